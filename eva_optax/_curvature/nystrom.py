r"""A power, such as the whitening, of a second moment that is known by a sketch, without any matrix of its size.

Of a symmetric A (n × n) a sketch Y = AΩ with orthonormal Ω (n × r), and the trace t, are known. Nyström's approximation
Y (ΩᵀY)⁻¹ Yᵀ has the eigenvalues λ and eigenvectors U; what is left of the trace, shared out over the other n − r
directions, is ρ. With z in units of the mean eigenvalue t / n,

    R = f(ρ) (I − V Vᵀ),   V = U (1 − f(λ)/f(ρ))^½,   f(z) = ((z + δ) / (1 + δ))^p,   p = −½ or another power < 0,

and R = I where A is a multiple of I. With a bias the input is (x, 1): e, the last unit vector, is one more column of Ω,
and A e = (a, 1) is known exactly.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike


class Basis(NamedTuple):
    """R of a layer, see above; any axes in front.

    Attributes:
      kernel: the rows of V that belong to the inputs, (n, r).
      bias: the row that belongs to the bias, (1, r); None without one.
      scale: f(ρ), (1, 1).
      explained: the share of the trace that the eigenvalues λ have, (1, 1).
    """

    kernel: Array
    bias: Array | None
    scale: Array
    explained: Array


def whiten(
    sketch: Array | None,
    omega: Array | None,
    mean: Array,
    square: Array,
    shift: Array,
    floor: Array,
    *,
    has_bias: bool,
    power: ArrayLike = -0.5,
) -> Basis:
    """R = ((A + shift) / floor)^power of one matrix; `jax.vmap` it.

    Args:
      sketch: Y without the bias, (n, r); None for the one vector that is known of it.
      omega: Ω, (n, r).
      mean: a, (n,).
      square: t without the bias, a scalar.
      shift: what is added to each eigenvalue.
      floor: the damped eigenvalue of which R is 1.
      has_bias: whether the input is (x, 1).
      power: p < 0.
    """
    size = len(mean) + has_bias
    trace = square + has_bias
    if sketch is None or omega is None:
        vectors, values = _one_vector(mean, has_bias)
    else:
        vectors, values = _eigenvectors(*_with_bias(sketch, omega, mean) if has_bias else (sketch, omega))
    rest = jnp.maximum(trace - jnp.sum(values), 0) / max(size - len(values), 1)

    def shrink(eigenvalue: Array) -> Array:
        return ((eigenvalue + shift) / floor) ** jnp.asarray(power, mean.dtype)

    scale = shrink(rest)
    # A direction below what is left on average is not known: it is treated as the rest.
    part = jnp.maximum(1 - shrink(values) / scale, 0)
    vectors = vectors * jnp.sqrt(part)[None]
    explained = jnp.sum(values) / jnp.where(trace > 0, trace, 1)
    bias = vectors[-1:] if has_bias else None
    return Basis(vectors[: len(mean)], bias, scale[None, None], explained[None, None])


def _one_vector(mean: Array, has_bias: bool) -> tuple[Array, Array]:
    u = jnp.append(mean, 1.0) if has_bias else mean
    value = jnp.sum(u * u)
    return (u / jnp.sqrt(jnp.where(value > 0, value, 1)))[:, None], value[None]


def _with_bias(sketch: Array, omega: Array, mean: Array) -> tuple[Array, Array]:
    bottom = jnp.einsum("i,ir->r", mean, omega, precision="highest")
    known = jnp.append(mean, 1.0)
    full = jnp.concatenate([jnp.concatenate([sketch, bottom[None]]), known[:, None]], 1)
    return full, jnp.pad(omega, [(0, 1), (0, 1)]).at[-1, -1].set(1)


def _eigenvectors(sketch: Array, omega: Array) -> tuple[Array, Array]:
    """Those of Nyström's approximation, from the r × r matrices of the sketch with Ω and of a factor with itself."""
    exact = jax.lax.Precision.HIGHEST
    # Tropp, Yurtsever, Udell and Cevher, 2017: a small shift makes the Cholesky factor exist, and is taken off again.
    shift = jnp.finfo(sketch.dtype).eps * 10 * jnp.sqrt(jnp.sum(sketch * sketch)) + jnp.finfo(sketch.dtype).tiny
    sketch = sketch + shift * omega
    core = jnp.matmul(omega.T, sketch, precision=exact)
    lower = jnp.linalg.cholesky((core + core.T) / 2)
    factor = jax.scipy.linalg.solve_triangular(lower, sketch.T, lower=True).T
    values, vectors = jnp.linalg.eigh(jnp.matmul(factor.T, factor, precision=exact))
    values = jnp.maximum(values, shift)
    return jnp.matmul(factor, vectors / jnp.sqrt(values)[None], precision=exact), values - shift
