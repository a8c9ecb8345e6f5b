"""`scale_by_eva_s`: Eva with the gradient's own means as its vectors; needs no tap."""

import optax
from jax.typing import ArrayLike

from eva_optax._curvature.curvature import Damping
from eva_optax._curvature.gradient_means import GradientMeans
from eva_optax._transforms.driver import Rate, precondition
from eva_optax._transforms.step_size import StepRule


def scale_by_eva_s(
    damping: ArrayLike = 0.1,
    *,
    relative: bool = True,
    decay: ArrayLike = 0.05,
    step_rule: StepRule = "layer_grad_norm",
    kl_clip: ArrayLike = 1e-3,
    learning_rate: Rate = 1.0,
) -> optax.GradientTransformation:
    r"""Preconditions each matrix or tensor with the means of its own gradient: vectorized Shampoo.

    With v₁ … v_k the running means of the gradient G along all axes but one, V = v₁ ⊗ … ⊗ v_k and γ the damping,

    .. math::
      P = G - \frac{\langle G, V \rangle}{(1 + \mathrm{damping}) \|V\|^2}\, V \quad (\text{relative}), \qquad
      P = G - \frac{\langle G, V \rangle}{\gamma + \|V\|^2}\, V \quad (\text{absolute}),

    and each P gets the length of its G ("layer_grad_norm"), or another step rule applies. The sign and the length of V
    do not matter with relative damping.

    It needs no tap and works on any tree of parameters; a tapped model may be given too, its probes get zero. Biases,
    scales and scalars keep their gradient: the only mean of a vector is the vector. A stack of scanned layers is one
    tensor to it. The gradient is read three times: for its means, for the sums, and for the update.

    Args:
      damping: γ, or with `relative` its ratio to ‖V‖²; > 0. Number or scalar array. ‖V‖² shrinks with the fourth power
        of a matrix's gradient and with its size, so that an absolute γ fits one model and one loss.
      relative: scale-free damping.
      decay: weight of the old value in the running means, in [0, 1); the first value is taken as it is.
      step_rule: how long the step is, as for `scale_by_eva`.
      kl_clip: κ of "kl_clip"; > 0.
      learning_rate: η of "kl_clip": the rate, or the schedule, that is applied after this transformation.

    Returns:
      An `optax.GradientTransformation` with state `ScaleByEvaState`, whose vectors are an array in the place of each
      parameter: v₁ … v_k are its rows, zeros behind the shorter ones. Averages are float32 (float64 beside float64
      parameters); updates have the gradients' shapes and dtypes. A gradient that is not finite is passed on, is not
      averaged, and is counted in `skipped`.

    Raises:
      ValueError: for an option out of its range; at update, if the state is no `ScaleByEvaState`.

    Source: Zhang, Shi and Li, "Eva: A General Vectorized Approximation Framework for Second-order Optimization",
    arXiv:2308.02123; Shampoo: Gupta, Koren and Singer, ICML 2018.

    Example:
      >>> import eva_optax, jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.ones((2, 3))}
      >>> tx = optax.chain(eva_optax.scale_by_eva_s(), optax.sgd(0.1))
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"kernel": jnp.array([[1.0, 2.0, 0.0], [3.0, 4.0, 2.0]])}, state, params)
      >>> print(jnp.linalg.norm(updates["kernel"]).round(3))  # 0.1 ‖G‖: only the direction has changed
      0.583
    """
    kept = Damping(damping, relative, keep_scale=True)
    return precondition("scale_by_eva_s", GradientMeans(), kept, decay, step_rule, kl_clip, learning_rate)
