"""Eva: a curvature of one direction, inverted by the Sherman-Morrison formula.

With G the kernel gradient and the bias gradient as its last row, (a, 1) the homogeneous input and γ the damping,

    P = (V Vᵀ + γI)⁻¹ G = (G − ⟨G, V⟩ / (γ + ‖V‖²) · V) / γ,  V = (a, 1) bᵀ.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from eva_optax._curvature.curvature import Averages, Damping, Gradient, Solution, Sums, Tapped, cosine
from eva_optax._curvature.sums import paired_sums, stack_biases, write_columns
from eva_optax._probes.fusion import materialize, on_gpu
from eva_optax._probes.layout import Layout


class RankOne(Tapped):
    """The Kronecker vectors a and b of each layer."""

    statistics = ("a", "b")

    def read(self, layout: Layout, gradients: Sequence[Gradient], averages: Averages) -> tuple[Sums, None]:
        """⟨G, V⟩, ⟨G, G⟩, ‖(a, 1)‖² and ‖b‖²."""
        a, b = averages["a"], averages["b"]
        outputs, inputs = layout.sum_axes

        def by_columns(kernels: list[Array], a: Array, b: Array) -> tuple[Array, Array]:
            along, squares = paired_sums(kernels, a, inputs)
            return layout.total(along * b), layout.total(squares)

        def by_rows(kernels: list[Array], a: Array, b: Array) -> tuple[Array, Array]:
            along, squares = paired_sums(kernels, b, outputs)
            return layout.total(along * a), layout.total(squares)

        # Input axes, which come first in a kernel, are summed first: the other way round a TPU's compiler transposes
        # parameters and momentum. A GPU's writes products with few columns to memory, and is at its best over rows.
        gv, gg = on_gpu(by_rows, by_columns, [gradient.kernel for gradient in gradients], a, b)
        aa, bias = layout.total(a * a), stack_biases(gradients)
        if bias is not None:
            gv, gg, aa = gv + layout.total(bias * b), gg + layout.total(bias * bias), aa + 1
        return {"gv": gv, "gg": gg, "aa": aa, "bb": layout.total(b * b)}, None

    def solve(self, sums: Sums, damping: Damping) -> Solution:
        """By Sherman and Morrison."""
        gv, gg, vv = sums["gv"], sums["gg"], sums["aa"] * sums["bb"]
        weight = gv * damping.invert(vv)
        finite = jnp.isfinite(vv) & jnp.isfinite(gv)  # products of what is finite may overflow
        return Solution(damping.factor(gg.dtype), weight, gg, weight * gv, weight**2 * vv, cosine(gv, gg, vv), finite)

    def write(
        self, layout: Layout, gradients: Sequence[Gradient], averages: Averages, kept: None, weight: Array
    ) -> list[Gradient]:
        """G − (a, 1) · (weight · b)."""
        return write_columns(gradients, averages["a"], materialize(weight * averages["b"]))
