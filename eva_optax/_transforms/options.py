"""Checks of options and trees that all transformations share. Only Python numbers are checked, never tracers."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.typing import ArrayLike

from eva_optax._probes.layers import Layer, Tree, how_to_tap, is_probe_leaf
from eva_optax._probes.probe import KRONECKER, is_probe, name_is_taken, path_names

_TOGETHER = (
    f'A mask must keep or drop a layer as a whole, with all that stands below "{KRONECKER}" in it: decide by the '
    "layer's path, not by a leaf's name or rank."
)


def check_positive(caller: str, **options: ArrayLike) -> None:
    """Raises ValueError for an option that is no number, or not finite and greater than 0."""
    for name, value in options.items():
        _check_number(caller, name, value)
        if isinstance(value, int | float) and not value > 0:
            raise ValueError(f"eva_optax.{caller}: {name} must be greater than 0, got {value}.")
        if isinstance(value, int | float) and value == math.inf:
            raise ValueError(f"eva_optax.{caller}: {name} must be finite, got {value}.")


def _check_number(caller: str, name: str, value: Any) -> None:
    if not isinstance(value, int | float) and not hasattr(value, "dtype"):
        raise ValueError(
            f"eva_optax.{caller}: {name} must be a number or a scalar array, got {value!r}. "
            f"A schedule is passed by optax.inject_hyperparams(eva_optax.{caller})({name}=schedule)."
        )


def check_decay(caller: str, decay: ArrayLike, name: str = "decay", *, up_to_one: bool = False) -> None:
    """Raises ValueError for a decay that is no number, or outside of [0, 1), or of [0, 1]."""
    _check_number(caller, name, decay)
    if isinstance(decay, int | float) and not (0 <= decay < 1 or (up_to_one and decay == 1)):
        interval = "[0, 1]" if up_to_one else "[0, 1)"
        raise ValueError(
            f"eva_optax.{caller}: {name} must lie in {interval}, got {decay}. It is the weight of the old average; the "
            "reference code's factor_decay is the weight of the new value, 1 - decay."
        )


def check_probes(caller: str, params: Tree, statistics: Sequence[str]) -> None:
    """Raises ValueError if there are leaves, but no probes among them, or without a statistic that is needed."""
    if () in params.paths:
        raise ValueError(
            f"eva_optax.{caller}: the parameters are one array, as optax.flatten makes them, which tells no layers. "
            f"Flatten only what comes after it: optax.chain(eva_optax.{caller}(...), optax.flatten(...))."
        )
    if params.leaves and not any(map(is_probe, params.paths)):
        raise ValueError(f"eva_optax.{caller}: {_why_no_probes(params)}")
    _check_statistics(caller, params.layers, statistics)


def _why_no_probes(params: Tree) -> str:
    whole = params.rebuild(params.leaves)

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    nodes, _ = jax.tree_util.tree_flatten_with_path(whole, is_leaf=is_masked)
    masked = [path_names(path) for path, node in nodes if is_masked(node)]
    if any(map(is_probe, masked)):
        return (
            "the probes are masked out, so that no Kronecker vectors can be collected: by optax.masked or "
            f"optax.partition, or by eva_optax.conjugate or center, whose inner transformation sees none. {_TOGETHER}"
        )
    tap = how_to_tap(whole)
    if masked:
        return f"the parameters that the mask leaves hold no probes. {_TOGETHER} If the model is not tapped yet: {tap}"
    return f"the parameters hold no probes, so that no Kronecker vectors can be collected. {tap}"


def check_names(caller: str, params: Tree) -> None:
    """Raises ValueError if something else than probes stands where probes do."""
    for path in params.paths:
        if is_probe(path) and not is_probe_leaf(path):
            raise name_is_taken(caller, path)


def check_nested(caller: str, params: Tree) -> None:
    """Raises ValueError if probes stand under names that were joined, as in a safetensors file."""
    for name in (name for path in params.paths for name in path):
        before, found, after = name.partition(KRONECKER)
        if found and before[-1:] and before[-1:] == after[:1] and not before[-1:].isalnum():
            separator = before[-1]
            raise ValueError(
                f"eva_optax.{caller}: the names of modules and parameters are joined, as in {name!r}, so that layers "
                "cannot be told. Nest them again before they are trained: flax.traverse_util.unflatten_dict(params, "
                f"sep={separator!r})."
            )


def check_updates(caller: str, updates: Tree, statistics: Sequence[str]) -> None:
    """Raises ValueError if there are leaves, but no layer, or none with the statistics that are needed."""
    if updates.leaves and not updates.layers:
        raise ValueError(
            f"eva_optax.{caller}: the updates hold no tapped layer. Give it the gradients of all parameters, "
            'probes included (below "kronecker" in each layer), before anything that flattens or drops them.'
        )
    _check_statistics(caller, updates.layers, statistics)


def _check_statistics(caller: str, layers: Sequence[Layer], statistics: Sequence[str]) -> None:
    for layer in layers:
        missing = [name for name in statistics if name not in layer.probe]
        if missing:
            raise ValueError(
                f"eva_optax.{caller}: needs the statistics {tuple(statistics)}, but the probe of layer {layer.name!r} "
                f"has no {missing}. Tap the model with eva_optax.tap(model, statistics={tuple(statistics)})."
            )
