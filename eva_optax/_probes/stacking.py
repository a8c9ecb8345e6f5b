"""Arrays of equal layers as one: one operation on all of them instead of one for each layer."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array


def stack(arrays: Sequence[Array]) -> Array:
    """Arrays of one shape along a new first axis."""
    expanded = [jax.lax.expand_dims(array, (0,)) for array in arrays]
    return jnp.concatenate(expanded) if len(expanded) > 1 else expanded[0]


def unstack(array: Array) -> list[Array]:
    """Undoes `stack`."""
    count = len(array)
    parts = jax.lax.split(array, (1,) * count) if count > 1 else [array]
    return [jax.lax.squeeze(part, (0,)) for part in parts]
