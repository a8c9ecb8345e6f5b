"""What the transformations keep: a tree of running averages, and one array for the scalars of all layers.

Averages stand where the parameters have what they are averages of; everything else is an `optax.MaskedNode`. A *plain*
layer has two scalars, whether it has an average yet and the cosine of its last step, in the array. A layer that is
several at once (scanned layers, experts, groups) has the two beside its averages, where its probe has its counter.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from eva_optax._curvature.curvature import Statistics
from eva_optax._probes.layers import Layer, Tree, take_apart
from eva_optax._probes.layout import Layout
from eva_optax._probes.probe import COUNTER, Path, Shape, accumulator
from eva_optax._probes.stacking import stack, unstack
from eva_optax._transforms.averages import Vectors
from eva_optax._transforms.buckets import Bucket
from eva_optax._transforms.packing import pack, packed_shape, unpack
from eva_optax._transforms.untapped import is_untapped


class Scalars(NamedTuple):
    """The two numbers of some layers, stacked, laid out against their kernels.

    Attributes:
      started: 1 as soon as there is an average.
      cosine: of the last step.
    """

    started: Array
    cosine: Array


class End(NamedTuple):
    """What the step of a bucket's layers ends with.

    Attributes:
      bucket: the layers.
      averages: after the step.
      scalars: after the step.
      skipped: which of them were used, but skipped.
      used: which of them were used.
      unseen: which of them were not, though they have a gradient.
    """

    bucket: Bucket
    averages: Vectors
    scalars: Scalars
    skipped: Array
    used: Array
    unseen: Array


def start_state(tree: Tree, layers: Sequence[Layer], curvature: Statistics) -> tuple[Any, Array, Array, Array]:
    """Averages, scalars, and the numbers of skipped layers and untapped steps, before the first step."""
    leaves: list[Any] = [optax.MaskedNode() for _ in tree.leaves]
    dtype = jnp.result_type(jnp.float32)
    for layer in layers:
        layout, like = layer.layout, tree.leaves[layer.kernel]

        def zeros(shape: Shape, like: Any = like) -> Array:
            return jnp.zeros_like(like, shape=shape, dtype=accumulator(like.dtype))

        dtype = jnp.result_type(dtype, like.dtype)
        shapes = curvature.averages(layer)
        if layer.probe:
            for name, shape in shapes.items():
                # Like the probe's leaf, which has its sharding.
                leaves[layer.probe[name]] = zeros(shape, tree.leaves[layer.probe[name]])
            if not layout.is_plain:
                leaves[layer.probe[COUNTER]] = zeros(_record_shape(layout), tree.leaves[layer.probe[COUNTER]])
        else:
            leaves[layer.kernel] = zeros(packed_shape(shapes))
    plain = sum(layer.layout.is_plain for layer in layers)
    return tree.rebuild(leaves), jnp.zeros(2 * plain, dtype), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)


_PACKED = "packed"


class Kept(NamedTuple):
    """What a state holds, taken apart.

    Attributes:
      leaves: of the averages.
      structure: what puts them together again.
      places: the place of each among the leaves, by layer and name.
      packed: the shapes, by name, of what is one leaf (at the name `_PACKED`) in the place of the kernel, by layer.
      plain: the place of each plain layer among all plain layers, by layer.
      scalars: the array of scalars.
      skipped: the number of skipped layers.
      untapped: the number of untapped steps.
    """

    leaves: list[Array]
    structure: Any
    places: dict[tuple[int, str], int]
    packed: dict[int, dict[str, Shape]]
    plain: dict[int, int]
    scalars: Array
    skipped: Array
    untapped: Array

    @classmethod
    def read(cls, caller: str, state: Any, tree: Tree, layers: Sequence[Layer], curvature: Statistics) -> Self:
        """Takes a state apart.

        Raises:
          ValueError: if it does not fit the layers.
        """
        wanted, packed = [], {}
        for index, layer in enumerate(layers):
            shapes = curvature.averages(layer)
            if not layer.probe:
                packed[index], shapes = shapes, {_PACKED: packed_shape(shapes)}
            if not layer.layout.is_plain:
                shapes[COUNTER] = _record_shape(layer.layout)
            for name, shape in shapes.items():
                place = layer.probe.get(name, layer.kernel)
                wanted.append((place, tree.paths[place], shape, (index, name)))
        wanted.sort()
        held = take_apart(state.vectors)
        _check_shapes(caller, {path: shape for _, path, shape, _ in wanted}, held)
        plain = [index for index, layer in enumerate(layers) if layer.layout.is_plain]
        if state.scalars.shape != (2 * len(plain),):
            raise ValueError(
                f"eva_optax.{caller}: the state has {state.scalars.shape} scalars, the gradients have {len(plain)} "
                "layers. Make the state with tx.init(params), from the parameters that are trained."
            )
        places = {key: place for place, (*_, key) in enumerate(wanted)}
        numbered = {index: number for number, index in enumerate(plain)}
        return cls(held.leaves, held.structure, places, packed, numbered, state.scalars, state.skipped, state.untapped)

    def of(self, bucket: Bucket) -> tuple[Vectors, Scalars]:
        """Averages and scalars of a bucket's layers, stacked, groups split."""
        layout = bucket.layout
        names = dict.fromkeys(name for index, name in self.places if index == bucket.members[0] and name != COUNTER)

        def stacked(name: str) -> Array:
            averages = [self.leaves[self.places[index, name]] for index in bucket.members]
            return stack([layout.split_groups(average.astype(accumulator(average.dtype))) for average in averages])

        averages = {name: stacked(name) for name in names}
        if bucket.members[0] in self.packed:
            averages = unpack(averages[_PACKED], self.packed[bucket.members[0]])
        if not layout.is_plain:
            counters = stack([self.leaves[self.places[index, COUNTER]] for index in bucket.members])
            return averages, Scalars(*layout.counter_to_kernel_axes(counters))
        first, count = self.plain[bucket.members[0]], len(bucket.members)
        chosen = np.array([self.plain[index] for index in bucket.members])
        shape = (count, *(1,) * len(layout.kernel))
        halves = (self.scalars[start:] for start in (0, len(self.plain)))
        in_a_row = list(chosen) == list(range(first, first + count))
        parts = (half[first : first + count] if in_a_row else half[chosen] for half in halves)
        dtype = next(iter(averages.values())).dtype
        return averages, Scalars(*(part.reshape(shape).astype(dtype) for part in parts))

    def settle(self, caller: str, ends: Sequence[End]) -> tuple[Any, Array, Array, Array]:
        """What `start_state` returns, after a step, from the ends of its buckets."""
        leaves, dtype = list(self.leaves), self.scalars.dtype
        order: list[int] = []
        numbers: list[tuple[Array, Array]] = []
        skipped = self.skipped
        for bucket, averages, scalars, skips, _, _ in ends:
            layout = bucket.layout
            shapes = bucket.layers[0].shapes
            averages = {_PACKED: pack(averages)} if bucket.members[0] in self.packed else averages
            for name, average in averages.items():
                for index, part in zip(bucket.members, unstack(average), strict=True):
                    merged = layout.merge_groups(part, shapes.get(name, tuple(part.shape)))
                    place = self.places[index, name]
                    leaves[place] = merged.astype(self.leaves[place].dtype)  # a user may keep averages in bfloat16
            if layout.is_plain:
                order += [self.plain[index] for index in bucket.members]
                numbers.append((scalars.started.ravel().astype(dtype), scalars.cosine.ravel().astype(dtype)))
            else:
                records = layout.kernel_axes_to_counter((scalars.started, jnp.max), (scalars.cosine, jnp.mean))
                for index, record in zip(bucket.members, unstack(records), strict=True):
                    leaves[self.places[index, COUNTER]] = record
                skips = layout.kernel_axes_to_counter((skips, jnp.any))
            skipped = skipped + jnp.sum(skips, dtype=skipped.dtype)
        halves = [jnp.concatenate(half) for half in zip(*numbers, strict=True)]
        if order != sorted(order):
            halves = [half[np.argsort(order)] for half in halves]
        scalars = jnp.concatenate(halves) if halves else self.scalars
        untapped = is_untapped(caller, [end.used for end in ends], [end.unseen for end in ends])
        return self.structure.unflatten(leaves), scalars, skipped, self.untapped + untapped


def _record_shape(layout: Layout) -> Shape:
    """The shape of what is kept in the place of a counter."""
    return layout.counter_with(len(Scalars._fields))


def _check_shapes(caller: str, wanted: Mapping[Path, Shape], held: Tree) -> None:
    shapes = [jnp.shape(leaf) for leaf in held.leaves]
    if held.paths == tuple(wanted) and shapes == list(wanted.values()):
        return
    given = dict(zip(held.paths, shapes, strict=True))
    path = next(path for path in (*wanted, *given) if wanted.get(path) != given.get(path))
    raise ValueError(
        f"eva_optax.{caller}: the state does not fit the gradients: at {'/'.join(path)!r} the state has "
        f"{given.get(path, 'nothing')}, the gradients want {wanted.get(path, 'nothing')}. Make the state with "
        "tx.init(params), from the parameters that are trained."
    )
