"""Eva and its kin as published: ready-made optimizers, in the manner of Optax's aliases."""

import optax
from jax.typing import ArrayLike

from eva_optax._curvature.curvature import Damping
from eva_optax._curvature.gradient_means import GradientMeans
from eva_optax._curvature.rank_one import RankOne
from eva_optax._transforms.driver import precondition
from eva_optax._transforms.eva_f import by_tap, one_sided
from eva_optax._transforms.hidden_probes import not_probes


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
    variant that needs no clip. There is one ν for the whole tree: members of an ensemble that are stacked in it share
    it, and `jax.vmap` of `init` and `update` over them gives each its own.

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
    kept = Damping(damping, relative=False, keep_scale=False)
    preconditioner = precondition("eva", RankOne(), kept, decay, "kl_clip", kl_clip, learning_rate)
    return _with_momentum(preconditioner, learning_rate, optax.trace(momentum), weight_decay, decoupled)


def eva_f(
    learning_rate: optax.ScalarOrSchedule,
    damping: ArrayLike = 0.03,
    *,
    decay: ArrayLike = 0.05,
    sketch_decay: ArrayLike = 0.95,
    every: ArrayLike = 10,
    momentum: float = 0.9,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    decoupled: bool = False,
) -> optax.GradientTransformation:
    r"""Eva-f, vectorized FOOF: absolute damping, KL normalization, momentum, weight decay.

    .. math::
      d_t = \nu_t P_t + \lambda w_t, \quad m_t = \mu m_{t-1} + d_t, \quad w_{t+1} = w_t - \eta_t m_t

    with P of `scale_by_eva_f(relative=False)` and ν of its "kl_norm": the length of a step is set by the learning rate
    and not by the gradient, so that the rate wants a schedule that ends near zero. Nothing is published of a model that
    is tapped with a rank: there it goes on with the sketch, as `scale_by_eva_f` does.

    Args:
      learning_rate: η, a number or a schedule.
      damping: γ > 0, in the units of the squared mean input.
      decay: weight of the old value in the running mean input, in [0, 1).
      sketch_decay: of `scale_by_eva_f`.
      every: of `scale_by_eva_f`.
      momentum: μ.
      weight_decay: λ; it enters the momentum, neither preconditioned nor scaled by ν.
      decoupled: add the weight decay after the momentum instead, as AdamW does.

    Returns:
      An `optax.GradientTransformation`; parameters are needed in `update` for the weight decay. Sketches have no
      momentum.

    Raises:
      ValueError: for an option out of its range, and as `scale_by_eva_f`.

    Source: Zhang, Shi and Li, arXiv:2308.02123.

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = eva_optax.tap(nn.Dense(2)), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> tx = eva_optax.eva_f(0.1)
      >>> state = tx.init(params)
      >>> grads = jax.grad(lambda p: model.apply({"params": p}, x).mean())(params)
      >>> updates, state = tx.update(grads, state, params)
    """
    kept = Damping(damping, relative=False, keep_scale=True)
    by_vectors, by_sketches = one_sided("eva_f", kept, decay, sketch_decay, every, "kl_norm")
    trace, options = optax.trace(momentum), (weight_decay, decoupled)
    return by_tap(
        _with_momentum(by_vectors, learning_rate, trace, *options),
        _with_momentum(by_sketches, learning_rate, optax.masked(trace, not_probes), *options),
    )


def eva_s(
    learning_rate: optax.ScalarOrSchedule,
    damping: ArrayLike = 0.1,
    *,
    relative: bool = True,
    decay: ArrayLike = 0.05,
    momentum: float = 0.9,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    decoupled: bool = False,
) -> optax.GradientTransformation:
    r"""Eva-s, vectorized Shampoo: each update as long as its gradient, Nesterov momentum, weight decay.

    .. math::
      d_t = \frac{\|G_t\|}{\|P_t\|} P_t + \lambda w_t, \quad m_t = \mu m_{t-1} + d_t, \quad
      w_{t+1} = w_t - \eta_t (d_t + \mu m_t)

    with P of `scale_by_eva_s`. It needs no tapped model.

    Args:
      learning_rate: η, a number or a schedule.
      damping: > 0; relative to the curvature's eigenvalue unless `relative` is False.
      relative: scale-free damping. The absolute damping of the paper fits one model and one loss.
      decay: weight of the old value in the running means, in [0, 1).
      momentum: μ.
      weight_decay: λ; it enters the momentum.
      decoupled: add the weight decay after the momentum instead, as AdamW does.

    Returns:
      An `optax.GradientTransformation`; parameters are needed in `update` for the weight decay.

    Raises:
      ValueError: for an option out of its range, and as `scale_by_eva_s`.

    Source: Zhang, Shi and Li, arXiv:2308.02123.

    Example:
      >>> import eva_optax, jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
      >>> tx = eva_optax.eva_s(0.1)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
    """
    kept = Damping(damping, relative, keep_scale=True)
    preconditioner = precondition("eva_s", GradientMeans(), kept, decay, "layer_grad_norm")
    trace = optax.trace(momentum, nesterov=True)
    return _with_momentum(preconditioner, learning_rate, trace, weight_decay, decoupled)


def _with_momentum(
    preconditioner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    trace: optax.GradientTransformation,
    weight_decay: optax.ScalarOrSchedule,
    decoupled: bool,
) -> optax.GradientTransformation:
    decayed = optax.add_decayed_weights(weight_decay)
    return optax.chain(
        preconditioner,
        *((trace, decayed) if decoupled else (decayed, trace)),
        optax.scale_by_learning_rate(learning_rate),
    )
