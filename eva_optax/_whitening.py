"""The change of coordinates that whitens a layer's mean input direction, and centres its inputs.

Kernel and bias of a layer are one matrix with the homogeneous input (a, 1); u is its direction. All functions work in
the layer's view (see `Layout`) and keep its batch axes.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from eva_optax._layout import Layout


class Whitening(NamedTuple):
    """R = I + weight · (a, 1)(a, 1)ᵀ, symmetric, for each independent layer.

    Attributes:
      a: the running mean input.
      weight: ((1 + ‖(a, 1)‖²/γ)^(−1/2) − 1) / ‖(a, 1)‖².
    """

    a: Array
    weight: Array


def whitening(layout: Layout, a: Array, has_bias: bool, damping: ArrayLike, relative: bool) -> Whitening:
    """R of one layer; `relative` damping is a multiple of ‖(a, 1)‖². The identity where a is zero and no bias there."""
    _, inputs = layout.sum_axes
    square = jnp.sum(a * a, inputs, keepdims=True) + (1 if has_bias else 0)
    damping = jnp.asarray(damping, square.dtype)
    known = square > 0
    square = jnp.where(known, square, 1)
    ratio = 1 / damping if relative else square / damping
    return Whitening(a, jnp.where(known, (1 / jnp.sqrt(1 + ratio) - 1) / square, 0))


def whiten(layout: Layout, change: Whitening, kernel: Array, bias: Array | None) -> tuple[Array, Array | None]:
    """R times (kernel, bias); the identity where the product is not finite, so that what broke it passes as it is."""
    _, inputs = layout.sum_axes
    along = jnp.sum(change.a * kernel, inputs, keepdims=True)
    if bias is not None:
        along += bias
    step = change.weight * along
    step = jnp.where(jnp.all(jnp.isfinite(step), layout.sum_axes[0], keepdims=True), step, 0)
    return kernel + change.a * step, None if bias is None else bias + step
