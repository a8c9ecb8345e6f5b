"""`scale_by_eva_f`: one-sided Eva, by the mean input of each layer, or by a sketch of its inputs' second moment."""

from typing import Any

import optax
from jax.typing import ArrayLike

from eva_optax._curvature.curvature import Damping
from eva_optax._curvature.kronecker import Recipe
from eva_optax._curvature.one_sided import OneSided
from eva_optax._probes.layers import take_apart
from eva_optax._probes.statistics import TRACE
from eva_optax._transforms.driver import Rate, precondition
from eva_optax._transforms.factored import Averaging, precondition_by_factors
from eva_optax._transforms.options import check_decay
from eva_optax._transforms.step_size import StepRule


def scale_by_eva_f(
    damping: ArrayLike = 0.1,
    *,
    relative: bool = True,
    decay: ArrayLike = 0.05,
    sketch_decay: ArrayLike = 0.95,
    every: ArrayLike = 10,
    step_rule: StepRule = "none",
    kl_clip: ArrayLike = 1e-3,
    learning_rate: Rate = 1.0,
) -> optax.GradientTransformation:
    r"""Preconditions the gradient of each tapped layer with its mean input: vectorized FOOF.

    With G the gradient of kernel and bias as one matrix, a (with a 1 for the bias) the running mean input and γ the
    damping,

    .. math::
      P = G - \frac{a\, a^\top G}{(1 + \mathrm{damping}) \|a\|^2} \quad (\text{relative}), \qquad
      P = \frac{1}{\gamma}\Bigl(G - \frac{a\, a^\top G}{\gamma + \|a\|^2}\Bigr) \quad (\text{absolute}).

    A model tapped with a rank, ``tap(model, rank=16)``, tells more of the second moment A of the homogeneous inputs
    than one direction. With λ, U the eigenvalues and vectors of what Nyström's method makes of its sketch, ρ the mean
    of the eigenvalues left, and z in units of the mean of all,

    .. math::
      P = \bigl(f(\rho) I + U (f(λ) - f(\rho)) U^\top\bigr) G, \qquad
      f(z) = \frac{1 + \mathrm{damping}}{z + \mathrm{damping}} \quad (\text{relative}), \qquad
      f(z) = \frac{1}{z + \gamma} \quad (\text{absolute}),

    renewed every so many steps. A rank of 0 has the mean input and the mean square alone. P is FOOF's (`scale_by_foof`)
    for a sketch of all directions, and where A has no more than r of them.

    Unlike `scale_by_eva` it works on layers whose summed cotangent vanishes, such as those before BatchNorm: it needs
    no cotangent. It belongs before SGD; before an optimizer that is not linear in the gradient take `conjugate`, which
    has the same curvature. An optimizer behind it would keep momentum for sketches: mask them, see `not_probes`.

    Args:
      damping: γ, or with `relative` its ratio to ‖a‖², for a sketch to the mean eigenvalue; > 0. A number or a scalar
        array.
      relative: scale-free damping, as for `scale_by_eva`. ‖a‖² does not depend on the scale of the loss, so that
        absolute damping is usable too.
      decay: weight of the old value in the running mean, in [0, 1); the first value is taken as it is.
      sketch_decay: the same for second moments, whose first values all count alike.
      every: how many steps the directions of a sketch are kept; in the first ones they are renewed each step.
      step_rule: how long the step is, as for `scale_by_eva`.
      kl_clip: κ of "kl_clip"; > 0.
      learning_rate: η of "kl_clip": the rate, or the schedule, that is applied after this transformation.

    Returns:
      An `optax.GradientTransformation` with state `ScaleByEvaState`, whose vectors are `a` alone, or
      `ScaleByKfacState` for a model tapped with a rank. Untapped parameters, dtypes, and layers that are unused or not
      finite are treated as by `scale_by_eva`. Where new directions are not finite, the old ones are kept.

    Raises:
      ValueError: as `scale_by_eva`; at update, if the state is of a model tapped with a rank and the gradients are not,
        or the other way round.

    Source: Zhang, Shi and Li, "Eva: A General Vectorized Approximation Framework for Second-order Optimization",
    arXiv:2308.02123; FOOF: Benzing, "Gradient Descent on Neurons and its Link to Approximate Second-order
    Optimization", ICML 2022. With a sketch: Seung, Lee and Ko, "NysAct", arXiv:2506.08360, who draw another Ω in each
    step although they average, count what the sketch does not see as zero, so that only the damping tells it, and make
    an n × n matrix; here Ω stays, the trace tells the rest, and no matrix is larger than the sketch. The algorithm:
    Tropp, Yurtsever, Udell and Cevher, 2017.

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> model, x = eva_optax.tap(nn.Dense(2)), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> tx = optax.chain(eva_optax.scale_by_eva_f(), optax.sgd(0.1))
      >>> state = tx.init(params)
      >>> grads = jax.grad(lambda p: model.apply({"params": p}, x).sum())(params)
      >>> updates, state = tx.update(grads, state, params)
      >>> updates["bias"]  # all inputs are equal, so that aaᵀG = ‖a‖² G exactly and P = G (1 - 1 / 1.1)
      Array([-0.03636365, -0.03636365], dtype=float32)
    """
    kept = Damping(damping, relative, keep_scale=step_rule == "kl_norm")
    options = step_rule, kl_clip, learning_rate
    return by_tap(*one_sided("scale_by_eva_f", kept, decay, sketch_decay, every, *options))


def one_sided(
    caller: str,
    damping: Damping,
    decay: ArrayLike,
    sketch_decay: ArrayLike,
    every: ArrayLike,
    step_rule: StepRule,
    kl_clip: ArrayLike = 1e-3,
    learning_rate: Rate = 1.0,
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """Eva-f by vectors, and by sketches."""
    check_decay(caller, sketch_decay, "sketch_decay")
    options = step_rule, kl_clip, learning_rate
    by_vectors = precondition(caller, OneSided(), damping, decay, *options)
    averaging = Averaging(sketch_decay, of_vectors=decay)
    return by_vectors, precondition_by_factors(caller, Recipe(), damping, averaging, every, *options)


def by_tap(
    by_vectors: optax.GradientTransformation, by_sketches: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """The one of both that fits what a model is tapped with."""

    def chosen(tree: Any) -> optax.GradientTransformationExtraArgs:
        sketched = any(TRACE in layer.shapes for layer in take_apart(tree).layers)
        return optax.with_extra_args_support(by_sketches if sketched else by_vectors)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return chosen(updates).update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(lambda params: chosen(params).init(params), update)
