"""Shampoo, which preconditions every axis of a gradient with a root of its second moment; needs no tap."""

import optax
from jax.typing import ArrayLike

from eva_optax._transforms.axis_roots import Graft, Options, precondition_axes


def scale_by_shampoo(
    epsilon: ArrayLike = 1e-6,
    *,
    relative: bool = True,
    decay: ArrayLike = 0.999,
    exponent: ArrayLike | None = None,
    block: int = 1024,
    merge: bool = True,
    every: ArrayLike = 20,
    start: ArrayLike = 20,
    graft: Graft | None = "adam",
    graft_decay: ArrayLike = 0.999,
    graft_epsilon: ArrayLike = 1e-8,
    b1: ArrayLike = 0.0,
) -> optax.GradientTransformation:
    r"""Preconditions each axis of each parameter with a root of its gradients' second moment: Shampoo.

    With G₍ₖ₎ the gradient as a matrix whose rows are its axis k, o the number of its axes, λ the largest eigenvalue of
    L_k, and ×ₖ the product along axis k,

    .. math::
      L_k \leftarrow \mathrm{decay}\, L_k + (1 - \mathrm{decay})\, G_{(k)} G_{(k)}^\top, \qquad
      R_k = \bigl(L_k + \varepsilon \lambda I\bigr)^{-1/(2o)}, \qquad P = G \times_1 R_1 \times_2 R_2 \cdots

    with averages corrected for their start. Each P then gets the length of the step that another method takes, which
    is *grafted* to it. Parameters of any rank are preconditioned: a vector with one matrix to the power -1/2; scalars
    take the step of the grafted method. It needs no tap; a tapped model may be given too, its probes get zero and are
    not looked at. A stack of scanned layers is one tensor to it.

    What it costs are two matrix products for each axis, and every so many steps an eigenvalue problem for each axis of
    each block. These are stacked by size, and within `jax.set_mesh(mesh)` each device of the mesh does its share of
    each stack. Two matrices are kept for each axis of a block: two of 1,024 × 1,024 for a bias of 1,024 entries, which
    `optax.partition` may give to another optimizer.

    Args:
      epsilon: ε > 0, relative to λ; in L_k + εI with `relative=False`. Number or scalar array.
      relative: whether ε is relative, which makes the direction of P the same for any scale of the loss.
      decay: weight of the old value in L_k, in [0, 1]; with 1 it is the sum, as in the first publication.
      exponent: a negative number in the place of -1/(2o), for all parameters.
      block: the largest matrix. Longer axes are cut into pieces, and a parameter into blocks, of which each has its
        own L_k, P and length.
      merge: whether adjacent axes are merged as long as their product is not greater than `block`: into as few as
        possible, but not less than two, and these as small as possible. A kernel of (3, 3, 16, 32) is (144, 32) then.
      every: how many steps the roots are kept: they are made at `start`, and then in each step that this divides.
      start: the first step that has roots. Before it the grafted step is taken, the gradient itself for None.
      graft: the method that gives the length: "grad", the gradient; "rms", the gradient divided by the root of the
        running mean of its squares; "adam", the same with the mean corrected for its start. None keeps P as it is.
      graft_decay: weight of the old value in the running mean of squares.
      graft_epsilon: added to its root; > 0.
      b1: weight of the old value in a running mean of gradients, which is preconditioned and grafted in the gradient's
        place. Statistics are always those of gradients. 0 keeps none; momentum of P is an `optax.trace` behind.

    Returns:
      An `optax.GradientTransformation` with state `ShampooState`. All that is kept is float32 (float64 beside float64
      parameters); updates have the gradients' shapes and dtypes. The gradient of a parameter that is not finite, or
      whose squares are not, is passed on as it is and not averaged; a block whose new roots are not finite keeps its
      old ones. Both are counted in `skipped`. Blocks that never had a gradient have the identity.

    Raises:
      ValueError: for an option out of its range; at update, if the state is no `ShampooState` or does not fit.

    Source: Gupta, Koren and Singer, "Shampoo: Preconditioned Stochastic Tensor Optimization", ICML 2018; blocks and
    grafting: Anil et al., arXiv:2002.09018; the order of operations: Shi et al., arXiv:2309.06497.

    Example:
      >>> import eva_optax, jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> tx = optax.chain(eva_optax.scale_by_shampoo(start=1, graft=None), optax.scale_by_learning_rate(0.1))
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"kernel": jnp.diag(jnp.array([3.0, -0.5]))}, state, params)
      >>> print(jnp.diag(updates["kernel"]).round(3))  # the first gradient, G = U S Vᵀ, becomes U Vᵀ
      [-0.1  0.1]
    """
    options = Options(
        epsilon, relative, decay, exponent, block, merge, every, start, graft, graft_decay, graft_epsilon, b1
    )
    return precondition_axes("scale_by_shampoo", options)


