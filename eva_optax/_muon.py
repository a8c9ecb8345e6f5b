"""Muon on the kernels of tapped layers, whatever their rank, and Adam on everything else."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from eva_optax._pairing import find_layers, leaves_by_path, path_names

_LOOKED_UP = "embedding"  # rows that are looked up are no matrix that maps inputs to outputs


def scale_by_muon(dimension_numbers: Any | Callable[[Any], Any] | None, **options: Any) -> optax.GradientTransformation:
    """`optax.contrib.muon` without learning rate; `dimension_numbers` by default from the tapped layers."""

    def muon(tree: Any) -> optax.GradientTransformation:
        # Made anew for each tree, not from a function of it: Optax would call that with a tree where the probes, which
        # tell the axes, are masked. A rate of -1 undoes the sign that Optax gives to its optimizers.
        numbers: Any = dimension_numbers(tree) if callable(dimension_numbers) else dimension_numbers
        numbers = kernel_axes(tree) if dimension_numbers is None else numbers
        return optax.contrib.muon(-1.0, muon_weight_dimension_numbers=numbers, **options)

    def init(params: Any) -> Any:
        return muon(params).init(params)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return muon(updates).update(updates, state, params)

    return optax.GradientTransformation(init, update)


def kernel_axes(tree: Any) -> Any:
    """Input and output axes of each tapped kernel, all other axes stacked; None for everything else."""
    numbers = {}
    for layer in find_layers(leaves_by_path(tree)):
        outputs, inputs = layer.layout.sum_axes
        matrix = inputs and outputs and not layer.layout.is_grouped and layer.kernel[-1] != _LOOKED_UP
        if matrix:
            numbers[layer.kernel] = MuonDimensionNumbers(inputs, outputs)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: numbers.get(path_names(path)), tree)
