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
    step_rule: StepRule, products: list[Products], kl_clip: ArrayLike, rate: ArrayLike, dtype: DTypeLike
) -> Array:
    """ν from the products of all healthy layers; 1 where it is not defined, and for the rules that share none."""
    if step_rule in ("none", "layer_grad_norm"):
        return jnp.ones((), dtype)
    gg = pg = pp = jnp.zeros((), dtype)
    for layer in products:
        here = [jnp.sum(product).astype(dtype) for product in layer]
        gg, pg, pp = gg + here[0], pg + here[1], pp + here[2]
    if step_rule == "kl_clip":
        nu = _root_or_one(jnp.asarray(kl_clip, dtype), jnp.asarray(rate, dtype) ** 2 * pg)
        return jnp.minimum(nu, 1)
    return _root_or_one(jnp.ones((), dtype), pg) if step_rule == "kl_norm" else _root_or_one(gg, pp)


def layer_factor(step_rule: StepRule, products: Products) -> tuple[Array, Array]:
    """‖G‖ / ‖P‖ of each independent layer by "layer_grad_norm", else 1; and where P is more than rounding error.

    Where the curvature takes out all of G, P is G again once it has its length: direction and quotient would be noise.
    """
    gg, _, pp = products
    if step_rule != "layer_grad_norm":
        return jnp.ones_like(gg), jnp.ones_like(gg, bool)
    return _root_or_one(gg, pp), pp > 64 * jnp.finfo(pp.dtype).eps * gg


def _root_or_one(numerator: Array, denominator: Array) -> Array:
    defined = denominator > 0
    return jnp.where(defined, jnp.sqrt(numerator / jnp.where(defined, denominator, 1)), 1)
