"""Trees without probes, for transformations that keep something for each parameter.

In the place of each leaf of a probe stands an `optax.MaskedNode`, which has no leaves: as in `optax.masked`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from eva_optax._probes.layers import Tree, take_apart
from eva_optax._probes.probe import is_probe


def hide_probes(tree: Any) -> Any:
    """`tree` without the leaves of its probes."""
    parts = take_apart(tree)
    return hide_places(parts, parts.leaves)


def hide_places(tree: Tree, leaves: Sequence[Any]) -> Any:
    """A tree like `tree` with other leaves, without those of its probes."""
    pairs = zip(tree.paths, leaves, strict=True)
    return tree.rebuild([optax.MaskedNode() if is_probe(path) else leaf for path, leaf in pairs])


def put_probes_back(tree: Tree, hidden: Any) -> list[Any]:
    """The leaves of a tree like `tree`, from one that hides its probes; zeros in their places."""
    remaining = iter(jax.tree.leaves(hidden))
    pairs = zip(tree.paths, tree.leaves, strict=True)
    return [jnp.zeros_like(leaf) if is_probe(path) else next(remaining) for path, leaf in pairs]
