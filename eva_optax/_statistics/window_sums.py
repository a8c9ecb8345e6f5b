"""Sums of a convolution's input over the positions that each kernel offset reads, one spatial axis after the other."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eva_optax._probes.probe import accumulator

Reads = list[np.ndarray]  # for each kernel offset the input positions that it reads, once per output position


def window_sums(x: Array, axes: list[Reads], strides: tuple[int, ...]) -> Array:
    """Sums `x` (batch, *spatial, channels) over what each kernel offset reads: (*window, channels)."""
    for axis in reversed(range(len(axes))):  # innermost first: each pass shrinks what the next one reads
        x = _sums_at(x, axis + 1, axes[axis], strides[axis])
    return jnp.sum(x, 0, dtype=accumulator(x.dtype))


def _sums_at(x: Array, axis: int, offsets: Reads, stride: int) -> Array:
    """Sums `x` over the positions of one axis that each offset reads, as often as each occurs."""
    each = partial(_sums_one_by_one, axis=axis, offsets=offsets)
    if stride == 1:
        return each(x)
    # On a TPU the sums of all offsets share one read, and splitting the axis would copy the activations; on a CPU each
    # sum is a read of its own.
    phases = partial(_sums_by_phase, axis=axis, offsets=offsets, stride=stride)
    return jax.lax.platform_dependent(x, tpu=each, default=phases)


def _sums_one_by_one(x: Array, axis: int, offsets: Reads) -> Array:
    """By masks where an offset reads few positions: a TPU would write a strided slice to memory and read it again."""
    dtype, total = accumulator(x.dtype), jnp.sum(x, axis, dtype=accumulator(x.dtype))

    def one(positions: np.ndarray) -> Array:
        counts = np.bincount(positions, minlength=x.shape[axis])
        corrected = _corrected(total, x, axis, counts, np.ones_like(counts))
        if corrected is not None:
            return corrected
        mask = counts.reshape([-1 if other == axis else 1 for other in range(x.ndim)])
        return jnp.sum(jnp.where(mask > 0, x.astype(dtype) * mask.astype(dtype), 0), axis)

    return jnp.stack([one(positions) for positions in offsets], axis)


def _sums_by_phase(x: Array, axis: int, offsets: Reads, stride: int) -> Array:
    """By the totals over every `stride`-th position, of which an offset reads nearly all of one phase."""
    steps = x.shape[axis] // stride
    whole = jax.lax.slice_in_dim(x, 0, steps * stride, axis=axis)
    split = whole.reshape(*x.shape[:axis], steps, stride, *x.shape[axis + 1 :])
    totals = jnp.sum(split, axis, dtype=accumulator(x.dtype))

    def one(positions: np.ndarray) -> Array:
        counts = np.bincount(positions, minlength=x.shape[axis])
        phase = int(positions[0]) % stride if len(positions) else 0
        usual = np.zeros_like(counts)
        usual[phase : steps * stride : stride] = 1
        total = jax.lax.index_in_dim(totals, phase, axis, keepdims=False)
        corrected = _corrected(total, x, axis, counts, usual)
        return _sums_one_by_one(x, axis, [positions]).squeeze(axis) if corrected is None else corrected

    return jnp.stack([one(positions) for positions in offsets], axis)


def _corrected(total: Array, x: Array, axis: int, counts: np.ndarray, usual: np.ndarray) -> Array | None:
    """`total`, over the `usual` positions, made one over `counts` by few border positions; None if they are many."""
    borders = np.flatnonzero(counts != usual)
    if 2 * len(borders) >= usual.sum():
        return None
    for border in borders.tolist():
        value = jax.lax.index_in_dim(x, border, axis, keepdims=False).astype(total.dtype)
        total += float(counts[border] - usual[border]) * value
    return total
