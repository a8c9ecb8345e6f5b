"""One step of the running averages: what is new of each layer enters them, and what is not finite does not."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from eva_optax._probes.fusion import materialize
from eva_optax._probes.statistics import FACTORS, OUTPUTS, TRACE
from eva_optax._probes.vectors import Scales

Vectors = dict[str, Array]


def has_weights(averages: Mapping[str, Any]) -> bool:
    """Whether there are second moments among them, whose averages count how much went into them."""
    return not averages.keys().isdisjoint((TRACE, *FACTORS))


def update_moving_average(
    new: Vectors, old: Vectors, started: Array, scales: Scales | None, decay: ArrayLike
) -> Vectors:
    """m ← decay·m + (1 − decay)·new for the stacked vectors of some layers, the first value as it is.

    Without meaning where a layer was not used, or its vectors are not finite (see `keep_finite`).

    Args:
      new: what the probes received, or the statistics themselves where `scales` is None.
      old: the averages.
      started: whether there is an average.
      scales: what `new` has to be multiplied by.
      decay: the weight of the old value.
    """
    weight = jnp.where(started == 0, 0, jnp.asarray(decay, started.dtype))

    def mixed(name: str) -> Array:
        share = 1 - weight if scales is None else (1 - weight) * _scale(scales, name)
        return weight * old[name] + share * new[name]

    return materialize({name: mixed(name) for name in old})


def update_weighted_average(
    new: Vectors, old: Vectors, weight: Array, scales: Scales | None, decay: ArrayLike
) -> Vectors:
    """m ← (decay·w·m + new) / (decay·w + 1), with w the weight of what has been averaged so far.

    One batch does not tell a second moment: so that the first ones count alike, each older one `decay` times less.
    """
    assert scales is not None  # second moments come from a tap
    share = 1 / (jnp.asarray(decay, weight.dtype) * weight + 1)
    factors = {name: _scale(scales, name) for name in old}
    return materialize({name: old[name] + share * (factors[name] * new[name] - old[name]) for name in old})


def _scale(scales: Scales, name: str) -> Array:
    return {"a": scales.mean, "b": scales.total, OUTPUTS: scales.square}.get(name, scales.moment)


def keep_finite(valid: Array, new: Vectors, old: Vectors) -> Vectors:
    """The averages: the new ones where they are valid."""
    return materialize({name: jnp.where(valid, new[name], old[name]) for name in old})
