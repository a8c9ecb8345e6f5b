"""Whether layers compute what their rules say: both outputs are compared while a model runs on real values."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eva_optax._probes.linear_map import LinearMap
from eva_optax._probes.probe import Path, accumulator
from eva_optax._statistics.einsum import Contraction
from eva_optax._statistics.grouped import GroupedContraction

Errors = dict[Path, float]  # by the path of the kernel

_ERRORS: ContextVar[Errors | None] = ContextVar("errors", default=None)


def collect(run: Callable[..., Any], state: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Errors:
    """The errors of the layers that `run(errors, state, *args, **kwargs)` calls inside of `verifying`, compiled.

    Shapes among the arguments become random numbers, flags and the like stay what they are.
    """
    leaves, structure = jax.tree.flatten((args, kwargs))
    arrays = {i: _real(i, leaf) for i, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")}
    errors: Errors = {}

    def call(state: Any, arrays: dict[int, Any]) -> None:
        args, kwargs = structure.unflatten([arrays.get(index, leaf) for index, leaf in enumerate(leaves)])
        run(errors, state, *args, **kwargs)

    jax.jit(call)(state, arrays)
    jax.effects_barrier()
    return errors


@contextmanager
def verifying(errors: Errors) -> Iterator[None]:
    """Lets the layers that are called inside note their errors."""
    token = _ERRORS.set(errors)
    try:
        yield
    finally:
        _ERRORS.reset(token)


def is_verifying() -> bool:
    """Whether errors are collected."""
    return _ERRORS.get() is not None


def compare(path: Path, linear_map: LinearMap, kernel: Array, bias: Array | None, x: Array, y: Array) -> None:
    """Notes how far the output `y` of a layer is from its rule's; convolutions and lookups are not compared.

    Nor are layers whose bias has its axes in another order than the output has them.
    """
    errors = _ERRORS.get()
    if errors is None or not isinstance(linear_map, Contraction | GroupedContraction):
        return
    if bias is not None and not linear_map.has_ordered_bias:
        return

    def note(error: Any) -> None:
        errors[path] = float(np.maximum(error, errors.get(path, 0.0)))  # NaN stays

    # Called back, because the layer may run inside of a scan.
    jax.debug.callback(note, relative_error(linear_map, kernel, bias, x, y))


def relative_error(
    linear_map: Contraction | GroupedContraction, kernel: Array, bias: Array | None, x: Array, y: Array
) -> Array:
    """The distance of `y` from a multiple of the rule's output, relative to `y`, with or without a bias.

    A constant factor does the vectors no harm: `a` is the same, and `b` is the cotangent of what the layer returns.
    """
    x, kernel, y = (jnp.asarray(array).astype(accumulator(array.dtype)) for array in (x, kernel, y))
    product = linear_map.apply(x, kernel)
    outputs = [y]
    if bias is not None:
        outputs.append(y - linear_map.apply(jnp.zeros_like(x), kernel, bias))

    least = jnp.finfo(product.dtype).tiny

    def error(output: Array) -> Array:
        factor = jnp.vdot(product, output) / jnp.maximum(jnp.vdot(product, product), least)
        return jnp.linalg.norm(output - factor * product) / jnp.maximum(jnp.linalg.norm(output), least)

    return jnp.min(jnp.stack([error(output) for output in outputs]))


def random_key(seed: int) -> Array:
    """A key whose numbers compile fast; it does not matter which they are."""
    return jax.random.key(seed, impl="unsafe_rbg")


def perturbed(params: Any) -> Any:
    """Parameters with a little noise, because many a kernel starts from zeros, which every rule fits."""

    def add(index: int, leaf: Any) -> Any:
        return leaf + 0.1 * _noise(index, leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    leaves, structure = jax.tree.flatten(params)
    return structure.unflatten(map(add, range(len(leaves)), leaves))


def _real(index: int, leaf: Any) -> Any:
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    return _noise(index, leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.zeros(leaf.shape, leaf.dtype)


def _noise(index: int, leaf: Any) -> Array:
    return jax.random.normal(random_key(index), leaf.shape, leaf.dtype)
