"""The tapped stand-ins for a Linen module and for a bound one."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import flax.linen as nn
import jax

from eva_optax._flax.linen import Interceptor, linen_tapping
from eva_optax._probes.layers import has_probes
from eva_optax._probes.statistics import VECTORS


@dataclass(frozen=True)
class TappedModule:
    """A Linen module whose calls are tapped; attributes that are not listed here are the module's own."""

    module: nn.Module
    embeddings: bool = False
    statistics: tuple[str, ...] = VECTORS
    partial: bool = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refused, with advice: a tapped model is the outermost module."""
        name = type(self.module).__name__
        raise TypeError(
            f"eva_optax.tap: a tapped {name} was called. Use its init, apply or bind. Inside of another module put "
            f"{name} untapped, and tap the outermost module, the one that init and apply are called on: all its layers "
            "are tapped."
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copy and pickle look for before `module` exists
            raise AttributeError(name)
        return getattr(self.module, name)

    def init(self, *args: Any, **kwargs: Any) -> Any:
        """`module.init`, with probes in "params"."""
        with self.tapping() as interceptor:
            return self.checked(self.module.init(*args, **kwargs), interceptor)

    def init_with_output(self, *args: Any, **kwargs: Any) -> Any:
        """`module.init_with_output`, with probes in "params"."""
        with self.tapping() as interceptor:
            output, variables = self.module.init_with_output(*args, **kwargs)
            return output, self.checked(variables, interceptor)

    def lazy_init(self, *args: Any, **kwargs: Any) -> Any:
        """`module.lazy_init`, with probes in "params"."""
        with self.tapping() as interceptor:
            return self.checked(self.module.lazy_init(*args, **kwargs), interceptor)

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """`module.apply`, tapped."""
        with self.tapping():
            return self.module.apply(*args, **kwargs)

    def bind(self, *args: Any, **kwargs: Any) -> "BoundModule":
        """`module.bind`; calls of the bound module's methods and submodules are tapped."""
        return BoundModule(self.module.bind(*args, **kwargs), self)

    def clone(self, *args: Any, **kwargs: Any) -> "TappedModule":
        """`module.clone`, tapped."""
        return replace(self, module=self.module.clone(*args, **kwargs))

    def init_shapes(self, caller: str, /, *args: Any, **kwargs: Any) -> tuple[Any, Interceptor]:
        """The shapes of what `init` returns for a call with these arguments, and what was found about its layers.

        Nothing is computed: arrays, or their `jax.ShapeDtypeStruct`, are traced; everything else is passed as it is.

        Raises:
          TypeError: if there are no arguments, and the model fails without.
        """
        leaves, structure = jax.tree.flatten((args, kwargs))
        traced = [leaf if hasattr(leaf, "shape") and hasattr(leaf, "dtype") else None for leaf in leaves]

        def init(key: Any, arrays: Any) -> Any:
            filled = [leaf if array is None else array for leaf, array in zip(leaves, arrays, strict=True)]
            args, kwargs = jax.tree.unflatten(structure, filled)
            return self.module.init(key, *args, **kwargs)

        try:
            with self.tapping(caller) as interceptor:
                return jax.eval_shape(init, jax.random.key(0), traced), interceptor
        except TypeError as error:
            if args or kwargs:
                raise
            raise TypeError(
                f"eva_optax.{caller}: {type(self.module).__name__} was called with nothing: {error}. Add an example of "
                "what the model is called with, after the other arguments, as in model.init(key, x): arrays, or "
                "jax.ShapeDtypeStruct for shapes alone."
            ) from error

    def tapping(self, caller: str = "tap") -> AbstractContextManager[Interceptor]:
        """Taps every Linen call inside, with the options of this model."""
        return linen_tapping(self.embeddings, self.statistics, partial=self.partial, caller=caller)

    def checked(self, variables: Any, interceptor: Interceptor) -> Any:
        """`variables`, if there are probes among their parameters; ValueError if nothing could be tapped."""
        params = variables.get("params", {})
        if params and not has_probes(params):
            from eva_optax._flax.coverage import largest_untapped, linen_report

            found = interceptor.findings
            untapped = largest_untapped(linen_report(variables, interceptor, {}), found.classes)
            raise ValueError(
                f"eva_optax.{found.caller}: {type(self.module).__name__} has parameters, but no layer that can be "
                f"tapped. Most of them are those of {untapped}. eva_optax.coverage(model, ...) lists all, with reasons."
            )
        return variables


class BoundModule:
    """A bound Linen module whose methods, and whose submodules' methods, run tapped."""

    def __init__(self, module: nn.Module, options: TappedModule):
        self._module = module
        self._options = options

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tapped(self._module)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_module", "_options"):
            raise AttributeError(name)
        return self._wrapped(getattr(self._module, name))

    def unbind(self) -> tuple[TappedModule, Any]:
        """The tapped module and its variables."""
        module, variables = self._module.unbind()
        return replace(self._options, module=module), variables

    def _wrapped(self, value: Any) -> Any:
        """Submodules, also in the containers that `setup` may hold them in, and methods, so that they run tapped."""
        if isinstance(value, nn.Module):
            return BoundModule(value, self._options)
        if isinstance(value, tuple | list) and any(isinstance(item, nn.Module) for item in value):
            return type(value)(map(self._wrapped, value))
        if isinstance(value, Mapping) and any(isinstance(item, nn.Module) for item in value.values()):
            return {key: self._wrapped(item) for key, item in value.items()}
        return self._tapped(value) if callable(value) else value

    def _tapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._options.tapping():
                return function(*args, **kwargs)

        return run


TappedModule.__module__ = BoundModule.__module__ = "eva_optax"
