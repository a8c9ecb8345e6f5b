"""`scale_by_eva`: Eva as an Optax gradient transformation."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from eva_optax._options import check_decay, check_layers, check_positive, check_probes
from eva_optax._pairing import Path, TappedLayer, is_probe, leaves_by_path, replace_leaves
from eva_optax._rank_one import RankOne, Sums, apply_rank_one, eva_step, layer_sums, rank_one_products
from eva_optax._running import check_state, settle, start_averages, take_in

StepRule = Literal["none", "kl_clip", "kl_norm", "grad_norm"]


class ScaleByEvaState(NamedTuple):
    """State of `scale_by_eva`.

    Attributes:
      count: steps taken, int32 scalar.
      vectors: the running vectors, shaped like the parameters: each probe holds the averages `a` and `b`, and in `n` 1
        as soon as there is one; everything else is an `optax.MaskedNode`.
      skipped: how many times a layer was skipped because its vectors were not finite, or no longer those that its tap
        gave, int32 scalar.
      nu: the last step-size factor ν, float scalar.
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    vectors: Any
    skipped: Array
    nu: Array


def scale_by_eva(
    damping: ArrayLike = 0.1,
    *,
    relative: bool = True,
    decay: ArrayLike = 0.05,
    step_rule: StepRule = "none",
    kl_clip: ArrayLike = 1e-3,
    learning_rate: ArrayLike | Callable[[Array], ArrayLike] = 1.0,
) -> optax.GradientTransformation:
    r"""Preconditions the gradient of each tapped layer with its Kronecker vectors.

    With G the gradient of kernel and bias as one matrix, a (with a 1 for the bias) the running mean input, b the
    running summed output cotangent and γ the damping,

    .. math::
      P = G - \frac{\langle G, a b^\top \rangle}{(1 + \mathrm{damping}) \|a\|^2 \|b\|^2}\, a b^\top
      \quad (\text{relative}), \qquad
      P = \frac{1}{\gamma}\Bigl(G - \frac{\langle G, a b^\top \rangle}{\gamma + \|a\|^2 \|b\|^2}\, a b^\top\Bigr)
      \quad (\text{absolute}),

    and every P is multiplied by one factor ν:

    ===========  =====================================================================  =======================
    step_rule    ν                                                                      source
    ===========  =====================================================================  =======================
    "none"       1
    "kl_clip"    :math:`\min(1, \sqrt{\kappa / (\eta^2 \sum \langle P, G \rangle)})`    ICLR paper
    "kl_norm"    :math:`1 / \sqrt{\sum \langle P, G \rangle}`, P without the 1/γ        extended paper
    "grad_norm"  :math:`\sqrt{\sum \|G\|^2 / \sum \|P\|^2}`                             reference code
    ===========  =====================================================================  =======================

    Put it first in a chain, before any optimizer: ``optax.chain(scale_by_eva(), optax.sgd(0.1, momentum=0.9))``. Before
    it only operations that are linear in the whole gradient keep the meaning of the vectors, such as clipping by the
    global norm. What Adam, Lion, a sign or noise leave of them is recognised by their counters and not used; RMSprop
    and Adagrad, whose eps stands under the root, are not recognised.
    Parameters that are not tapped keep their gradient and do not enter ν; updates of probes are zero. A layer whose
    vectors are not finite keeps its averages and its gradient for that step, and `skipped` counts it. A layer whose
    gradient is not finite, or that was not used, passes its gradient on.

    Vectors that are nothing but rounding noise arrive here as exact zeros (the tap compares the norm of each sum with
    the rounding error of its terms): where the summed cotangent cancels, as in a layer before BatchNorm, P is G
    (G/γ with absolute damping).

    Args:
      damping: γ, or with `relative` its ratio to ‖a‖²‖b‖²; > 0. Number or scalar array.
      relative: scale-free damping. The update keeps the gradient's scale and goes with any optimizer at its own
        learning rate. False is the paper's formula, whose damping depends on the scale of the loss.
      decay: weight of the old value in the running averages, in [0, 1); the first value is taken as it is.
      step_rule: how ν is found, see above.
      kl_clip: κ of "kl_clip"; > 0.
      learning_rate: η of "kl_clip": the rate, or the schedule, that is applied after this transformation.

    Returns:
      An `optax.GradientTransformation` with state `ScaleByEvaState`. Averages are float32 (float64 beside float64
      parameters) whatever the gradients' dtype; updates have the gradients' shapes and dtypes.

    Raises:
      ValueError: for an option out of its range; at init, if the parameters hold no probes; at update, if the gradients
        hold none, if a layer's vectors, kernel and state do not fit, if the state is no `ScaleByEvaState`, or if the
        probes' gradients went through Adam or the like (then, under `jit`, the layer is skipped and counted).

    Source: Zhang, Shi and Li, "Eva: Practical Second-order Optimization with Kronecker-vectorized Approximation", ICLR
    2023 (the Sherman-Morrison update and the KL clip); extended version arXiv:2308.02123 (the KL normalization).

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> model, x = eva_optax.tap(nn.Dense(2)), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> tx = optax.chain(eva_optax.scale_by_eva(), optax.sgd(0.1))
      >>> state = tx.init(params)
      >>> grads = jax.grad(lambda p: model.apply({"params": p}, x).sum())(params)
      >>> updates, state = tx.update(grads, state, params)
      >>> updates["bias"]  # all inputs are equal, so that G = a b exactly and P = G (1 - 1 / 1.1)
      Array([-0.03636365, -0.03636365], dtype=float32)
    """
    check_positive("scale_by_eva", damping=damping, kl_clip=kl_clip)
    check_decay("scale_by_eva", decay)
    if step_rule not in get_args(StepRule):
        raise ValueError(f"eva_optax.scale_by_eva: step_rule must be one of {get_args(StepRule)}, got {step_rule!r}.")

    def init(params: Any) -> ScaleByEvaState:
        check_probes("scale_by_eva", params)
        averages = start_averages(params, ("a", "b"))
        dtype = jnp.result_type(jnp.float32, *(leaf.dtype for leaf in jax.tree.leaves(averages)))
        zero = jnp.zeros((), jnp.int32)
        return ScaleByEvaState(zero, averages, jnp.zeros_like(zero), jnp.ones((), dtype))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ScaleByEvaState]:
        del params
        check_state("scale_by_eva", state, ScaleByEvaState)
        layers = check_layers("scale_by_eva", updates)
        leaves, averages = leaves_by_path(updates), leaves_by_path(state.vectors)
        steps = [_read(layer, leaves, averages, decay) for layer in layers]
        rank_ones = [eva_step(step.sums, damping, relative, keep_scale=step_rule == "kl_norm") for step in steps]
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        nu = _step_size(steps, rank_ones, step_rule, kl_clip, rate, state.nu.dtype)

        outputs = {path: jnp.zeros_like(leaf) for path, leaf in leaves.items() if is_probe(path)}
        skipped = state.skipped
        for step, rank_one in zip(steps, rank_ones, strict=True):
            outputs |= _write(step, rank_one, nu, leaves)
            averages |= step.averages
            skipped += step.broken
        count = jnp.asarray(optax.safe_increment(state.count))
        new_state = ScaleByEvaState(count, replace_leaves(state.vectors, averages), skipped, nu)
        return replace_leaves(updates, outputs), new_state

    return optax.GradientTransformation(init, update)


