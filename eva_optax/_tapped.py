"""`tap` and `tapping`: the tapped stand-in for a Linen module, and the context manager behind it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import flax.linen as nn

from eva_optax._linen import Interceptor
from eva_optax._pairing import is_probe, leaves_by_path


@contextmanager
def linen_tapping(embeddings: bool) -> Iterator[Interceptor]:
    """Taps every Linen call inside."""
    interceptor = Interceptor(embeddings)
    with nn.intercept_methods(interceptor):
        yield interceptor


@dataclass(frozen=True)
class TappedModule:
    """A Linen module whose calls are tapped; attributes that are not listed here are the module's own."""

    module: nn.Module
    embeddings: bool = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copy and pickle look for before `module` exists
            raise AttributeError(name)
        return getattr(self.module, name)

    def init(self, *args: Any, **kwargs: Any) -> Any:
        """`module.init`, with probes in "params"."""
        return self._checked(self._run("init", *args, **kwargs))

    def init_with_output(self, *args: Any, **kwargs: Any) -> Any:
        """`module.init_with_output`, with probes in "params"."""
        output, variables = self._run("init_with_output", *args, **kwargs)
        return output, self._checked(variables)

    def lazy_init(self, *args: Any, **kwargs: Any) -> Any:
        """`module.lazy_init`, with probes in "params"."""
        return self._checked(self._run("lazy_init", *args, **kwargs))

    def apply(self, *args: Any, **kwargs: Any) -> Any:
        """`module.apply`, tapped."""
        return self._run("apply", *args, **kwargs)

    def tabulate(self, *args: Any, **kwargs: Any) -> str:
        """`module.tabulate`, probes included."""
        return self._run("tabulate", *args, **kwargs)

    def bind(self, *args: Any, **kwargs: Any) -> "BoundModule":
        """`module.bind`; calls of the bound module's methods and submodules are tapped."""
        return BoundModule(self.module.bind(*args, **kwargs), self.embeddings)

    def clone(self, *args: Any, **kwargs: Any) -> "TappedModule":
        """`module.clone`, tapped."""
        return TappedModule(self.module.clone(*args, **kwargs), self.embeddings)

    def _run(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        with linen_tapping(self.embeddings):
            return getattr(self.module, method)(*args, **kwargs)

    def _checked(self, variables: Any) -> Any:
        params = variables.get("params", {})
        if params and not any(map(is_probe, leaves_by_path(params))):
            raise ValueError(
                f"eva_optax.tap: {type(self.module).__name__} has parameters, but no layer that can be tapped. "
                "eva_optax.coverage(model, ...) lists each parameter with the reason."
            )
        return variables


class BoundModule:
    """A bound Linen module whose methods, and whose submodules' methods, run tapped."""

    def __init__(self, module: nn.Module, embeddings: bool):
        self._module = module
        self._embeddings = embeddings

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tapped(self._module)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("_module", "_embeddings"):
            raise AttributeError(name)
        value = getattr(self._module, name)
        if isinstance(value, nn.Module):
            return BoundModule(value, self._embeddings)
        return self._tapped(value) if callable(value) else value

    def unbind(self) -> tuple[TappedModule, Any]:
        """The tapped module and its variables."""
        module, variables = self._module.unbind()
        return TappedModule(module, self._embeddings), variables

    def _tapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with linen_tapping(self._embeddings):
                return function(*args, **kwargs)

        return run
