"""The transformation behind `scale_by_eva` and `scale_by_eva_f`: one rule for a layer, applied to all tapped layers."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from eva_optax._figures import note_figures, start_figures
from eva_optax._layout import Layout
from eva_optax._options import check_decay, check_layers, check_positive, check_probes
from eva_optax._pairing import Path, TappedLayer, is_probe, leaves_by_path, replace_leaves
from eva_optax._rank_one import Damping, Step
from eva_optax._running import Settled, check_state, settle, start_averages, take_in
from eva_optax._step_rule import Products, StepRule, check_step_rule, layer_factor, shared_factor

# From layout, kernel, bias and running vectors to the step, and the squared norms of the vectors.
Rule = Callable[[Layout, Array, Array | None, dict[str, Array], Damping], tuple[Step, dict[str, Array]]]
Rate = ArrayLike | Callable[[Array], ArrayLike]


class ScaleByEvaState(NamedTuple):
    """State of `scale_by_eva` and its kin.

    Attributes:
      count: steps taken, int32 scalar.
      vectors: the running vectors, shaped like the parameters. `scale_by_eva`: each probe holds the averages `a` and
        `b`, and in `n` 1 as soon as there is one; `scale_by_eva_f`: only `a`; `scale_by_eva_s`: in the place of each
        parameter the tuple of its vectors. Everything else is an `optax.MaskedNode`.
      skipped: how many times a layer was skipped because its vectors or their squares were not finite, or no longer
        those that its tap gave, int32 scalar.
      nu: the last step-size factor ν, float scalar.
      figures: what `diagnostics` reports of each layer at the last step, by name; trees shaped like the parameters.
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    vectors: Any
    skipped: Array
    nu: Array
    figures: dict[str, Any]


def precondition(
    caller: str,
    rule: Rule,
    vectors: Sequence[str],
    damping: Damping,
    decay: ArrayLike,
    step_rule: StepRule,
    kl_clip: ArrayLike,
    learning_rate: Rate,
) -> optax.GradientTransformation:
    """Applies `rule` to each tapped layer, with the running averages of the `vectors` that it needs."""
    check_positive(caller, damping=damping.value, kl_clip=kl_clip)
    check_decay(caller, decay)
    check_step_rule(caller, step_rule)

    def init(params: Any) -> ScaleByEvaState:
        check_probes(caller, params)
        averages = start_averages(params, vectors)
        dtype = jnp.result_type(jnp.float32, *(leaf.dtype for leaf in jax.tree.leaves(averages)))
        zero = jnp.zeros((), jnp.int32)
        figures = start_figures(params, (*(f"norm_{vector}" for vector in vectors), "cosine"))
        return ScaleByEvaState(zero, averages, jnp.zeros_like(zero), jnp.ones((), dtype), figures)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ScaleByEvaState]:
        del params
        check_state(caller, state, ScaleByEvaState)
        layers = check_layers(caller, updates)
        leaves, averages = leaves_by_path(updates), leaves_by_path(state.vectors)
        steps = [_read(layer, leaves, averages, rule, vectors, damping, decay) for layer in layers]
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        nu = shared_factor(step_rule, [step.healthy_products for step in steps], kl_clip, rate, state.nu.dtype)

        outputs = {path: jnp.zeros_like(leaf) for path, leaf in leaves.items() if is_probe(path)}
        figures = {name: leaves_by_path(tree) for name, tree in state.figures.items()}
        skipped = state.skipped
        for step in steps:
            outputs |= _write(step, nu, step_rule, leaves)
            averages |= step.settled.averages
            skipped += step.settled.broken
            note_figures(figures, step.layer, step.figures, step.settled.healthy)
        new_state = ScaleByEvaState(
            jnp.asarray(optax.safe_increment(state.count)),
            replace_leaves(state.vectors, averages),
            skipped,
            nu,
            {name: replace_leaves(tree, figures[name]) for name, tree in state.figures.items()},
        )
        return replace_leaves(updates, outputs), new_state

    return optax.GradientTransformation(init, update)


class _LayerStep(NamedTuple):
    """One layer within an update: gradients and running mean input in its view, and what was found about them."""

    layer: TappedLayer
    kernel: Array
    bias: Array | None
    a: Array
    step: Step
    settled: Settled
    figures: dict[str, Array]

    @property
    def healthy(self) -> Array:
        """Whether each stacked layer is healthy, in the view."""
        return self.layer.layout.view(self.layer.layout.spread_counter(self.settled.healthy))

    @property
    def healthy_products(self) -> Products:
        gg, pg, pp = (jnp.where(self.healthy, product, 0) for product in self.step.products)
        return gg, pg, pp


def _read(
    layer: TappedLayer,
    leaves: dict[Path, Array],
    averages: dict[Path, Array],
    rule: Rule,
    vectors: Sequence[str],
    damping: Damping,
    decay: ArrayLike,
) -> _LayerStep:
    """Averages the layer's vectors and takes its sums: the first of the two reads of its gradient."""
    layout = layer.layout
    average = take_in(layer, leaves, averages, vectors, decay)
    running = {name: layout.view(average.vectors[name]) for name in vectors}
    kernel, bias = layer.gradient(leaves)
    step, squares = rule(layout, kernel, bias, running, damping)

    # What is finite comes out of the sums, so that it costs no pass of its own.
    finite_vectors, finite_gradient = (
        layout.view_per_layer(jnp.all, jnp.isfinite(total)) for total in (sum(squares.values()), step.gg)
    )
    settled = settle(layer, average, finite_vectors, finite_gradient)
    figures = {f"norm_{name}": jnp.sqrt(layout.view_per_layer(jnp.sum, square)) for name, square in squares.items()}
    figures["cosine"] = layout.view_per_layer(jnp.mean, step.cosine)
    return _LayerStep(layer, kernel, bias, running["a"], step, settled, figures)


def _write(layer_step: _LayerStep, nu: Array, step_rule: StepRule, leaves: dict[Path, Array]) -> dict[Path, Array]:
    """The updates of the layer's kernel and bias: the second read of its gradient."""
    step = layer_step.step
    rescaling, known = layer_factor(step_rule, step.products)
    usable = layer_step.healthy & known
    factor = step.factor * rescaling * nu.astype(step.factor.dtype)
    step = step._replace(factor=jnp.where(usable, factor, 1), row=jnp.where(usable, step.row, 0))
    a = jnp.where(usable, layer_step.a, 0)  # an a that is not finite is none even times 0
    return layer_step.layer.place(*step.apply(layer_step.kernel, layer_step.bias, a), leaves)
