"""`scale_by_eva_s`: Eva with the gradient's own means as its vectors; needs no tap."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from eva_optax._options import check_decay, check_positive
from eva_optax._pairing import is_probe, path_names
from eva_optax._precondition import Rate, ScaleByEvaState
from eva_optax._rank_one import safe_divide
from eva_optax._running import check_state
from eva_optax._step_rule import Products, StepRule, check_step_rule, layer_factor, shared_factor
from eva_optax._tap import accumulator, shard_like

Means = tuple[Array, ...]


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
      An `optax.GradientTransformation` with state `ScaleByEvaState`, whose vectors are a tuple v₁ … v_k in the place of
      each parameter, in its rank. Averages are float32 (float64 beside float64 parameters); updates have the gradients'
      shapes and dtypes. A gradient that is not finite is passed on, is not averaged, and is counted in `skipped`.

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
    check_positive("scale_by_eva_s", damping=damping, kl_clip=kl_clip)
    check_decay("scale_by_eva_s", decay)
    check_step_rule("scale_by_eva_s", step_rule)

    def init(params: Any) -> ScaleByEvaState:
        means = _map_tensors(lambda leaf: _means(jnp.zeros_like(leaf, dtype=accumulator(leaf.dtype))), params)
        dtype = jnp.result_type(jnp.float32, *(leaf.dtype for leaf in jax.tree.leaves(means)))
        zeros = _map_tensors(lambda leaf: jnp.zeros((), accumulator(leaf.dtype)), params)
        figures = {"norm": zeros, "cosine": jax.tree.map(jnp.copy, zeros)}
        count = jnp.zeros((), jnp.int32)
        return ScaleByEvaState(count, means, jnp.zeros_like(count), jnp.ones((), dtype), figures)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ScaleByEvaState]:
        del params
        check_state("scale_by_eva_s", state, ScaleByEvaState)
        read = partial(_read, damping=damping, relative=relative, decay=decay)
        steps = _map_tensors(read, updates, state.vectors, state.figures["cosine"])
        found = [step for step in jax.tree.leaves(steps, is_leaf=_is_step) if _is_step(step)]
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        nu = shared_factor(step_rule, [step.healthy_products for step in found], kl_clip, rate, state.nu.dtype)

        def pick(name: str) -> Any:
            return jax.tree.map(lambda step: getattr(step, name), steps, is_leaf=_is_step)

        def write(path: Any, leaf: Array, step: Any) -> Array:
            if _is_step(step):
                return _write(leaf, step, nu, step_rule)
            return jnp.zeros_like(leaf) if is_probe(path_names(path)) else leaf

        new_state = ScaleByEvaState(
            jnp.asarray(optax.safe_increment(state.count)),
            pick("means"),
            state.skipped + sum(jnp.asarray(~step.healthy, jnp.int32) for step in found),
            nu,
            {"norm": pick("norm"), "cosine": pick("cosine")},
        )
        return jax.tree_util.tree_map_with_path(write, updates, steps), new_state

    return optax.GradientTransformation(init, update)


class _Step(NamedTuple):
    """What was found about one tensor: P = G − weight · V, V of length 1."""

    means: Means
    units: Means  # the means, each with length 1
    weight: Array
    products: Products
    healthy: Array
    norm: Array
    cosine: Array

    @property
    def healthy_products(self) -> Products:
        gg, pg, pp = (jnp.where(self.healthy, product, 0) for product in self.products)
        return gg, pg, pp


def _is_step(value: Any) -> bool:
    return isinstance(value, _Step)


def _map_tensors(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Maps over the matrices and tensors of `tree`; an `optax.MaskedNode` for everything else."""

    def on_tensor(path: Any, leaf: Any, *others: Any) -> Any:
        tensor = leaf.ndim >= 2 and leaf.size > 0 and not is_probe(path_names(path))
        return function(leaf, *others) if tensor else optax.MaskedNode()

    return jax.tree_util.tree_map_with_path(on_tensor, tree, *rest)


def _means(gradient: Array) -> Means:
    """v₁ … v_k in the gradient's rank."""
    axes = range(gradient.ndim)
    return tuple(jnp.mean(gradient, [other for other in axes if other != axis], keepdims=True) for axis in axes)


def _read(
    gradient: Array,
    old: Means,
    old_cosine: Array,
    *,
    damping: ArrayLike,
    relative: bool,
    decay: ArrayLike,
) -> _Step:
    """Averages the means of one tensor's gradient and takes its sums."""
    gradient = jnp.asarray(gradient).astype(accumulator(gradient.dtype))
    new, gg = _means(gradient), jnp.sum(gradient * gradient)
    healthy = jnp.isfinite(gg)
    first = jnp.all(jnp.stack([jnp.all(mean == 0) for mean in old]))
    means = []
    for mean, value in zip(old, new, strict=True):
        weight = jnp.asarray(decay, mean.dtype)
        running = jnp.where(first, value, weight * mean + (1 - weight) * value)
        means.append(jnp.where(healthy, running, mean))
    # The length of each mean is taken out first: the product of all, squared, leaves the range of float32 soon.
    norms = [jnp.sqrt(jnp.sum(mean * mean)) for mean in means]
    units = tuple(safe_divide(mean, norm) for mean, norm in zip(means, norms, strict=True))
    norm = math.prod(norms[1:], start=norms[0])
    along = jnp.sum(gradient * _outer(units))
    share = 1 / (1 + jnp.asarray(damping, norm.dtype)) if relative else norm**2 / (damping + norm**2)
    weight = share * along
    gv, vv = weight * along, weight**2
    return _Step(
        tuple(means),
        units,
        weight,
        (gg, gg - gv, jnp.maximum(gg - 2 * gv + vv, 0)),
        healthy,
        norm,
        jnp.where(healthy, safe_divide(along, jnp.sqrt(gg)), old_cosine),
    )


def _outer(vectors: Means) -> Array:
    """v₁ ⊗ … ⊗ v_k."""
    return math.prod(vectors[1:], start=vectors[0])


def _write(gradient: Array, step: _Step, nu: Array, step_rule: StepRule) -> Array:
    """The update of one tensor, with the gradient's dtype and sharding."""
    factor, known = layer_factor(step_rule, step.products)
    usable = step.healthy & known
    factor = jnp.where(usable, factor * nu.astype(factor.dtype), 1)
    removed = jnp.where(usable, step.weight, 0) * _outer(step.units)
    update = factor * (gradient.astype(factor.dtype) - removed)
    return shard_like(update.astype(gradient.dtype), gradient)
