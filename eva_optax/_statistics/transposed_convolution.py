"""Statistics of transposed convolutions, whose patches are mostly zeros between the positions of the input."""

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
from eva_optax._statistics.images import Padding, channels_last, dilate, images, some_images
from eva_optax._statistics.moments import input_moment, output_moment
from eva_optax._statistics.window_sums import Reads, window_sums


@dataclass(frozen=True)
class TransposedConvolution:
    """A transposed convolution; a is the mean over the input positions that each kernel offset meets.

    An output position meets only some of the offsets, so that no single mean patch exists: this a is a definition.
    `transposed` marks a kernel of shape (*window, output channels, input channels) with its window flipped.
    """

    kernel_shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Padding
    kernel_dilation: tuple[int, ...]
    transposed: bool

    @property
    def probe_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        *window, rows, columns = self.kernel_shape
        ones = (1,) * len(window)
        if self.transposed:
            return (*window, 1, columns), (*ones, rows, 1)
        return (*window, rows, 1), (*ones, 1, columns)

    def reads(self, spatial: Sequence[int]) -> list[Reads]:
        axes = []
        for axis, size in enumerate(spatial):
            stride, count = self.strides[axis], self.kernel_shape[axis]
            window = (count - 1) * self.kernel_dilation[axis] + 1
            padded = dilate(np.arange(size), stride)
            padded = np.pad(padded, _transposed_padding(self.padding, axis, window, stride), constant_values=-1)
            outputs = np.arange(len(padded) - window + 1)
            read = [padded[outputs + offset * self.kernel_dilation[axis]] for offset in range(count)]
            read = [positions[positions >= 0] for positions in read]
            axes.append(read[::-1] if self.transposed else read)
        return axes

    @property
    def last_output_axis(self) -> int:
        return -2 if self.transposed else -1

    def mean_input(self, x: Array) -> Array:
        x = x.reshape(-1, *x.shape[-len(self.strides) - 1 :])
        axes = self.reads(x.shape[1:-1])
        total = window_sums(x, axes, (1,) * len(axes)) / (x.shape[0] * self._met(axes)[..., None])
        return total.reshape(self.probe_shapes[0])

    def _met(self, axes: list[Reads]) -> np.ndarray:
        """How many input positions each offset of the window meets, at least 1."""
        met = np.array(1.0)
        for reads in axes:
            met = met[..., None] * np.array([max(len(positions), 1) for positions in reads])
        return met

    def sum_cotangent(self, dy: Array) -> Array:
        b = jnp.sum(dy, tuple(range(dy.ndim - 1)), dtype=accumulator(dy.dtype))
        return b.reshape(self.probe_shapes[1])

    def sketch(self, x: Array, rank: int, rows: int) -> Array:
        """Of the patches at output positions, zero where they meet no input, and counted by input positions, as a."""
        x = some_images(x, len(self.strides), rows)
        z, transposed = jax.vjp(partial(self._convolve, x), directions(self._inputs, rank, x.dtype))
        (moment,) = transposed(z)
        moment = jnp.swapaxes(moment, -1, -2) if self.transposed else moment
        return moment / math.prod(x.shape[:-1])

    def mean_square(self, x: Array, rows: int) -> Array:
        x = some_images(x, len(self.strides), rows)
        axes = self.reads(x.shape[1:-1])
        total = jnp.sum(window_sums(x * x, axes, (1,) * len(axes))) / math.prod(x.shape[:-1])
        return total.reshape((1,) * len(self.kernel_shape))

    @property
    def last_input_axis(self) -> int:
        return -1 if self.transposed else -2

    is_lookup = False

    def input_moment(self, x: Array, moments: Moments) -> Array:
        """Of the patches at output positions, each offset so large that a, over what it meets, is their mean.

        Beside a bias the moment of (x, 1) would otherwise have negative eigenvalues.
        """
        x = images(x, len(self.strides), moments.rows)
        inputs = self._inputs
        found = self._convolve(x, jnp.eye(math.prod(inputs), dtype=x.dtype).reshape(*inputs, -1))
        rows = found.reshape(len(x), -1, *self.probe_shapes[0])
        scale = rows.shape[1] / self._met(self.reads(x.shape[1:-1]))
        rows = rows * scale[None, None, ..., None, None].astype(rows.dtype)
        return input_moment(rows, self.probe_shapes, self.last_output_axis, moments)

    def output_moment(self, dy: Array, moments: Moments) -> Array:
        dy = images(dy, len(self.strides), None)
        rows = dy.reshape(len(dy), -1, *self.probe_shapes[1])
        return output_moment(rows, self.probe_shapes, self.last_input_axis, moments)

    @property
    def _inputs(self) -> tuple[int, ...]:
        """The sizes of the window and of the input channels."""
        *window, rows, columns = self.kernel_shape
        return (*window, columns if self.transposed else rows)

    def _convolve(self, x: Array, kernel: Array) -> Array:
        """The layer with another kernel, (*window, input channels, outputs)."""
        return jax.lax.conv_transpose(
            x,
            jnp.swapaxes(kernel, -1, -2) if self.transposed else kernel,
            strides=self.strides,
            padding="VALID" if self.padding == "CIRCULAR" else self.padding,
            rhs_dilation=self.kernel_dilation,
            transpose_kernel=self.transposed,
            dimension_numbers=channels_last(x.ndim),
            precision=jax.lax.Precision.HIGHEST,
        )


def _transposed_padding(padding: Padding, axis: int, window: int, stride: int) -> tuple[int, int]:
    """How `jax.lax.conv_transpose` pads the dilated input; CIRCULAR wraps the VALID result and loses nothing."""
    if not isinstance(padding, str):
        return padding[axis]
    if padding == "SAME":
        total = window + stride - 2
        low = window - 1 if stride > window - 1 else -(-total // 2)
    else:
        total = window + stride - 2 + max(window - stride, 0)
        low = window - 1
    return low, total - low
