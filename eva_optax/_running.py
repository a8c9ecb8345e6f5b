"""Running averages of the Kronecker vectors: a tree shaped like the parameters, and how a step enters it.

In the state each probe holds the averages of its vectors, and in `n` 1 as soon as there is one; everything else is an
`optax.MaskedNode`. A vector is taken in only if the layer was used and vectors and gradient are finite; what is not
taken in leaves the average as it was.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from eva_optax._pairing import Path, TappedLayer, is_probe, path_names, true_vectors


def start_averages(params: Any, vectors: Sequence[str]) -> Any:
    """Averages of the named vectors ("a", "b") before the first step, at least float32."""

    def start(path: Any, leaf: Any) -> Any:
        names = path_names(path)
        if is_probe(names) and names[-1] in (*vectors, "n"):
            return jnp.zeros_like(leaf, dtype=jnp.promote_types(leaf.dtype, jnp.float32))
        return optax.MaskedNode()

    return jax.tree_util.tree_map_with_path(start, params)


class Average(NamedTuple):
    """One layer's running vectors with this step's taken in, before its gradient has been looked at.

    Attributes:
      vectors: the averages that this step works with, by name, in the kernel's rank; always finite.
      old: the averages before this step, and "n".
      used: whether the layer was used, in the counter's shape.
      finite: whether this step's vectors are finite, likewise.
    """

    vectors: dict[str, Array]
    old: dict[str, Array]
    used: Array
    finite: Array


def take_in(
    layer: TappedLayer, leaves: dict[Path, Array], averages: dict[Path, Array], vectors: Sequence[str], decay: ArrayLike
) -> Average:
    """m ← decay·m + (1 − decay)·new, the first value as it is.

    Raises:
      ValueError: if the averages are of other shapes than the layer's vectors.
    """
    layout = layer.layout
    old = {name: averages[layer.probe[name]] for name in (*vectors, "n")}
    wanted = {"a": layout.a, "b": layout.b, "n": layout.counter}
    for name, average in old.items():
        if average.shape != wanted[name]:
            raise ValueError(
                f"eva_optax: the state of layer {layer.name!r} does not fit the gradients: {name} has shape "
                f"{average.shape} in the state, {wanted[name]} in the gradients. Make the state with tx.init(params), "
                "from the parameters that are trained."
            )
    found, used = true_vectors(layer, leaves.__getitem__)
    new = {name: getattr(found, name) for name in vectors}
    finite = jnp.ones_like(used)
    for vector in new.values():
        finite &= layout.all_per_layer(jnp.isfinite(vector))
    take, first = layout.spread_counter(used & finite), layout.spread_counter(old["n"] == 0)

    def running(name: str) -> Array:
        weight = jnp.asarray(decay, new[name].dtype)
        return jnp.where(take, jnp.where(first, new[name], weight * old[name] + (1 - weight) * new[name]), old[name])

    return Average({name: running(name) for name in vectors}, old, used, finite)


def settle(layer: TappedLayer, average: Average, finite_gradient: Array) -> tuple[Array, Array, dict[Path, Array]]:
    """Ends the layer's step, once it is known whether its gradient is finite.

    Returns which stacked layers are healthy (used, vectors and gradient finite), in the kernel's rank; how many are
    broken (vectors not finite beside a finite gradient); and what the state holds from now on.
    """
    healthy = average.used & average.finite & finite_gradient
    broken = jnp.sum(average.used & ~average.finite & finite_gradient, dtype=jnp.int32)
    keep = layer.layout.spread_counter(healthy)
    state = {layer.probe["n"]: jnp.where(healthy, 1, average.old["n"])}
    for name, vector in average.vectors.items():
        state[layer.probe[name]] = jnp.where(keep, vector, average.old[name])
    return keep, broken, state
