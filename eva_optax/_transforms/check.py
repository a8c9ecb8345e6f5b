"""`check`: whether training went as it was asked to, from what the state has counted."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from eva_optax._probes.probe import COUNTER
from eva_optax._transforms.diagnostics import State, averages_by_layer, find_states
from eva_optax._transforms.state import ShampooState
from eva_optax._transforms.untapped import UNTAPPED

_MOST_NAMES = 5


def check(state: Any) -> None:
    r"""Raises an error if layers were skipped, or steps went past the taps, since the state was made.

    Compiled steps cannot raise; they count, and this reads the two counters:

    .. math::
      \mathrm{untapped} = \sum_t [\text{no layer had vectors, some tapped layer had a gradient}], \qquad
      \mathrm{skipped} = \sum_t \sum_l [\text{the vectors of layer } l \text{ had no meaning}]

    Call it after the first step, and whenever you log; it waits for the step, and copies a few numbers. A layer that a
    step does not use is not counted, and neither is a step whose gradients are all zero, as loss scaling makes them.
    Weight decay before Eva does give such a step gradients. Counters add up: ``optax.tree.set(state, skipped=0,
    untapped=0)`` starts anew; to live with some skipped steps, log `diagnostics` instead.

    Args:
      state: an optimizer's state with a state of this library anywhere in it: of `chain`, `MultiSteps`,
        `inject_hyperparams`, a `TrainState`, an `nnx.Optimizer`.

    Returns:
      None.

    Raises:
      ValueError: if something was counted, with the reason; if there is no such state; under `jit`.

    Source: this library.

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp
      >>> plain, x = nn.Dense(2), jnp.ones((4, 3))
      >>> params = eva_optax.tap(plain).init(jax.random.key(0), x)["params"]
      >>> tx = eva_optax.scale_by_eva()
      >>> grads = jax.grad(lambda p: plain.apply({"params": p}, x).sum())(params)  # not the tapped model
      >>> updates, state = jax.jit(tx.update)(grads, tx.init(params))
      >>> try:
      ...   eva_optax.check(state)
      ... except ValueError as error:
      ...   print(str(error)[:76])
      eva_optax.check: in 1 step, tapped layers had gradients, but no layer had ve
    """
    for found in find_states("check", state):
        counters = found.skipped, 0 if isinstance(found, ShampooState) else found.untapped
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(counters)):
            raise ValueError(
                "eva_optax.check: the state is traced, and its numbers are not known yet. Call it outside of jit, on "
                "the state that the step returns; inside, eva_optax.diagnostics(state) gives the same counters."
            )
        skipped, untapped = map(_total, counters)
        if untapped:
            steps = "1 step" if untapped == 1 else f"{untapped} steps"
            raise ValueError(f"eva_optax.check: in {steps}, {UNTAPPED}")
        if skipped:
            raise ValueError(_skipped_message(found, skipped))


def _total(counter: Any) -> int:
    """The sum of a counter, also of an ensemble's, also in the box that NNX puts around it."""
    return sum(int(np.sum(jax.device_get(leaf))) for leaf in jax.tree.leaves(counter))


def _skipped_message(state: State, skipped: int) -> str:
    if isinstance(state, ShampooState):
        return (
            f"eva_optax.check: {skipped} times a gradient or the roots of a block were not finite. Look for gradients "
            "that are NaN, or whose squares overflow; if all of them are finite, raise epsilon."
        )
    names = list(_never_averaged(state))
    shown = ", ".join(map(repr, names[:_MOST_NAMES])) + (", …" if len(names) > _MOST_NAMES else "")
    return (
        f"eva_optax.check: layers were skipped {skipped} times, because their vectors or the squares of these were not "
        "finite, because their factors could not be inverted, or because something scaled the entries of their probes' "
        "gradients each for itself. "
        + (f"These layers never had an average: {shown}. " if names else "All layers had an average at some time. ")
        + "Look for activations that overflow or are NaN, and for what changes gradients before Eva: it comes first in "
        "a chain, before Adam, signs and noise. In the latter case an update outside of jit names the layer."
    )


def _never_averaged(state: Any) -> Iterator[str]:
    """The names of the layers that have no average in a state."""
    layers, names = averages_by_layer(state)
    (scalars,) = jax.device_get(jax.tree.leaves(state.scalars))
    plain = iter(np.moveaxis(scalars, -1, 0)[: scalars.shape[-1] // 2])
    for path, averages in layers.items():
        numbers = jax.device_get(averages[COUNTER]) if COUNTER in averages else next(plain)
        if not np.any(numbers):
            yield names.get(path, "/".join(path))
