"""Which sums are nothing but rounding noise.

A sum of terms that cancel leaves rounding noise. BatchNorm makes the cotangents before it, and the activations after
it, cancel exactly in exact arithmetic. What floating point leaves has a random direction, and scale-free
preconditioning would give it full weight.

The tap knows the terms of its own sum, and sends a bound on its noise along. Whoever reads the gradients decides: terms
may cancel only across devices or calls.
"""

import math

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from eva_optax._probes.probe import NUMBERS

# Each term carries a rounding error of its own; those that BatchNorm shares out over all terms alike do not average
# out, and grow with the root of their number; so does the error of the accumulator, since compilers sum in blocks:
# sorted terms, the worst order, left at most 0.37 roundings times that root on a CPU, for 1,024 to 1,048,576 terms. The
# factors cover what was measured behind BatchNorm in bfloat16, float32 and float64, over up to 65,536 positions, the
# last also a mean cotangent that is many times as large as what BatchNorm leaves of it. The bound spares genuine
# vectors: the norm of a sum of independent terms is about the root of the sum of squares.
TERM_ROUNDINGS = 2.0
SHARED_ROUNDINGS = 1 / 8
ACCUMULATOR_ROUNDINGS = 16.0
MOST_NOISE = 0.25


def noise_bound(terms: Array, vector: Array, unit: float, *, mean: bool) -> Array:
    """What the norm of the rounding error of `vector` stays below, in an array of one entry.

    Args:
      terms: what was summed.
      vector: the sum of the terms, or their mean.
      unit: what the bound is multiplied by.
      mean: whether it is the mean.
    """
    squares = jnp.sum(jnp.square(terms.astype(vector.dtype)))
    # Something above zero, where the root has a derivative.
    root = jnp.sqrt(squares + float(jnp.finfo(vector.dtype).tiny))
    return jnp.expand_dims(root * (unit * _roundings(terms, vector, mean)), 0)


def without_noise(scale: Array, vector: Array, bound: Array) -> Array:
    """`scale`, or 0 where the norm of `vector` is no larger than `bound`: for some layers, stacked at the first axis.

    Both are sums, over calls and devices, of what each of them had: bounds on parts add up to a bound on the sum, and
    a sum of parts that only cancel together is recognised. What is not finite is no noise: it is to be seen.

    Args:
      scale: what brings both to a size whose square is in the range of their dtype; it has the shape of `bound`.
      vector: the stacked vectors.
      bound: one number for each layer, and for each of its batch axes that has one.
    """
    axes = [axis for axis in range(1, vector.ndim) if bound.shape[axis] == 1]
    squares = jnp.sum(jnp.square(vector * scale), axes, keepdims=True)
    return jnp.where(squares <= jnp.square(bound * scale), 0, scale)


def _roundings(terms: Array, vector: Array, mean: bool) -> ArrayLike:
    """The bound on the norm of the rounding error, in units of the root of the terms' sum of squares."""
    known = isinstance(terms.size, int)  # not so for a symbolic batch, see `jax.export`
    size, least = (terms.size, min) if known else (jnp.asarray(terms.size, vector.dtype), jnp.minimum)
    count = size / vector.size
    roundings = (TERM_ROUNDINGS + SHARED_ROUNDINGS * count**0.5) * float(jnp.finfo(terms.dtype).eps)
    roundings = least(roundings + ACCUMULATOR_ROUNDINGS * count**0.5 * float(jnp.finfo(vector.dtype).eps), MOST_NOISE)
    return roundings / count if mean else roundings


def share_of_noise(counter: tuple[int, ...]) -> float:
    """A counter with batch axes has an entry for each of them, which share the noise of all."""
    return (math.prod(counter) // NUMBERS) ** -0.5