def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    epsilon: ArrayLike = 1e-12,
    *,
    relative: bool = False,
    decay: ArrayLike = 0.999,
    exponent: ArrayLike | None = None,
    block: int = 1024,
    merge: bool = True,
    every: ArrayLike = 100,
    start: ArrayLike | None = None,
    graft: Graft | None = "adam",
    graft_decay: ArrayLike = 0.999,
    graft_epsilon: ArrayLike = 1e-8,
    b1: ArrayLike = 0.9,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: optax.ScalarOrSchedule = 0.0,
) -> optax.GradientTransformation:
    r"""Distributed Shampoo as published, in the place of Adam: averaged gradients, absolute ε, Adam's lengths.

    .. math::
      d_t = P_t + \lambda w_t, \quad m_t = \mu m_{t-1} + d_t, \quad w_{t+1} = w_t - \eta_t m_t

    with P of `scale_by_shampoo` for the average of gradients with b1, and with Nesterov momentum :math:`d_t + \mu m_t`
    in the place of :math:`m_t`. Learning rate, b1, decays and weight decay of AdamW are where to start from. In the
    place of SGD with momentum: ``shampoo(learning_rate, b1=0.0, graft="grad", momentum=0.9)``.

    Args:
      learning_rate: η, a number or a schedule.
      epsilon: ε > 0. Less than the resolution of the dtype relative to λ counts as that.
      relative: of `scale_by_shampoo`.
      decay: of `scale_by_shampoo`.
      exponent: of `scale_by_shampoo`.
      block: of `scale_by_shampoo`.
      merge: of `scale_by_shampoo`. The original merges up to `block` without an end, small matrices into vectors.
      every: of `scale_by_shampoo`.
      start: of `scale_by_shampoo`; `every` by default.
      graft: of `scale_by_shampoo`.
      graft_decay: of `scale_by_shampoo`.
      graft_epsilon: of `scale_by_shampoo`.
      b1: of `scale_by_shampoo`.
      momentum: μ.
      nesterov: Nesterov momentum.
      weight_decay: λ. It enters the momentum, and is neither preconditioned nor grafted.

    Returns:
      An `optax.GradientTransformation`; parameters are needed in `update` for the weight decay.

    Raises:
      ValueError: for an option out of its range, and as `scale_by_shampoo`.

    Source: Shi et al., "A Distributed Data-Parallel PyTorch Implementation of the Distributed Shampoo Optimizer",
    arXiv:2309.06497; github.com/facebookresearch/optimizers for the order of the operations.

    Example:
      >>> import eva_optax, jax.numpy as jnp
      >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
      >>> tx = eva_optax.shampoo(1e-3, every=10)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
    """
    start = every if start is None else start
    options = Options(
        epsilon, relative, decay, exponent, block, merge, every, start, graft, graft_decay, graft_epsilon, b1
    )
    without = isinstance(momentum, int | float) and momentum == 0
    return optax.chain(
        precondition_axes("shampoo", options),
        optax.add_decayed_weights(weight_decay),
        optax.identity() if without else optax.trace(momentum, nesterov),
        optax.scale_by_learning_rate(learning_rate),
    )
