"""The driver of K-FAC and FOOF: each layer's gradient times inverses of its factors, which are renewed now and then."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from eva_optax._curvature.curvature import Damping, Gradient, Tapped, cosine
from eva_optax._curvature.kronecker import Recipe, Split, precondition
from eva_optax._curvature.one_factor import input_names, output_names
from eva_optax._probes.layers import Layer, Tree, take_apart
from eva_optax._probes.layout import Layout
from eva_optax._probes.linear_map import Moments
from eva_optax._probes.probe import Shape, is_probe
from eva_optax._probes.stacking import stack, unstack
from eva_optax._probes.statistics import INPUTS, OUTPUTS
from eva_optax._transforms.averages import has_weights, keep_finite
from eva_optax._transforms.changes import is_valid
from eva_optax._transforms.driver import Part, Rate, observe, start, total_like
from eva_optax._transforms.options import check_decay, check_positive
from eva_optax._transforms.renewal import Source, renew_inverses, start_inverses
from eva_optax._transforms.state import ScaleByKfacState, check_state
from eva_optax._transforms.step_size import StepRule, check_step_rule, layer_factor, shared_factor

Start = Literal["weighted", "first", "identity"]


@dataclass(frozen=True)
class Factors(Tapped):
    """The factors of each layer, as far as its tap collects them; vectors in the place of those that it does not."""

    two_sided: bool
    statistics: tuple[str, ...] = ("a",)

    def names(self, layer: Layer) -> list[str]:
        """What is averaged."""
        return [*input_names(layer), *(output_names(layer) if self.two_sided else ())]

    def averages(self, layer: Layer) -> dict[str, Shape]:
        """Those of the factors."""
        return {name: layer.shapes[name] for name in self.names(layer)}


class Averaging(NamedTuple):
    """How factors are averaged.

    Attributes:
      decay: weight of the old value.
      start: "weighted", the first ones count alike, each older one `decay` times less; "first", the first one is taken
        as it is; "identity", the sum starts with one, and is divided by the weight of all that comes after.
      of_vectors: weight of the old value for layers of which there are vectors alone; None for `decay`.
    """

    decay: ArrayLike
    start: Start = "weighted"
    of_vectors: ArrayLike | None = None


def precondition_by_factors(
    caller: str,
    recipe: Recipe,
    damping: Damping,
    averaging: Averaging,
    every: ArrayLike,
    step_rule: StepRule = "none",
    kl_clip: ArrayLike = 1e-3,
    learning_rate: Rate = 1.0,
    gain: ArrayLike = 1.0,
    sharing: str | None = None,
) -> optax.GradientTransformation:
    """The transformation that multiplies the gradient of each layer by inverses of its factors, and by `gain`.

    `sharing` is how the model must be tapped, if that matters.
    """
    check_positive(caller, damping=damping.value, kl_clip=kl_clip, every=every)
    check_decay(caller, averaging.decay)
    check_step_rule(caller, step_rule)
    _check_recipe(caller, recipe)
    factors = Factors(recipe.two_sided)

    def init(params: Any) -> ScaleByKfacState:
        kept, tree = start(caller, factors, params), take_apart(params)
        if recipe.two_sided and tree.layers:
            _check_two_sided(caller, tree)
        if sharing is not None:
            _check_sharing(caller, tree, sharing)
        # `optax.tree.map_params` gives no parameters: one leaf then stands for what has not the form of parameters.
        inverses: Any = start_inverses(recipe, tree, tree.layers, factors.names) or jnp.zeros(())
        return ScaleByKfacState(jnp.zeros((), jnp.int32), *kept, jnp.ones((), kept[1].dtype), inverses)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ScaleByKfacState]:
        del params
        check_state(caller, state, ScaleByKfacState)
        moment_decay = None if averaging.start == "first" else averaging.decay
        decay = averaging.decay if averaging.of_vectors is None else averaging.of_vectors
        step = observe(caller, factors, take_apart(updates), state, decay, moment_decay)
        squares = [_inner(part.bucket.layout, part.gradients, part.gradients) for part in step.parts]
        valid = [
            is_valid(part) & jnp.isfinite(total_like(part.used, gg))
            for part, gg in zip(step.parts, squares, strict=True)
        ]
        averages = [keep_finite(good, part.new, part.old) for part, good in zip(step.parts, valid, strict=True)]
        sources = [
            Source(part, kept, good | (part.scalars.started > 0), _damping(damping, averaging, part, good))
            for part, kept, good in zip(step.parts, averages, valid, strict=True)
        ]
        inverses, failed = renew_inverses(recipe, state.inverses, sources, state.count, every)
        products = [
            _multiply(part, gg, each, gain) for part, gg, each in zip(step.parts, squares, inverses, strict=True)
        ]
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        finite = [product.finite_sums() for product in products]
        nu = shared_factor(step_rule, finite, kl_clip, rate, state.nu.dtype)
        leaves = [jnp.zeros_like(leaf) if is_probe(path) else leaf for path, leaf in step.tree.items()]
        ends = []
        for part, kept, good, broken, product in zip(step.parts, averages, valid, failed, products, strict=True):
            product.place(part, step_rule, nu, leaves)
            skipped = part.formed & jnp.isfinite(product.gg) & ~good
            ends.append(part.settle(kept, good, skipped | broken, product.cosine, product.gg))
        kept = step.kept.settle(caller, ends)
        by_name = {
            layer.name: inverse
            for part, each in zip(step.parts, inverses, strict=True)
            for layer, inverse in zip(part.bucket.layers, each, strict=True)
        }
        count = jnp.asarray(optax.safe_increment(state.count))
        return step.tree.rebuild(leaves), ScaleByKfacState(count, *kept, nu, by_name or state.inverses)

    return optax.GradientTransformation(init, update)


class _Product(NamedTuple):
    """The gradients of a bucket's layers times their inverses, and the products that tell how long they are.

    Attributes:
      changed: of each layer.
      gg: ⟨G, G⟩, laid out against the kernel.
      pg: ⟨P, G⟩.
      pp: ⟨P, P⟩.
      gain: what P is still to be multiplied by; the products are of what it is then.
    """

    changed: list[Gradient]
    gg: Array
    pg: Array
    pp: Array
    gain: ArrayLike

    @property
    def finite(self) -> Array:
        """Whether a layer's update is; else it gets its gradient, which the user is to see."""
        return jnp.isfinite(self.gg) & jnp.isfinite(self.pp)

    @property
    def cosine(self) -> Array:
        """Of update and gradient."""
        return jnp.where(self.finite, cosine(self.pg, self.gg, self.pp), 0)

    def finite_sums(self) -> tuple[Array, ...]:
        """The three products, summed over the layers."""
        return tuple(jnp.sum(jnp.where(self.finite, part, 0)) for part in (self.gg, self.pg, self.pp))

    def place(self, part: Part, step_rule: StepRule, nu: Array, leaves: list[Any]) -> None:
        """Puts the updates among `leaves`."""
        factor, usable = jnp.broadcast_to(jnp.asarray(self.gain, self.gg.dtype), self.gg.shape), self.finite
        if step_rule == "layer_grad_norm":
            rescaling, known = layer_factor((self.gg, self.pg, self.pp))
            factor, usable = factor * rescaling, usable & known
        elif step_rule != "none":
            factor = factor * nu.astype(factor.dtype)
        numbers = zip(unstack(usable), unstack(factor), strict=True)
        layers = zip(part.bucket.layers, part.gradients, self.changed, numbers, strict=True)
        for layer, given, (kernel, bias), (use, scale) in layers:
            kernel = _placed_as(jnp.where(use, scale * kernel, given.kernel), given.kernel)
            if bias is not None and given.bias is not None:
                bias = _placed_as(jnp.where(use, scale * bias, given.bias), given.bias)
            layer.place(kernel, bias, leaves)


