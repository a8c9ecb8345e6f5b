"""Several vectors as one array: what stands in the place of a parameter in a state must be one leaf.

Trees that are mapped beside the parameters, `optax.tree.map_params` among them, and the variables of NNX want it so.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array

from eva_optax._probes.placement import replicate
from eva_optax._probes.probe import Shape


def packed_shape(shapes: Mapping[str, Shape]) -> Shape:
    """One row for each vector, as long as the longest of them."""
    return len(shapes), max(max(shape) for shape in shapes.values())


def pack(vectors: Mapping[str, Array]) -> Array:
    """Vectors of some tensors, stacked along the first axis and each long in one other axis, as rows."""
    rows = [replicate(vector.reshape(len(vector), 1, -1)) for vector in vectors.values()]
    longest = max(row.shape[-1] for row in rows)
    return jnp.concatenate([jnp.pad(row, ((0, 0), (0, 0), (0, longest - row.shape[-1]))) for row in rows], 1)


def unpack(rows: Array, shapes: Mapping[str, Shape]) -> dict[str, Array]:
    """Undoes `pack`, for vectors of these shapes."""
    return {
        name: jax.lax.slice(rows, (0, index, 0), (len(rows), index + 1, max(shape))).reshape(len(rows), *shape)
        for index, (name, shape) in enumerate(shapes.items())
    }
