"""Second moments of rows, laid out beside a kernel.

Rows come as (samples, positions, *shape), with the shape of a for inputs and of b for cotangents: one that the layer
reads, or writes, at one position of one sample.
"""

import math
import string

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, PartitionSpec
from jax.typing import DTypeLike

from eva_optax._probes.linear_map import Moments
from eva_optax._probes.probe import Shape, accumulator


def input_moment(rows: Array, shapes: tuple[Shape, Shape], axis: int, moments: Moments) -> Array:
    """A = XᵀX / rows: of all positions, or with "reduce" of the mean of each sample's.

    Args:
      rows: (samples, positions, *the shape of a).
      shapes: those of a and of b.
      axis: the kernel's last output axis, which gets the columns.
      moments: what A is made of.
    """
    if moments.sharing == "reduce":
        rows = jnp.mean(rows.astype(accumulator(rows.dtype)), 1, keepdims=True)
    a, b = shapes
    return _moment(rows, a, b, axis) / (rows.shape[0] * rows.shape[1])


def output_moment(rows: Array, shapes: tuple[Shape, Shape], axis: int, moments: Moments) -> Array:
    """B = samples · dYᵀdY: of all positions, or with "reduce" of the sum of each sample's.

    Args:
      rows: (samples, positions, *the shape of b).
      shapes: those of a and of b.
      axis: the kernel's last input axis, which gets the columns.
      moments: what B is made of.
    """
    if moments.sharing == "reduce":
        rows = jnp.sum(rows.astype(accumulator(rows.dtype)), 1, keepdims=True)
    samples, positions = rows.shape[:2]
    if moments.skip_padding:
        samples = jnp.sum(jnp.any(rows != 0, tuple(range(1, rows.ndim))))
    if moments.rows is not None:
        rows = some_positions(rows, moments.rows)
    a, b = shapes
    return _moment(rows, b, a, axis) * (samples * positions / rows.shape[1])


def weights_without_padding(valid: Array, sharing: str, dtype: DTypeLike) -> Array:
    """What inputs are multiplied by, so that their second moment is that of the valid rows alone.

    Args:
      valid: which rows are, (samples, *positions).
      sharing: with "reduce" the mean over a sample is that of its valid positions.
      dtype: of the result.
    """
    shares = valid.astype(dtype)
    if sharing == "reduce":
        axes = tuple(range(1, valid.ndim))
        shares = shares / jnp.maximum(jnp.mean(shares, axes, keepdims=True), 1 / shares[0].size)
        valid = jnp.any(valid, axes)
    return shares / jnp.sqrt(jnp.maximum(jnp.mean(valid, dtype=dtype), 1 / valid.size))


def some_positions(rows: Array, most: int) -> Array:
    """About so many of some rows: those of every so many positions, and of all samples, which may be sharded."""
    samples, positions = rows.shape[:2]
    wanted = max(most // samples, 1)
    return rows[:, :: -(-positions // wanted)] if positions > wanted else rows


def _moment(rows: Array, own: Shape, other: Shape, axis: int) -> Array:
    """Σ r rᵀ, laid out as r, with the columns along `axis`; `other` is the other vector's shape.

    Axes that both vectors have are layers side by side, each with a moment of its own; so are groups of outputs.
    """
    sizes, summed = [], []
    for size, theirs in zip(own, other, strict=True):
        grouped = 1 < theirs < size
        sizes += [theirs, size // theirs] if grouped else [size]
        summed += [False, True] if grouped else [theirs == 1]
    letters = string.ascii_lowercase[: len(sizes)]
    columns = "".join(c.upper() if is_summed else c for c, is_summed in zip(letters, summed, strict=True))
    new = "".join(c for c in columns if c.isupper())
    split = rows.reshape(*rows.shape[:2], *sizes)
    # Where shardings are part of the types, the sum over a sharded batch has to be told where it goes.
    where = PartitionSpec() if AxisType.Explicit in jax.typeof(rows).sharding.mesh.axis_types else None
    found = jnp.einsum(
        f"yz{letters},yz{columns}->{letters}{new}",
        split,
        split,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=accumulator(rows.dtype),  # products of two numbers of half precision are exact in it
        out_sharding=where,
    )
    count = math.prod(size for size, is_summed in zip(sizes, summed, strict=True) if is_summed)
    found = jnp.moveaxis(found.reshape(*own, count), -1, len(own) + axis + 1)
    at = len(own) + axis
    return found.reshape(*own[:at], own[at] * count, *own[at + 1 :])
