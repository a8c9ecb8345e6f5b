"""`attach` and `strip`: probes beside parameters that exist already, and parameters without probes."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from eva_optax._flax.functions import is_nnx_module, tap
from eva_optax._probes.collection import check_statistics
from eva_optax._probes.layers import has_probes, take_apart
from eva_optax._probes.probe import KRONECKER
from eva_optax._probes.statistics import VECTORS


def attach(model: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    """Adds probes of zeros to parameters that exist already, such as a loaded checkpoint.

    Args:
      model: the model, tapped or not; it is not changed.
      params: its parameters. Linen: the "params" collection, nested dicts or a FrozenDict, boxed or not. NNX: an
        `nnx.State`, or nested dicts of arrays.
      *args: what a Linen model is called with, after the random key, as in `model.init(key, *args, **kwargs)`; for an
        NNX model what `tap` is given. Only shapes and dtypes are looked at: nothing is computed.
      **kwargs: likewise.

    Returns:
      `params` with a probe beside every kernel that can be tapped; probes that exist are made anew.

    Raises:
      TypeError: if `model` is no Flax module, or a Linen model is given no example of its input.
      ValueError: if `params` are not the parameters of `model`, or no layer can be tapped.

    Source: as `tap`.

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = nn.Dense(2), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]  # or loaded from a file
      >>> params = eva_optax.attach(model, params, x)
      >>> sorted(params)
      ['bias', 'kernel', 'kronecker']
    """
    if is_nnx_module(model):
        return _attach_nnx(model, params, *args, **kwargs)
    from eva_optax._flax.tapped_module import TappedModule

    tapped = model if isinstance(model, TappedModule) else tap(model)
    variables = tapped.checked(*tapped.init_shapes("attach", *args, **kwargs))
    wanted, given = variables["params"], strip(params)
    if not _boxes(given):  # saved without partition names
        wanted = _unboxed(wanted)
    shapes = [
        {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (_unboxed(strip(wanted)), _unboxed(given))
    ]
    if shapes[0] != shapes[1]:
        different = sorted(set(shapes[0].items()) ^ set(shapes[1].items()), key=str)
        path = different[0][0]
        raise ValueError(
            f"eva_optax.attach: params do not fit {type(tapped.module).__name__}. {len(different)} entries differ; "
            f"at {path} the model has shape {shapes[0].get(path, 'none')}, params {shapes[1].get(path, 'none')}. "
            'Give the "params" collection alone, and call the model as in training.'
        )
    return _merge(given, wanted)


def strip(tree: Any) -> Any:
    """Removes every probe from a tree, for example before export.

    Also for what a loss computes from the parameters themselves: the norm of each, or `w / ‖w‖`, has no derivative
    where it meets a probe, which is zero, and leaves NaN there. And for counts and summaries: those of real parameters
    are those of the stripped ones, as in the example, and ``nnx.display(strip(model))`` or ``nnx.tabulate(strip(model),
    x)`` show an NNX model without probes, as ``tabulate`` of a tapped Linen model does by itself.

    Args:
      tree: parameters, variables, gradients or an optimizer state: any nesting of mappings, tuples and lists; or an
        `nnx.State`; or an NNX model.

    Returns:
      The same tree without the "kronecker" entries; other leaves are the same objects. For a model an untapped copy
      that holds the same arrays; the model itself stays tapped.

    Source: as `tap`.

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp
      >>> model = eva_optax.tap(nn.Dense(2))
      >>> params = model.init(jax.random.key(0), jnp.ones((4, 3)))["params"]
      >>> sorted(eva_optax.strip(params))
      ['bias', 'kernel']
      >>> sum(leaf.size for leaf in jax.tree.leaves(eva_optax.strip(params)))  # how many parameters the model has
      8
    """
    if is_nnx_module(tree):
        from eva_optax._flax.nnx import untapped_copy

        return untapped_copy(tree)
    if _is_state(tree):
        from flax import nnx

        return nnx.from_flat_state([(path, leaf) for path, leaf in nnx.to_flat_state(tree) if KRONECKER not in path])
    if isinstance(tree, Mapping):
        return _rebuild(tree, {key: strip(value) for key, value in tree.items() if key != KRONECKER})
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*map(strip, tree))
    if type(tree) in (tuple, list):
        return type(tree)(map(strip, tree))
    return tree


def _attach_nnx(
    model: Any,
    params: Any,
    *args: Any,
    embeddings: bool = False,
    statistics: Sequence[str] = VECTORS,
    rank: int | None = None,
    factors: str | None = None,
    max_dim: int = 8192,
    sharing: str = "expand",
    factor_rows: int | None = None,
    skip_padding: bool = False,
    **kwargs: Any,
) -> Any:
    """`attach` for the state of an NNX model."""
    from flax import nnx

    from eva_optax._flax.nnx import tap_module

    tapped = nnx.clone(model)
    collected = check_statistics("attach", statistics, rank, factors, max_dim, sharing, factor_rows, skip_padding)
    if args or kwargs or embeddings or rank is not None or factors or not has_probes(nnx.state(model)):
        tap_module("attach", tapped, embeddings, collected, args, kwargs)
    state: Any = nnx.state(tapped)
    if isinstance(params, nnx.State):
        probes = {path: leaf for path, leaf in nnx.to_flat_state(state) if KRONECKER in path}
        attached: Any = nnx.from_flat_state(dict(nnx.to_flat_state(strip(params))) | probes)
    else:
        attached = _merge(strip(params), nnx.to_pure_dict(state))
    wanted, given = ({layer.name for layer in take_apart(tree).layers} for tree in (state, attached))
    if wanted != given:
        raise ValueError(
            f"eva_optax.attach: params do not fit {type(model).__name__}: they lack {sorted(wanted - given)}."
        )
    return attached


def _is_state(tree: Any) -> bool:
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(tree, nnx.State)


def _rebuild(like: Mapping[str, Any], entries: dict[str, Any]) -> Any:
    """A mapping of the type of `like`, a dict or a FrozenDict."""
    constructor: Any = type(like)
    return constructor(entries)


def _is_box(node: Any) -> bool:
    return hasattr(node, "replace_boxed")


def _boxes(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree, is_leaf=_is_box) if _is_box(leaf)]


def _unboxed(tree: Any) -> Any:
    """`tree` without partition names, and without the sharding constraints that Flax's own `unbox` applies."""
    return jax.tree.map(lambda leaf: leaf.value if _is_box(leaf) else leaf, tree, is_leaf=_is_box)


def _merge(params: Mapping[str, Any], shapes: Mapping[str, Any]) -> Any:
    """`params` with zeros of the shape of every probe in `shapes`."""
    merged = {
        key: _merge(value, shapes.get(key, {})) if isinstance(value, Mapping) else value
        for key, value in params.items()
    }
    if KRONECKER in shapes:
        merged[KRONECKER] = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[KRONECKER])
    return _rebuild(params, merged)
