"""The changes of coordinates: how the gradients of a bucket's layers are taken forward, and updates back."""

from functools import reduce
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from eva_optax._curvature.curvature import Damping, Gradient
from eva_optax._curvature.nystrom import Basis
from eva_optax._curvature.one_sided import OneSided
from eva_optax._curvature.sketched import change
from eva_optax._curvature.sums import column_products, stack_biases
from eva_optax._probes.layers import Tree
from eva_optax._probes.layout import Layout
from eva_optax._probes.probe import TRACE
from eva_optax._probes.stacking import unstack
from eva_optax._transforms.averages import Vectors
from eva_optax._transforms.bases import has_sketches, renew, start_bases
from eva_optax._transforms.driver import Part, Step
from eva_optax._transforms.state import CenterState, ConjugateState, SketchState


class Whitened(NamedTuple):
    """Coordinates in which the mean input direction, or what a sketch knows, is whitened: R, there and back.

    Attributes:
      damping: of the one direction, and of second moments.
      every: how many steps the coordinates of a sketch are kept.
    """

    damping: Damping
    every: ArrayLike

    curvature = OneSided(whitening=True, sketches=True)

    def state(self, tree: Tree) -> type[ConjugateState | SketchState]:
        """The type of the state for a tree of parameters or gradients."""
        return SketchState if has_sketches(tree) else ConjugateState

    def start(self, tree: Tree) -> tuple[Any, ...]:
        """What the state holds beside averages."""
        return (jnp.zeros((), jnp.int32), start_bases(tree)) if has_sketches(tree) else ()

    def renew(
        self, step: Step, averages: list[Vectors], valid: list[Array], state: Any
    ) -> tuple[tuple[Any, ...], list[Any]]:
        """What the state holds after a step, and for each part the coordinates of its sketches, if it has any."""
        if not isinstance(state, SketchState):
            return (), [[] for _ in step.parts]
        started = [good | (part.scalars.started > 0) for part, good in zip(step.parts, valid, strict=True)]
        parts = list(zip(step.parts, averages, started, strict=True))
        chosen = renew(state.bases, parts, self.damping, state.count, self.every)
        bases = {
            layer.name: basis
            for part, made in zip(step.parts, chosen, strict=True)
            for layer, basis in zip(part.bucket.layers, made, strict=bool(made))
        }
        return (jnp.asarray(optax.safe_increment(state.count)), bases), chosen

    def forward(self, part: Part, averages: Vectors, bases: list[Basis]) -> tuple[list[Gradient], Any, Array, Array]:
        """R G of each layer, what `back` needs, the cosine of G and the mean input, and ⟨G, G⟩."""
        layout = part.bucket.layout
        if bases:
            explained = jnp.stack([basis.explained for basis in bases])
            shape = jnp.broadcast_shapes(part.used.shape, averages[TRACE].shape)
            gg = jnp.stack([jnp.sum(gradient.kernel**2) for gradient in part.gradients])
            gg = gg.reshape(-1, *(1,) * (part.used.ndim - 1))
            return change(layout, part.gradients, bases), bases, explained.reshape(shape), gg
        sums, along = self.curvature.read(layout, part.gradients, averages)
        solution = self.curvature.solve(sums, self.damping)
        # The identity where the product is not finite, so that what broke it passes as it is.
        finite = jnp.isfinite(sums["square"])
        weight, cosine = (jnp.where(finite, value, 0) for value in (solution.weight, solution.cosine))
        changed = self.curvature.write(layout, part.gradients, averages, along, weight)
        return changed, weight, cosine, sums["gg"]

    def back(self, layout: Layout, updates: list[Gradient], averages: Vectors, carried: Any) -> list[Gradient]:
        """R times each update."""
        if isinstance(carried, list):
            return change(layout, updates, carried)
        along = column_products(layout, updates, averages["a"])
        return self.curvature.write(layout, updates, averages, along, carried)


class Centred:
    """Coordinates in which the inputs of layers with a bias are centred."""

    curvature = OneSided(whitening=True)

    def state(self, tree: Tree) -> type[CenterState]:
        """The type of the state."""
        return CenterState

    def start(self, tree: Tree) -> tuple[Any, ...]:
        """Nothing beside averages."""
        return ()

    def renew(
        self, step: Step, averages: list[Vectors], valid: list[Array], state: Any
    ) -> tuple[tuple[Any, ...], list[Any]]:
        """Nothing: the means are all."""
        return (), [None for _ in step.parts]

    def forward(self, part: Part, averages: Vectors, bases: None) -> tuple[list[Gradient], Any, Array, Array]:
        """G − μ gᵀ of each layer, what stands for weights and cosines, and ⟨g, g⟩: only layers with a bias count."""
        changed = [
            Gradient(kernel if bias is None else kernel - mean * bias, bias)
            for (kernel, bias), mean in zip(part.gradients, unstack(averages["a"]), strict=True)
        ]
        started, biases = part.scalars.started, stack_biases(part.gradients)
        gg = jnp.zeros_like(started) if biases is None else part.bucket.layout.total(biases * biases)
        return changed, started, part.scalars.cosine, gg

    def back(self, layout: Layout, updates: list[Gradient], averages: Vectors, carried: Any) -> list[Gradient]:
        """Δβ = Δβ' − μᵀΔW."""
        _, inputs = layout.sum_axes
        return [
            Gradient(kernel, None if bias is None else bias - jnp.sum(mean * kernel, inputs, keepdims=True))
            for (kernel, bias), mean in zip(updates, unstack(averages["a"]), strict=True)
        ]


def is_valid(part: Part) -> Array:
    """Which layers were used, and have finite statistics."""
    if TRACE not in part.new:
        return part.used & jnp.isfinite(part.bucket.layout.total(part.new["a"] ** 2))
    axes = [axis for axis, size in enumerate(part.used.shape) if axis > 0 and size == 1]
    finite = [jnp.isfinite(jnp.sum(jnp.square(average), axes, keepdims=True)) for average in part.new.values()]
    return part.used & reduce(jnp.logical_and, finite)
