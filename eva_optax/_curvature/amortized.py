"""Factorizations of many matrices: those of one size at once, shared out over devices, and only every few steps."""

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, PartitionSpec
from jax.typing import ArrayLike

from eva_optax._probes.placement import replicate, vary_like


def in_stacks(function: Callable[..., Any], matrices: Sequence[Array], *operands: Sequence[ArrayLike]) -> list[Any]:
    """`function` of matrices, called once for all of one size and dtype: one batched factorization instead of many.

    Within `jax.set_mesh` each device of the mesh takes its share of every stack.

    Args:
      function: takes a stack of matrices (count, n, n), and for each operand the numbers of these matrices, (count,).
        Returns a tree of arrays (count, ...).
      matrices: each (*batch, n, n).
      operands: of each, for each of `matrices` numbers that broadcast to its batch axes.

    Returns:
      For each of `matrices` what `function` made of it, its batch axes in front.
    """
    buckets: dict[Any, list[int]] = {}
    for place, matrix in enumerate(matrices):
        buckets.setdefault((matrix.shape[-2:], matrix.dtype), []).append(place)
    results: list[Any] = [None] * len(matrices)
    for (shape, dtype), places in buckets.items():
        batches = [matrices[place].shape[:-2] for place in places]
        stack = jnp.concatenate([replicate(matrices[place]).reshape(-1, *shape) for place in places])
        numbers = []
        for operand in operands:
            each = zip((jnp.asarray(operand[place], dtype) for place in places), batches, strict=True)
            numbers.append(jnp.concatenate([jnp.broadcast_to(number, batch).ravel() for number, batch in each]))
        made = _share_out(partial(one_by_one, function), stack, *numbers)
        start = 0
        for place, batch in zip(places, batches, strict=True):
            results[place] = jax.tree.map(_part(start, batch), made)
            start += math.prod(batch)
    return results


def one_by_one(function: Callable[..., Any], *stacks: Any) -> Any:
    """`function` of stacks, for a CPU of stacks of one, in turn.

    There JAX 0.10 lets kernels of LAPACK hand the matrices of a stack to the threads that they run on themselves, and
    wait: as many such kernels at a time as there are threads wait for ever. JAX 0.11 does not.
    """
    count = len(jax.tree.leaves(stacks)[0])

    def in_turn(*stacks: Any) -> Any:
        made = jax.lax.map(lambda parts: function(*jax.tree.map(lambda part: part[None], parts)), stacks)
        return jax.tree.map(lambda array: array[:, 0], made)

    return function(*stacks) if count == 1 else jax.lax.platform_dependent(*stacks, cpu=in_turn, default=function)


def _part(start: int, batch: tuple[int, ...]) -> Callable[[Array], Array]:
    """Takes one layer's part of a stack."""
    return lambda array: array[start : start + math.prod(batch)].reshape(*batch, *array.shape[1:])


def _share_out(function: Callable[..., Any], *stacks: Array) -> Any:
    """`function` of stacks, each device of the mesh that is set doing a part; the result is whole on every device."""
    mesh, count = jax.sharding.get_abstract_mesh(), len(stacks[0])
    # Within `shard_map` a device has stacks of its own. One matrix cannot be shared.
    if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types or count == 1:
        return function(*stacks)
    share = -(-count // mesh.size)

    def part(*stacks: Array) -> Any:
        start = share * jax.lax.axis_index(mesh.axis_names)
        made = function(*(jax.lax.dynamic_slice_in_dim(stack, start, share) for stack in stacks))
        return jax.tree.map(lambda array: jax.lax.all_gather(array, mesh.axis_names, tiled=True), made)

    missing = share * mesh.size - count
    padded = [jnp.pad(stack, [(0, missing), *[(0, 0)] * (stack.ndim - 1)], mode="edge") for stack in stacks]
    # JAX does not see that what was gathered is the same everywhere: hence no check of it.
    made = jax.shard_map(part, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)(*padded)
    return jax.tree.map(lambda array: array[:count], made)


def renew(due: Array, make: Callable[[], Sequence[Any]], old: Sequence[Any]) -> tuple[list[Any], list[Array]]:
    """What `make` makes in a step that is due; the old in every other step, and wherever the new is not finite.

    One condition stands around all layers: a step that is not due computes nothing. Under `vmap`, where members of an
    ensemble could differ, both sides are computed.

    Args:
      due: whether this step is, a boolean scalar.
      make: makes for each layer a tree like its old one.
      old: for each layer a tree of arrays that belong together, new or old as one: (*batch, n, n), or (*batch, 1, 1)
        for numbers, with the same batch axes throughout the layer. Within `shard_map` both sides of the condition must
        vary over the same axes of the mesh: `vary_like`.

    Returns:
      The trees, and for each layer whether they are new, (*batch,).
    """

    def fresh() -> list[tuple[Any, Array]]:
        return [_keep_finite(*pair) for pair in zip(make(), old, strict=True)]

    def stale() -> list[tuple[Any, Array]]:
        firsts = [jax.tree.leaves(kept)[0] for kept in old]
        return [(kept, vary_like(jnp.zeros(f.shape[:-2], bool), f)) for kept, f in zip(old, firsts, strict=True)]

    trees = jax.lax.cond(due, fresh, stale)
    return [tree for tree, _ in trees], [made for _, made in trees]


def _keep_finite(new: Any, old: Any) -> tuple[Any, Array]:
    """A layer's new tree where it is finite, else the old one; and where it is."""
    finite = reduce(jnp.logical_and, [jnp.isfinite(part).all((-2, -1)) for part in jax.tree.leaves(new)])
    return jax.tree.map(lambda made, kept: jnp.where(finite[..., None, None], made, kept), new, old), finite
