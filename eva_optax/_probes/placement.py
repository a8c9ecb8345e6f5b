"""Arrays where others lie: over the axes of a mesh, as types know it, and within `shard_map`."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec


def varying_axes(aval: Any) -> frozenset[str]:
    """The mesh axes of the enclosing `shard_map` over which an array of this type may differ."""
    return aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying  # renamed in JAX 0.10


def vary(leaf: Array, axes: frozenset[str]) -> Array:
    missing = tuple(sorted(axes - varying_axes(jax.typeof(leaf))))
    return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf


def cast_like(value: Array, aval: Any) -> Array:
    """`value` with the shape, dtype, varying axes and sharding of `aval`."""
    value = value.astype(aval.dtype)
    value = value if value.shape == aval.shape else jnp.broadcast_to(value, aval.shape)
    value = vary(value, varying_axes(aval))
    return _sharded(value, aval.sharding)


def vary_like(value: Array, leaf: Array) -> Array:
    """`value` as one that differs over the mesh axes that `leaf` differs over, within `shard_map`."""
    return vary(value, varying_axes(jax.typeof(leaf)))


def shard_like(value: Array, leaf: Array) -> Array:
    """`value` with the sharding of `leaf`, where shardings are part of the types (explicit mesh axes)."""
    return _sharded(value, jax.typeof(leaf).sharding)


def replicate(value: Array) -> Array:
    """`value` whole on every device, where shardings are part of the types."""
    sharding: Any = jax.typeof(value).sharding
    return jax.sharding.reshard(value, PartitionSpec()) if any(sharding.spec) else value


def _sharded(value: Array, wanted: Any) -> Array:
    return value if jax.typeof(value).sharding.spec == wanted.spec else jax.sharding.reshard(value, wanted)
