"""`conjugate` and `center`: any Optax transformation, run in better coordinates of each tapped layer."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from eva_optax._curvature.curvature import Damping, Gradient
from eva_optax._curvature.one_sided import OneSided
from eva_optax._curvature.sums import column_products, stack_biases
from eva_optax._probes.layout import Layout
from eva_optax._probes.stacking import unstack
from eva_optax._transforms.averages import Vectors, keep_finite
from eva_optax._transforms.driver import Part, observe, start
from eva_optax._transforms.hidden_probes import hide_places, hide_probes, put_probes_back
from eva_optax._transforms.options import check_decay, check_positive
from eva_optax._transforms.state import CenterState, ConjugateState, check_state


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

    return in_coordinates("conjugate", lambda tree: inner, Whitened(Damping(damping, relative)), decay)


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
      An `optax.GradientTransformationExtraArgs` with state `CenterState`; updates as for `conjugate`.

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
    return in_coordinates("center", lambda tree: inner, Centred(), decay)


class Whitened(NamedTuple):
    """Coordinates in which the mean input direction is whitened: R, there and back."""

    damping: Damping
    state: type[ConjugateState] = ConjugateState

    def forward(self, part: Part, averages: Vectors) -> tuple[list[Gradient], Array, Array, Array]:
        """R G of each layer, the weights in R, the cosine of G and the mean input, and ⟨G, G⟩."""
        layout = part.bucket.layout
        sums, along = _WHITENING.read(layout, part.gradients, averages)
        solution = _WHITENING.solve(sums, self.damping)
        # The identity where the product is not finite, so that what broke it passes as it is.
        finite = jnp.isfinite(sums["square"])
        weight, cosine = (jnp.where(finite, value, 0) for value in (solution.weight, solution.cosine))
        changed = _WHITENING.write(layout, part.gradients, averages, along, weight)
        return changed, weight, cosine, sums["gg"]

    def back(self, layout: Layout, updates: list[Gradient], averages: Vectors, weight: Array) -> list[Gradient]:
        """R times each update."""
        along = column_products(layout, updates, averages["a"])
        return _WHITENING.write(layout, updates, averages, along, weight)


class Centred:
    """Coordinates in which the inputs of layers with a bias are centred."""

    state: type[ConjugateState] = CenterState

    def forward(self, part: Part, averages: Vectors) -> tuple[list[Gradient], Array, Array, Array]:
        """G − μ gᵀ of each layer, what stands for weights and cosines, and ⟨g, g⟩: only layers with a bias count."""
        changed = [
            Gradient(kernel if bias is None else kernel - mean * bias, bias)
            for (kernel, bias), mean in zip(part.gradients, unstack(averages["a"]), strict=True)
        ]
        started, biases = part.scalars.started, stack_biases(part.gradients)
        gg = jnp.zeros_like(started) if biases is None else part.bucket.layout.total(biases * biases)
        return changed, started, part.scalars.cosine, gg

    def back(self, layout: Layout, updates: list[Gradient], averages: Vectors, weight: Array) -> list[Gradient]:
        """Δβ = Δβ' − μᵀΔW."""
        _, inputs = layout.sum_axes
        return [
            Gradient(kernel, None if bias is None else bias - jnp.sum(mean * kernel, inputs, keepdims=True))
            for (kernel, bias), mean in zip(updates, unstack(averages["a"]), strict=True)
        ]


_WHITENING = OneSided(whitening=True)


def _refuse_line_search(caller: str, *_: Any, **__: Any) -> None:
    raise ValueError(
        f"eva_optax.{caller}: a line search inside of it would go along an update in other coordinates than the loss "
        f"has. Put it behind: optax.chain(eva_optax.{caller}(optax.scale_by_lbfgs()), optax.scale(-1.0), "
        "optax.scale_by_zoom_linesearch(20))."
    )


def in_coordinates(
    caller: str,
    inner_of: Callable[[Any], optax.GradientTransformation],
    coordinates: Whitened | Centred,
    decay: ArrayLike,
) -> optax.GradientTransformationExtraArgs:
    """Takes gradients forward, runs an inner transformation on the tree without probes, and takes its updates back.

    Args:
      caller: for messages.
      inner_of: makes the inner transformation from a tree with probes, of parameters or gradients.
      coordinates: there and back.
      decay: of the running mean inputs.
    """
    state_type = coordinates.state

    def init(params: Any) -> ConjugateState:
        return state_type(*start(caller, _WHITENING, params), inner_of(params).init(hide_probes(params)))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, ConjugateState]:
        check_state(caller, state, state_type)
        step = observe(caller, _WHITENING, updates, state, decay)
        leaves, ends, weights = list(step.tree.leaves), [], []
        for part in step.parts:
            valid = part.used & jnp.isfinite(part.bucket.layout.total(part.new["a"] ** 2))
            averages = keep_finite(valid, part.new, part.old)
            changed, weight, cosine, gg = coordinates.forward(part, averages)
            for layer, gradient in zip(part.bucket.layers, changed, strict=True):
                layer.place(*gradient, leaves)
            ends.append(part.settle(averages, valid, part.used & ~valid, cosine, gg))
            weights.append(weight)
        inner = optax.with_extra_args_support(inner_of(updates))
        hidden = None if params is None else hide_probes(params)
        like_updates = jax.tree.structure(updates)
        extra = {k: hide_probes(v) if jax.tree.structure(v) == like_updates else v for k, v in extra.items()}
        if "value_fn" in extra:
            extra["value_fn"] = partial(_refuse_line_search, caller)
        inner_updates, inner_state = inner.update(hide_places(step.tree, leaves), state.inner, hidden, **extra)
        leaves = put_probes_back(step.tree, inner_updates)
        for end, weight in zip(ends, weights, strict=True):
            layers = end.bucket.layers
            taken = [Gradient(*layer.gradient(leaves)) for layer in layers]
            given = coordinates.back(end.bucket.layout, taken, end.averages, weight)
            for layer, gradient in zip(layers, given, strict=True):
                layer.place(*gradient, leaves)
        return step.tree.rebuild(leaves), state_type(*step.kept.settle(caller, ends), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
