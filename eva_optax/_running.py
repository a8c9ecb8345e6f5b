"""Running averages of the Kronecker vectors: a tree shaped like the parameters, and how a step enters it.

In the state each probe holds the averages of its vectors, and in `n` 1 as soon as there is one; everything else is an
`optax.MaskedNode`. A vector is taken in only if the layer was used and vectors and gradient are finite; what is not
taken in leaves the average as it was.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from eva_optax._fusion import materialize
from eva_optax._pairing import Path, TappedLayer, is_probe, path_names, true_vectors


def start_averages(params: Any, vectors: Sequence[str]) -> Any:
    """Averages of the named vectors ("a", "b") before the first step, at least float32."""

    def start(path: Any, leaf: Any) -> Any:
        names = path_names(path)
        if is_probe(names) and names[-1] in (*vectors, "n"):
            return jnp.zeros_like(leaf, dtype=jnp.promote_types(leaf.dtype, jnp.float32))
        return optax.MaskedNode()

    return jax.tree_util.tree_map_with_path(start, params)


def check_state(function: str, state: Any, wanted: type) -> None:
    """Refuses a state that is not one of `wanted`, a NamedTuple.

    Raises:
      ValueError: naming the function, what the state is, and how to go on.
    """
    if isinstance(state, wanted):
        return
    held = tuple(state) if isinstance(state, Mapping) else getattr(state, "_fields", None)
    fields: Any = getattr(wanted, "_fields", ())
    raise ValueError(
        f"eva_optax.{function}: state must be a {wanted.__name__} with the fields {fields}, got a "
        f"{type(state).__name__}" + (f" with {held}" if held else "") + ". Restore a checkpoint with tx.init(params) "
        "as its template. A state of another optimizer, or of a version with other fields, cannot be converted: keep "
        "the parameters and go on with tx.init(params), whose averages the next step fills."
    )


class Average(NamedTuple):
    """One layer's running vectors with this step's taken in, before its gradient has been looked at.

    Attributes:
      vectors: the averages by name, in the kernel's rank; without meaning where the layer was not used, or its vectors
        are not finite.
      old: the averages before this step, and "n".
      used: whether the layer was used, in the counter's shape.
    """

    vectors: dict[str, Array]
    old: dict[str, Array]
    used: Array


def take_in(
    layer: TappedLayer, leaves: dict[Path, Array], averages: dict[Path, Array], vectors: Sequence[str], decay: ArrayLike
) -> Average:
    """m ← decay·m + (1 − decay)·new, the first value as it is.

    Raises:
      ValueError: if the averages lack the layer, or are of other shapes than its vectors.
    """
    layout = layer.layout
    if any(layer.probe[name] not in averages for name in (*vectors, "n")):
        raise ValueError(
            f"eva_optax: the state holds no vectors for layer {layer.name!r}, the gradients do. Make the state with "
            "tx.init(params), from the parameters that are trained."
        )
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
    first = layout.spread_counter(old["n"] == 0)

    def running(name: str) -> Array:
        new = getattr(found, name)
        weight = jnp.asarray(decay, new.dtype)
        return jnp.where(first, new, weight * old[name] + (1 - weight) * new)

    return Average(materialize({name: running(name) for name in vectors}), old, used)


class Settled(NamedTuple):
    """The end of one layer's step.

    Attributes:
      healthy: which stacked layers were used and have finite vectors and gradient, in the counter's shape.
      broken: how many have vectors that are not finite beside a finite gradient, int32 scalar.
      averages: what the state holds from now on, by path.
    """

    healthy: Array
    broken: Array
    averages: dict[Path, Array]


def settle(layer: TappedLayer, average: Average, finite_vectors: Array, finite_gradient: Array) -> Settled:
    """Ends the layer's step, once it is known what of it is finite (in the counter's shape)."""
    healthy = average.used & finite_vectors & finite_gradient
    broken = jnp.sum(average.used & ~finite_vectors & finite_gradient, dtype=jnp.int32)
    keep = layer.layout.spread_counter(healthy)
    state = {layer.probe["n"]: jnp.where(healthy, 1, average.old["n"])}
    for name, vector in average.vectors.items():
        state[layer.probe[name]] = jnp.where(keep, vector, average.old[name]).astype(average.old[name].dtype)
    return Settled(healthy, broken, state)
