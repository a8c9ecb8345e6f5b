"""The mean input alone: Eva-f, and the change of coordinates that whitens its direction.

With (a, 1) the homogeneous input of a layer and γ the damping, the curvature is C = (a, 1)(a, 1)ᵀ ⊗ I + γI, and

    Eva-f      P = C⁻¹ G = (G − (a, 1) · (a, 1)ᵀG / (γ + ‖(a, 1)‖²)) / γ
    whitening  R G with R = (C/γ)^(−1/2) = I + ((1 + ‖(a, 1)‖²/γ)^(−1/2) − 1) / ‖(a, 1)‖² · (a, 1)(a, 1)ᵀ.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from eva_optax._curvature.curvature import Averages, Damping, Gradient, Solution, Sums, Tapped, cosine, safe_divide
from eva_optax._curvature.one_factor import moment_names
from eva_optax._curvature.sums import paired_sums, stack_biases, write_columns
from eva_optax._probes.fusion import materialize
from eva_optax._probes.layers import Layer
from eva_optax._probes.layout import Layout
from eva_optax._probes.probe import Shape


@dataclass(frozen=True)
class OneSided(Tapped):
    """The mean input of each layer; `whitening` chooses R instead of the inverse, `moments` averages those as well."""

    whitening: bool = False
    statistics: tuple[str, ...] = ("a",)
    moments: bool = False

    def averages(self, layer: Layer) -> dict[str, Shape]:
        """The mean input, and what is collected of the second moment where it is looked at."""
        names = moment_names(layer) if self.moments else self.statistics
        return {name: layer.shapes[name] for name in names}

    def read(self, layout: Layout, gradients: Sequence[Gradient], averages: Averages) -> tuple[Sums, Array]:
        """‖uᵀG‖² with u = (a, 1)/‖(a, 1)‖, ⟨G, G⟩ and ‖(a, 1)‖²; and (a, 1)ᵀG, whose own square overflows first."""
        a = averages["a"]
        along, gg = paired_sums([gradient.kernel for gradient in gradients], a, layout.sum_axes[1])
        aa, bias = layout.total(a * a), stack_biases(gradients)
        if bias is not None:
            along, gg, aa = along + bias, gg + bias * bias, aa + 1
        unit = along * safe_divide(1, jnp.sqrt(aa))
        return {"square": layout.total(unit * unit), "gg": layout.total(gg), "aa": aa}, along

    def solve(self, sums: Sums, damping: Damping) -> Solution:
        """V = (a, 1) · (a, 1)ᵀG."""
        square, gg, aa = sums["square"], sums["gg"], sums["aa"]
        if self.whitening:
            value = jnp.asarray(damping.value, aa.dtype)
            ratio = 1 / value if damping.relative else aa / value
            factor, weight = None, safe_divide(1 - 1 / jnp.sqrt(1 + ratio), aa)
        else:
            factor, weight = damping.factor(aa.dtype), damping.invert(aa)
        share = weight * aa
        gv, vv, finite = share * square, share**2 * square, jnp.isfinite(aa)
        return Solution(factor, weight, gg, gv, vv, cosine(square, gg, square), finite)

    def write(
        self, layout: Layout, gradients: Sequence[Gradient], averages: Averages, kept: Array, weight: Array
    ) -> list[Gradient]:
        """G − (a, 1) · (weight · (a, 1)ᵀG)."""
        rows = jnp.where(weight == 0, 0, weight * kept)  # what is not finite is none even times 0
        return write_columns(gradients, averages["a"], materialize(rows))
