"""The changes of coordinates: how the gradients of a bucket's layers are taken forward, and updates back."""

from functools import reduce
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from eva_optax._curvature.curvature import Damping, Gradient
from eva_optax._curvature.kronecker import Inverse, Recipe, precondition
from eva_optax._curvature.nystrom import Basis
from eva_optax._curvature.one_factor import moment_names, traces
from eva_optax._curvature.one_sided import OneSided
from eva_optax._curvature.sums import column_products, stack_biases
from eva_optax._probes.layers import Layer, Tree
from eva_optax._probes.layout import Layout
from eva_optax._probes.sketch_axes import SketchAxes
from eva_optax._probes.stacking import unstack
from eva_optax._probes.statistics import DIAGONAL, FACTORS, INPUTS, TRACE
from eva_optax._transforms.averages import Vectors, has_weights
from eva_optax._transforms.driver import Part, Step, total_like
from eva_optax._transforms.renewal import Source, renew_inverses, start_inverses
from eva_optax._transforms.state import CenterState, ConjugateState

_ROOT = Recipe(power=-0.5, two_sided=True)


class Whitened(NamedTuple):
    """Coordinates in which the mean input direction, or what is known beyond it, is whitened: R, there and back.

    With the second moment of the outputs' cotangents they are whitened on that side, too.

    Attributes:
      damping: of the one direction, and of second moments.
      every: how many steps the coordinates of second moments are kept.
    """

    damping: Damping
    every: ArrayLike

    curvature = OneSided(whitening=True, moments=True)
    state = ConjugateState

    def start(self, tree: Tree) -> tuple[Any, ...]:
        """What the state holds beside averages."""
        layers = list(filter(has_moment, tree.layers))
        # `optax.tree.map_params` gives no parameters: one leaf then stands for what has not the form of parameters.
        bases = start_inverses(_ROOT, tree, layers, moment_names) if tree.leaves else jnp.zeros(())
        return jnp.zeros((), jnp.int32), bases

    def renew(
        self, step: Step, averages: list[Vectors], valid: list[Array], state: Any
    ) -> tuple[tuple[Any, ...], list[Any]]:
        """What the state holds after a step, and for each part the roots of its second moments, if it has any."""
        roots: list[list[Inverse]] = [[] for _ in step.parts]
        sources = {
            index: Source(part, kept, good | (part.scalars.started > 0), self.damping)
            for index, (part, kept, good) in enumerate(zip(step.parts, averages, valid, strict=True))
            if has_moment(part.bucket.layers[0])
        }
        count, bases = jnp.asarray(optax.safe_increment(state.count)), {}
        if not sources:
            return (count, bases), roots
        made, _ = renew_inverses(_ROOT, state.bases, list(sources.values()), state.count, self.every)
        for (index, source), each in zip(sources.items(), made, strict=True):
            roots[index] = each
            bases |= {layer.name: root for layer, root in zip(source.part.bucket.layers, each, strict=True)}
        return (count, bases), roots

    def forward(self, part: Part, averages: Vectors, roots: list[Inverse]) -> tuple[list[Gradient], Any, Array, Array]:
        """R G of each layer, what `back` needs, the cosine of G and the mean input, and ⟨G, G⟩."""
        layout = part.bucket.layout
        if roots:
            explained = jnp.stack([_explained(root)[..., 0, 0] for root in roots])
            gg = jnp.stack([jnp.sum(gradient.kernel**2) for gradient in part.gradients])
            gg = gg.reshape(-1, *(1,) * (part.used.ndim - 1))
            changed = [precondition(layout, g, root) for g, root in zip(part.gradients, roots, strict=True)]
            return changed, roots, SketchAxes.of(layout).against_kernel(explained), gg
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
            return [precondition(layout, update, root) for update, root in zip(updates, carried, strict=True)]
        along = column_products(layout, updates, averages["a"])
        return self.curvature.write(layout, updates, averages, along, carried)


def whitened(damping: ArrayLike, relative: bool, every: ArrayLike) -> Whitened:
    """These coordinates, by the options that users give. Absolute damping γ makes R = (I + A/γ)^(−½)."""
    return Whitened(Damping(damping, relative, keep_scale=True), every)


def _explained(root: Inverse) -> Array:
    """The share of the inputs' mean square in the directions that are told apart."""
    return root.inputs.explained if isinstance(root.inputs, Basis) else jnp.ones_like(root.condition)


class Centred:
    """Coordinates in which the inputs of layers with a bias are centred."""

    curvature = OneSided(whitening=True)
    state = CenterState

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


def has_moment(layer: Layer) -> bool:
    """Whether a tap collects the second moment of the layer's input, or its trace at least."""
    return any(name in layer.shapes for name in (TRACE, INPUTS, DIAGONAL))


def is_valid(part: Part) -> Array:
    """Which layers were used, have their matrices, and have finite statistics."""
    layout, vectors = part.bucket.layout, [average for name, average in part.new.items() if name not in FACTORS]
    if has_weights(part.new):  # what has one weight is valid as one
        parts = [*map(jnp.square, vectors), *traces(layout, part.new)]
        sums = [total_like(part.used, number) for number in parts]
    else:
        sums = [layout.total(jnp.square(vector)) for vector in vectors]
    return reduce(jnp.logical_and, map(jnp.isfinite, sums), part.formed)
