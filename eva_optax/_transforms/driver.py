"""The driver of the whole family: from the gradients of a step to running averages, scalars and updates.

`update` takes the tree apart once and finds its layers once. Layers of equal layout are worked on together; what is
done for each by itself is the first read of its gradient, for sums, and the second, for the update.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from eva_optax._curvature.curvature import Curvature, Damping, Gradient, Solution, Statistics
from eva_optax._curvature.one_factor import traces
from eva_optax._probes.layers import Layer, Tree, take_apart
from eva_optax._probes.layout import Layout
from eva_optax._probes.probe import is_probe
from eva_optax._probes.stacking import stack, unstack
from eva_optax._probes.vectors import Scales
from eva_optax._transforms.averages import (
    Vectors,
    has_weights,
    keep_finite,
    update_moving_average,
    update_weighted_average,
)
from eva_optax._transforms.buckets import Bucket, fill_buckets
from eva_optax._transforms.centralized import are_centralized
from eva_optax._transforms.kept import End, Kept, Scalars, start_state
from eva_optax._transforms.options import (
    check_decay,
    check_names,
    check_nested,
    check_positive,
    check_probes,
    check_updates,
)
from eva_optax._transforms.state import ScaleByEvaState, check_state
from eva_optax._transforms.step_size import StepRule, check_step_rule, layer_factor, shared_factor

Rate = ArrayLike | Callable[[Array], ArrayLike]


def precondition(
    caller: str,
    curvature: Curvature,
    damping: Damping,
    decay: ArrayLike,
    step_rule: StepRule,
    kl_clip: ArrayLike = 1e-3,
    learning_rate: Rate = 1.0,
) -> optax.GradientTransformation:
    """The transformation that preconditions each layer with a curvature."""
    check_positive(caller, damping=damping.value, kl_clip=kl_clip)
    check_decay(caller, decay)
    check_step_rule(caller, step_rule)

    def init(params: Any) -> ScaleByEvaState:
        kept = start(caller, curvature, params)
        return ScaleByEvaState(jnp.zeros((), jnp.int32), *kept, jnp.ones((), kept[1].dtype))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ScaleByEvaState]:
        del params
        check_state(caller, state, ScaleByEvaState)
        step = observe(caller, curvature, take_apart(updates), state, decay)
        reads = [_read(curvature, damping, part) for part in step.parts]
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        shared = step_rule not in ("none", "layer_grad_norm")
        products = [read.valid_products() for read in reads] if shared else []
        nu = shared_factor(step_rule, products, kl_clip, rate, state.nu.dtype)
        leaves = [jnp.zeros_like(leaf) if is_probe(path) else leaf for path, leaf in step.tree.items()]
        for read in reads:
            _write(curvature, read, step_rule, nu, leaves)
        kept = step.kept.settle(caller, [read.end for read in reads])
        count = jnp.asarray(optax.safe_increment(state.count))
        return step.tree.rebuild(leaves), ScaleByEvaState(count, *kept, nu)

    return optax.GradientTransformation(init, update)


def start(caller: str, curvature: Statistics, params: Any) -> tuple[Any, Array, Array, Array]:
    """`start_state` of a curvature, for its layers; `params` may hold shapes instead of arrays."""
    tree = take_apart(params)
    check_nested(caller, tree)
    check_names(caller, tree)
    if curvature.statistics:
        check_probes(caller, tree, curvature.statistics)
    return start_state(tree, _layers(curvature, tree), curvature)


def _layers(curvature: Statistics, tree: Tree) -> Sequence[Layer]:
    """The tapped layers; for a curvature that needs no tap each matrix and tensor that is no probe."""
    if curvature.statistics:
        return tree.layers
    found = []
    for place, (path, leaf) in enumerate(tree.items()):
        if leaf.ndim >= 2 and leaf.size > 0 and not is_probe(path):
            found.append(Layer("/".join(path), path, place, None, {}, Layout.of_tensor(tuple(leaf.shape)), {}))
    return found


class Part(NamedTuple):
    """One bucket within a step; all but the gradients stacked.

    Attributes:
      bucket: its layers.
      gradients: of each layer.
      old: the averages before the step.
      new: with this step's statistics taken in; without meaning where they are not valid.
      used: whether each layer was used.
      formed: whether its matrices, if it has any, were formed in this step: a flag may leave them out.
      weight: that of the averages after the step, where it counts.
      scalars: what the state held.
    """

    bucket: Bucket
    gradients: list[Gradient]
    old: Vectors
    new: Vectors
    used: Array
    formed: Array
    weight: ArrayLike
    scalars: Scalars

    def settle(self, averages: Vectors, valid: Array, skipped: Array, cosine: Array, gg: Array) -> End:
        """Ends the step, once it is known what is valid and what was skipped; `gg` is 0 without a gradient."""
        started = jnp.where(valid, self.weight, self.scalars.started).astype(cosine.dtype)
        unseen = ~self.used & (gg != 0)
        if started.shape != cosine.shape:  # what is counted as one
            valid, started, skipped = (jnp.broadcast_to(part, cosine.shape) for part in (valid, started, skipped))
        scalars = Scalars(started, jnp.where(valid, cosine, self.scalars.cosine))
        return End(self.bucket, averages, scalars, skipped, self.used, unseen)


class Step(NamedTuple):
    """One step on a tree of gradients."""

    tree: Tree
    parts: list[Part]
    kept: Kept


def observe(
    caller: str, curvature: Statistics, tree: Tree, state: Any, decay: ArrayLike, moment_decay: ArrayLike | None = None
) -> Step:
    """Finds the layers of a tree of gradients, and takes their statistics into the running averages.

    Second moments, and what belongs to them, have a decay of their own, and weights; if it is None, they have not.

    Raises:
      ValueError: if there are none, or the state does not fit.
    """
    if curvature.statistics:
        check_updates(caller, tree, curvature.statistics)
    layers = _layers(curvature, tree)
    kept = Kept.read(caller, state, tree, layers, curvature)
    buckets = fill_buckets(layers, tree.leaves)
    new, scales = _statistics(caller, curvature, buckets, tree)
    parts = []
    for bucket, of_step, scale in zip(buckets, new, scales, strict=True):
        gradients = [Gradient(*layer.gradient(tree.leaves)) for layer in bucket.layers]
        old, scalars = kept.of(bucket)
        if scale is None:
            observed = [curvature.observe(gradient) for gradient in gradients]
            of_step = {name: stack([each[name] for each in observed]) for name in old}
        used = jnp.ones_like(scalars.started, bool) if scale is None else scale.used
        weight: ArrayLike = 1
        if moment_decay is not None and has_weights(old):
            averages = update_weighted_average(of_step, old, scalars.started, scale, moment_decay)
            weight = moment_decay * scalars.started + 1
        else:
            averages = update_moving_average(of_step, old, scalars.started, scale, decay)
        formed = used
        for trace in traces(bucket.layout, {name: of_step[name] for name in old}):
            formed = formed & (total_like(used, trace) != 0)
        parts.append(Part(bucket, gradients, old, averages, used, formed, weight, scalars))
    return Step(tree, parts, kept)


def total_like(used: Array, numbers: Array) -> Array:
    """Numbers summed over the axes along which it is not told apart which layers were used."""
    return jnp.sum(numbers, [axis for axis, size in enumerate(used.shape) if axis > 0 and size == 1], keepdims=True)


def _statistics(
    caller: str, curvature: Statistics, buckets: Sequence[Bucket], tree: Tree
) -> tuple[list[Vectors], list[Scales | None]]:
    """What the probes of each bucket received, and what it has to be multiplied by; nothing without a tap."""
    if not curvature.statistics:
        return [{} for _ in buckets], [None for _ in buckets]
    names = [curvature.averages(bucket.layers[0]) for bucket in buckets]
    stacks = zip(buckets, names, strict=True)
    found = [{name: bucket.stacked(tree.leaves, name) for name in averages} for bucket, averages in stacks]
    scales = [bucket.scales(tree.leaves, vectors) for bucket, vectors in zip(buckets, found, strict=True)]
    kernels = [tree.leaves[layer.kernel] for bucket in buckets for layer in bucket.layers]
    spoiled = are_centralized(caller, [vectors["a"] for vectors in found], [scale.used for scale in scales], kernels)
    if spoiled is None:
        return found, list(scales)
    return found, [scale._replace(mean=jnp.where(spoiled, jnp.nan, scale.mean)) for scale in scales]


class _Read(NamedTuple):
    """What the first read of the gradients of a bucket gave."""

    part: Part
    solution: Solution
    beside: Any
    valid: Array
    end: End

    def valid_products(self) -> tuple[Array, ...]:
        """⟨G, G⟩, ⟨P, G⟩ and ⟨P, P⟩, summed over the valid layers."""
        return tuple(jnp.sum(jnp.where(self.valid, product, 0)) for product in self.solution.products())


def _read(curvature: Curvature, damping: Damping, part: Part) -> _Read:
    """The first read of the gradients: sums, solution, and which layers are valid."""
    sums, beside = curvature.read(part.bucket.layout, part.gradients, part.new)
    solution = curvature.solve(sums, damping)
    finite = jnp.isfinite(solution.gg)
    valid = part.used & solution.finite_statistics & finite
    averages = keep_finite(valid, part.new, part.old)
    skipped = part.used & ~valid
    if curvature.statistics:  # else they are the gradient's own
        skipped = skipped & finite
    end = part.settle(averages, valid, skipped, solution.cosine, solution.gg)
    return _Read(part, solution, beside, valid, end)


def _write(curvature: Curvature, read: _Read, step_rule: StepRule, nu: Array, leaves: list[Any]) -> None:
    """Puts the updates of a bucket's layers among `leaves`: the second read of their gradients."""
    part, solution, usable, factor = read.part, read.solution, read.valid, read.solution.factor
    if step_rule == "layer_grad_norm":
        rescaling, known = layer_factor(solution.products())
        usable = usable & known
        factor = rescaling if factor is None else factor * rescaling
    elif step_rule != "none":
        factor = nu.astype(solution.gg.dtype) if factor is None else factor * nu.astype(solution.gg.dtype)
    weight = jnp.where(usable, solution.weight, 0)
    # The averages that are kept are finite, where those of this step need not be.
    written = curvature.write(part.bucket.layout, part.gradients, read.end.averages, read.beside, weight)
    factors = None if factor is None else unstack(jnp.where(usable, factor, 1))
    for index, (layer, (kernel, bias)) in enumerate(zip(part.bucket.layers, written, strict=True)):
        if factors is not None:
            kernel, bias = factors[index] * kernel, None if bias is None else factors[index] * bias
        layer.place(kernel, bias, leaves)
