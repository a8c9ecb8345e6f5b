"""AdamW and Muon with the whole second moment of each layer's inputs: ready-made optimizers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import optax
from jax.typing import ArrayLike

from eva_optax._curvature.curvature import Damping
from eva_optax._curvature.kronecker import Recipe
from eva_optax._transforms.changes import whitened
from eva_optax._transforms.coordinates import in_coordinates
from eva_optax._transforms.factored import Averaging, precondition_by_factors
from eva_optax._transforms.hidden_probes import without_probes
from eva_optax._transforms.muon import scale_by_muon
from eva_optax._transforms.options import check_decay, check_positive


def foof_adamw(
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
    decay: ArrayLike = 0.95,
    every: ArrayLike = 10,
) -> optax.GradientTransformationExtraArgs:
    r"""AdamW in coordinates where the inputs of each tapped layer are whitened, all directions of them.

    .. math::
      w_{t+1} = w_t - \eta_t \bigl(R_t \cdot \mathrm{Adam}(R_t G_t) + \lambda w_t\bigr), \qquad
      R = \Bigl(\frac{\bar A + \mathrm{damping}\, I}{1 + \mathrm{damping}}\Bigr)^{-1/2}

    with Ā the second moment of the inputs of `scale_by_foof`. FOOF before Adam would be undone by it: Adam divides each
    entry by its size. This is `eva_adamw` for a model tapped with ``tap(model, factors="input")``; one
    tapped with "both" is whitened on the side of its outputs, too.

    Args:
      learning_rate: η, a number or a schedule.
      b1: decay of Adam's first moment.
      b2: decay of Adam's second moment; try 0.95, as for `eva_adamw`.
      eps: added to the root of the second moment.
      eps_root: added below the root.
      mu_dtype: dtype of the first moment; the gradient's by default.
      weight_decay: λ, decoupled and in the model's own coordinates; a number or a schedule.
      mask: which parameters decay, as for `optax.adamw`.
      nesterov: Nesterov momentum in Adam.
      damping: of A, in units of its mean eigenvalue, or γ in R = (I + A/γ)^(−½); > 0.
      relative: whether the damping is relative.
      decay: weight of the old value in the running averages, in [0, 1).
      every: how many steps R is kept; in the first ones it is made anew in each.

    Returns:
      An `optax.GradientTransformationExtraArgs`; parameters are needed in `update` for the weight decay. Probes have no
      moments.

    Raises:
      ValueError: for an option out of its range, and as `conjugate`.

    Source: this library; FOOF: Benzing, ICML 2022; AdamW: Loshchilov and Hutter, ICLR 2019.

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = eva_optax.tap(nn.Dense(2), factors="input"), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> tx = eva_optax.foof_adamw(1e-3)
      >>> state = tx.init(params)
      >>> grads = jax.grad(lambda p: model.apply({"params": p}, x).mean())(params)
      >>> updates, state = tx.update(grads, state, params)
    """
    check_positive("foof_adamw", damping=damping, every=every)
    check_decay("foof_adamw", decay)
    adam = optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov)
    return optax.chain(
        in_coordinates("foof_adamw", lambda tree: adam, whitened(damping, relative, every), decay, decay),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def foof_muon(
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
    damping: ArrayLike = 0.2,
    relative: bool = True,
    decay: ArrayLike = 0.95,
    every: ArrayLike = 10,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon behind FOOF: Newton-Muon.

    .. math::
      w_{t+1} = w_t - \eta_t \bigl(\mathrm{Muon}((\bar A_t + \mathrm{damping}\, I)^{-1} G_t) + \lambda w_t\bigr)

    with Ā of `scale_by_foof`, and for Muon `optax.contrib.muon`: it orthogonalizes the momentum of the preconditioned
    gradients of the kernels of tapped layers, axes and stacks as the layer has them, and runs Adam on everything else,
    embeddings included. Tap the model with ``tap(model, factors="input")``. `eva_muon` with the same tap has the root
    of the same matrix on both sides of Muon.

    Args:
      learning_rate: η, a number or a schedule, of Muon and Adam alike.
      ns_steps: Newton-Schulz iterations.
      beta: decay of Muon's momentum.
      eps: added to denominators, in Muon and Adam.
      weight_decay: λ, decoupled, for all parameters; a number or a schedule.
      mask: which parameters decay, as for `optax.adamw`.
      mu_dtype: dtype of the momentum; the gradient's by default.
      nesterov: Nesterov momentum, in Muon and Adam.
      adaptive: scale Muon's updates by their dual norm.
      adam_b1: decay of Adam's first moment.
      adam_b2: decay of Adam's second moment.
      adam_eps_root: added below the root in Adam.
      muon_weight_dimension_numbers: as for `eva_muon`.
      damping: of A, in units of its mean eigenvalue, or γ; > 0.
      relative: whether the damping is relative.
      decay: weight of the old value in the running averages, in [0, 1).
      every: how many steps inverses are kept; in the first ones they are made anew in each.

    Returns:
      An `optax.GradientTransformationExtraArgs`; parameters are needed in `update` for the weight decay. Probes have no
      momentum.

    Raises:
      ValueError: for an option out of its range, and as `scale_by_foof`.

    Source: "Newton-Muon", arXiv:2604.01472 (the damping of 0.2); Muon: Jordan et al., 2024.

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = eva_optax.tap(nn.Dense(2), factors="input"), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> tx = eva_optax.foof_muon(1e-3)
      >>> state = tx.init(params)
      >>> grads = jax.grad(lambda p: model.apply({"params": p}, x).mean())(params)
      >>> updates, state = tx.update(grads, state, params)
    """
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
        precondition_by_factors("foof_muon", Recipe(), Damping(damping, relative), Averaging(decay), every),
        without_probes(muon),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
