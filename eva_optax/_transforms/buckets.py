"""Layers of equal layout together: their averages and scalars are stacked, one operation instead of one a layer.

Stacking adds an axis in front, so that whatever is sharded along a layer's own axes stays so. Gradients of kernels are
never stacked: that would copy them.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from eva_optax._probes.layers import Layer
from eva_optax._probes.layout import Layout
from eva_optax._probes.probe import COUNTER, accumulator
from eva_optax._probes.stacking import stack
from eva_optax._probes.vectors import Scales, read_counters


class Bucket(NamedTuple):
    """Layers of equal layout.

    Attributes:
      members: their places among all layers.
      layers: the layers.
    """

    members: tuple[int, ...]
    layers: tuple[Layer, ...]

    @property
    def layout(self) -> Layout:
        """The layout of each."""
        return self.layers[0].layout

    def stacked(self, leaves: Sequence[Any], name: str) -> Array:
        """The probes' leaves of a name, groups split, at least float32."""
        arrays = [jnp.asarray(leaves[layer.probe[name]]) for layer in self.layers]
        return stack([self.layout.split_groups(array.astype(accumulator(array.dtype))) for array in arrays])

    def scales(self, leaves: Sequence[Any], vectors: Mapping[str, Array]) -> Scales:
        """The scales of the layers' statistics, of which these are wanted."""
        if self.layout.bias is not None:
            vectors = {name: vector for name, vector in vectors.items() if name != "a"}  # (a, 1) is never noise
        counters = [jnp.asarray(leaves[layer.probe[COUNTER]]) for layer in self.layers]
        stacked = stack([counter.astype(accumulator(counter.dtype)) for counter in counters])
        numbers = self.layout.counter_to_kernel_axes(stacked)
        return read_counters(numbers, vectors, tuple(layer.name for layer in self.layers))


def fill_buckets(layers: Sequence[Layer], leaves: Sequence[Any]) -> list[Bucket]:
    """The buckets of layers whose parts, among `leaves`, are of equal types, and whose paths differ in numbers alone.

    How arrays are sharded is mostly no part of their types, but follows from names: of two layers of one shape, "up"
    may be split along its outputs and "down" along its inputs. Their vectors in one array would drag each other's
    kernels over the mesh.
    """
    found: dict[Any, list[int]] = {}
    for index, layer in enumerate(layers):
        parts = [layer.kernel, *([] if layer.bias is None else [layer.bias]), *layer.probe.values()]
        types = tuple(_type(leaves[place]) for place in parts)
        names = tuple(re.sub(r"\d+", "", name) for name in layer.path)
        found.setdefault((names, layer.layout, tuple(layer.probe), types), []).append(index)
    return [Bucket(tuple(members), tuple(layers[index] for index in members)) for members in found.values()]


def _type(leaf: Any) -> str:
    """What arrays must have in common to be stacked: shape, dtype, and sharding where it is a type."""
    return str(jax.typeof(leaf))
