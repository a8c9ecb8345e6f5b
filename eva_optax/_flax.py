"""The functions that need Flax; Flax itself is imported at their first call."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from eva_optax._pairing import KRONECKER

if TYPE_CHECKING:
    from eva_optax._coverage import Coverage


def tap(model: Any, *, embeddings: bool = False) -> Any:
    """Returns an object to use in the place of `model`, whose gradients carry the Kronecker vectors.

    Beside each kernel that it taps stands a small probe of zeros, a part of the parameters. The gradient of a probe is
    (a, b), the mean input and the summed output cotangent of the layer; see `vectors`. Outputs, initial values, random
    streams and the gradients of real parameters are those of `model`.

    Args:
      model: a `flax.linen.Module`, the outermost one: tap what you call `init` and `apply` on.
      embeddings: also tap the lookups of `nn.Embed`; a is then the frequency of each token.

    Returns:
      A `TappedModule`: `init`, `init_with_output`, `lazy_init`, `apply`, `bind`, `tabulate` and `clone` are those of
      `model`, tapped; other attributes pass through. It compares and hashes like the model.

    Raises:
      TypeError: if `model` is no Linen module.
      ValueError: from `init`, if the model has parameters but no layer that can be tapped.

    Reverse mode only: `jax.jvp` through a tapped model fails; use the untapped model for it.

    Source: Zhang, Shi and Li, ICLR 2023 (the vectors); that they are the gradient of a probe is this library's.

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp
      >>> model = eva_optax.tap(nn.Dense(2))
      >>> params = model.init(jax.random.key(0), jnp.ones((4, 3)))["params"]
      >>> sorted(params)
      ['bias', 'kernel', 'kronecker']
    """
    import flax.linen as nn

    from eva_optax._tapped import TappedModule

    if isinstance(model, TappedModule):
        return TappedModule(model.module, embeddings or model.embeddings)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"eva_optax.tap: model must be an instance of flax.linen.Module, got {model!r} of {type(model)}."
        )
    return TappedModule(model, embeddings)


def tapping(*, embeddings: bool = False) -> AbstractContextManager[Any]:
    """A context manager in which every Linen `init` and `apply` is tapped, for code that calls them itself.

    The context is no part of the cache key of `jax.jit`: enter it inside the function that is jitted, as the example
    does. A function that was jitted and run before, and is called inside the context, stays untapped.

    Args:
      embeddings: as for `tap`.

    Returns:
      The context manager.

    Source: as `tap`.

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = nn.Dense(2), jnp.ones((4, 3))
      >>> with eva_optax.tapping():
      ...   params = model.init(jax.random.key(0), x)["params"]
      >>> @jax.jit
      ... def gradient(params):
      ...   with eva_optax.tapping():
      ...     return jax.grad(lambda p: model.apply({"params": p}, x).sum())(params)
      >>> sorted(eva_optax.vectors(gradient(params)))
      ['']
    """
    from eva_optax._linen import linen_tapping

    return linen_tapping(embeddings)


def coverage(model: Any, *args: Any, **kwargs: Any) -> "Coverage":
    """Reports which parameters of a model are tapped, which are not, and why.

    Args:
      model: the model, tapped (then with the options of `tap`) or not.
      *args: what the model is called with, after the random key, as in `model.init(key, *args, **kwargs)`. Only shapes
        and dtypes are looked at: nothing is computed.
      **kwargs: likewise.

    Returns:
      A `Coverage`: `rows` (path, shape, tapped, reason), `tapped` and `total` (numbers of entries), `share`, `untapped`
      (reasons by path). `print` shows it as a table.

    Raises:
      TypeError: if `model` is no Linen module.

    Source: as `tap`.

    Example:
      >>> import eva_optax, flax.linen as nn, jax.numpy as jnp
      >>> report = eva_optax.coverage(nn.Sequential([nn.Dense(2), nn.LayerNorm()]), jnp.ones((4, 3)))
      >>> report.untapped["layers_1/scale"]
      'LayerNorm: scales or shifts element by element'
    """
    from eva_optax._coverage import linen_coverage

    return linen_coverage(*tap(model).init_shapes(*args, **kwargs))


def attach(model: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
    """Adds probes of zeros to parameters that exist already, such as a loaded checkpoint.

    Args:
      model: the model, tapped or not.
      params: its parameters (the "params" collection): nested dicts or a FrozenDict, boxed or not.
      *args: what the model is called with, after the random key, as in `model.init(key, *args, **kwargs)`. Only shapes
        and dtypes are looked at: nothing is computed.
      **kwargs: likewise.

    Returns:
      `params` with a probe beside every kernel that can be tapped; probes that exist are made anew.

    Raises:
      TypeError: if `model` is no Linen module.
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
    tapped = tap(model)
    variables = tapped.checked(tapped.init_shapes(*args, **kwargs)[0])
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

    Args:
      tree: parameters, variables, gradients or an optimizer state: any nesting of mappings, tuples and lists.

    Returns:
      The same tree without the "kronecker" entries; other leaves are the same objects.

    Source: as `tap`.

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp
      >>> model = eva_optax.tap(nn.Dense(2))
      >>> params = model.init(jax.random.key(0), jnp.ones((4, 3)))["params"]
      >>> sorted(eva_optax.strip(params))
      ['bias', 'kernel']
    """
    if isinstance(tree, Mapping):
        return _rebuild(tree, {key: strip(value) for key, value in tree.items() if key != KRONECKER})
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*map(strip, tree))
    if type(tree) in (tuple, list):
        return type(tree)(map(strip, tree))
    return tree


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
    merged = {key: _merge(value, shapes[key]) if isinstance(value, Mapping) else value for key, value in params.items()}
    if KRONECKER in shapes:
        merged[KRONECKER] = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[KRONECKER])
    return _rebuild(params, merged)
