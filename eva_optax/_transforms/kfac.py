"""`scale_by_kfac`: the second moments of each layer's inputs and of the cotangents of its outputs."""

import optax
from jax.typing import ArrayLike

from eva_optax._curvature.curvature import Damping
from eva_optax._curvature.kronecker import Recipe, Split
from eva_optax._transforms.driver import Rate
from eva_optax._transforms.factored import Averaging, precondition_by_factors
from eva_optax._transforms.step_size import StepRule


def scale_by_kfac(
    damping: ArrayLike = 0.1,
    *,
    relative: bool = True,
    split: Split = "pi",
    decay: ArrayLike = 0.95,
    every: ArrayLike = 10,
    step_rule: StepRule = "none",
    kl_clip: ArrayLike = 1e-3,
    learning_rate: Rate = 1.0,
) -> optax.GradientTransformation:
    r"""Preconditions the gradient of each tapped layer with the Kronecker factors of its Fisher matrix: K-FAC.

    With G the gradient of kernel and bias as one matrix, A the running second moment of the inputs (with a 1 for the
    bias), B that of the output cotangents, Ā and B̄ the two in units of their mean eigenvalues, δ the relative and γ the
    absolute damping, and π² the ratio of the mean eigenvalues of A and B,

    ========  ==========================================  ==========================================================
    split     relative                                    absolute
    ========  ==========================================  ==========================================================
    "pi"      :math:`(1+δ)^2 (\bar A + δI)^{-1} G         :math:`(A + π\sqrt{γ} I)^{-1} G (B + \sqrt{γ}/π\, I)^{-1}`
              (\bar B + δI)^{-1}`
    "eigen"   :math:`(1+δ) (\bar A ⊗ \bar B + δI)^{-1} G`  :math:`(A ⊗ B + γI)^{-1} G`, exact in eigenvectors
    ========  ==========================================  ==========================================================

    Tap the model with ``tap(model, factors="both")``. A side that is larger than its `max_dim` keeps its vector, a or
    b, and is inverted by Sherman's and Morrison's formula; such a layer, and an embedding, whose A is diagonal, is
    split by "pi". `scale_by_foof` is the case B = I.

    B is the empirical Fisher matrix's, of the gradient of the loss. For that of sampled labels see `merge_factors`.
    Absolute damping is in units of the curvature of the loss that is differentiated: a summed loss needs more than a
    mean. B is quadratic in the gradients that arrive: clipping by the global norm belongs behind, since in front it
    would weigh the steps of the average. How factors are formed, held and masked is as for `scale_by_foof`.

    Args:
      damping: δ or γ, see above; > 0. Number or scalar array.
      relative: scale-free damping: isotropic factors leave the gradient as it is, at any scale.
      split: how the two factors share the damping.
      decay: weight of the old value in the running averages, in [0, 1). The first values count alike.
      every: how many steps inverses are kept; in the first ones they are made anew in each.
      step_rule: how long the step is, as for `scale_by_eva`.
      kl_clip: κ of "kl_clip"; > 0.
      learning_rate: η of "kl_clip": the rate, or the schedule, that is applied after this transformation.

    Returns:
      An `optax.GradientTransformation` with state `ScaleByKfacState`, as `scale_by_foof`.

    Raises:
      ValueError: for an option out of its range; at init, if the model is not tapped for both factors; and as
        `scale_by_eva`.

    Source: Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015
    ("pi" is their section 6.3); convolutions: Grosse and Martens, ICML 2016; exact inverses: George et al., "Fast
    Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis", NeurIPS 2018.

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> model, x = eva_optax.tap(nn.Dense(2), factors="both"), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> sgd = optax.masked(optax.sgd(0.1, momentum=0.9), eva_optax.not_probes)
      >>> tx = optax.chain(eva_optax.scale_by_kfac(), sgd)
      >>> grads = jax.grad(lambda p: model.apply({"params": p}, x).sum(-1).mean())(params)
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> eva_optax.check(state)
    """
    kept = Damping(damping, relative, keep_scale=step_rule == "kl_norm")
    recipe, averaging = Recipe(two_sided=True, split=split), Averaging(decay)
    return precondition_by_factors("scale_by_kfac", recipe, kept, averaging, every, step_rule, kl_clip, learning_rate)
