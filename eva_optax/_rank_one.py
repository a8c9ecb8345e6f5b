"""The mathematics of one layer: a rank-one curvature inverted by the Sherman-Morrison formula.

With G the kernel gradient and the bias gradient as its last row, V = (a, 1)·b the Kronecker direction, γ the damping,

    P = (V Vᵀ + γI)⁻¹ G = (G − ⟨G, V⟩ / (γ + ‖V‖²) · V) / γ.

G is read once for the sums and once for the update; P is never needed for the step-size factor, because ⟨P, G⟩ and
⟨P, P⟩ follow from three scalars.
Arguments are in the layer's view (see `Layout`), sums keep its batch axes: one number for each independent layer.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from eva_optax._layout import Layout


class Sums(NamedTuple):
    """⟨G, G⟩, ⟨G, V⟩ and ⟨V, V⟩ of each independent layer."""

    gg: Array
    gv: Array
    vv: Array


def layer_sums(layout: Layout, kernel: Array, bias: Array | None, a: Array, b: Array) -> Sums:
    """The sums over one layer; `kernel`, `a`, `b` in the view, `bias` laid out as `b`."""
    outputs, inputs = layout.sum_axes
    # Side by side over the same axes first: one pass over the kernel's gradient gives both.
    gv = jnp.sum(a * jnp.sum(kernel * b, outputs, keepdims=True), inputs, keepdims=True)
    gg = jnp.sum(jnp.sum(kernel * kernel, outputs, keepdims=True), inputs, keepdims=True)
    aa = jnp.sum(a * a, inputs, keepdims=True)
    bb = jnp.sum(b * b, outputs, keepdims=True)
    if bias is not None:  # the homogeneous input's 1 stays a separate scalar
        gv += jnp.sum(bias * b, outputs, keepdims=True)
        gg += jnp.sum(bias * bias, outputs, keepdims=True)
        aa += 1
    return Sums(gg, gv, aa * bb)


class RankOne(NamedTuple):
    """The update P = factor · (G − coefficient · V)."""

    factor: Array
    coefficient: Array


def eva_step(sums: Sums, damping: ArrayLike, relative: bool, keep_scale: bool) -> RankOne:
    """Sherman-Morrison. `relative` damping is a multiple of ‖V‖²; `keep_scale` leaves out the outer 1/γ."""
    one = jnp.ones_like(sums.vv)
    damping = jnp.asarray(damping, sums.vv.dtype)
    if relative:
        known = sums.vv > 0
        return RankOne(one, jnp.where(known, sums.gv / jnp.where(known, (1 + damping) * sums.vv, 1), 0))
    return RankOne(one if keep_scale else one / damping, sums.gv / (damping + sums.vv))


def rank_one_products(sums: Sums, step: RankOne) -> tuple[Array, Array]:
    """⟨P, G⟩ and ⟨P, P⟩, without P."""
    factor, c = step
    pg = factor * (sums.gg - c * sums.gv)
    pp = factor**2 * (sums.gg - 2 * c * sums.gv + c**2 * sums.vv)
    return pg, jnp.maximum(pp, 0)


def apply_rank_one(step: RankOne, kernel: Array, bias: Array | None, a: Array, b: Array) -> tuple[Array, Array | None]:
    """P for kernel and bias, laid out as they are."""
    factor, c = step
    return factor * (kernel - (c * a) * b), None if bias is None else factor * (bias - c * b)
