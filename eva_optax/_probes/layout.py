"""How kernel, bias, statistics and counter of one layer lie against each other; static, from shapes alone.

Axis by axis a layer is described by the sizes of its kernel, of a and of b:

    input axis    a full, b 1          output axis   a 1, b full
    batch axis    both full: one layer of its own per index (scanned layers, experts, heads)
    grouped axis  b full, a a divisor: that many layers side by side (grouped convolution)

With its grouped axes split into a batch axis and an output axis each, everything broadcasts. All other kernels are
never reshaped or transposed, and keep their sharding.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array

from eva_optax._probes.probe import NUMBERS, Shape


class Layout(NamedTuple):
    """Shapes of a layer's parts. `stacks` pairs each stacked axis in the counter with the kernel's.

    The counter has the bias's layout (the kernel's without a bias), one axis for its numbers, at `numbers`, and 1
    everywhere but at its stacked axes.
    """

    kernel: Shape
    bias: Shape | None
    a: Shape
    b: Shape
    counter: Shape
    numbers: int
    stacks: tuple[tuple[int, int], ...]

    @classmethod
    def fit(cls, name: str, *, kernel: Shape, bias: Shape | None, a: Shape, b: Shape | None, counter: Shape) -> Self:
        """Checks that the shapes fit together; without b no axis but stacked ones is a batch axis.

        Raises:
          ValueError: naming the layer and all shapes, if they do not.
        """
        for numbers in range(len(counter)):
            stacks = None if counter[numbers] != NUMBERS else _stacked(kernel, a, b, counter, numbers)
            if stacks is None:
                continue
            stacked = [axis for _, axis in stacks]
            sizes = enumerate(zip(kernel, a, strict=False))
            full_b = b or tuple(size if i == 1 or axis in stacked else 1 for axis, (size, i) in sizes)
            layout = cls(kernel, bias, a, full_b, counter, numbers, stacks)
            if layout._fits():
                return layout
        raise ValueError(
            f"eva_optax: the probe of layer {name!r} does not fit its kernel. The kernel has shape {kernel}, the "
            f"bias {bias}; the vectors have shapes a {a}, b {b} and counter {counter}, but a must have the "
            "kernel's shape with its output axes set to 1, and b with its input axes set to 1. Was the checkpoint "
            "made for another model? eva_optax.strip removes the old probes and eva_optax.attach makes new ones."
        )

    def _fits(self) -> bool:
        kernel, bias = self.kernel, self.bias
        fits = len(kernel) == len(self.a) == len(self.b) and all(map(_axis_fits, kernel, self.a, self.b))
        if not fits or bias is None:
            return fits
        in_bias = self._stacks_in_bias
        return (
            len(bias) in (len(self.counter), len(in_bias))
            and math.prod(bias) == math.prod(self.b)
            and all(bias[q] == kernel[p] for q, p in in_bias)
        )

    @classmethod
    def of_tensor(cls, shape: Shape) -> Self:
        """A tensor as one layer without a bias, all of whose axes are input axes."""
        return cls(shape, None, shape, (1,) * len(shape), (NUMBERS,), 0, ())

    def counter_with(self, count: int) -> Shape:
        """The shape of a counter of so many numbers."""
        return tuple(count if axis == self.numbers else size for axis, size in enumerate(self.counter))

    def split_groups(self, array: Array) -> Array:
        """Kernel, a or b with each grouped axis split in two; anything else as it is."""
        return array.reshape(self.split_shape(array.shape)) if self.is_grouped else array

    def merge_groups(self, array: Array, shape: Shape) -> Array:
        """Undoes `split_groups`."""
        return array.reshape(shape) if self.is_grouped else array

    @property
    def sum_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The output axes and the input axes, groups split; what is left are batch axes.

        An axis that is 1 in both counts as input if an output axis follows, so that the window of a 1×1 convolution
        does: XLA's CPU backend is a hundred times slower at sums over an inner axis alone.
        """
        a, b = self.split_shape(self.a), self.split_shape(self.b)
        last = max((axis for axis, (i, o) in enumerate(zip(a, b, strict=True)) if i == 1 < o), default=-1)
        inputs = tuple(axis for axis, (i, o) in enumerate(zip(a, b, strict=True)) if o == 1 and (i > 1 or axis < last))
        outputs = tuple(axis for axis, i in enumerate(a) if i == 1 and axis not in inputs)
        return outputs, inputs

    @property
    def is_grouped(self) -> bool:
        """Whether there are grouped axes."""
        return any(size not in (1, full) for size, full in zip(self.a, self.kernel, strict=True))

    @property
    def is_plain(self) -> bool:
        """Whether it is one layer: no batch axes and no groups."""
        return all(i == 1 or o == 1 for i, o in zip(self.a, self.b, strict=True))

    def total(self, stacked: Array) -> Array:
        """The sum over input and output axes, of arrays of equal layers stacked at a new first axis."""
        return jnp.sum(stacked, [1 + axis for axes in self.sum_axes for axis in axes], keepdims=True)

    def counter_to_kernel_axes(self, stacked: Array) -> list[Array]:
        """The numbers of stacked counters, each laid out against kernel, a and b, groups split."""
        shape = [1] * len(self.kernel)
        for position, axis in self.stacks:
            shape[axis] = self.counter[position]
        shape = (len(stacked), *self.split_shape(tuple(shape)))
        axis = self.numbers + 1
        return [jax.lax.index_in_dim(stacked, index, axis).reshape(shape) for index in range(stacked.shape[axis])]

    def kernel_axes_to_counter(self, *numbers: tuple[Array, Callable[[Array, Sequence[int]], Array]]) -> Array:
        """Undoes it; each number comes with what reduces it over the axes that a counter lacks."""
        unsplit = tuple(1 if o == 1 else i for i, o in zip(self.a, self.b, strict=True))
        others = tuple(1 + axis for axis in range(len(self.kernel)) if axis not in self._stack_axes)
        single = self.counter_with(1)

        def part(number: Array, reduce: Callable[[Array, Sequence[int]], Array]) -> Array:
            count, *split = number.shape
            merged = number.reshape(count, *(unsplit if self.is_grouped else split))
            return reduce(merged, others).reshape(count, *single)

        return jnp.concatenate([part(*number) for number in numbers], self.numbers + 1)

    def bias_to_kernel_axes(self, bias: Array) -> Array:
        """A bias-shaped array laid out as b."""
        in_bias = self._stacks_in_bias
        if not in_bias:
            return bias.reshape(self.b)
        moved = jnp.moveaxis(bias, [q for q, _ in in_bias], range(len(in_bias)))
        inner = [size for axis, size in enumerate(self.b) if axis not in self._stack_axes]
        moved = moved.reshape(*moved.shape[: len(in_bias)], *inner)
        return jnp.moveaxis(moved, range(len(in_bias)), self._stack_axes)

    def kernel_axes_to_bias(self, spread: Array) -> Array:
        """Undoes `bias_to_kernel_axes`."""
        assert self.bias is not None
        in_bias = self._stacks_in_bias
        if not in_bias:
            return spread.reshape(self.bias)
        moved = jnp.moveaxis(spread, self._stack_axes, range(len(in_bias)))
        positions = [q for q, _ in in_bias]
        inner = [size for axis, size in enumerate(self.bias) if axis not in positions]
        moved = moved.reshape(*moved.shape[: len(in_bias)], *inner)
        return jnp.moveaxis(moved, range(len(in_bias)), positions)

    def repeat_groups(self, a: Array) -> Array:
        """a with the entry of each group repeated for the group's output channels."""
        for axis in self._grouped:
            a = jnp.repeat(a, self.kernel[axis] // self.a[axis], axis)
        return a

    @property
    def _stack_axes(self) -> list[int]:
        return [axis for _, axis in self.stacks]

    @property
    def _stacks_in_bias(self) -> tuple[tuple[int, int], ...]:
        """As `stacks`, with the positions in the bias. A bias without axes of its own has stacked ones alone."""
        if self.bias is None or len(self.bias) == len(self.counter):
            return self.stacks
        return tuple(enumerate(self._stack_axes))

    @property
    def _grouped(self) -> list[int]:
        return [axis for axis, size in enumerate(self.kernel) if self.a[axis] not in (1, size)]

    def split_shape(self, shape: Shape) -> Shape:
        """The shape of kernel, a or b with each grouped axis split in two."""
        split: list[int] = []
        for axis, size in enumerate(shape):
            if axis not in self._grouped:
                split.append(size)
            elif size == 1:
                split += [1, 1]
            else:
                split += [self.a[axis], size // self.a[axis]]
        return tuple(split)


def find_stacked(a: Shape, b: Shape | None, counter: Shape, count: int) -> tuple[int, tuple[tuple[int, int], ...]]:
    """The axis of a counter that holds its numbers, so many, and its stacked axes with those of a and b."""
    places = range(len(counter))
    for numbers in reversed(places) if b is None else places:  # without b an input axis may look like a stacked one
        stacks = _stacked(a, a, b, counter, numbers) if counter[numbers] == count else None
        if stacks is not None:
            return numbers, stacks
    raise ValueError(f"eva_optax: a counter of shape {counter} does not fit vectors of shapes {a} and {b}.")


def _stacked(
    kernel: Shape, a: Shape, b: Shape | None, counter: Shape, numbers: int
) -> tuple[tuple[int, int], ...] | None:
    """The stacked axes of the counter with the kernel's; None if an axis of the counter is none of the kernel's."""
    if not len(kernel) == len(a) == len(b or a):
        return None
    stacks = []
    for position, size in enumerate(counter):
        if position == numbers or size == 1:
            continue
        # Flax stacks kernel and bias at the same axis, counted from the front or, if negative, from the end.
        candidates = (position, position - len(counter) + len(kernel))
        match = [p for p in candidates if p < len(kernel) and a[p] == (b or a)[p] == kernel[p] == size]
        if not match:
            return None
        stacks.append((position, match[0]))
    return tuple(stacks) if stacks == sorted(stacks, key=lambda stack: stack[1]) else None


def _axis_fits(kernel: int, a: int, b: int) -> bool:
    if b == 1:
        return a == kernel
    return b == kernel and (a == 1 or kernel % a == 0)
