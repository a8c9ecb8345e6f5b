"""How the sketch of a layer's inputs lies against its kernel.

A tap stores it as the kernel of a layer with as few outputs as it has vectors. Here the vectors get an axis of their
own, the last one, and the kernel's output axes go: what is left are its batch and input axes in their order.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from eva_optax._probes.layout import Layout
from eva_optax._probes.probe import Shape

_VECTORS = "z"


class SketchAxes(NamedTuple):
    """The axes of a kernel, groups split, by letters.

    Attributes:
      kernel: all, in their order.
      batch: those of layers side by side.
      inputs: those that the layer sums over.
      outputs: the others.
      shape: the sizes of batch and input axes, in the kernel's order.
    """

    kernel: str
    batch: str
    inputs: str
    outputs: str
    shape: Shape

    @classmethod
    def of(cls, layout: Layout) -> "SketchAxes":
        """The axes of a layer."""
        outputs, inputs = layout.sum_axes
        return cls._of(layout.split_shape(layout.a), inputs, outputs)

    @classmethod
    def of_outputs(cls, layout: Layout) -> "SketchAxes":
        """The same with inputs and outputs exchanged, for moments of a layer's cotangents."""
        outputs, inputs = layout.sum_axes
        return cls._of(layout.split_shape(layout.b), outputs, inputs)

    @classmethod
    def _of(cls, a: Shape, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> "SketchAxes":
        letters = "abcdefghijklmnopqrstuvwxy"[: len(a)]

        def named(axes: tuple[int, ...]) -> str:
            return "".join(letters[axis] for axis in axes)

        batch = tuple(axis for axis in range(len(a)) if axis not in (*outputs, *inputs))
        shape = tuple(size for axis, size in enumerate(a) if axis not in outputs)
        return cls(letters, named(batch), named(inputs), named(outputs), shape)

    @property
    def vectors(self) -> str:
        """The letters of the vectors: of batch and inputs in the kernel's order, and their own."""
        return "".join(c for c in self.kernel if c not in self.outputs) + _VECTORS

    @property
    def rows(self) -> str:
        """The letters of products of the vectors with a kernel."""
        return self.batch + _VECTORS + self.outputs

    @property
    def bias(self) -> str:
        """The letters of a bias."""
        return "".join(c for c in self.kernel if c not in self.inputs)

    def unfold(self, sketch: Array, a: Shape) -> Array:
        """A stack of sketches as their taps store them, beside a of this shape, as (stack, *batch and inputs, vectors).

        The axis that has the vectors is the one in which a sketch and a differ.
        """
        shape = sketch.shape[1:]
        axis = next((axis for axis, (size, of_a) in enumerate(zip(shape, a, strict=True)) if size != of_a), len(a) - 1)
        split = sketch.reshape(*sketch.shape[: axis + 1], a[axis], shape[axis] // a[axis], *shape[axis + 1 :])
        last = jnp.moveaxis(split, axis + 2, -1)
        return last.reshape(len(sketch), *self.shape, last.shape[-1])

    def to_matrices(self, array: Array) -> Array:
        """(stack, *batch and inputs, vectors) as (stack · batch, inputs, vectors)."""
        order = [c for c in self.vectors if c != _VECTORS]
        axes = [1 + order.index(c) for c in self.batch + self.inputs]
        moved = jnp.transpose(array, [0, *axes, array.ndim - 1])
        count = len(array) * math.prod(self.sizes(self.batch))
        return moved.reshape(count, math.prod(self.sizes(self.inputs)), array.shape[-1])

    def by_batch(self, numbers: Array) -> Array:
        """Numbers for a stack of layers, laid out against their kernels, as (stack, *batch)."""
        return jnp.broadcast_to(numbers, (len(numbers), *self._batch_alone)).reshape(
            len(numbers), *self.sizes(self.batch)
        )

    def against_kernel(self, numbers: Array) -> Array:
        """Undoes it."""
        return numbers.reshape(len(numbers), *self._batch_alone)

    @property
    def _batch_alone(self) -> Shape:
        sizes = dict(zip(self.batch, self.sizes(self.batch), strict=True))
        return tuple(sizes.get(letter, 1) for letter in self.kernel)

    def sizes(self, letters: str) -> Shape:
        """The sizes of some batch or input axes."""
        known = dict(zip((c for c in self.vectors if c != _VECTORS), self.shape, strict=True))
        return tuple(known[c] for c in letters)
