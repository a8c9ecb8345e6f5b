"""`conjugate` and `center`: any Optax transformation, run in better coordinates of each tapped layer."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from eva_optax._figures import note_figures, start_figures
from eva_optax._layout import Layout
from eva_optax._options import check_decay, check_layers, check_positive, check_probes
from eva_optax._pairing import TappedLayer, is_probe, leaves_by_path, replace_leaves
from eva_optax._rank_one import Damping, eva_f_step
from eva_optax._running import check_state, settle, start_averages, take_in
from eva_optax._whitening import whiten, whitening


class ConjugateState(NamedTuple):
    """State of `conjugate` and `center`.

    Attributes:
      vectors: the running mean inputs, shaped like the parameters: each probe holds `a`, and in `n` 1 as soon as there
        is one; everything else is an `optax.MaskedNode`.
      skipped: how many times a layer's mean input was not finite, int32 scalar.
      figures: what `diagnostics` reports of each layer at the last step, by name; trees shaped like the parameters.
      inner: the state of the inner transformation, in the new coordinates.
    """

    vectors: Any
    skipped: Array
    figures: dict[str, Any]
    inner: Any


def conjugate(
    inner: optax.GradientTransformation,
    damping: ArrayLike = 0.1,
    *,
    relative: bool = True,
    decay: ArrayLike = 0.05,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs `inner` in coordinates where the mean input direction of each tapped layer is whitened.

    With a the running mean input and u = (a, 1)/‖(a, 1)‖ the direction of the homogeneous input,

    .. math::
      \mathrm{update} = R \cdot \mathrm{inner}(R\, G), \qquad
      R = I + \Bigl(\bigl(1 + 1/\mathrm{damping}\bigr)^{-1/2} - 1\Bigr) u u^\top,

    where R acts on the input axes of [kernel; bias]. This is `inner` after the change of variables W = R V, and so it
    is right for transformations that are not linear in the gradient: Adam, Muon, Lion. Around SGD it is the one-sided
    preconditioner R² = (I + u uᵀ/damping)⁻¹.

    Keep weight decay and the learning rate outside: ``chain(conjugate(scale_by_adam()), add_decayed_weights(wd),
    scale_by_learning_rate(lr))``. What `inner` keeps from step to step (momentum, second moments) holds gradients each
    in the coordinates of its own step; the R of the current step takes the whole of what `inner` returns back. `inner`
    is given `params` as they are, not in the new coordinates.

    Args:
      inner: the transformation to run.
      damping: > 0; with `relative` a multiple of ‖(a, 1)‖², else it is γ in R = (I + (a,1)(a,1)ᵀ/γ)^(−1/2).
      relative: whether the damping is relative to ‖(a, 1)‖².
      decay: weight of the old value in the running mean, in [0, 1); the first value is taken as it is.

    Returns:
      An `optax.GradientTransformationExtraArgs` with state `ConjugateState`. Updates have the gradients' shapes and
      dtypes; parameters that are not tapped get what `inner` makes of them, probes get zero.

    Raises:
      ValueError: for an option out of its range; at init, if the parameters hold no probes; at update, if the gradients
        hold none, or if vectors, kernel and state do not fit.

    Source: this library; R² is the inverse curvature of vectorized FOOF (Eva-f), arXiv:2308.02123.

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> model, x = eva_optax.tap(nn.Dense(2)), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> tx = optax.chain(eva_optax.conjugate(optax.scale_by_adam()), optax.scale_by_learning_rate(1e-3))
      >>> state = tx.init(params)
      >>> grads = jax.grad(lambda p: model.apply({"params": p}, x).sum())(params)
      >>> updates, state = tx.update(grads, state, params)
    """
    check_positive("conjugate", damping=damping)
    check_decay("conjugate", decay)

    def change(layer: TappedLayer, a: Array, kernel: Array, bias: Array | None) -> KernelAndBias:
        r = whitening(layer.layout, a, bias is not None, damping, relative)
        return whiten(layer.layout, r, kernel, bias)

    return _in_coordinates("conjugate", inner, change, change, decay, {"norm_a": _norm, "cosine": _cosine})


