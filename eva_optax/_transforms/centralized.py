"""Mean inputs that `optax.centralize` was applied to: it takes the mean over all axes but the first out of each leaf.

A dense layer's mean input has one entry there, and becomes zero: nothing would be left of Eva, without a sign.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

# Of a sum to what was summed, squared: far above rounding, far below what vectors have.
_CENTRED = 1e-9
# It does so to all layers; each that is looked at adds to every step.
_MOST = 4


def are_centralized(
    caller: str, mean_inputs: Sequence[Array], used: Sequence[Array], gradients: Sequence[Array]
) -> Array | None:
    """Whether the rows of mean inputs, of some if they are many, sum to zero; None for a single one: it may by chance.

    Args:
      caller: for the message.
      mean_inputs: stacked along a new first axis, in one array or several.
      used: which of the layers were used in this step.
      gradients: of the layers' kernels. Inputs of zero have a mean of zero too, but leave no gradient: the smallest
        that is more than one column, which would itself be centred away, tells.

    Raises:
      ValueError: if it is so, and the values are known (not under `jit`).
    """
    told = [gradient for gradient in gradients if gradient.size > len(gradient)]
    if sum(map(len, mean_inputs)) < 2 or not told:
        return None
    some = slice(_MOST)
    found = jnp.zeros((), bool)
    for each in used[some]:
        found = found | each.any()
    found = found & jnp.any(min(told, key=lambda gradient: gradient.size) != 0)
    for a in mean_inputs[some]:
        rows = jnp.sum(a, range(2, a.ndim))
        squares = jnp.sum(jnp.square(a))
        found = found & (jnp.sum(jnp.square(rows)) <= _CENTRED * squares) & jnp.isfinite(squares)
    if not isinstance(found, Tracer) and found.is_fully_addressable and bool(found):
        raise ValueError(
            f"eva_optax.{caller}: the mean inputs of all layers are centred, as optax.centralize leaves them: nothing "
            "is left of a dense layer's. Put Eva first: optax.chain(eva_optax.scale_by_eva(), optax.centralize(), ...)."
        )
    return found
