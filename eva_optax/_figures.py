"""Figures of each layer that a state keeps to be reported: what a step has computed anyway, and a user would log."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from eva_optax._pairing import Path, TappedLayer, is_probe, path_names


def start_figures(params: Any, names: Iterable[str]) -> dict[str, Any]:
    """Zeros, by name: trees shaped like `params` with one number for each layer, where its probe has its counter."""

    def start(path: Any, leaf: Any) -> Any:
        place = path_names(path)
        if is_probe(place) and place[-1] == "n":
            return jnp.zeros_like(leaf, dtype=jnp.promote_types(leaf.dtype, jnp.float32))
        return optax.MaskedNode()

    return {name: jax.tree_util.tree_map_with_path(start, params) for name in names}


def note_figures(
    noted: dict[str, dict[Path, Array]], layer: TappedLayer, figures: Mapping[str, Array], healthy: Array
) -> None:
    """Enters a layer's figures into `noted`, by name and path; a layer that is not healthy keeps its last ones."""
    place = layer.probe["n"]
    for name, number in figures.items():
        old = noted[name][place]
        noted[name][place] = jnp.where(healthy, number, old).astype(old.dtype)
