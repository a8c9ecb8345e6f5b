"""The directions that second moments are looked at along: those who make a sketch and those who read it know them."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


def directions(shape: Sequence[int], rank: int, dtype: DTypeLike) -> Array:
    r"""Ω: orthonormal columns over input axes of a shape, (*shape, rank); all there are where rank is their size.

    .. math::  Ω_{ik} = \pm_i \sqrt{(2 - δ_{k0}) / n}\, \cos(π (i + ½) k / n)

    A cosine transform with fixed signs, made from the shape alone: no random numbers that another version or device
    would draw otherwise, and no array that would have to be stored or sent.
    """
    size = math.prod(shape)
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (size, rank), axis) for axis in (0, 1))
    # Whole multiples of a quarter of the period, so that rounding does not grow with the size.
    angle = ((2 * row + 1) * column % (4 * size)).astype(dtype) * (math.pi / (2 * size))
    scale = jnp.where(column == 0, size**-0.5, (2 / size) ** 0.5).astype(dtype)
    return (jnp.cos(angle) * scale * _signs(row).astype(dtype)).reshape(*shape, rank)


def _signs(index: Array) -> Array:
    """1 or -1 for each number, by a hash of 32 bits."""
    mixed = index.astype(jnp.uint32) * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return 1 - 2 * (mixed >> 31).astype(jnp.int32)
