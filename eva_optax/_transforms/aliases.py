"""AdamW and Muon in whitened coordinates: ready-made optimizers, with the arguments of Optax's own."""

from collections.abc import Callable
from functools import partial
from typing import Any

import optax
from jax.typing import ArrayLike

from eva_optax._transforms.changes import whitened
from eva_optax._transforms.coordinates import in_coordinates
from eva_optax._transforms.muon import scale_by_muon
from eva_optax._transforms.options import check_decay, check_positive


def eva_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    eps_root: ArrayLike = 0.0,
    mu_dtype: Any | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: Any | Callable[[Any], Any] | None = None,
    *,
    nesterov: bool = False,
    damping: ArrayLike = 0.1,
    relative: bool = True,
    decay: ArrayLike = 0.05,
    sketch_decay: ArrayLike = 0.95,
    every: ArrayLike = 10,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW in coordinates where the mean input of each tapped layer is whitened.

    .. math::  w_{t+1} = w_t - \eta_t \bigl(R_t \cdot \mathrm{Adam}(R_t G_t) + \lambda w_t\bigr)

    with R of `conjugate`. Arguments and defaults are those of `optax.adamw`, whose limit it is for a large damping, and
    those of `conjugate`. Where to start: this, for a model tapped with `tap(model, rank=16)`, at AdamW's learning rate.
    Before long runs try b2 = 0.95 with and without Eva: what Adam sees changes faster in moving coordinates, and the
    benchmarks of this library have it on both sides.

    Args:
      learning_rate: η, a number or a schedule.
      b1: decay of Adam's first moment.
      b2: decay of Adam's second moment; see above for 0.95.
      eps: added to the root of the second moment.
      eps_root: added below the root.
      mu_dtype: dtype of the first moment; the gradient's by default.
      weight_decay: λ, decoupled and in the model's own coordinates; a number or a schedule.
      mask: which parameters decay, as for `optax.adamw`.
      nesterov: Nesterov momentum in Adam.
      damping: of `conjugate`; > 0.
      relative: whether the damping is relative to the squared norm of the mean input.
      decay: weight of the old value in the running mean input, in [0, 1).
      sketch_decay: of `conjugate`.
      every: of `conjugate`.

    Returns:
      An `optax.GradientTransformationExtraArgs`; parameters are needed in `update` for the weight decay.

    Raises:
      ValueError: for an option out of its range, and as `conjugate`.

    Source: this library; AdamW: Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = eva_optax.tap(nn.Dense(2), rank=16), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> tx = eva_optax.eva_adamw(1e-3)
      >>> state = tx.init(params)
      >>> grads = jax.grad(lambda p: model.apply({"params": p}, x).mean())(params)
      >>> updates, state = tx.update(grads, state, params)
    """
    check_positive("eva_adamw", damping=damping)
    check_decay("eva_adamw", decay)
    check_decay("eva_adamw", sketch_decay, "sketch_decay")
    check_positive("eva_adamw", every=every)
    adam = optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
    return optax.chain(
        in_coordinates(
            "eva_adamw",
            lambda tree: adam,
            whitened(damping, relative, every),
            decay,
            sketch_decay,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def eva_muon(
    learning_rate: optax.ScalarOrSchedule,
    ns_steps: int = 5,
    beta: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[Any], Any] | None = None,
    mu_dtype: Any | None = None,
    *,
    nesterov: bool = True,
    adaptive: bool = False,
    adam_b1: ArrayLike = 0.9,
    adam_b2: ArrayLike = 0.999,
    adam_eps_root: ArrayLike = 0.0,
    muon_weight_dimension_numbers: Any | Callable[[Any], Any] | None = None,
    damping: ArrayLike = 0.1,
    relative: bool = True,
    decay: ArrayLike = 0.05,
    sketch_decay: ArrayLike = 0.95,
    every: ArrayLike = 10,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon in coordinates where the mean input of each tapped layer is whitened.

    .. math::  w_{t+1} = w_t - \eta_t \bigl(R_t \cdot \mathrm{Muon}(R_t G_t) + \lambda w_t\bigr)

    with R of `conjugate`, and for Muon `optax.contrib.muon`: it orthogonalizes the momentum of the kernels of tapped
    layers, axes and stacks as the layer has them, and runs Adam on everything else, embeddings included. Arguments that
    it shares with `optax.contrib.muon` keep the defaults that they have there; adam_b2 = 0.95 is worth a try in both.

    Args:
      learning_rate: η, a number or a schedule, of Muon and Adam alike.
      ns_steps: Newton-Schulz iterations.
      beta: decay of Muon's momentum.
      eps: added to denominators, in Muon and Adam.
      weight_decay: λ, decoupled and in the model's own coordinates, for all parameters; a number or a schedule.
      mask: which parameters decay, as for `optax.adamw`.
      mu_dtype: dtype of the momentum; the gradient's by default.
      nesterov: Nesterov momentum, in Muon and Adam.
      adaptive: scale Muon's updates by their dual norm.
      adam_b1: decay of Adam's first moment.
      adam_b2: decay of Adam's second moment.
      adam_eps_root: added below the root in Adam.
      muon_weight_dimension_numbers: a tree of `optax.contrib.MuonDimensionNumbers`, None where Adam runs, or a function
        from the parameters to one, as for `optax.contrib.muon`. By default it is made from the tapped layers.
      damping: of `conjugate`; > 0.
      relative: whether the damping is relative to the squared norm of the mean input.
      decay: weight of the old value in the running mean input, in [0, 1).
      sketch_decay: of `conjugate`.
      every: of `conjugate`.

    Returns:
      An `optax.GradientTransformationExtraArgs`; parameters are needed in `update` for the weight decay.

    Raises:
      ValueError: for an option out of its range, and as `conjugate`.

    Source: this library; Muon: Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024.

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = eva_optax.tap(nn.Dense(2)), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> tx = eva_optax.eva_muon(1e-3)
      >>> state = tx.init(params)
      >>> grads = jax.grad(lambda p: model.apply({"params": p}, x).mean())(params)
      >>> updates, state = tx.update(grads, state, params)
    """
    check_positive("eva_muon", damping=damping)
    check_decay("eva_muon", sketch_decay, "sketch_decay")
    check_positive("eva_muon", every=every)
    check_decay("eva_muon", decay)
    muon = partial(
        scale_by_muon,
        dimension_numbers=muon_weight_dimension_numbers,
        ns_steps=ns_steps,
        beta=beta,
        eps=eps,
        mu_dtype=mu_dtype,
        nesterov=nesterov,
        adaptive=adaptive,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        adam_eps_root=adam_eps_root,
    )
    return optax.chain(
        in_coordinates("eva_muon", muon, whitened(damping, relative, every), decay, sketch_decay),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
