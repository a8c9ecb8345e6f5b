"""Steps that go past the taps: layers that have probes get a gradient, and none of the probes gets one.

The model's own `apply`, or a function that was jitted before the model was tapped, trains as if there were no Eva; so
does a second transformation of the family in a chain, since the first one gives probes zeros.
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

UNTAPPED = (
    "tapped layers had gradients, but no layer had vectors: the loss did not run the tapped model. It called the apply "
    "of the model that is not tapped, or a function that was jitted before the model was tapped: call model.apply of "
    "model = eva_optax.tap(model), and jit the step after that. Or the vectors were lost on the way: by a cast of the "
    "gradients to float16, where they are zero, or by another transformation of eva_optax before this one in the "
    "chain, which uses them up: one of them is enough."
)


def is_untapped(caller: str, used: Sequence[Array], unseen: Sequence[Array]) -> Array:
    """Whether no layer was used in this step, though some have gradients that are not zero.

    Args:
      caller: for the message.
      used: which layers were used, in arrays of any shapes.
      unseen: which layers were not, though they have a gradient.

    Raises:
      ValueError: if it is so, and the values are known (not under `jit`).
    """
    if not used:
        return jnp.zeros((), bool)
    some_used, some_unseen = (jnp.concatenate([part.ravel() for part in parts]).any() for parts in (used, unseen))
    untapped = some_unseen & ~some_used
    if not isinstance(untapped, Tracer) and untapped.is_fully_addressable and bool(untapped):
        raise ValueError(f"eva_optax.{caller}: {UNTAPPED}")
    return untapped
