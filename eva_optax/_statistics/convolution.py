"""Kronecker vectors of convolutions: a is the exact mean patch, found without ever extracting a patch.

Along each spatial axis every kernel offset reads some positions of the input. The mean patch is the sum of the input
over those positions, one axis after the other, divided by the number of output positions; what padding adds is zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eva_optax._probes.probe import accumulator
from eva_optax._statistics.window_sums import Reads, window_sums

Padding = str | tuple[tuple[int, int], ...]

_PAD_MODES: dict[str, Literal["wrap", "reflect"]] = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


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
            padded = _padded_positions(size, window, self.strides[axis], self.padding, axis, self.input_dilation[axis])
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
    def _order(self) -> tuple[int, ...]:
        """The axes of `channels_last` (*window, input channels, output channels) as they come in the kernel."""
        outputs, inputs, *window = self.dimension_numbers.rhs_spec
        return tuple(np.argsort((*window, inputs, outputs)).tolist())


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
            padded = _dilate(np.arange(size), stride)
            padded = np.pad(padded, _transposed_padding(self.padding, axis, window, stride), constant_values=-1)
            outputs = np.arange(len(padded) - window + 1)
            read = [padded[outputs + offset * self.kernel_dilation[axis]] for offset in range(count)]
            read = [positions[positions >= 0] for positions in read]
            axes.append(read[::-1] if self.transposed else read)
        return axes

    def mean_input(self, x: Array) -> Array:
        x = x.reshape(-1, *x.shape[-len(self.strides) - 1 :])
        axes = self.reads(x.shape[1:-1])
        met = np.array(1.0)
        for reads in axes:
            met = met[..., None] * np.array([max(len(positions), 1) for positions in reads])
        return (window_sums(x, axes, (1,) * len(axes)) / (x.shape[0] * met[..., None])).reshape(self.probe_shapes[0])

    def sum_cotangent(self, dy: Array) -> Array:
        b = jnp.sum(dy, tuple(range(dy.ndim - 1)), dtype=accumulator(dy.dtype))
        return b.reshape(self.probe_shapes[1])


@dataclass(frozen=True)
class LocalConvolution:
    """A convolution with a kernel of its own at each output position: positions are batch axes.

    The kernel has the shape (*output positions, input channels * window, output channels).
    """

    kernel_shape: tuple[int, ...]
    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: Padding
    input_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]

    @property
    def probe_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        *positions, _, features = self.kernel_shape
        return (*self.kernel_shape[:-1], 1), (*positions, 1, features)

    def mean_input(self, x: Array) -> Array:
        x = x.reshape(-1, *x.shape[-len(self.strides) - 1 :])
        image = jnp.mean(x, 0, keepdims=True, dtype=accumulator(x.dtype))
        rank, padding = image.ndim, self.padding
        if padding in (*_PAD_MODES, "CAUSAL"):
            windows = [(k - 1) * d + 1 for k, d in zip(self.window, self.kernel_dilation, strict=True)]
            pads = [(w - 1, 0) if padding == "CAUSAL" else ((w - 1) // 2, w // 2) for w in windows]
            image = jnp.pad(image, [(0, 0), *pads, (0, 0)], mode=_PAD_MODES.get(padding, "constant"))
            padding = "VALID"
        channels_last = (0, rank - 1, *range(1, rank - 1))
        patches = jax.lax.conv_general_dilated_patches(
            image,
            self.window,
            self.strides,
            padding,
            self.input_dilation,
            self.kernel_dilation,
            jax.lax.ConvDimensionNumbers(channels_last, (rank - 1, rank - 2, *range(rank - 2)), channels_last),
            precision=jax.lax.Precision.HIGHEST,
        )
        return patches.reshape(self.probe_shapes[0])

    def sum_cotangent(self, dy: Array) -> Array:
        b = jnp.sum(dy.reshape(-1, *dy.shape[-len(self.strides) - 1 :]), 0, dtype=accumulator(dy.dtype))
        return b.reshape(self.probe_shapes[1])


def _dilate(positions: np.ndarray, dilation: int) -> np.ndarray:
    """`positions` with `dilation - 1` zeros, marked -1, between neighbours."""
    dilated = np.full((len(positions) - 1) * dilation + 1, -1)
    dilated[::dilation] = positions
    return dilated


def _padded_positions(
    size: int, window: int, stride: int, padding: Padding, axis: int, input_dilation: int
) -> np.ndarray:
    """The input position at each place of the padded axis, -1 where it holds a zero."""
    positions = np.arange(size)
    if padding in _PAD_MODES:  # these pad the input before it is dilated
        positions = np.pad(positions, ((window - 1) // 2, window // 2), mode=_PAD_MODES[str(padding)])
    elif padding == "CAUSAL":
        positions = np.pad(positions, (window - 1, 0), constant_values=-1)
    positions = _dilate(positions, input_dilation)
    low = high = 0
    if padding in ("SAME", "SAME_LOWER"):
        missing = max((-(-len(positions) // stride) - 1) * stride + window - len(positions), 0)
        low = missing // 2 if padding == "SAME" else missing - missing // 2
        high = missing - low
    elif not isinstance(padding, str):
        low, high = padding[axis]
    positions = np.pad(positions, (max(low, 0), max(high, 0)), constant_values=-1)
    return positions[max(-low, 0) : len(positions) - max(-high, 0)]  # negative padding crops


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
