"""Statistics of convolutions that have a kernel of their own at each position."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from eva_optax._probes.directions import directions
from eva_optax._probes.linear_map import Moments
from eva_optax._probes.probe import accumulator
from eva_optax._statistics.images import Padding, images, patches, some_images
from eva_optax._statistics.moments import input_moment, output_moment


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

    last_output_axis = -1

    def mean_input(self, x: Array) -> Array:
        x = x.reshape(-1, *x.shape[-len(self.strides) - 1 :])
        image = jnp.mean(x, 0, keepdims=True, dtype=accumulator(x.dtype))
        return self._patches(image).reshape(self.probe_shapes[0])

    def sum_cotangent(self, dy: Array) -> Array:
        b = jnp.sum(dy.reshape(-1, *dy.shape[-len(self.strides) - 1 :]), 0, dtype=accumulator(dy.dtype))
        return b.reshape(self.probe_shapes[1])

    def sketch(self, x: Array, rank: int, rows: int) -> Array:
        patches = self._patches(some_images(x, len(self.strides), rows))
        exact = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        z = exact("n...i,ir->n...r", patches, directions(patches.shape[-1:], rank, patches.dtype))
        return exact("n...i,n...r->...ir", patches, z) / len(patches)

    def mean_square(self, x: Array, rows: int) -> Array:
        patches = self._patches(some_images(x, len(self.strides), rows))
        return (jnp.sum(patches * patches, (0, -1)) / len(patches))[..., None, None]

    last_input_axis = -2
    is_lookup = False

    def input_moment(self, x: Array, moments: Moments) -> Array:
        rows = self._patches(images(x, len(self.strides), moments.rows))
        return input_moment(rows[:, None, ..., None], self.probe_shapes, -1, moments)

    def output_moment(self, dy: Array, moments: Moments) -> Array:
        rows = images(dy, len(self.strides), None)[:, None, ..., None, :]
        return output_moment(rows, self.probe_shapes, -2, moments)

    def _patches(self, x: Array) -> Array:
        """What each output position reads: (batch, *positions, input channels * window)."""
        return patches(x, self.window, self.strides, self.padding, self.input_dilation, self.kernel_dilation)
