"""Ready-made optimizers, in the manner of Optax's aliases."""

import optax
from jax.typing import ArrayLike

from eva_optax._eva import scale_by_eva


def eva(
    learning_rate: optax.ScalarOrSchedule,
    damping: ArrayLike = 0.03,
    *,
    decay: ArrayLike = 0.05,
    kl_clip: ArrayLike = 1e-3,
    momentum: float = 0.9,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    decoupled: bool = False,
) -> optax.GradientTransformation:
    r"""Eva as published: absolute damping, KL clip with the current rate, momentum, weight decay.

    .. math::
      d_t = \nu_t P_t + \lambda w_t, \quad m_t = \mu m_{t-1} + d_t, \quad w_{t+1} = w_t - \eta_t m_t

    with P of `scale_by_eva(relative=False)` and ν of its "kl_clip". While the clip is active the length of a step is
    set by `kl_clip` and not by the learning rate. `optax.chain(scale_by_eva(), optax.sgd(...))` is the scale-free
    variant that needs no clip.

    Args:
      learning_rate: η, a number or a schedule.
      damping: γ > 0. It depends on the scale of the loss: a summed loss needs more than a mean.
      decay: weight of the old value in the running vectors, in [0, 1).
      kl_clip: κ > 0.
      momentum: μ.
      weight_decay: λ. As in the reference it enters the momentum (neither preconditioned nor scaled by ν).
      decoupled: add the weight decay after the momentum instead, as AdamW does.

    Returns:
      An `optax.GradientTransformation`; parameters are needed in `update` for the weight decay.

    Raises:
      ValueError: for an option out of its range, and as `scale_by_eva`.

    Source: Zhang, Shi and Li, ICLR 2023; github.com/lzhangbv/eva for the order of the operations.

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = eva_optax.tap(nn.Dense(2)), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> tx = eva_optax.eva(0.1)
      >>> state = tx.init(params)
      >>> grads = jax.grad(lambda p: model.apply({"params": p}, x).mean())(params)
      >>> updates, state = tx.update(grads, state, params)
    """
    decayed = optax.add_decayed_weights(weight_decay)
    trace = optax.trace(momentum)
    return optax.chain(
        scale_by_eva(
            damping, relative=False, decay=decay, step_rule="kl_clip", kl_clip=kl_clip, learning_rate=learning_rate
        ),
        *((trace, decayed) if decoupled else (decayed, trace)),
        optax.scale_by_learning_rate(learning_rate),
    )
