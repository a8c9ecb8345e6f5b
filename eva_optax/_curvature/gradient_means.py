"""Eva-s: the direction of a tensor's gradient that its own means span.

With v₁ … v_k the means of G along all axes but one, and V = v₁ ⊗ … ⊗ v_k,

    P = G − ⟨G, V⟩ / (γ + ‖V‖²) · V.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from eva_optax._curvature.curvature import Averages, Damping, Gradient, Solution, Sums, cosine, safe_divide
from eva_optax._probes.fusion import materialize
from eva_optax._probes.layers import Layer
from eva_optax._probes.layout import Layout
from eva_optax._probes.probe import Shape
from eva_optax._probes.stacking import stack, unstack

Means = list[Array]


class GradientMeans:
    """The means of each tensor's gradient, called "0", "1", … by the axis that they keep."""

    statistics: tuple[str, ...] = ()

    def averages(self, layer: Layer) -> dict[str, Shape]:
        """The means, in the tensor's rank."""
        shape = layer.layout.kernel
        return {
            str(kept): tuple(size if axis == kept else 1 for axis, size in enumerate(shape))
            for kept in range(len(shape))
        }

    def observe(self, gradient: Gradient) -> dict[str, Array]:
        """The means of one gradient."""
        axes = range(gradient.kernel.ndim)
        return {
            str(kept): jnp.mean(gradient.kernel, [axis for axis in axes if axis != kept], keepdims=True)
            for kept in axes
        }

    def read(self, layout: Layout, gradients: Sequence[Gradient], averages: Averages) -> tuple[Sums, Means]:
        """⟨G, V/‖V‖⟩, ⟨G, G⟩ and ‖V‖; and the means, each of length 1."""
        means = list(averages.values())
        # The length of each mean is taken out first: the product of all, squared, leaves the range of float32 soon.
        norms = [jnp.sqrt(layout.total(mean * mean)) for mean in means]
        units = materialize([safe_divide(mean, norm) for mean, norm in zip(means, norms, strict=True)])
        each = zip(gradients, zip(*map(unstack, units), strict=True), strict=True)
        along, gg = zip(*((g.kernel * math.prod(u[1:], start=u[0]), g.kernel * g.kernel) for g, u in each), strict=True)
        axes = [axis for axes in layout.sum_axes for axis in axes]
        sums = {
            "along": stack([jnp.sum(part, axes, keepdims=True) for part in along]),
            "gg": stack([jnp.sum(part, axes, keepdims=True) for part in gg]),
            "norm": math.prod(norms[1:], start=norms[0]),
        }
        return sums, units

    def solve(self, sums: Sums, damping: Damping) -> Solution:
        """V of length 1, so that it does not leave the range of float32."""
        along, gg, norm = sums["along"], sums["gg"], sums["norm"]
        value = jnp.asarray(damping.value, norm.dtype)
        share = 1 / (1 + value) if damping.relative else norm**2 / (value + norm**2)
        weight = share * along
        # The means are finite where the gradient is.
        finite = jnp.ones_like(gg, bool)
        share = cosine(along, gg, jnp.ones_like(gg))
        return Solution(damping.factor(gg.dtype), weight, gg, weight * along, weight**2, share, finite)

    def write(
        self, layout: Layout, gradients: Sequence[Gradient], averages: Averages, kept: Means, weight: Array
    ) -> list[Gradient]:
        """G − weight · V/‖V‖."""
        units = zip(*map(unstack, (weight * kept[0], *kept[1:])), strict=True)
        return [
            Gradient(gradient.kernel - math.prod(unit[1:], start=unit[0]), None)
            for gradient, unit in zip(gradients, units, strict=True)
        ]