def _placed_as(value: Array, like: Array) -> Array:
    """`value` sharded as `like`: products with matrices would otherwise lie as these do.

    JAX 0.12 has nothing that says so where shardings are no part of the types; there the compiler decides.
    """
    try:
        from jax.experimental.shard_alike import shard_alike
    except ImportError:
        return value
    return shard_alike(value, like)[0]


def _multiply(part: Part, gg: Array, inverses: Sequence[Any], gain: ArrayLike) -> _Product:
    layout, gain = part.bucket.layout, jnp.asarray(gain, gg.dtype)
    changed = [precondition(layout, *pair) for pair in zip(part.gradients, inverses, strict=True)]
    pg, pp = _inner(layout, changed, part.gradients), _inner(layout, changed, changed)
    return _Product(changed, gg, gain * pg, gain**2 * pp, gain)


def _inner(layout: Layout, left: Sequence[Gradient], right: Sequence[Gradient]) -> Array:
    """⟨·, ·⟩ of each layer and batch axis, laid out against the kernel, stacked."""
    axes = [axis for axes in layout.sum_axes for axis in axes]

    def inner(x: Gradient, y: Gradient) -> Array:
        kernel = jnp.sum(x.kernel * y.kernel, axes, keepdims=True)
        if x.bias is None or y.bias is None:
            return kernel
        return kernel + jnp.sum(x.bias * y.bias, axes, keepdims=True)

    return stack([inner(x, y) for x, y in zip(left, right, strict=True)])


