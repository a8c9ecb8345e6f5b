"""Powers of symmetric positive semi-definite matrices, from their eigenvalues."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


class Power(NamedTuple):
    """A power of each matrix of a stack.

    Attributes:
      matrix: (count, n, n).
      condition: the ratio of the largest to the smallest damped eigenvalue that it was made of, (count, 1, 1).
    """

    matrix: Array
    condition: Array


def power(matrices: Array, exponent: Array, epsilon: ArrayLike, relative: bool) -> Power:
    """(A + εI) to a power for each matrix A of a stack, or with `relative` (A + ελI), λ its largest eigenvalue.

    An eigenvalue of zero comes out of rounding as anything up to ±λ times the resolution of the dtype: none is taken
    for smaller than that, so that a tiny ε does not make much of it. With relative damping a matrix of zeros has no
    negative power: what is returned for it is not finite.

    Args:
      matrices: symmetric, (count, n, n), float32 or float64.
      exponent: one number for each, (count,).
      epsilon: ε > 0.
      relative: whether ε is a multiple of λ.
    """
    values, vectors = jnp.linalg.eigh(matrices)
    values = jnp.maximum(values, 0)
    largest = values[:, -1:]
    shift = jnp.asarray(epsilon, values.dtype)
    damped = values + (shift * largest if relative else shift)
    damped = jnp.maximum(damped, jnp.finfo(values.dtype).eps * largest)
    # Half of the power on each side.
    half = vectors * (damped ** (exponent[:, None] / 2))[:, None, :]
    made = jnp.matmul(half, half.mT, precision="highest")
    return Power(made, (damped[:, -1] / damped[:, 0])[:, None, None])
