"""The mathematics of one layer: a curvature of one direction, inverted by the Sherman-Morrison formula.

With G the kernel gradient and the bias gradient as its last row, (a, 1) the homogeneous input and γ the damping,

    Eva    P = (V Vᵀ + γI)⁻¹ G = (G − ⟨G, V⟩ / (γ + ‖V‖²) · V) / γ,  V = (a, 1) bᵀ,
    Eva-f  P = (a aᵀ + γI)⁻¹ G = (G − (a, 1) · (a, 1)ᵀG / (γ + ‖(a, 1)‖²)) / γ.

Both take a multiple of a from each column: P = factor · (G − (a, 1) · row). G is read once for the sums and once for
the update; P is never needed for the step-size factor, because ⟨P, G⟩ and ⟨P, P⟩ follow from scalars.
Arguments are in the layer's view (see `Layout`), sums keep its batch axes: one number for each independent layer.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from eva_optax._fusion import keep_apart, materialize, on_gpu
from eva_optax._layout import Layout

Axes = tuple[int, ...]


class Step(NamedTuple):
    """The update P = factor · (G − V), and its products, for each independent layer.

    Attributes:
      factor: the number before the bracket.
      row: V = (a, 1) · row, laid out as b.
      gg: ⟨G, G⟩.
      gv: ⟨G, V⟩.
      vv: ⟨V, V⟩.
      cosine: of the angle between G and the direction of the curvature.
    """

    factor: Array
    row: Array
    gg: Array
    gv: Array
    vv: Array
    cosine: Array

    @property
    def products(self) -> tuple[Array, Array, Array]:
        """⟨G, G⟩, ⟨P, G⟩ and ⟨P, P⟩."""
        pp = self.factor**2 * (self.gg - 2 * self.gv + self.vv)
        return self.gg, self.factor * (self.gg - self.gv), jnp.maximum(pp, 0)

    def apply(self, kernel: Array, bias: Array | None, a: Array) -> tuple[Array, Array | None]:
        """P for kernel and bias, laid out as they are."""
        factor, row, a = materialize((self.factor, self.row, a))
        return factor * (kernel - a * row), None if bias is None else factor * (bias - row)


class Damping(NamedTuple):
    """How a curvature is damped.

    Attributes:
      value: γ, or with `relative` its ratio to the curvature's only eigenvalue.
      relative: whether P is scale-free; it is then γ (V Vᵀ + γI)⁻¹ G.
      keep_scale: leave out the outer 1/γ of absolute damping.
    """

    value: ArrayLike
    relative: bool
    keep_scale: bool

    def invert(self, eigenvalue: Array) -> tuple[Array, Array]:
        """The outer factor, and 1 / (γ + eigenvalue); that is 0 where relative damping knows no scale."""
        one, value = jnp.ones_like(eigenvalue), jnp.asarray(self.value, eigenvalue.dtype)
        if self.relative:
            return one, safe_divide(one, (1 + value) * eigenvalue)
        return one if self.keep_scale else one / value, 1 / (value + eigenvalue)


def eva_step(
    layout: Layout, kernel: Array, bias: Array | None, vectors: dict[str, Array], damping: Damping
) -> tuple[Step, dict[str, Array]]:
    """Eva's step, and ‖a‖² and ‖b‖²; `kernel` and `vectors` in the view, `bias` laid out as b."""
    outputs, inputs = layout.sum_axes
    a, b = vectors["a"], vectors["b"]

    def sums(first: Axes, then: Axes, of_first: Array, of_then: Array) -> tuple[Array, Array]:
        # Side by side over the same axes: one pass over the kernel's gradient gives both.
        gv, gg = keep_apart([jnp.sum(factor * kernel, first, keepdims=True) for factor in (of_first, kernel)])
        return jnp.sum(of_then * gv, then, keepdims=True), jnp.sum(gg, then, keepdims=True)

    # Input axes, which come first in a kernel, are summed first: the other way round a TPU's compiler transposes
    # parameters and momentum. A GPU is faster over the last axes.
    gv, gg = on_gpu(partial(sums, outputs, inputs, b, a), partial(sums, inputs, outputs, a, b))
    aa = jnp.sum(a * a, inputs, keepdims=True)
    bb = jnp.sum(b * b, outputs, keepdims=True)
    squares = {"a": aa, "b": bb}
    if bias is not None:  # the homogeneous input's 1 stays a separate scalar
        gv += jnp.sum(bias * b, outputs, keepdims=True)
        gg += jnp.sum(bias * bias, outputs, keepdims=True)
        aa += 1
    factor, inverse = damping.invert(aa * bb)
    weight = gv * inverse
    step = Step(factor, weight * b, gg, weight * gv, weight**2 * aa * bb, cosine(gv, gg, aa * bb))
    return step, squares


def eva_f_step(
    layout: Layout, kernel: Array, bias: Array | None, vectors: dict[str, Array], damping: Damping
) -> tuple[Step, dict[str, Array]]:
    """Eva-f's step, and ‖a‖²; arguments as for `eva_step`."""
    outputs, inputs = layout.sum_axes
    a = vectors["a"]
    ag, gg = keep_apart([jnp.sum(factor * kernel, inputs, keepdims=True) for factor in (a, kernel)])
    gg = jnp.sum(gg, outputs, keepdims=True)
    aa = jnp.sum(a * a, inputs, keepdims=True)
    squares = {"a": aa}
    if bias is not None:
        ag += bias
        gg += jnp.sum(bias * bias, outputs, keepdims=True)
        aa += 1
    factor, inverse = damping.invert(aa)
    square = jnp.sum(ag * ag, outputs, keepdims=True)
    share = cosine(square, gg * aa, square)
    return Step(factor, inverse * ag, gg, inverse * square, inverse**2 * aa * square, share), squares


def cosine(xy: Array, xx: Array, yy: Array) -> Array:
    """⟨x, y⟩ / (‖x‖ ‖y‖), 0 where one of them is zero."""
    return safe_divide(xy, jnp.sqrt(xx) * jnp.sqrt(yy))


def safe_divide(numerator: Array, denominator: Array) -> Array:
    """The quotient, 0 where the denominator is not greater than 0 or is NaN."""
    known = denominator > 0
    return jnp.where(known, numerator / jnp.where(known, denominator, 1), 0)
