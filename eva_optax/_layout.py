"""How kernel, bias, vectors and counters of one layer lie against each other; static, from shapes alone.

Axis by axis a layer is described by the sizes of its kernel, of a and of b:

    input axis    a full, b 1          output axis   a 1, b full
    batch axis    both full: one layer of its own per index (scanned layers, experts, heads)
    grouped axis  b full, a a divisor: that many layers side by side (grouped convolution)

In the *view* of a layer a grouped axis is split into a batch axis and an output axis, so that everything broadcasts.
All other kernels are their own view: they are never reshaped or transposed, and keep their sharding.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import jax.numpy as jnp
from jax import Array

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """Shapes of a layer's parts. `stacks` pairs each stacked axis in the counter (bias layout) with the kernel's."""

    kernel: Shape
    bias: Shape | None
    a: Shape
    b: Shape
    counter: Shape
    stacks: tuple[tuple[int, int], ...]

    @classmethod
    def fit(cls, name: str, *, kernel: Shape, bias: Shape | None, a: Shape, b: Shape, counter: Shape) -> Self:
        """Checks that the shapes fit together.

        Raises:
          ValueError: naming the layer and all shapes, if they do not.
        """
        fits = len(kernel) == len(a) == len(b) and all(map(_axis_fits, kernel, a, b))
        fits = fits and (bias is None or len(bias) == len(counter))
        stacks = []
        for position, size in enumerate(counter):
            if fits and size > 1:
                # Flax stacks kernel and bias at the same axis, counted from the front or, if negative, from the end.
                candidates = (position, position - len(counter) + len(kernel))
                match = [p for p in candidates if p < len(kernel) and a[p] == b[p] == kernel[p] == size]
                fits = bool(match)
                stacks += [(position, match[0])] if match else []
        fits = fits and stacks == sorted(stacks, key=lambda stack: stack[1])
        layout = cls(kernel, bias, a, b, counter, tuple(stacks))
        if fits and bias is not None:
            fits = math.prod(bias) == math.prod(b) and all(bias[q] == kernel[p] for q, p in stacks)
        if not fits:
            raise ValueError(
                f"eva_optax: the probe of layer {name!r} does not fit its kernel. The kernel has shape {kernel}, the "
                f"bias {bias}; the vectors have shapes a {a}, b {b} and counter {counter}, but a must have the "
                "kernel's shape with its output axes set to 1, and b with its input axes set to 1. Was the checkpoint "
                "made for another model? eva_optax.strip removes the old probes and eva_optax.attach makes new ones."
            )
        return layout

    def view(self, array: Array) -> Array:
        """Kernel, a or b with grouped axes split; anything else as it is."""
        return array.reshape(self._view_shape(array.shape)) if self._grouped else array

    def unview(self, array: Array, shape: Shape) -> Array:
        """Undoes `view`."""
        return array.reshape(shape) if self._grouped else array

    @property
    def sum_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The output axes and the input axes of the view; what is left are batch axes.

        An axis that is 1 in both counts as input if an output axis follows, so that the window of a 1×1 convolution
        does: XLA's CPU backend is a hundred times slower at sums over an inner axis alone.
        """
        a, b = self._view_shape(self.a), self._view_shape(self.b)
        last = max((axis for axis, (i, o) in enumerate(zip(a, b, strict=True)) if i == 1 < o), default=-1)
        inputs = tuple(axis for axis, (i, o) in enumerate(zip(a, b, strict=True)) if o == 1 and (i > 1 or axis < last))
        outputs = tuple(axis for axis, i in enumerate(a) if i == 1 and axis not in inputs)
        return outputs, inputs

    @property
    def is_grouped(self) -> bool:
        """Whether the view splits an axis."""
        return bool(self._grouped)

    @property
    def batch_shape(self) -> Shape:
        """The sizes of the batch axes and the numbers of groups, unsplit, every other axis 1."""
        return tuple(1 if b == 1 else a for a, b in zip(self.a, self.b, strict=True))

    def per_layer(self, reduce: Callable[[Array, Sequence[int]], Array], array: Array) -> Array:
        """`array`, of the kernel's rank, reduced (`jnp.all`, `jnp.sum`) over each stacked layer; as the counter."""
        others = tuple(axis for axis in range(len(self.kernel)) if axis not in self._stack_axes)
        return reduce(array, others).reshape(self.counter)

    def view_per_layer(self, reduce: Callable[[Array, Sequence[int]], Array], sums: Array) -> Array:
        """`per_layer` of sums over the view's input and output axes."""
        return self.per_layer(reduce, self.unview(sums, self.batch_shape))

    def spread_counter(self, counter: Array) -> Array:
        """A counter, in the bias's rank, laid out against the unsplit kernel, a and b."""
        shape = [1] * len(self.kernel)
        for position, axis in self.stacks:
            shape[axis] = self.counter[position]
        return counter.reshape(shape)

    def spread_bias(self, bias: Array) -> Array:
        """A bias-shaped array laid out as b."""
        moved = jnp.moveaxis(bias, [q for q, _ in self.stacks], range(len(self.stacks)))
        inner = [size for axis, size in enumerate(self.b) if axis not in self._stack_axes]
        moved = moved.reshape(*moved.shape[: len(self.stacks)], *inner)
        return jnp.moveaxis(moved, range(len(self.stacks)), self._stack_axes)

    def gather_bias(self, spread: Array) -> Array:
        """Undoes `spread_bias`."""
        assert self.bias is not None
        moved = jnp.moveaxis(spread, self._stack_axes, range(len(self.stacks)))
        positions = [q for q, _ in self.stacks]
        inner = [size for axis, size in enumerate(self.bias) if axis not in positions]
        moved = moved.reshape(*moved.shape[: len(self.stacks)], *inner)
        return jnp.moveaxis(moved, range(len(self.stacks)), positions)

    def repeat_groups(self, a: Array) -> Array:
        """a with the entry of each group repeated for the group's output channels."""
        for axis in self._grouped:
            a = jnp.repeat(a, self.kernel[axis] // self.a[axis], axis)
        return a

    @property
    def _stack_axes(self) -> list[int]:
        return [axis for _, axis in self.stacks]

    @property
    def _grouped(self) -> list[int]:
        return [axis for axis, size in enumerate(self.kernel) if self.a[axis] not in (1, size)]

    def _view_shape(self, shape: Shape) -> Shape:
        split: list[int] = []
        for axis, size in enumerate(shape):
            if axis not in self._grouped:
                split.append(size)
            elif size == 1:
                split += [1, 1]
            else:
                split += [self.a[axis], size // self.a[axis]]
        return tuple(split)


def _axis_fits(kernel: int, a: int, b: int) -> bool:
    if b == 1:
        return a == kernel
    return b == kernel and (a == 1 or kernel % a == 0)