def center(inner: optax.GradientTransformation, *, decay: ArrayLike = 0.05) -> optax.GradientTransformationExtraArgs:
    r"""Runs `inner` in coordinates where the inputs of each tapped layer with a bias are centred.

    With μ the running mean input, the layer is y = (x − μ)·W + β' with β' = β + μᵀW. Its gradients and updates are

    .. math::
      G' = G - \mu g^\top, \quad g' = g, \quad
      (\Delta W, \Delta\beta') = \mathrm{inner}(G', g'), \quad \Delta\beta = \Delta\beta' - \mu^\top \Delta W

    with G and g the gradients of kernel and bias. There is no damping. A layer without a bias has nothing to take the
    mean's part and passes as it is (`coverage` says which these are). What `inner` keeps from step to step is as for
    `conjugate`.

    Args:
      inner: the transformation to run; weight decay and learning rate stay outside, as for `conjugate`.
      decay: weight of the old value in the running mean, in [0, 1). Old means spoil it: keep it small.

    Returns:
      An `optax.GradientTransformationExtraArgs` with state `ConjugateState`; updates as for `conjugate`.

    Raises:
      ValueError: as `conjugate`.

    Source: this library; centring activations goes back to LeCun et al., "Efficient BackProp", 1998.

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> model, x = eva_optax.tap(nn.Dense(2)), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> tx = optax.chain(eva_optax.center(optax.scale_by_adam()), optax.scale_by_learning_rate(1e-3))
      >>> state = tx.init(params)
      >>> grads = jax.grad(lambda p: model.apply({"params": p}, x).sum())(params)
      >>> updates, state = tx.update(grads, state, params)
    """
    check_decay("center", decay)

    def forward(layer: TappedLayer, a: Array, kernel: Array, bias: Array | None) -> KernelAndBias:
        return (kernel, None) if bias is None else (kernel - a * bias, bias)

    def back(layer: TappedLayer, a: Array, kernel: Array, bias: Array | None) -> KernelAndBias:
        if bias is None:
            return kernel, None
        return kernel, bias - jnp.sum(a * kernel, layer.layout.sum_axes[1], keepdims=True)

    return _in_coordinates("center", inner, forward, back, decay, {"norm_a": _norm})


KernelAndBias = tuple[Array, Array | None]
Change = Callable[[TappedLayer, Array, Array, Array | None], KernelAndBias]
Report = Mapping[str, Callable[[Layout, Array, Array, Array | None], Array]]


def _in_coordinates(
    caller: str,
    inner: optax.GradientTransformation,
    forward: Change,
    back: Change,
    decay: ArrayLike,
    report: Report,
) -> optax.GradientTransformationExtraArgs:
    """Takes gradients `forward`, runs `inner`, and takes its updates `back`, layer by layer."""
    inner = optax.with_extra_args_support(inner)

    def init(params: Any) -> ConjugateState:
        check_probes(caller, params)
        averages = start_averages(params, ("a",))
        return ConjugateState(averages, jnp.zeros((), jnp.int32), start_figures(params, report), inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, ConjugateState]:
        check_state(caller, state, ConjugateState)
        layers = check_layers(caller, updates)
        leaves, averages = leaves_by_path(updates), leaves_by_path(state.vectors)
        figures = {name: leaves_by_path(tree) for name, tree in state.figures.items()}
        skipped, means = state.skipped, {}
        new = {path: jnp.zeros_like(leaf) for path, leaf in leaves.items() if is_probe(path)}
        for layer in layers:
            average = take_in(layer, leaves, averages, ("a",), decay)
            finite = layer.layout.per_layer(jnp.all, jnp.isfinite(average.vectors["a"]))
            settled = settle(layer, average, finite, jnp.ones_like(finite))
            means[layer.name] = layer.layout.view(settled.averages[layer.probe["a"]])
            kernel, bias = layer.gradient(leaves)
            new |= layer.place(*forward(layer, means[layer.name], kernel, bias), leaves)
            averages |= settled.averages
            skipped += settled.broken
            found = {name: figure(layer.layout, means[layer.name], kernel, bias) for name, figure in report.items()}
            note_figures(figures, layer, found, settled.healthy)
        updates, inner_state = inner.update(replace_leaves(updates, new), state.inner, params, **extra)
        leaves = leaves_by_path(updates)
        new = {path: jnp.zeros_like(leaf) for path, leaf in leaves.items() if is_probe(path)}
        for layer in layers:
            new |= layer.place(*back(layer, means[layer.name], *layer.gradient(leaves)), leaves)
        vectors = replace_leaves(state.vectors, averages)
        noted = {name: replace_leaves(tree, figures[name]) for name, tree in state.figures.items()}
        return replace_leaves(updates, new), ConjugateState(vectors, skipped, noted, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _norm(layout: Layout, a: Array, kernel: Array, bias: Array | None) -> Array:
    square = jnp.sum(a * a, layout.sum_axes[1], keepdims=True)
    return jnp.sqrt(layout.view_per_layer(jnp.sum, square))


def _cosine(layout: Layout, a: Array, kernel: Array, bias: Array | None) -> Array:
    """The share of the gradient along (a, 1), in the read that R needs anyway."""
    step, _ = eva_f_step(layout, kernel, bias, {"a": a}, Damping(1.0, relative=True, keep_scale=True))
    return layout.view_per_layer(jnp.mean, step.cosine)
