"""The tapped subclasses of NNX layer classes.

The tapped subclass of a class stands behind it and before the Flax class in the order of resolution, so that a
subclass that overrides `__call__` reaches it by `super()`. Being another class, it makes `nnx.jit` trace again.
"""

import importlib
import types
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

from flax import nnx

from eva_optax._flax.linen import linen_tapping
from eva_optax._flax.nnx_layers import AnyKind, kind_of
from eva_optax._probes.statistics import VECTORS

_PREFIX = "Tapped:"


class TappedMixin:
    """What every tapped class derives from."""

    __slots__ = ()  # so that the layout of an instance stays that of its untapped class
    untapped_class: type


def layer_class(layer: type) -> tuple[type, AnyKind] | None:
    """The class in the order of resolution that has a rule, and the rule."""
    for base in layer.__mro__:
        kind = kind_of(base)
        if kind is not None:
            return base, kind
    return None


@cache
def tapped_class(
    cls: type, base: type, kind: AnyKind | None, embeddings: bool = False, statistics: tuple[str, ...] = VECTORS
) -> type:
    """The tapped subclass of `cls`, whose base with a rule is `base`; without a kind, of a bridge to Linen."""
    if cls is base:
        bridged = kind is None
        call = _bridged_call(cls, embeddings, statistics) if bridged else _tapped_call(cls, kind)
        bases = (cls, TappedMixin)
    else:
        bases, call = (cls, tapped_class(base, base, kind, embeddings, statistics)), None
    pytree = {"pytree": cls._pytree__is_pytree} if hasattr(cls, "_pytree__is_pytree") else {}

    def body(namespace: dict[str, Any]) -> None:
        namespace["__module__"] = "eva_optax"  # so that pickles do not know this file
        namespace["__qualname__"] = _encode(cls, embeddings, statistics)
        namespace["__doc__"] = cls.__doc__
        namespace["untapped_class"] = cls
        if call is not None:
            namespace["__call__"] = call

    return types.new_class(cls.__name__, bases, pytree, body)  # what `repr` and `nnx.display` call it


def _tapped_call(cls: type, kind: AnyKind) -> Callable[..., Any]:
    """The `__call__` of the tapped subclass of a class with a rule."""
    original: Any = cls.__call__

    @wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return kind.tapped(self, original(self, *args, **kwargs), original, args, kwargs)

    return call


def _bridged_call(cls: type, embeddings: bool, statistics: tuple[str, ...]) -> Callable[..., Any]:
    """The `__call__` of a tapped bridge: all that Linen does inside is tapped."""
    original: Any = cls.__call__

    @wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with linen_tapping(embeddings, statistics):
            return original(self, *args, **kwargs)

    return call


def _encode(cls: type, embeddings: bool, statistics: tuple[str, ...]) -> str:
    """A name without dots, by which pickle finds the tapped class of `cls` again, see `find_class`."""
    options = ",".join([*statistics, *(["embeddings"] if embeddings else [])])
    return _PREFIX + f"{cls.__module__}:{cls.__qualname__}:{options}".replace(".", "/")


def find_class(name: str) -> type:
    """The tapped class of an encoded name."""
    module, qualname, options = name.removeprefix(_PREFIX).replace("/", ".").split(":")
    cls: Any = importlib.import_module(module)
    for part in qualname.split("."):
        cls = getattr(cls, part)
    chosen = options.split(",")
    return swapped_class(cls, "embeddings" in chosen, tuple(option for option in chosen if option != "embeddings"))


def swapped_class(cls: type, embeddings: bool, statistics: tuple[str, ...]) -> type:
    """The tapped subclass of a class with a rule."""
    if issubclass(cls, nnx.bridge.ToNNX):
        return tapped_class(cls, nnx.bridge.ToNNX, None, embeddings, statistics)
    found = layer_class(cls)
    if found is None:
        raise AttributeError(f"eva_optax: {cls} is no layer that can be tapped. Was it registered before it was saved?")
    return tapped_class(cls, *found)
