"""`conjugate` and `center`: any Optax transformation, run in better coordinates of each tapped layer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax
from jax.typing import ArrayLike

from eva_optax._curvature.curvature import Gradient
from eva_optax._probes.layers import take_apart
from eva_optax._transforms.averages import keep_finite
from eva_optax._transforms.changes import Centred, Whitened, is_valid, whitened
from eva_optax._transforms.driver import observe, start
from eva_optax._transforms.hidden_probes import hide_places, hide_probes, put_probes_back
from eva_optax._transforms.options import check_decay, check_positive
from eva_optax._transforms.state import CenterState, ConjugateState, check_state


def conjugate(
    inner: optax.GradientTransformation,
    damping: ArrayLike = 0.1,
    *,
    relative: bool = True,
    decay: ArrayLike = 0.05,
    sketch_decay: ArrayLike = 0.95,
    every: ArrayLike = 10,
) -> optax.GradientTransformationExtraArgs:
    r"""Runs `inner` in coordinates where the inputs of each tapped layer are whitened, as far as they are known.

    With a the running mean input and u = (a, 1)/‖(a, 1)‖ the direction of the homogeneous input,

    .. math::
      \mathrm{update} = R \cdot \mathrm{inner}(R\, G), \qquad
      R = I + \Bigl(\bigl(1 + 1/\mathrm{damping}\bigr)^{-1/2} - 1\Bigr) u u^\top,

    where R acts on the input axes of [kernel; bias]. A model tapped with a rank, `tap(model, rank=16)`, tells more
    of the second moment A of the homogeneous inputs than one direction. With λ, U the eigenvalues and vectors of what
    Nyström's method makes of its sketch, ρ the mean of the eigenvalues left, and z in units of the mean of all,

    .. math::
      R = f(\rho) I + U \bigl(f(λ) - f(\rho)\bigr) U^\top, \qquad
      f(z) = \bigl((z + \mathrm{damping}) / (1 + \mathrm{damping})\bigr)^{-1/2}.

    A rank of 0 has the mean input and the mean square alone: R is of the first form, with the damping that they tell.
    With `tap(model, factors="input")` all of A is there, and R is f(A); `scale_by_foof` has the same to the power −1.
    With `tap(model, factors="both")` the outputs are whitened, too: the update is R inner(R G S) S with S = f(B) and B
    the second moment of the outputs' cotangents, as in `scale_by_kfac`; both share absolute damping as there.

    This is `inner` after the change of variables W = R V, and so it is right for transformations that are not linear in
    the gradient: Adam, Muon, Lion. Around SGD it is the one-sided preconditioner R².

    Keep weight decay and the learning rate outside: ``chain(conjugate(scale_by_adam()), add_decayed_weights(wd),
    scale_by_learning_rate(lr))``. What `inner` keeps from step to step (momentum, second moments) holds gradients each
    in the coordinates of its own step; the R of the current step takes the whole of what `inner` returns back. `inner`
    is given `params` as they are, not in the new coordinates.

    Args:
      inner: the transformation to run.
      damping: > 0; with `relative` a multiple of ‖(a, 1)‖², of the mean eigenvalue for second moments; else it is γ in
        R = (I + (a,1)(a,1)ᵀ/γ)^(−1/2), or (I + A/γ)^(−1/2).
      relative: whether the damping is relative.
      decay: weight of the old value in the running mean, in [0, 1); the first value is taken as it is.
      sketch_decay: the same for second moments, whose first values all count alike.
      every: how many steps R of second moments is kept; in the first ones it is renewed each step.

    Returns:
      An `optax.GradientTransformationExtraArgs` with state `ConjugateState`. Where a new R is not finite, the old one
      is kept. Updates have the gradients' shapes and dtypes; parameters that are not tapped get what `inner` makes of
      them, probes get zero.

    Raises:
      ValueError: for an option out of its range; at init, if the parameters hold no probes; at update, if the gradients
        hold none, or if vectors, kernel and state do not fit.

    Source: this library; R² is the inverse curvature of vectorized FOOF (Eva-f), arXiv:2308.02123. Nyström's method for
    the inputs' covariance: Seung, Lee and Ko, "NysAct", arXiv:2506.08360 (to the power −1, before SGD); the algorithm:
    Tropp, Yurtsever, Udell and Cevher, 2017.

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
    check_decay("conjugate", sketch_decay, "sketch_decay")
    check_positive("conjugate", every=every)
    return in_coordinates(
        "conjugate",
        lambda tree: inner,
        whitened(damping, relative, every),
        decay,
        sketch_decay,
    )


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
    sketch_decay: ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Takes gradients forward, runs an inner transformation on the tree without probes, and takes its updates back.

    Args:
      caller: for messages.
      inner_of: makes the inner transformation from a tree with probes, of parameters or gradients.
      coordinates: there and back.
      decay: of the running mean inputs.
      sketch_decay: of running second moments.
    """

    def init(params: Any) -> ConjugateState | CenterState:
        tree, averages = take_apart(params), start(caller, coordinates.curvature, params)
        inner_state = inner_of(params).init(hide_probes(params))
        return coordinates.state(*averages, inner_state, *coordinates.start(tree))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, ConjugateState | CenterState]:
        tree = take_apart(updates)
        check_state(caller, state, coordinates.state)
        step = observe(caller, coordinates.curvature, tree, state, decay, sketch_decay)
        leaves, ends, carried = list(step.tree.leaves), [], []
        valid = [is_valid(part) for part in step.parts]
        averages = [keep_finite(good, part.new, part.old) for part, good in zip(step.parts, valid, strict=True)]
        more, bases = coordinates.renew(step, averages, valid, state)
        for part, good, kept, basis in zip(step.parts, valid, averages, bases, strict=True):
            changed, carry, cosine, gg = coordinates.forward(part, kept, basis)
            for layer, gradient in zip(part.bucket.layers, changed, strict=True):
                layer.place(*gradient, leaves)
            ends.append(part.settle(kept, good, part.formed & ~good, cosine, gg))
            carried.append(carry)
        inner = optax.with_extra_args_support(inner_of(updates))
        hidden = None if params is None else hide_probes(params)
        like_updates = jax.tree.structure(updates)
        extra = {k: hide_probes(v) if jax.tree.structure(v) == like_updates else v for k, v in extra.items()}
        if "value_fn" in extra:
            extra["value_fn"] = partial(_refuse_line_search, caller)
        inner_updates, inner_state = inner.update(hide_places(step.tree, leaves), state.inner, hidden, **extra)
        leaves = put_probes_back(step.tree, inner_updates)
        for end, carry in zip(ends, carried, strict=True):
            layers = end.bucket.layers
            taken = [Gradient(*layer.gradient(leaves)) for layer in layers]
            given = coordinates.back(end.bucket.layout, taken, end.averages, carry)
            for layer, gradient in zip(layers, given, strict=True):
                layer.place(*gradient, leaves)
        return step.tree.rebuild(leaves), coordinates.state(*step.kept.settle(caller, ends), inner_state, *more)

    return optax.GradientTransformationExtraArgs(init, update)
