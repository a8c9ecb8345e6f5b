"""Kronecker vectors of layers that reshape around their product, written with einops' parentheses.

"...(h i),h i j->...(h j)" splits the input's last axis and merges the output's; "...i,i(h d)->...h d" has a kernel
that is stored with two of its axes merged. The vectors are those of the product between the split arrays, and then
merged as the kernel is.
"""

import itertools
import math
from dataclasses import dataclass

from jax import Array

from eva_optax._probes.linear_map import Moments
from eva_optax._probes.probe import Shape
from eva_optax._statistics.einsum import Contraction

Split = tuple[Shape | None, ...]  # for each axis the sizes that it is split into, None for one that stays


@dataclass(frozen=True)
class GroupedContraction:
    """The layer that splits its input and its kernel, contracts them by `split`, and merges the output."""

    kernel_shape: Shape
    split: Contraction
    x_axes: Split
    kernel_axes: Split
    y_axes: Split

    @property
    def probe_shapes(self) -> tuple[Shape, Shape]:
        a, b = self.split.probe_shapes
        return self._merged(a), self._merged(b)

    @property
    def has_ordered_bias(self) -> bool:
        return self.split.has_ordered_bias

    def mean_input(self, x: Array) -> Array:
        return self.split.mean_input(_split(x, self.x_axes)).reshape(self.probe_shapes[0])

    def sum_cotangent(self, dy: Array) -> Array:
        return self.split.sum_cotangent(_split(dy, self.y_axes)).reshape(self.probe_shapes[1])

    def apply(self, x: Array, kernel: Array, bias: Array | None = None) -> Array:
        y = self.split.apply(_split(x, self.x_axes), _split(kernel, self.kernel_axes), bias)
        return y.reshape(_merge(y.shape, self.y_axes))

    @property
    def last_output_axis(self) -> int | None:
        return self._merged_axis(self.split.last_output_axis)

    @property
    def last_input_axis(self) -> int | None:
        return self._merged_axis(self.split.last_input_axis)

    is_lookup = False

    def _merged_axis(self, axis: int | None) -> int | None:
        """The axis of the kernel that an axis of the split one is part of, both counted from the end."""
        if axis is None:
            return None
        ends = list(itertools.accumulate(len(parts or (1,)) for parts in self.kernel_axes))
        return next(place for place, end in enumerate(ends) if axis + ends[-1] < end) - len(ends)

    def sketch(self, x: Array, rank: int, rows: int) -> Array:
        moment = self.split.sketch(_split(x, self.x_axes), rank, rows)
        return moment.reshape(self._merged(moment.shape))

    def mean_square(self, x: Array, rows: int) -> Array:
        square = self.split.mean_square(_split(x, self.x_axes), rows)
        return square.reshape(self._merged(square.shape))

    def input_moment(self, x: Array, moments: Moments) -> Array:
        moment = self.split.input_moment(_split(x, self.x_axes), moments)
        return moment.reshape(self._merged(moment.shape))

    def output_moment(self, dy: Array, moments: Moments) -> Array:
        moment = self.split.output_moment(_split(dy, self.y_axes), moments)
        return moment.reshape(self._merged(moment.shape))

    def without_padding(self, x: Array, dy: Array, sharing: str) -> Array:
        split = self.split.without_padding(_split(x, self.x_axes), _split(dy, self.y_axes), sharing)
        return split.reshape(x.shape)

    def _merged(self, shape: Shape) -> Shape:
        return _merge(shape, self.kernel_axes)


def _split(array: Array, axes: Split) -> Array:
    return array.reshape(
        [part for size, parts in zip(array.shape, axes, strict=True) for part in ((size,) if parts is None else parts)]
    )


def _merge(shape: Shape, axes: Split) -> Shape:
    """The shape of an array after its split axes are merged again."""
    sizes = iter(shape)
    return tuple(math.prod(next(sizes) for _ in parts or (1,)) for parts in axes)
