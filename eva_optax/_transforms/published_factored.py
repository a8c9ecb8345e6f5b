"""K-FAC and FOOF as published: ready-made optimizers, in the manner of Optax's aliases."""

import optax
from jax.typing import ArrayLike

from eva_optax._curvature.curvature import Damping
from eva_optax._curvature.kronecker import Recipe
from eva_optax._transforms.factored import Averaging, precondition_by_factors
from eva_optax._transforms.hidden_probes import not_probes
from eva_optax._transforms.options import check_positive


def kfac(
    learning_rate: optax.ScalarOrSchedule,
    damping: ArrayLike = 0.03,
    *,
    decay: ArrayLike = 0.05,
    kl_clip: ArrayLike = 1e-3,
    momentum: float = 0.9,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    batch_size: ArrayLike | None = None,
    sharing: str = "reduce",
    every: ArrayLike = 1,
) -> optax.GradientTransformation:
    r"""K-FAC as in the Eva paper's comparisons: factored damping, KL clip, momentum, weight decay.

    .. math::
      d_t = \nu_t P_t + \lambda w_t, \quad m_t = \mu m_{t-1} + d_t, \quad w_{t+1} = w_t - \eta_t m_t

    with P of `scale_by_kfac(relative=False, split="pi")` and ν of its "kl_clip". The authors' cotangents are those of
    the mean loss, 1/N of those of a sample's own, so that their B is 1/N² of ours: with `batch_size=N`

    .. math::
      P = N^2 (A + \pi N \sqrt{\gamma} I)^{-1} G (B + N \sqrt{\gamma} / \pi\, I)^{-1}

    which is their update, with their damping, where a kernel is used at one position of a sample. Without it the
    damping is in the units of the loss. They take the mean over positions, here "reduce" sums cotangents over them.
    Their code adds the damping to the running factors in place, in every step anew; here it is not added twice.

    Args:
      learning_rate: η, a number or a schedule.
      damping: γ > 0.
      decay: weight of the old value in the running factors, in [0, 1); the first value is taken as it is.
      kl_clip: κ > 0.
      momentum: μ.
      weight_decay: λ; it enters the momentum, neither preconditioned nor scaled by ν.
      batch_size: the authors' N, the number of samples in the mean of the loss; None for textbook units.
      sharing: how the model is tapped, `tap(model, factors="both", sharing="reduce")` as the authors' or "expand".
      every: how many steps inverses are kept.

    Returns:
      An `optax.GradientTransformation`; parameters are needed in `update` for the weight decay. Probes have no
      momentum.

    Raises:
      ValueError: for an option out of its range; at init, if the model is tapped with another `sharing`; and as
        `scale_by_kfac`.

    Source: Martens and Grosse, ICML 2015; github.com/lzhangbv/eva for defaults, units and the order of the operations.

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = eva_optax.tap(nn.Dense(2), factors="both", sharing="reduce"), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> tx = eva_optax.kfac(0.1, batch_size=4)
      >>> state = tx.init(params)
      >>> grads = jax.grad(lambda p: model.apply({"params": p}, x).sum(-1).mean())(params)
      >>> updates, state = tx.update(grads, state, params)
    """
    size = 1 if batch_size is None else batch_size
    check_positive("kfac", damping=damping, batch_size=size)
    preconditioner = precondition_by_factors(
        "kfac",
        Recipe(two_sided=True),
        Damping(damping * size**2, relative=False),
        Averaging(decay, "first"),
        every,
        "kl_clip",
        kl_clip,
        learning_rate,
        gain=size**2,
        sharing=sharing,
    )
    return _with_momentum(preconditioner, learning_rate, momentum, weight_decay)


def foof(
    learning_rate: optax.ScalarOrSchedule,
    damping: ArrayLike = 0.01,
    *,
    decay: ArrayLike = 0.95,
    momentum: float = 0.9,
    every: ArrayLike = 1,
) -> optax.GradientTransformation:
    r"""FOOF as published: absolute damping, momentum, and a running factor that starts at the identity.

    .. math::
      P_t = \Bigl(\frac{d^t}{1 - d^t} I + A_t + \gamma I\Bigr)^{-1} G_t, \quad
      m_t = \mu m_{t-1} + P_t, \quad w_{t+1} = w_t - \eta_t m_t

    with A of `scale_by_foof(relative=False)`. The sum of the authors starts at I and is divided by the weight of what
    came after, so that the first steps have a larger damping: 19 more in the first one.

    Args:
      learning_rate: η, a number or a schedule.
      damping: γ > 0, in the units of squared inputs.
      decay: d, weight of the old value in the running factor, in [0, 1).
      momentum: μ.
      every: how many steps inverses are kept.

    Returns:
      An `optax.GradientTransformation`. Probes have no momentum.

    Raises:
      ValueError: for an option out of its range, and as `scale_by_foof`.

    Source: Benzing, ICML 2022; github.com/hseung88/mac for the running average and defaults.

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = eva_optax.tap(nn.Dense(2), factors="input"), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> tx = eva_optax.foof(0.1)
      >>> state = tx.init(params)
      >>> grads = jax.grad(lambda p: model.apply({"params": p}, x).mean())(params)
      >>> updates, state = tx.update(grads, state, params)
    """
    kept = Damping(damping, relative=False)
    preconditioner = precondition_by_factors("foof", Recipe(), kept, Averaging(decay, "identity"), every)
    return _with_momentum(preconditioner, learning_rate, momentum)


def _with_momentum(
    preconditioner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    momentum: float,
    weight_decay: optax.ScalarOrSchedule = 0.0,
) -> optax.GradientTransformation:
    behind = optax.chain(optax.add_decayed_weights(weight_decay), optax.trace(momentum))
    return optax.chain(preconditioner, optax.masked(behind, not_probes), optax.scale_by_learning_rate(learning_rate))
