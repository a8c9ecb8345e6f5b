"""`scale_by_eva_f`: one-sided Eva, the mean input alone."""

import optax
from jax.typing import ArrayLike

from eva_optax._curvature.curvature import Damping
from eva_optax._curvature.one_sided import OneSided
from eva_optax._transforms.driver import Rate, precondition
from eva_optax._transforms.step_size import StepRule


def scale_by_eva_f(
    damping: ArrayLike = 0.1,
    *,
    relative: bool = True,
    decay: ArrayLike = 0.05,
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

    Unlike `scale_by_eva` it works on layers whose summed cotangent vanishes, such as those before BatchNorm: it needs
    no cotangent. It belongs before SGD; before an optimizer that is not linear in the gradient take `conjugate`, which
    has the same curvature.

    Args:
      damping: γ, or with `relative` its ratio to ‖a‖²; > 0. Number or scalar array.
      relative: scale-free damping, as for `scale_by_eva`. ‖a‖² does not depend on the scale of the loss, so that
        absolute damping is usable too.
      decay: weight of the old value in the running average, in [0, 1); the first value is taken as it is.
      step_rule: how long the step is, as for `scale_by_eva`.
      kl_clip: κ of "kl_clip"; > 0.
      learning_rate: η of "kl_clip": the rate, or the schedule, that is applied after this transformation.

    Returns:
      An `optax.GradientTransformation` with state `ScaleByEvaState`, whose vectors are `a` alone. Untapped parameters,
      dtypes, and layers that are unused or not finite are treated as by `scale_by_eva`.

    Raises:
      ValueError: as `scale_by_eva`.

    Source: Zhang, Shi and Li, "Eva: A General Vectorized Approximation Framework for Second-order Optimization",
    arXiv:2308.02123; FOOF: Benzing, "Gradient Descent on Neurons and its Link to Approximate Second-order
    Optimization", ICML 2022.

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
    return precondition("scale_by_eva_f", OneSided(), kept, decay, step_rule, kl_clip, learning_rate)
