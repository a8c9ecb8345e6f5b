"""Trees without probes, for transformations that keep something for each parameter.

In the place of each leaf of a probe stands an `optax.MaskedNode`, which has no leaves: as in `optax.masked`.
"""

from collections.abc import Callable, Sequence
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


def not_probes(tree: Any) -> Any:
    r"""Which leaves of a tree are no probes: a mask for `optax.masked`.

    .. math::  \text{mask}(\text{leaf}) = [\text{no "kronecker" in the path of the leaf}]

    The updates of probes are zeros, and an optimizer behind a transformation of this library would keep momentum and
    moments of them, which nobody uses. Of vectors these are small; of the matrices that `tap(model, factors=...)` makes
    they are as large as the layers themselves. Behind `scale_by_foof` and `scale_by_kfac`, and behind `scale_by_eva_f`
    with a rank, mask them, as the ready-made optimizers do.

    Args:
      tree: parameters of a tapped model, or anything of their structure.

    Returns:
      A tree of bools of the same structure, False for all that stands below "kronecker".

    Source: this library.

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp, optax
      >>> model, x = eva_optax.tap(nn.Dense(2), factors="input"), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> sgd = optax.sgd(0.1, momentum=0.9)
      >>> tx = optax.chain(eva_optax.scale_by_foof(), optax.masked(sgd, eva_optax.not_probes))
      >>> len(jax.tree.leaves(sgd.init(params))), len(jax.tree.leaves(tx.init(params)[1]))
      (6, 2)
    """
    parts = take_apart(tree)
    return parts.rebuild(not is_probe(path) for path in parts.paths)


def without_probes(
    inner_of: Callable[[Any], optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
    """Runs an inner transformation, made from the tree with probes, on the tree without."""

    def init(params: Any) -> Any:
        return inner_of(params).init(hide_probes(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        inner, tree = optax.with_extra_args_support(inner_of(updates)), take_apart(updates)
        hidden = None if params is None else hide_probes(params)
        changed, state = inner.update(hide_probes(updates), state, hidden, **extra)
        return tree.rebuild(put_probes_back(tree, changed)), state

    return optax.GradientTransformationExtraArgs(init, update)