def _damping(damping: Damping, averaging: Averaging, part: Part, valid: Array) -> Damping:
    """With what is left of the identity that the average of each layer started with."""
    if averaging.start != "identity" or not has_weights(part.new):
        return damping
    # After t steps it has the weight dᵗ, and all that came after 1 − dᵗ = (1 − d) · weight.
    weight = jnp.where(valid, part.weight, part.scalars.started)
    came_after = (1 - jnp.asarray(averaging.decay, weight.dtype)) * weight
    return damping._replace(value=damping.value + 1 / came_after - 1)


def _check_recipe(caller: str, recipe: Recipe) -> None:
    if isinstance(recipe.power, int | float) and not recipe.power < 0:
        raise ValueError(f"eva_optax.{caller}: power must be less than 0, got {recipe.power}; -1 is the inverse.")
    if recipe.split not in get_args(Split):
        raise ValueError(f"eva_optax.{caller}: split must be one of {get_args(Split)}, got {recipe.split!r}.")


def _check_sharing(caller: str, tree: Tree, sharing: str) -> None:
    for layer in tree.layers:
        for name in (INPUTS, OUTPUTS):
            found = Moments.of(tree.paths[layer.probe[name]][-1]).sharing if name in layer.probe else sharing
            if found != sharing:
                raise ValueError(
                    f"eva_optax.{caller}: sharing={sharing!r}, but layer {layer.name!r} is tapped with "
                    f'sharing={found!r}. Tap the model with eva_optax.tap(model, factors="both", '
                    f"sharing={sharing!r}), or give {caller} sharing={found!r}; where every kernel is used at one "
                    "position of a sample, as in a plain stack of dense layers, both are the same."
                )


def _check_two_sided(caller: str, tree: Tree) -> None:
    lacking = [layer.name for layer in tree.layers if OUTPUTS not in layer.shapes and "b" not in layer.shapes]
    if lacking or not any(OUTPUTS in layer.shapes for layer in tree.layers):
        which = f"layer {lacking[0]!r} has" if lacking else "the probes of the model's layers have"
        raise ValueError(
            f"eva_optax.{caller}: needs the second moment of each layer's output cotangents, and {which} none. "
            'Tap the model with eva_optax.tap(model, factors="both"); for parameters that exist already: '
            "eva_optax.attach(model, eva_optax.strip(params), x)."
        )
