"""Shampoo: second moments of a tensor along each of its axes, and their roots applied to it.

With G₍ₖ₎ the tensor as a matrix whose rows are axis k, L_k a sum or average of G₍ₖ₎ G₍ₖ₎ᵀ, and o the number of axes,

    P = G ×₁ R₁ ×₂ R₂ …,   R_k = (L_k + εI)^(−1/(2o)).

All functions work on blocks of one shape, (tensors, blocks, *block).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from eva_optax._curvature.curvature import safe_divide

_BATCH = 2  # axes in front


class Roots(NamedTuple):
    """The roots of some blocks.

    Attributes:
      matrices: R_k for each axis, (tensors, blocks, n, n).
      condition: the largest condition number of the matrices that they are roots of, (tensors, blocks, 1, 1).
      step: the step in which they were made, 0 for the identity before, (tensors, blocks, 1, 1).
    """

    matrices: tuple[Array, ...]
    condition: Array
    step: Array


def moments(blocks: Array) -> tuple[Array, ...]:
    """G₍ₖ₎ G₍ₖ₎ᵀ for each axis k, (tensors, blocks, n, n)."""
    axes, other = list(range(blocks.ndim)), blocks.ndim
    return tuple(
        jnp.einsum(blocks, axes, blocks, _renamed(axes, axis, other), [0, 1, axis, other], precision="highest")
        for axis in axes[_BATCH:]
    )


def apply(roots: Sequence[Array], blocks: Array) -> Array:
    """G ×₁ R₁ ×₂ R₂ … of each block."""
    axes, other = list(range(blocks.ndim)), blocks.ndim
    for axis, root in zip(axes[_BATCH:], roots, strict=True):
        result = _renamed(axes, axis, other)
        # Small eigenvalues have large roots, which rounding to less than single precision would fill with the others.
        blocks = jnp.einsum(root, [0, 1, other, axis], blocks, axes, result, precision="highest")
    return blocks


def _renamed(axes: list[int], axis: int, other: int) -> list[int]:
    return [other if each == axis else each for each in axes]


def graft(blocks: Array, lengths: Array) -> Array:
    """Each block as long as the block of `lengths` in its place."""
    axes = tuple(range(_BATCH, blocks.ndim))
    norms = [jnp.sqrt(jnp.sum(part * part, axes, keepdims=True)) for part in (lengths, blocks)]
    return safe_divide(*norms) * blocks
