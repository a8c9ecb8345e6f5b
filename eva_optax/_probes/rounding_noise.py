"""Which sums are nothing but rounding noise.

A sum of terms that cancel leaves rounding noise. BatchNorm makes the cotangents before it, and the activations after
it, cancel exactly in exact arithmetic. What floating point leaves has a random direction, and scale-free
preconditioning would give it full weight.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

# Each term carries a rounding error of its own; those that BatchNorm shares out over all terms alike do not average
# out; a sequential sum adds an error of the accumulator at each term. The factors cover what was measured behind
# BatchNorm in bfloat16, float32 and float64, over up to 65,536 positions. The bound spares genuine vectors: the norm
# of a sum of independent terms is about the root of the sum of squares.
TERM_ROUNDINGS = 2.0
SHARED_ROUNDINGS = 1 / 8
ACCUMULATOR_ROUNDINGS = 2.0
MOST_NOISE = 0.25


def drop_noise(vector: Array, terms: Array, *, mean: bool, unit: float) -> Array:
    """`unit` times `vector`, or zeros if its norm is no larger than the rounding error of the sum that it came from.

    Args:
      vector: the sum of the terms, or their mean.
      terms: what was summed.
      mean: whether `vector` is the mean.
      unit: a power of two.
    """
    squares = jnp.square(terms.astype(vector.dtype))
    bound = _roundings(terms, vector, mean) ** 2
    genuine = jnp.sum(jnp.square(vector)) > jnp.sum(squares) * bound
    # What is not finite times 0 is NaN: that is to be seen.
    return vector * jax.lax.select(genuine, *(np.asarray(value, vector.dtype) for value in (unit, 0)))


def _roundings(terms: Array, vector: Array, mean: bool) -> ArrayLike:
    """The bound on the norm of the rounding error, in units of the root of the terms' sum of squares."""
    known = isinstance(terms.size, int)  # not so for a symbolic batch, see `jax.export`
    size, least = (terms.size, min) if known else (jnp.asarray(terms.size, vector.dtype), jnp.minimum)
    count = size / vector.size
    roundings = (TERM_ROUNDINGS + SHARED_ROUNDINGS * count**0.5) * float(jnp.finfo(terms.dtype).eps)
    roundings = least(roundings + ACCUMULATOR_ROUNDINGS * count * float(jnp.finfo(vector.dtype).eps), MOST_NOISE)
    return roundings / count if mean else roundings
