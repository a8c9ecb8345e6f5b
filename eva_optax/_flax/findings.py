"""What a run of a Linen model tells about its parameters: who made them, of which rank, and which lack a probe."""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from eva_optax._probes.layers import layer_names
from eva_optax._probes.probe import KRONECKER, Path, name_is_taken


@dataclass(eq=False)
class Findings:
    """Notes on the modules that run.

    Attributes:
      caller: the function that the user called, for messages.
      partial: whether layers without a probe may stand beside layers with one.
      classes: the class of every module by its path, and of the module that made a parameter by the parameter's path:
        modules that share a scope have one path.
      ranks: the rank of each parameter where it is made, without the axes that `nn.scan` and its like stack.
      probed: of each layer that can be tapped, in the `apply` that runs, whether it has a probe; by the probe's path.
    """

    caller: str
    partial: bool
    classes: dict[Path, type] = field(default_factory=dict)
    ranks: dict[Path, int] = field(default_factory=dict)
    probed: dict[Path, bool] = field(default_factory=dict)
    _depth: int = 0
    _root: Any = None  # a weak reference: scopes hold tracers

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Notes what happens while a method of `module` runs."""
        assert module.scope is not None
        if KRONECKER in module.path:
            raise name_is_taken(self.caller, module.path)
        if self._depth == 0 and (self._root is None or self._root() is not module.scope.root):  # another `apply`
            self.check_probes()
            self._root = weakref.ref(module.scope.root)
        before = frozenset(_parameters(module))
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        self.classes.setdefault(module.path, type(module))
        for name, value in _parameters(module).items():
            if name in before or isinstance(value, Mapping):  # a submodule's, or a probe
                continue
            path = (*module.path, name)
            if name == KRONECKER:
                raise name_is_taken(self.caller, path)
            self.classes.setdefault(path, type(module))
            self.ranks.setdefault(path, max(map(np.ndim, jax.tree.leaves(value)), default=0))

    def check_probes(self) -> None:
        """Ends an `apply`.

        Raises:
          ValueError: if some layers had probes and others none, unless `partial`.
        """
        probed = dict(self.probed)
        self.probed.clear()
        if self.partial or all(probed.values()) or not any(probed.values()):
            return
        names = layer_names(probed)
        without = [repr(names[path]) for path, has in probed.items() if not has]
        listed = ", ".join(without[:5]) + (", …" if len(without) > 5 else "")
        raise ValueError(
            f"eva_optax.{self.caller}: {len(without)} of {len(probed)} layers have no probe among the parameters: "
            f"{listed}. They would be trained as if they were not tapped. Add what is missing with "
            "eva_optax.attach(model, params, x), for example after a part of params was loaded. If these layers are to "
            f"stay without, being frozen for example, pass partial=True to eva_optax.{self.caller}."
        )


def _parameters(module: nn.Module) -> Mapping[str, Any]:
    """What a module's scope holds among the parameters, while they are made."""
    return module.variables.get("params", {}) if module.is_initializing() else {}
