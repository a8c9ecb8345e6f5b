"""How long the step is: the factor ν that all preconditioned layers share, or one for each layer."""

from typing import Any, Literal, get_args

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

StepRule = Literal["none", "kl_clip", "kl_norm", "grad_norm", "layer_grad_norm"]
Products = tuple[Array, Array, Array]  # ⟨G, G⟩, ⟨P, G⟩, ⟨P, P⟩ of the independent layers of one parameter


def check_step_rule(caller: str, step_rule: Any) -> None:
    """Raises ValueError for a rule that there is not."""
    if step_rule not in get_args(StepRule):
        raise ValueError(f"eva_optax.{caller}: step_rule must be one of {get_args(StepRule)}, got {step_rule!r}.")


def shared_factor(
    step_rule: StepRule, products: list[Any], kl_clip: ArrayLike, rate: ArrayLike, dtype: DTypeLike
) -> Array:
    """ν from the summed products of all valid layers, group by group; 1 where it is not defined or shared."""
    if step_rule in ("none", "layer_grad_norm") or not products:
        return jnp.ones((), dtype)
    zero = jnp.zeros((), dtype)
    gg, pg, pp = (sum((part.astype(dtype) for part in parts), start=zero) for parts in zip(*products, strict=True))
    if step_rule == "kl_clip":
        nu = _root_or_one(jnp.asarray(kl_clip, dtype), jnp.asarray(rate, dtype) ** 2 * pg)
        return jnp.minimum(nu, 1)
    return _root_or_one(jnp.ones((), dtype), pg) if step_rule == "kl_norm" else _root_or_one(gg, pp)


def layer_factor(products: Products) -> tuple[Array, Array]:
    """Grafting: ‖G‖ / ‖P‖ of each layer, and where P is more than rounding error.

    Where the curvature takes out all of G, P is G again once it has its length: direction and quotient would be noise.
    """
    gg, _, pp = products
    return _root_or_one(gg, pp), pp > 64 * jnp.finfo(pp.dtype).eps * gg


def _root_or_one(numerator: Array, denominator: Array) -> Array:
    defined = denominator > 0
    return jnp.where(defined, jnp.sqrt(numerator / jnp.where(defined, denominator, 1)), 1)