class _LayerStep(NamedTuple):
    """One layer within an update: gradients and running vectors in its view, and what was found about them."""

    layer: TappedLayer
    kernel: Array
    bias: Array | None
    a: Array
    b: Array
    sums: Sums
    healthy: Array  # a flag for each stacked layer, in the view
    broken: Array
    averages: dict[Path, Array]


def _read(layer: TappedLayer, leaves: dict[Path, Array], averages: dict[Path, Array], decay: ArrayLike) -> _LayerStep:
    """Averages the layer's vectors and takes its sums: the first of the two reads of its gradient."""
    layout = layer.layout
    average = take_in(layer, leaves, averages, ("a", "b"), decay)
    a, b = (layout.view(average.vectors[name]) for name in ("a", "b"))
    kernel, bias = layer.gradient(leaves)
    sums = layer_sums(layout, kernel, bias, a, b)
    # Whether the gradient is finite comes out of the sums, so that it costs no read of its own.
    finite_gradient = layout.all_per_layer(jnp.isfinite(layout.unview(sums.gg, layout.batch_shape)))
    healthy, broken, settled = settle(layer, average, finite_gradient)
    return _LayerStep(layer, kernel, bias, a, b, sums, layout.view(healthy), broken, settled)


def _write(step: _LayerStep, rank_one: RankOne, nu: Array, leaves: dict[Path, Array]) -> dict[Path, Array]:
    """The updates of the layer's kernel and bias: the second read of its gradient."""
    factor = jnp.where(step.healthy, rank_one.factor * nu.astype(step.a.dtype), 1)
    coefficient = jnp.where(step.healthy, rank_one.coefficient, 0)
    kernel, bias = apply_rank_one(RankOne(factor, coefficient), step.kernel, step.bias, step.a, step.b)
    return step.layer.place(kernel, bias, leaves)


def _step_size(
    steps: list[_LayerStep],
    rank_ones: list[RankOne],
    step_rule: StepRule,
    kl_clip: ArrayLike,
    rate: ArrayLike,
    dtype: DTypeLike,
) -> Array:
    """ν from the sums over all healthy layers; 1 where it is not defined."""
    if step_rule == "none":
        return jnp.ones((), dtype)
    gg = pg = pp = jnp.zeros((), dtype)
    for step, rank_one in zip(steps, rank_ones, strict=True):
        products = (step.sums.gg, *rank_one_products(step.sums, rank_one))
        here = [jnp.sum(jnp.where(step.healthy, product, 0)).astype(dtype) for product in products]
        gg, pg, pp = gg + here[0], pg + here[1], pp + here[2]
    if step_rule == "kl_clip":
        numerator, denominator = jnp.asarray(kl_clip, dtype), jnp.asarray(rate, dtype) ** 2 * pg
    elif step_rule == "kl_norm":
        numerator, denominator = jnp.ones((), dtype), pg
    else:
        numerator, denominator = gg, pp
    defined = denominator > 0
    nu = jnp.where(defined, jnp.sqrt(numerator / jnp.where(defined, denominator, 1)), 1)
    return jnp.minimum(nu, 1) if step_rule == "kl_clip" else nu
