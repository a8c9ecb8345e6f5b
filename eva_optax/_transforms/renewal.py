"""What a state keeps of second moments: for each layer what its gradients are multiplied by, renewed now and then."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from eva_optax._curvature.amortized import renew
from eva_optax._curvature.curvature import Damping
from eva_optax._curvature.kronecker import Inverse, Known, Recipe, identity_like, make_inverses
from eva_optax._probes.layers import Layer, Tree
from eva_optax._probes.placement import replicate, shard_like
from eva_optax._probes.probe import accumulator
from eva_optax._probes.sketch_axes import SketchAxes
from eva_optax._probes.stacking import unstack
from eva_optax._transforms.averages import Vectors
from eva_optax._transforms.driver import Part


class Source(NamedTuple):
    """What the inverses of a bucket's layers are made of.

    Attributes:
      part: the bucket within the step.
      averages: after the step.
      started: whether there are any.
      damping: of each layer; its value may be an array that is laid out as `started`.
    """

    part: Part
    averages: Vectors
    started: Array
    damping: Damping


def start_inverses(
    recipe: Recipe, tree: Tree, layers: Sequence[Layer], names: Callable[[Layer], Sequence[str]]
) -> dict[str, Inverse]:
    """The identity for each layer, by its name; `names` are those of its averages."""

    def known(layer: Layer) -> Known:
        dtype = accumulator(tree.leaves[layer.kernel].dtype)
        zeros = {name: jnp.zeros((1, *layer.layout.split_shape(layer.shapes[name])), dtype) for name in names(layer)}
        return Known(layer.layout, layer.bias is not None, zeros, Damping(1.0, relative=True))

    def make() -> list[Inverse]:
        made = make_inverses(recipe, list(map(known, layers)))
        return [jax.tree.map(lambda stacked: stacked[0], inverse) for inverse in made]

    shapes = jax.eval_shape(make)
    return {layer.name: identity_like(shape) for layer, shape in zip(layers, shapes, strict=True)}


def renew_inverses(
    recipe: Recipe, inverses: Mapping[str, Inverse], sources: Sequence[Source], count: Array, every: ArrayLike
) -> tuple[list[list[Inverse]], list[Array]]:
    """The inverses of a step, made anew every so many steps, and which layers should have new ones and have not.

    In the first steps they are always made anew: the averages still change much.

    Args:
      recipe: which.
      inverses: those of the step before, by the names of layers.
      sources: what they are made of.
      count: the number of steps before this one.
      every: how many steps they are kept.

    Returns:
      For each source a list, and an array laid out against the layers' kernels, stacked.
    """
    old = [inverses[layer.name] for source in sources for layer in source.part.bucket.layers]
    started = [_axes(source).by_batch(source.started) for source in sources]

    def make() -> list[Inverse]:
        made = make_inverses(recipe, [_known(source) for source in sources])
        each = []
        for inverse, known in zip(made, started, strict=True):
            # What has no average yet is not renewed.
            condition = jnp.where(known[..., None, None], inverse.condition, jnp.nan)
            each += _by_layer(inverse._replace(condition=condition))
        return jax.tree.map(lambda new, kept: shard_like(new.astype(kept.dtype), kept), each, old)

    due = (count % jnp.asarray(every, count.dtype) == 0) | (count < every)
    chosen, renewed = renew(due, make, old)
    chosen = [
        inverse._replace(age=jnp.where(new[..., None, None], 0, kept.age + 1))
        for inverse, new, kept in zip(chosen, renewed, old, strict=True)
    ]
    inverses_of, failed, start = [], [], 0
    for source, known in zip(sources, started, strict=True):
        part = slice(start, start + len(known))
        inverses_of.append(chosen[part])
        failed.append(_axes(source).against_kernel(due & known & ~jnp.stack(renewed[part])))
        start = part.stop
    return inverses_of, failed


def _axes(source: Source) -> SketchAxes:
    return SketchAxes.of(source.part.bucket.layout)


def _known(source: Source) -> Known:
    bucket, value = source.part.bucket, source.damping.value
    averages = {name: replicate(average) for name, average in source.averages.items()}
    if jnp.ndim(value):
        value = _axes(source).by_batch(jnp.asarray(value)).ravel()
    return Known(bucket.layout, bucket.layers[0].bias is not None, averages, source.damping._replace(value=value))


def _by_layer(stacked: Inverse) -> list[Inverse]:
    leaves, structure = jax.tree.flatten(stacked)
    return [structure.unflatten(part) for part in zip(*map(unstack, leaves), strict=True)]
