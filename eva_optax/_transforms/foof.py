"""`scale_by_foof`: the whole second moment of each layer's inputs."""

import optax
from jax.typing import ArrayLike

from eva_optax._curvature.curvature import Damping
from eva_optax._curvature.kronecker import Recipe
from eva_optax._transforms.driver import Rate
from eva_optax._transforms.factored import Averaging, precondition_by_factors
from eva_optax._transforms.step_size import StepRule


def scale_by_foof(
    damping: ArrayLike = 0.1,
    *,
    relative: bool = True,
    decay: ArrayLike = 0.95,
    power: ArrayLike = -1.0,
    every: ArrayLike = 10,
    step_rule: StepRule = "none",
    kl_clip: ArrayLike = 1e-3,
    learning_rate: Rate = 1.0,
) -> optax.GradientTransformation:
    r"""Preconditions the gradient of each tapped layer with the second moment of its inputs: FOOF.

    With G the gradient of kernel and bias as one matrix, A the running second moment of the inputs (with a 1 for the
    bias), and Ā = A / mean eigenvalue,

    .. math::
      P = \Bigl(\frac{\bar A + \mathrm{damping}\, I}{1 + \mathrm{damping}}\Bigr)^{\mathrm{power}} G
      \quad (\text{relative}), \qquad
      P = (A + \gamma I)^{\mathrm{power}} G \quad (\text{absolute}).

    Tap the model with ``tap(model, factors="input")``. What else a tap holds is taken too. Of a side larger than its
    `max_dim`, and of a model without factors, the mean input: P is then that of `scale_by_eva_f`, whose damping is in
    units of the one eigenvalue. With a `rank` a sketch of A: P is that of `scale_by_eva_f`. Of an embedding the
    diagonal, which is all of A.

    Form A in every step, or with ``tapping(factors=step % 10 == 0)`` in some; the others go on with the average. Where
    A was not formed, or the layer was not used, the gradient is multiplied by what there is. It belongs before SGD;
    before an optimizer that is not linear in the gradient take `conjugate` or `foof_adamw`. An optimizer behind it
    would keep momentum for probes as large as layers: mask them, see `not_probes`.

    Args:
      damping: δ in units of A's mean eigenvalue, or γ; > 0. Number or scalar array.
      relative: scale-free damping: isotropic inputs leave the gradient as it is, at any scale.
      decay: weight of the old value in the running averages, in [0, 1). The first values count alike.
      power: < 0; −1 is FOOF, by Cholesky's method. Others are made from eigenvalues, and so is a traced one.
      every: how many steps an inverse is kept; in the first ones it is made anew in each.
      step_rule: how long the step is, as for `scale_by_eva`.
      kl_clip: κ of "kl_clip"; > 0.
      learning_rate: η of "kl_clip": the rate, or the schedule, that is applied after this transformation.

    Returns:
      An `optax.GradientTransformation` with state `ScaleByKfacState`. Averages and inverses are float32 (float64 beside
      float64 parameters); updates have the gradients' shapes and dtypes. An inverse that is not finite, or has a
      residual of 0.1 or more, is not used: the layer keeps the old one, at first the identity, and `skipped` counts it.
      Within `jax.set_mesh` each device makes its share of the inverses. Untapped parameters keep their gradient, a
      gradient that is not finite passes as it is.

    Raises:
      ValueError: for an option out of its range, and as `scale_by_eva`.

    Source: Benzing, "Gradient Descent on Neurons and its Link to Approximate Second-order Optimization", ICML 2022;
    sketches: Seung, Lee and Ko, "NysAct", arXiv:2506.08360.

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> model, x = eva_optax.tap(nn.Dense(2, use_bias=False), factors="input"), jnp.array([[3.0, 0.0], [0.0, 1.0]])
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> sgd = optax.masked(optax.sgd(0.1, momentum=0.9), eva_optax.not_probes)
      >>> tx = optax.chain(eva_optax.scale_by_foof(damping=0.2), sgd)
      >>> grads = jax.grad(lambda p: model.apply({"params": p}, x).mean())(params)
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> (updates["kernel"] / grads["kernel"])[:, 0]  # mean squares of 9 and 1, that is 1.8 and 0.2 of their mean
      Array([-0.06, -0.3 ], dtype=float32)
    """
    kept = Damping(damping, relative, keep_scale=step_rule == "kl_norm")
    recipe, averaging = Recipe(power), Averaging(decay)
    return precondition_by_factors("scale_by_foof", recipe, kept, averaging, every, step_rule, kl_clip, learning_rate)
