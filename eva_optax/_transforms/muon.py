"""Muon on the kernels of tapped layers, whatever their rank, and Adam on everything else."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from eva_optax._probes.layers import Tree, take_apart
from eva_optax._transforms.hidden_probes import hide_places, hide_probes

_LOOKED_UP = "embedding"  # rows that are looked up are no matrix that maps inputs to outputs


def scale_by_muon(
    tree: Any, dimension_numbers: Any | Callable[[Any], Any] | None, **options: Any
) -> optax.GradientTransformation:
    """`optax.contrib.muon` without learning rate, for the parameters of a tapped tree without its probes.

    Args:
      tree: the tapped parameters, or their gradients: their probes tell the axes.
      dimension_numbers: as for `optax.contrib.muon`; None for those of the tapped layers.
      **options: as for `optax.contrib.muon`.
    """
    parts = take_apart(tree)
    numbers: Any
    if dimension_numbers is None:
        numbers = hide_places(parts, kernel_axes(parts))
    elif callable(dimension_numbers):
        numbers = dimension_numbers(hide_probes(tree))
    else:
        leaves = jax.tree.leaves(dimension_numbers, is_leaf=lambda node: node is None or _is_numbers(node))
        numbers = hide_places(parts, leaves) if len(leaves) == len(parts.leaves) else dimension_numbers
    # A rate of -1 undoes the sign that Optax gives to its optimizers.
    return optax.contrib.muon(-1.0, muon_weight_dimension_numbers=numbers, **options)


def kernel_axes(tree: Tree) -> list[MuonDimensionNumbers | None]:
    """Input and output axes of each tapped kernel, all other axes stacked; None for everything else."""
    numbers: list[MuonDimensionNumbers | None] = [None] * len(tree.leaves)
    for layer in tree.layers:
        outputs, inputs = layer.layout.sum_axes
        if inputs and outputs and not layer.layout.is_grouped and layer.path[-1] != _LOOKED_UP:
            numbers[layer.kernel] = MuonDimensionNumbers(inputs, outputs)
    return numbers


def _is_numbers(node: Any) -> bool:
    return isinstance(node, MuonDimensionNumbers)
