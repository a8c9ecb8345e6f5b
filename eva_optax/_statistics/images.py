"""How convolutions read images: the order of their axes, what padding adds, and which examples a sketch is made of."""

import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from eva_optax._probes.probe import accumulator
from eva_optax._statistics.sketches import IMAGES, thin

Padding = str | tuple[tuple[int, int], ...]

PAD_MODES: dict[str, Literal["wrap", "reflect"]] = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


def some_images(x: Array, rank: int, rows: int) -> Array:
    """The input of examples with about so many rows, one batch axis before `rank` spatial ones, at least float32."""
    x = x.reshape(-1, *x.shape[-rank - 1 :]).astype(accumulator(x.dtype))
    positions = math.prod(x.shape[1:-1])
    return thin(x, 0, min(len(x) * positions // rows, len(x) // IMAGES) if isinstance(x.shape[0], int) else 1)


def images(x: Array, rank: int, rows: int | None) -> Array:
    """The input with one batch axis before `rank` spatial ones: of all examples, or of as few as have so many rows."""
    x = x.reshape(-1, *x.shape[-rank - 1 :])
    return x if rows is None else thin(x, 0, len(x) * math.prod(x.shape[1:-1]) // rows)


def patches(
    x: Array,
    window: Sequence[int],
    strides: Sequence[int],
    padding: Padding,
    input_dilation: Sequence[int],
    kernel_dilation: Sequence[int],
) -> Array:
    """What each output position reads: (batch, *positions, channels · window), windows of each channel together."""
    padded, padding = pad(x, padding, window, kernel_dilation)
    return jax.lax.conv_general_dilated_patches(
        padded,
        window,
        strides,
        padding,
        input_dilation,
        kernel_dilation,
        channels_last(x.ndim),
        precision=jax.lax.Precision.HIGHEST,
    )


def pad(x: Array, padding: Padding, window: Sequence[int], dilation: Sequence[int]) -> tuple[Array, Padding]:
    """The input as Flax pads it itself, and what is left for the convolution to pad."""
    if padding not in (*PAD_MODES, "CAUSAL"):
        return x, padding
    reach = [(size - 1) * step for size, step in zip(window, dilation, strict=True)]
    sides = [(size, 0) if padding == "CAUSAL" else (size // 2, (size + 1) // 2) for size in reach]
    return jnp.pad(x, [(0, 0), *sides, (0, 0)], mode=PAD_MODES.get(str(padding), "constant")), "VALID"


def channels_last(rank: int) -> jax.lax.ConvDimensionNumbers:
    """Of inputs (batch, *spatial, channels) and kernels (*window, input channels, output channels)."""
    image = (0, rank - 1, *range(1, rank - 1))
    return jax.lax.ConvDimensionNumbers(image, (rank - 1, rank - 2, *range(rank - 2)), image)


def dilate(positions: np.ndarray, dilation: int) -> np.ndarray:
    """`positions` with `dilation - 1` zeros, marked -1, between neighbours."""
    dilated = np.full((len(positions) - 1) * dilation + 1, -1)
    dilated[::dilation] = positions
    return dilated


def padded_positions(
    size: int, window: int, stride: int, padding: Padding, axis: int, input_dilation: int
) -> np.ndarray:
    """The input position at each place of the padded axis, -1 where it holds a zero."""
    positions = np.arange(size)
    if padding in PAD_MODES:  # these pad the input before it is dilated
        positions = np.pad(positions, ((window - 1) // 2, window // 2), mode=PAD_MODES[str(padding)])
    elif padding == "CAUSAL":
        positions = np.pad(positions, (window - 1, 0), constant_values=-1)
    positions = dilate(positions, input_dilation)
    low = high = 0
    if padding in ("SAME", "SAME_LOWER"):
        missing = max((-(-len(positions) // stride) - 1) * stride + window - len(positions), 0)
        low = missing // 2 if padding == "SAME" else missing - missing // 2
        high = missing - low
    elif not isinstance(padding, str):
        low, high = padding[axis]
    positions = np.pad(positions, (max(low, 0), max(high, 0)), constant_values=-1)
    return positions[max(-low, 0) : len(positions) - max(-high, 0)]  # negative padding crops
