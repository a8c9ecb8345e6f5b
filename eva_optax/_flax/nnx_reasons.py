"""Why an NNX layer of a class with a rule is not tapped: what its class says, and the code of its subclasses."""

import dis
import inspect
import types
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx

from eva_optax._flax.nnx_classes import TappedMixin
from eva_optax._flax.plans import COMPLEX, EMBEDDING_OFF, REPARAMETRISED

NEEDS_INPUT = "calls {0}, which needs an example input: eva_optax.tap(model, x), and so for attach and coverage"

_RAW_TAPS = {"tap_einsum", "tap_ragged_dot", "tap_conv"}
# What changes a variable, or an attribute, without an assignment.
_SETTERS = {"setattr", "__setattr__", "set_value", "set_raw_value", "copy_from", "update_from_state", "update"}


def skip_reason(layer: nnx.Module, base: type, kernel: str | None, embeddings: bool) -> str | None:
    """Why a layer of a class with a rule is not tapped; None if it is. The kernel is None if only a call tells."""
    value: Any = getattr(layer, kernel or "", None)
    if kernel and not isinstance(value, nnx.Variable):
        return f"{base.__name__} has no parameter {kernel!r}"
    for cls in type(layer).__mro__:
        if cls is base:
            break
        if kernel in vars(cls):
            return REPARAMETRISED
        if "__call__" in vars(cls) and not issubclass(cls, TappedMixin):
            call = inspect.unwrap(vars(cls)["__call__"])
            if "super" not in _names(call):
                return f"{cls.__name__} computes its output in its own way"
            if _may_change(call, kernel):
                return f"{cls.__name__} may change its {kernel} before the layer uses it"
    if kernel and jnp.issubdtype(value.dtype, jnp.complexfloating):
        return COMPLEX
    return EMBEDDING_OFF if base is nnx.Embed and not embeddings else None


def raw_tap(layer: nnx.Module) -> str | None:
    """The tap for raw parameters that a module calls by itself, as far as the code of its methods says so."""
    for cls in type(layer).__mro__:
        if cls.__module__.startswith("flax."):
            return None
        for method in vars(cls).values():
            called = _RAW_TAPS & _names(inspect.unwrap(method)) if callable(method) else None
            if called:
                return min(called)
    return None


def _may_change(function: Any, kernel: str | None) -> bool:
    """Whether a function that names the kernel may put another value in its place, or into it."""
    names = _names(function)
    if kernel not in names:
        return False
    stored = {
        instruction.argval if instruction.opname.endswith("_ATTR") else kernel
        for code in _codes(function)
        for instruction in dis.get_instructions(code)
        if instruction.opname in ("STORE_ATTR", "DELETE_ATTR", "STORE_SUBSCR", "STORE_SLICE")
    }
    return bool(stored & {kernel, "value", "raw_value"} or names & _SETTERS)


def _names(function: Any) -> set[str]:
    """The names that occur in a function's code."""
    return {name for code in _codes(function) for name in (*code.co_names, *code.co_freevars)}


def _codes(function: Any) -> Iterator[types.CodeType]:
    """A function's code, and that of the functions inside it."""
    codes = [getattr(function, "__code__", None)]
    for code in codes:
        if code is not None:
            yield code
            codes += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
