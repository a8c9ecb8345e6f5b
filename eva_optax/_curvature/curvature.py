"""What a curvature is to the transformations: three steps, of which the second sees scalars alone.

    read    arrays -> scalars: the sums over each layer that its update needs, in the first read of its gradient
    solve   scalars -> scalars: how much of the curvature's direction is taken out
    write   arrays and scalars -> arrays: the update, in the second read of the gradient

Every update has the form P = factor · (G − weight · V), with V built from the layer's arrays, so that its products with
itself and with G follow from sums: P is not needed for the length of a step.

All three work on some layers of equal layout at once. What is small (averages, scalars) is stacked at a new first axis;
gradients are not, since that would copy them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from eva_optax._probes.layers import Layer
from eva_optax._probes.layout import Layout
from eva_optax._probes.probe import Shape

Sums = dict[str, Array]
Averages = Mapping[str, Array]


class Gradient(NamedTuple):
    """The gradient of one layer, along the kernel's axes, groups split, at least float32; the bias laid out as b."""

    kernel: Array
    bias: Array | None


class Damping(NamedTuple):
    """How a curvature is damped.

    Attributes:
      value: γ, or with `relative` its ratio to the curvature's only eigenvalue.
      relative: whether P is scale-free; it is then γ (V Vᵀ + γI)⁻¹ G.
      keep_scale: leave out the outer 1/γ of absolute damping.
    """

    value: ArrayLike
    relative: bool
    keep_scale: bool = False

    def factor(self, dtype: Any) -> Array | None:
        """What stands before the bracket; None if it is 1."""
        return None if self.relative or self.keep_scale else 1 / jnp.asarray(self.value, dtype)

    def shift_and_floor(self, unit: Array) -> tuple[Array, Array]:
        """What is added to each eigenvalue, and which damped eigenvalue counts as 1; `unit` is the mean eigenvalue."""
        value = jnp.broadcast_to(jnp.asarray(self.value, unit.dtype), unit.shape)
        if self.relative:
            known = jnp.where(unit == 0, 1, unit)
            return value * known, (1 + value) * known
        return value, value if self.keep_scale else jnp.ones_like(value)

    def invert(self, eigenvalue: Array) -> Array:
        """1 / (γ + eigenvalue); 0 where relative damping knows no scale."""
        value = jnp.asarray(self.value, eigenvalue.dtype)
        return safe_divide(1, (1 + value) * eigenvalue) if self.relative else 1 / (value + eigenvalue)


class Solution(NamedTuple):
    """P = factor · (G − weight · V) of some layers, one number for each.

    Attributes:
      factor: the number before the bracket, a scalar; None if it is 1.
      weight: how much of V is taken out.
      gg: ⟨G, G⟩.
      gv: ⟨G, weight · V⟩.
      vv: ‖weight · V‖².
      cosine: of the angle between G and V.
      finite_statistics: whether the squares of the averages are finite.
    """

    factor: Array | None
    weight: Array
    gg: Array
    gv: Array
    vv: Array
    cosine: Array
    finite_statistics: Array

    def products(self) -> tuple[Array, Array, Array]:
        """⟨G, G⟩, ⟨P, G⟩ and ⟨P, P⟩."""
        factor = 1 if self.factor is None else self.factor
        pp = factor**2 * (self.gg - 2 * self.gv + self.vv)
        return self.gg, factor * (self.gg - self.gv), jnp.maximum(pp, 0)


class Statistics(Protocol):
    """What is collected and averaged of each layer."""

    @property
    def statistics(self) -> tuple[str, ...]:
        """The statistics of the tap that it needs averages of; () if it makes its own from the gradient."""
        ...

    def averages(self, layer: Layer) -> dict[str, Shape]:
        """The shapes of what is averaged for a layer, by name."""
        ...

    def observe(self, gradient: Gradient) -> dict[str, Array]:
        """What a curvature without statistics takes from a gradient, by name."""
        ...


class Curvature(Statistics, Protocol):
    """One kind of curvature."""

    def read(self, layout: Layout, gradients: Sequence[Gradient], averages: Averages) -> tuple[Sums, Any]:
        """Sums over each layer, one number for each and for each of its batch axes, and what `write` needs beside."""
        ...

    def solve(self, sums: Sums, damping: Damping) -> Solution:
        """The solution for sums of any shape."""
        ...

    def write(
        self, layout: Layout, gradients: Sequence[Gradient], averages: Averages, kept: Any, weight: Array
    ) -> list[Gradient]:
        """G − weight · V of each layer."""
        ...


class Tapped:
    """The part that curvatures on the statistics of a tap share."""

    statistics: tuple[str, ...] = ()

    def averages(self, layer: Layer) -> dict[str, Shape]:
        """Those of the statistics."""
        return {name: layer.shapes[name] for name in self.statistics}

    def observe(self, gradient: Gradient) -> dict[str, Array]:
        """Nothing: the tap does."""
        return {}


def safe_divide(numerator: ArrayLike, denominator: Array) -> Array:
    """The quotient, 0 where the denominator is not greater than 0 or is NaN."""
    known = denominator > 0
    return jnp.where(known, numerator / jnp.where(known, denominator, 1), 0)


def cosine(xy: Array, xx: Array, yy: Array) -> Array:
    """⟨x, y⟩ / (‖x‖ ‖y‖), 0 where one of them is zero."""
    return safe_divide(xy, jnp.sqrt(xx) * jnp.sqrt(yy))
