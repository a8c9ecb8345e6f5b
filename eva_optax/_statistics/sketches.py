"""Which rows the sketches of second moments are made of."""

import jax
from jax import Array

IMAGES = 4  # as many, at least


def thin(x: Array, axis: int, stride: int) -> Array:
    """Every so many entries along an axis, as many as divide it.

    The axis is split and not sliced by a stride: so a batch that is sharded over devices stays where it is.
    """
    size = x.shape[axis]
    if not isinstance(size, int):  # symbolic, see `jax.export`
        return x
    stride = max(divisor for divisor in range(1, max(stride, 1) + 1) if size % divisor == 0)
    if stride == 1:
        return x
    split = x.reshape(*x.shape[:axis], size // stride, stride, *x.shape[axis + 1 :])
    return jax.lax.index_in_dim(split, 0, axis + 1, keepdims=False)
