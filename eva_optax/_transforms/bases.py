"""What a state keeps of sketches: for each layer that has one the coordinates that it whitens, renewed now and then."""

import math
from collections.abc import Mapping, Sequence
from operator import itemgetter

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from eva_optax._curvature.curvature import Damping
from eva_optax._curvature.nystrom import Basis
from eva_optax._curvature.sketched import choose, identity, whitening
from eva_optax._probes.layers import Layer, Tree
from eva_optax._probes.probe import MOMENT, TRACE, accumulator
from eva_optax._probes.sketch_axes import SketchAxes
from eva_optax._probes.tap import replicate, shard_like
from eva_optax._transforms.averages import Vectors
from eva_optax._transforms.driver import Part


def is_sketched(layer: Layer) -> bool:
    """Whether a tap collects the second moment of the layer's input, or its trace at least."""
    return TRACE in layer.shapes


def has_sketches(tree: Tree) -> bool:
    """Whether a layer of a tree has."""
    return any(map(is_sketched, tree.layers))


def start_bases(tree: Tree) -> dict[str, Basis]:
    """R = I for each layer with a sketch, by its name."""
    bases = {}
    for layer in filter(is_sketched, tree.layers):
        axes = SketchAxes.of(layer.layout)
        columns = math.prod(layer.shapes[MOMENT]) // math.prod(layer.shapes["a"]) if MOMENT in layer.shapes else 0
        dtype = accumulator(tree.leaves[layer.kernel].dtype)
        bases[layer.name] = identity(axes, columns, layer.bias is not None, dtype)
    return bases


def renew(
    bases: Mapping[str, Basis],
    parts: Sequence[tuple[Part, Vectors, Array]],
    damping: Damping,
    count: Array,
    every: ArrayLike,
) -> list[list[Basis]]:
    """The coordinates of a step, for each part a list, made anew every so many steps.

    In the first steps they are always made anew: the averages still change much.

    Args:
      bases: those of the step before.
      parts: for the layers of a bucket the averages, and whether there are any.
      damping: of the second moments.
      count: the number of steps before this one.
      every: how many steps they are kept.
    """
    old = [[bases[layer.name] for layer in part.bucket.layers if is_sketched(layer)] for part, *_ in parts]

    def make() -> list[list[Basis]]:
        return [_fresh(*part, damping, kept) if kept else [] for part, kept in zip(parts, old, strict=True)]

    due = (count % jnp.asarray(every, count.dtype) == 0) | (count < every)
    return jax.lax.cond(due, make, lambda: old)


def _fresh(part: Part, averages: Vectors, started: Array, damping: Damping, old: list[Basis]) -> list[Basis]:
    """The coordinates of a bucket's layers; the old ones where there is no average yet, or they are not finite."""
    layout = part.bucket.layout
    averages = {name: replicate(average) for name, average in averages.items()}
    made = whitening(layout, old[0].bias is not None, averages, damping)
    started = jnp.broadcast_to(started, averages[TRACE].shape).reshape(made.scale.shape)
    usable, axes = started & jnp.isfinite(made.scale), SketchAxes.of(layout)
    each = (jax.tree.map(itemgetter(index), made) for index in range(len(old)))
    chosen = [choose(axes, *parts) for parts in zip(usable, each, old, strict=True)]
    return jax.tree.map(shard_like, chosen, old)
