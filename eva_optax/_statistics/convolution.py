"""Statistics of convolutions: a is the exact mean patch, found without ever extracting a patch.

Along each spatial axis every kernel offset reads some positions of the input. The mean patch is the sum of the input
over those positions, one axis after the other, divided by the number of output positions; what padding adds is zero.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eva_optax._probes.directions import directions
from eva_optax._probes.linear_map import Moments
from eva_optax._probes.probe import accumulator
from eva_optax._statistics.images import Padding, channels_last, images, pad, padded_positions, patches, some_images
from eva_optax._statistics.moments import input_moment, output_moment
from eva_optax._statistics.window_sums import Reads, window_sums


@dataclass(frozen=True)
class Convolution:
    """A convolution with channels last and a kernel of shape (*window, input channels / groups, output channels).

    `padding` is "SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", "CAUSAL" or a (low, high) pair for each spatial
    axis. With groups, a has the number of groups where other layers have 1: each group is a layer of its own.
    """

    kernel_shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Padding
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]
    groups: int

    @property
    def probe_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        rank = len(self.kernel_shape)
        return (*self.kernel_shape[:-1], self.groups), (*(1,) * (rank - 1), self.kernel_shape[-1])

    def reads(self, spatial: Sequence[int]) -> tuple[list[Reads], int]:
        """For each spatial axis what its offsets read, and the number of output positions in all."""
        axes, positions = [], 1
        for axis, size in enumerate(spatial):
            window = (self.kernel_shape[axis] - 1) * self.kernel_dilation[axis] + 1
            padded = padded_positions(size, window, self.strides[axis], self.padding, axis, self.input_dilation[axis])
            starts = np.arange(0, len(padded) - window + 1, self.strides[axis])
            offsets = np.arange(self.kernel_shape[axis]) * self.kernel_dilation[axis]
            read = [padded[starts + offset] for offset in offsets]
            axes.append([positions_of[positions_of >= 0] for positions_of in read])
            positions *= len(starts)
        return axes, positions

    def mean_input(self, x: Array) -> Array:
        spatial = x.shape[-len(self.strides) - 1 : -1]
        axes, positions = self.reads(spatial)
        if positions == 0:
            raise ValueError(f"eva_optax: a convolution over {spatial} with window {self.kernel_shape} has no output.")
        x = x.reshape(-1, *x.shape[-len(self.strides) - 1 :])
        total = window_sums(x, axes, self.strides) / (x.shape[0] * positions)
        # Channels come ordered by group; the kernel holds the groups side by side along its last axis.
        grouped = total.reshape(*total.shape[:-1], self.groups, -1)
        return jnp.swapaxes(grouped, -1, -2)

    def sum_cotangent(self, dy: Array) -> Array:
        b = jnp.sum(dy, tuple(range(dy.ndim - 1)), dtype=accumulator(dy.dtype))
        return b.reshape(self.probe_shapes[1])

    last_output_axis = -1

    def sketch(self, x: Array, rank: int, rows: int) -> Array:
        return self.moment_along(x, directions(self.kernel_shape[:-1], rank, accumulator(x.dtype)), rows)

    def moment_along(self, x: Array, omega: Array, rows: int) -> Array:
        """XᵀXΩ / rows for any Ω, (*window, input channels / groups, r)."""
        x = some_images(x, len(self.strides), rows)
        padded, padding = pad(x, self.padding, self.kernel_shape[:-2], self.kernel_dilation)
        convolve = partial(
            jax.lax.conv_general_dilated,
            padded,
            window_strides=self.strides,
            padding=padding,
            lhs_dilation=self.input_dilation,
            rhs_dilation=self.kernel_dilation,
            dimension_numbers=channels_last(x.ndim),
            feature_group_count=self.groups,
            precision=jax.lax.Precision.HIGHEST,
        )
        z, transposed = jax.vjp(convolve, jnp.tile(omega, self.groups))
        (moment,) = transposed(z)
        return moment / math.prod(z.shape[:-1])

    def mean_square(self, x: Array, rows: int) -> Array:
        x = some_images(x, len(self.strides), rows)
        squares = self.mean_input(x * x)
        return jnp.sum(squares, tuple(range(squares.ndim - 1)), keepdims=True)

    last_input_axis = -2
    is_lookup = False

    def input_moment(self, x: Array, moments: Moments) -> Array:
        window = self.kernel_shape[:-2]
        geometry = (window, self.strides, self.padding, self.input_dilation, self.kernel_dilation)
        rows = patches(images(x, len(window), moments.rows), *geometry)
        # Patches come channel by channel, each with its window; channels ordered by group.
        rows = rows.reshape(len(rows), -1, self.groups, self.kernel_shape[-2], *window)
        rows = jnp.moveaxis(rows, (2, 3), (-1, -2))
        return input_moment(rows, self.probe_shapes, -1, moments)

    def output_moment(self, dy: Array, moments: Moments) -> Array:
        dy = images(dy, len(self.strides), None)
        return output_moment(dy.reshape(len(dy), -1, *self.probe_shapes[1]), self.probe_shapes, -2, moments)


@dataclass(frozen=True)
class PermutedConvolution:
    """A convolution whose axes lie in any order; a kernel that lacks the input axis has it as a last one of size 1."""

    kernel_shape: tuple[int, ...]
    channels_last: Convolution
    dimension_numbers: jax.lax.ConvDimensionNumbers

    @property
    def probe_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        a, b = (tuple(shape[axis] for axis in self._order) for shape in self.channels_last.probe_shapes)
        return a[: len(self.kernel_shape)], b[: len(self.kernel_shape)]

    def mean_input(self, x: Array) -> Array:
        batch, channels, *spatial = self.dimension_numbers.lhs_spec
        a = self.channels_last.mean_input(jnp.transpose(x, (batch, *spatial, channels)))
        return jnp.transpose(a, self._order).reshape(self.probe_shapes[0])

    def sum_cotangent(self, dy: Array) -> Array:
        batch, channels, *spatial = self.dimension_numbers.out_spec
        b = self.channels_last.sum_cotangent(jnp.transpose(dy, (batch, *spatial, channels)))
        return jnp.transpose(b, self._order).reshape(self.probe_shapes[1])

    @property
    def last_output_axis(self) -> int:
        return self.dimension_numbers.rhs_spec[0] - len(self.kernel_shape)

    def sketch(self, x: Array, rank: int, rows: int) -> Array:
        batch, channels, *spatial = self.dimension_numbers.lhs_spec
        x, sizes = jnp.transpose(x, (batch, *spatial, channels)), self.channels_last.kernel_shape
        # Directions are numbered as the kernel's inputs come.
        omega = directions([sizes[axis] for axis in self._input_order], rank, accumulator(x.dtype))
        omega = jnp.transpose(omega, (*np.argsort(self._input_order).tolist(), -1))
        return self._as_kernel(self.channels_last.moment_along(x, omega, rows))

    def mean_square(self, x: Array, rows: int) -> Array:
        batch, channels, *spatial = self.dimension_numbers.lhs_spec
        return self._as_kernel(self.channels_last.mean_square(jnp.transpose(x, (batch, *spatial, channels)), rows))

    @property
    def last_input_axis(self) -> int | None:
        """None for a kernel that lacks the input axis."""
        axis, rank = self.dimension_numbers.rhs_spec[1], len(self.kernel_shape)
        return axis - rank if axis < rank else None

    is_lookup = False

    def input_moment(self, x: Array, moments: Moments) -> Array:
        batch, channels, *spatial = self.dimension_numbers.lhs_spec
        moment = self.channels_last.input_moment(jnp.transpose(x, (batch, *spatial, channels)), moments)
        inputs, groups = self.channels_last.kernel_shape[:-1], self.channels_last.groups
        split = moment.reshape(*inputs, groups, *inputs)
        count = len(inputs) + 1
        columns = [count + axis for axis in self._input_order]
        return self._as_kernel(jnp.transpose(split, (*range(count), *columns)).reshape(moment.shape))

    def output_moment(self, dy: Array, moments: Moments) -> Array:
        batch, channels, *spatial = self.dimension_numbers.out_spec
        dy = jnp.transpose(dy, (batch, *spatial, channels))
        return self._as_kernel(self.channels_last.output_moment(dy, moments))

    def _as_kernel(self, array: Array) -> Array:
        """An array with the axes of `channels_last` with those of the kernel, which may lack the input axis."""
        moved = jnp.transpose(array, self._order)
        return moved.reshape(moved.shape[: len(self.kernel_shape)])

    @property
    def _order(self) -> tuple[int, ...]:
        """The axes of `channels_last` (*window, input channels, output channels) as they come in the kernel."""
        outputs, inputs, *window = self.dimension_numbers.rhs_spec
        return tuple(np.argsort((*window, inputs, outputs)).tolist())

    @property
    def _input_order(self) -> tuple[int, ...]:
        """The same without the outputs."""
        return tuple(axis for axis in self._order if axis < len(self._order) - 1)
