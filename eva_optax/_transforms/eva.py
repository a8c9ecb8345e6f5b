"""`scale_by_eva`: Eva as an Optax gradient transformation."""

import optax
from jax.typing import ArrayLike

from eva_optax._curvature.curvature import Damping
from eva_optax._curvature.rank_one import RankOne
from eva_optax._transforms.driver import Rate, precondition
from eva_optax._transforms.step_size import StepRule


def scale_by_eva(
    damping: ArrayLike = 0.1,
    *,
    relative: bool = True,
    decay: ArrayLike = 0.05,
    step_rule: StepRule = "none",
    kl_clip: ArrayLike = 1e-3,
    learning_rate: Rate = 1.0,
) -> optax.GradientTransformation:
    r"""Preconditions the gradient of each tapped layer with its Kronecker vectors.

    With G the gradient of kernel and bias as one matrix, a (with a 1 for the bias) the running mean input, b the
    running summed output cotangent and γ the damping,

    .. math::
      P = G - \frac{\langle G, a b^\top \rangle}{(1 + \mathrm{damping}) \|a\|^2 \|b\|^2}\, a b^\top
      \quad (\text{relative}), \qquad
      P = \frac{1}{\gamma}\Bigl(G - \frac{\langle G, a b^\top \rangle}{\gamma + \|a\|^2 \|b\|^2}\, a b^\top\Bigr)
      \quad (\text{absolute}),

    and every P is multiplied by one factor ν, or by one for each layer:

    =================  ===============================================================  =======================
    step_rule          factor                                                           source
    =================  ===============================================================  =======================
    "none"             1
    "kl_clip"          :math:`\min(1, \sqrt{\kappa / (\eta^2 \sum \langle P, G \rangle)})`  ICLR paper
    "kl_norm"          :math:`1 / \sqrt{\sum \langle P, G \rangle}`, P without the 1/γ  extended paper
    "grad_norm"        :math:`\sqrt{\sum \|G\|^2 / \sum \|P\|^2}`                       reference code
    "layer_grad_norm"  :math:`\|G\| / \|P\|` of each layer (ν is 1)                     extended paper, Eva-s
    =================  ===============================================================  =======================

    Put it first in a chain, before any optimizer: ``optax.chain(scale_by_eva(), optax.sgd(0.1, momentum=0.9))``. Before
    it only operations that are linear in the whole gradient keep the meaning of the vectors, such as clipping by the
    global norm. What an optimizer, a sign or noise leave of them is recognised by their counters and not used: a
    learning rate by its sign, Adam's kin by their eps. The bare `scale_by_rms`, `scale_by_stddev`, `scale_by_rss` and
    `scale_by_adadelta`, without a rate, are not: what no norm sees is so small that x/√(x² + eps) is linear there; and
    `scale_by_radam` is an average until its sixth step.
    Parameters that are not tapped keep their gradient and do not enter ν; updates of probes are zero. A layer whose
    vectors are not finite keeps its averages and its gradient for that step, and `skipped` counts it. A layer whose
    gradient is not finite, or that was not used, passes its gradient on.

    Vectors that are nothing but rounding noise count as zeros: where the summed cotangent cancels, as in a layer before
    BatchNorm, also one that is synchronised over devices, P is G (G/γ with absolute damping). The norm of each sum is
    compared with a bound on the rounding error of its terms, which are n for each output. In units of the root of their
    summed squares it is (2 + √n/8) ε of their dtype and 16 √n ε of float32, at most 1/4, and parts from several devices
    or calls add up. That costs genuine vectors below it: in float32 a ratio of 0.0005 at 65,536 rows and 0.002 at a
    million, in bfloat16 one of 0.08 at 4,096 and 0.14 at 16,384.

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
    kept = Damping(damping, relative, keep_scale=step_rule == "kl_norm")
    return precondition("scale_by_eva", RankOne(), kept, decay, step_rule, kl_clip, learning_rate)
