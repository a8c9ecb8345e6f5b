r"""Powers and eigenvectors of damped second moments of homogeneous inputs.

With a bias the input of a layer is (x, 1). Its second moment [[A, a], [aᵀ, 1]] is known from A and the mean a, and its
damped inverse by a Schur complement, so that no matrix of an odd size is made:

    S = A + γI − a aᵀ / (1 + γ),   k = −S⁻¹a / (1 + γ),   inverse = [[S⁻¹, k], [kᵀ, (1 − aᵀk) / (1 + γ)]].

Inverses are made by Cholesky's method, which is the more exact one; other powers from eigenvalues.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from eva_optax._curvature.amortized import in_stacks

EXACT = jax.lax.Precision.HIGHEST


class Moment(NamedTuple):
    """The second moments of some layers, of one size; ((A + shift) / floor)^power is wanted of each.

    Attributes:
      matrix: A, (k, n, n).
      mean: a, (k, n), where the input is (x, 1); else None.
      shift: (k,).
      floor: (k,).
    """

    matrix: Array
    mean: Array | None
    shift: Array
    floor: Array


class Factor(NamedTuple):
    """A symmetric matrix over inputs x, or over (x, 1) in parts; any axes in front.

    Attributes:
      kernel: (n, n).
      bias: the last column without its last entry, (n, 1); None without a bias.
      corner: the last entry, (1, 1); None without a bias.
    """

    kernel: Array
    bias: Array | None
    corner: Array | None


class Eigenbasis(NamedTuple):
    """Eigenvectors over inputs x, or (x, 1), as columns, and their eigenvalues; any axes in front.

    Attributes:
      kernel: the rows that belong to the inputs, (n, m).
      bias: the row that belongs to the bias, (1, m); None without one.
      values: (1, m).
    """

    kernel: Array
    bias: Array | None
    values: Array


class Health(NamedTuple):
    """How far a result can be trusted, (k, 1, 1) each.

    Attributes:
      condition: the condition number of the result, for an inverse that of the 1-norm.
      residual: what is left between the result and what it was made from, along one vector, in units of its length.
    """

    condition: Array
    residual: Array


def powers(moments: Sequence[Moment], power: ArrayLike) -> list[tuple[Factor, Health]]:
    """((A + shift) / floor)^power of each, not finite where there is none; matrices of one size go in one stack."""
    if isinstance(power, int | float) and power == -1:
        inverses = in_stacks(_inverse, [_schur_complement(moment) for moment in moments])
        return [
            (_with_bias(inverse, moment), health) for (inverse, health), moment in zip(inverses, moments, strict=True)
        ]

    def of_eigenvalues(matrices: Array, shift: Array, floor: Array) -> tuple[Array, Health]:
        values, vectors, residual = _eigh(matrices)
        scaled = ((values + shift[:, None]) / floor[:, None]) ** jnp.asarray(power, values.dtype)
        half = vectors * jnp.sqrt(scaled)[:, None, :]
        condition = jnp.max(scaled, 1) / jnp.min(scaled, 1)
        return jnp.matmul(half, half.mT, precision=EXACT), Health(condition[:, None, None], residual)

    shifts, floors = ([getattr(moment, name) for moment in moments] for name in ("shift", "floor"))
    found = in_stacks(of_eigenvalues, [_whole(moment.matrix, moment.mean) for moment in moments], shifts, floors)
    return [
        (Factor(matrix, None, None), health)
        if moment.mean is None
        else (Factor(matrix[:, :-1, :-1], matrix[:, :-1, -1:], matrix[:, -1:, -1:]), health)
        for (matrix, health), moment in zip(found, moments, strict=True)
    ]


def eigenbases(moments: Sequence[tuple[Array, Array | None]]) -> list[tuple[Eigenbasis, Array]]:
    """Eigenvectors and eigenvalues of each A, with its a where the input is (x, 1), and their residuals."""
    found = in_stacks(_eigh, [_whole(*moment) for moment in moments])
    return [
        (Eigenbasis(vectors, None, values[:, None]), residual)
        if mean is None
        else (Eigenbasis(vectors[:, :-1], vectors[:, -1:], values[:, None]), residual)
        for (values, vectors, residual), (_, mean) in zip(found, moments, strict=True)
    ]


def _schur_complement(moment: Moment) -> Array:
    matrix, mean, shift, _ = moment
    shift = shift[:, None, None]
    damped = matrix + shift * jnp.eye(matrix.shape[-1], dtype=matrix.dtype)[None]
    return damped if mean is None else damped - mean[:, :, None] * mean[:, None, :] / (1 + shift)


def _inverse(matrices: Array) -> tuple[Array, Health]:
    lower = jnp.linalg.cholesky(matrices)
    identity = jnp.broadcast_to(jnp.eye(matrices.shape[-1], dtype=matrices.dtype)[None], matrices.shape)
    half = jax.scipy.linalg.solve_triangular(lower, identity, lower=True)
    inverse = jnp.matmul(half.mT, half, precision=EXACT)
    vector = _direction(matrices)
    error = _norm(_times(matrices, _times(inverse, vector)) - vector) / _norm(vector)
    condition = jnp.linalg.norm(matrices, 1, (-2, -1)) * jnp.linalg.norm(inverse, 1, (-2, -1))
    return inverse, Health(condition[:, None, None], error[:, None, None])


def _with_bias(inverse: Array, moment: Moment) -> Factor:
    """The damped inverse, times floor, from that of the Schur complement."""
    _, mean, shift, floor = moment
    floor = floor[:, None, None]
    if mean is None:
        return Factor(floor * inverse, None, None)
    corner, mean = 1 + shift[:, None, None], mean[:, :, None]
    column = -jnp.matmul(inverse, mean, precision=EXACT) / corner
    last = (1 - jnp.sum(mean * column, 1, keepdims=True)) / corner
    return Factor(floor * inverse, floor * column, floor * last)


def _eigh(matrices: Array) -> tuple[Array, Array, Array]:
    """Eigenvalues, of which none is negative, eigenvectors, and the residual of both."""
    found, vectors = jnp.linalg.eigh(matrices)
    values, vector = jnp.maximum(found, 0), _direction(matrices)
    made = _times(vectors, values * _times(vectors.mT, vector))
    largest = jnp.max(jnp.abs(found), 1)
    error = _norm(made - _times(matrices, vector)) / (_norm(vector) * jnp.where(largest == 0, 1, largest))
    return values, vectors, error[:, None, None]


def _direction(matrices: Array) -> Array:
    """A vector for each, of ones with signs that no feature of a layer is likely to have."""
    index = jnp.arange(matrices.shape[-1])
    signs = 1 - 2 * ((index * index + index // 3) % 2)
    return jnp.broadcast_to(signs.astype(matrices.dtype)[None], matrices.shape[:2])


def _times(matrices: Array, vectors: Array) -> Array:
    return jnp.einsum("kij,kj->ki", matrices, vectors, precision=EXACT)


def _norm(vectors: Array) -> Array:
    return jnp.linalg.norm(vectors, axis=1)


def _whole(matrix: Array, mean: Array | None) -> Array:
    """The matrix over x, or (x, 1)."""
    if mean is None:
        return matrix
    last = jnp.concatenate([mean, jnp.ones_like(mean[:, :1])], 1)
    return jnp.concatenate([jnp.concatenate([matrix, mean[:, None, :]], 1), last[:, :, None]], 2)
