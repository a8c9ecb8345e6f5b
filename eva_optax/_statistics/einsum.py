"""Kronecker vectors of layers that contract their input with the kernel: Dense, DenseGeneral, Einsum, Embed."""

import math
import string
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, PartitionSpec

from eva_optax._probes.directions import directions
from eva_optax._probes.fusion import apart_on_gpu
from eva_optax._probes.linear_map import Moments
from eva_optax._probes.probe import accumulator
from eva_optax._statistics.moments import input_moment, output_moment, some_positions, weights_without_padding
from eva_optax._statistics.sketches import thin


@dataclass(frozen=True)
class Contraction:
    """The layer y = einsum(f"{x},{kernel}->{y}", input, kernel), one letter an axis.

    A kernel letter that is also in `x` and in `y` is a batch axis (heads, experts), in `x` alone an input axis, in
    `y` alone an output axis. The letters of `positions` (batch, time, space) are averaged in the input; every other
    letter that the kernel lacks is summed, because the layer sums it too.
    """

    kernel_shape: tuple[int, ...]
    x: str
    kernel: str
    y: str
    positions: str

    @property
    def probe_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        axes = list(zip(self.kernel, self.kernel_shape, strict=True))
        # A letter that only the kernel has is an input axis too: the layer reads the same input along it.
        a = tuple(1 if c in self.y and c not in self.x else size for c, size in axes)
        b = tuple(size if c in self.y else 1 for c, size in axes)
        return a, b

    @property
    def has_ordered_bias(self) -> bool:
        """Whether the output has the kernel's output axes in the kernel's order, as the layout of a bias wants it."""
        order = [self.kernel.index(letter) for letter in self.y if letter in self.kernel]
        return order == sorted(order)

    @property
    def last_output_axis(self) -> int | None:
        outputs = [axis for axis, c in enumerate(self.kernel) if c in self.y and c not in self.x]
        return outputs[-1] - len(self.kernel) if outputs else None

    @property
    def last_input_axis(self) -> int | None:
        """None where the output lacks the positions of the input, so that rows of cotangents are not known."""
        inputs = [axis for axis, c in enumerate(self.kernel) if c not in self.y]
        return inputs[-1] - len(self.kernel) if inputs and set(self.positions) <= set(self.y) else None

    is_lookup = False

    def mean_input(self, x: Array) -> Array:
        a = _reduce(x, self.x, self.kernel, self.kernel_shape)
        count = 1
        for letter, size in zip(self.x, x.shape, strict=True):
            count *= size if letter in self.positions else 1
        return jnp.broadcast_to(a / count, self.probe_shapes[0])

    def sum_cotangent(self, dy: Array) -> Array:
        return _reduce(dy, self.y, self.kernel, self.kernel_shape)

    def apply(self, x: Array, kernel: Array, bias: Array | None = None) -> Array:
        """The output of the layer, to compare with."""
        equation = f"{self.x},{self.kernel}->{self.y}"
        y = jnp.einsum(equation, x, kernel, precision=jax.lax.Precision.HIGHEST)
        sizes = (size if letter in self.kernel else 1 for letter, size in zip(self.y, y.shape, strict=True))
        return y if bias is None else y + bias.reshape(tuple(sizes))

    def sketch(self, x: Array, rank: int, rows: int) -> Array:
        x, letters, count = self._rows(x, rows)
        inputs = [axis for axis, c in enumerate(self.kernel) if c not in self.y]
        omega = directions([self.kernel_shape[axis] for axis in inputs], rank, x.dtype)
        # The layer itself with as many outputs, and the gradient of its kernel at the cotangent z.
        names = "".join(self.kernel[axis] for axis in inputs)
        z = "".join(c for c in letters if c not in names)
        read = "".join(c for c in self.kernel if c in letters)
        new = next(c for c in string.ascii_letters if c not in self.x + self.kernel + self.y)
        exact = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        x, omega = apart_on_gpu((x, omega))
        projected = exact(f"{letters},{names}{new}->{z}{new}", x, omega)
        # Where shardings are part of the types, the sum over a sharded batch has to be told where it goes.
        where = PartitionSpec() if AxisType.Explicit in jax.typeof(x).sharding.mesh.axis_types else None
        moment = exact(f"{letters},{z}{new}->{read}{new}", x, projected, out_sharding=where)
        shape = [size if c in read else 1 for c, size in zip(self.kernel, self.kernel_shape, strict=True)]
        axis = self.last_output_axis
        assert axis is not None
        # Along an axis that the input lacks it is the same.
        full = list(self.probe_shapes[0])
        moment = jnp.broadcast_to(moment.reshape(*shape, rank), (*full, rank))
        return jnp.moveaxis(jnp.squeeze(moment, len(full) + axis), -1, axis) / count

    def mean_square(self, x: Array, rows: int) -> Array:
        x, letters, count = self._rows(x, rows)
        axes = [axis for axis, c in enumerate(letters) if c not in self.kernel or c not in self.y]
        squares = jnp.sum(x * x, axes)
        kept = [c for i, c in enumerate(letters) if i not in axes]
        squares = jnp.transpose(squares, [kept.index(c) for c in self.kernel if c in kept])
        sizes = list(zip(self.kernel, self.kernel_shape, strict=True))
        repeated = math.prod(size for c, size in sizes if c not in self.x + self.y)
        return squares.reshape([size if c in kept else 1 for c, size in sizes]) * (repeated / count)

    def input_moment(self, x: Array, moments: Moments) -> Array:
        rows = self._by_position(x, self.x)
        if moments.rows is not None:
            rows = some_positions(rows, moments.rows)
        rows = jnp.broadcast_to(rows, (*rows.shape[:2], *self.probe_shapes[0]))
        axis = self.last_output_axis
        assert axis is not None
        return input_moment(rows, self.probe_shapes, axis, moments)

    def output_moment(self, dy: Array, moments: Moments) -> Array:
        axis = self.last_input_axis
        assert axis is not None
        return output_moment(self._by_position(dy, self.y), self.probe_shapes, axis, moments)

    def without_padding(self, x: Array, dy: Array, sharing: str) -> Array:
        if not self.positions:
            return x
        valid = jnp.any(dy != 0, tuple(axis for axis, c in enumerate(self.y) if c not in self.positions))
        kept = [c for c in self.y if c in self.positions]
        valid = jnp.transpose(valid, [kept.index(c) for c in self.positions])
        weights = weights_without_padding(valid, sharing, accumulator(x.dtype))
        order = sorted(self.positions, key=self.x.index)
        weights = jnp.transpose(weights, [self.positions.index(c) for c in order])
        sizes = [size if c in self.positions else 1 for c, size in zip(self.x, x.shape, strict=True)]
        return x * weights.reshape(sizes)

    def _by_position(self, array: Array, letters: str) -> Array:
        """Input or output as (samples, positions, *kernel), 1 where the kernel has what the array lacks."""
        known = self.positions + self.kernel
        summed = tuple(axis for axis, c in enumerate(letters) if c not in known)
        array = jnp.sum(array, summed, dtype=accumulator(array.dtype)) if summed else array
        kept = [c for c in letters if c in known]
        sizes = dict(zip(kept, array.shape, strict=True))
        ordered = [c for c in known if c in kept]
        samples, *positions = (sizes[c] for c in self.positions) if self.positions else (1,)
        array = jnp.transpose(array, [kept.index(c) for c in ordered])
        return array.reshape(samples, math.prod(positions), *(sizes.get(c, 1) for c in self.kernel))

    def _rows(self, x: Array, rows: int) -> tuple[Array, str, Any]:
        """The input at some positions, summed over what the layer sums, with its letters and their number."""
        sizes = dict(zip(self.x, x.shape, strict=True))
        count = math.prod(sizes[c] for c in self.positions)
        if isinstance(count, int) and self.positions:
            axis = self.x.index(self.positions[-1])  # positions come before it, and a batch of them may be sharded
            x = thin(x, axis, min(count // rows, x.shape[axis]))
        letters = "".join(c for c in self.x if c in self.positions or c in self.kernel)
        summed = tuple(axis for axis, c in enumerate(self.x) if c not in letters)
        x = jnp.sum(x, summed, dtype=accumulator(x.dtype)) if summed else x.astype(accumulator(x.dtype))
        sizes = zip(letters, x.shape, strict=True)
        return x, letters, math.prod(size for c, size in sizes if c in self.positions)


def _reduce(array: Array, letters: str, kernel: str, kernel_shape: tuple[int, ...]) -> Array:
    """`array` summed over the letters that the kernel lacks, laid out in the kernel's rank."""
    axes = tuple(axis for axis, letter in enumerate(letters) if letter not in kernel)
    kept = [letter for letter in letters if letter in kernel]
    total = jnp.sum(array, axes, dtype=accumulator(array.dtype))
    total = jnp.transpose(total, [kept.index(letter) for letter in kernel if letter in kept])
    return total.reshape([size if c in kept else 1 for c, size in zip(kernel, kernel_shape, strict=True)])


@dataclass(frozen=True)
class Lookup:
    """The layer y = kernel[ids], a contraction with one-hot rows: a is the frequency of each token."""

    kernel_shape: tuple[int, ...]

    @property
    def probe_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        vocabulary, features = self.kernel_shape
        return (vocabulary, 1), (1, features)

    def mean_input(self, x: Array) -> Array:
        if self.kernel_shape[0] == 1:  # Flax broadcasts a single row, whatever the token
            return jnp.ones((1, 1), jnp.float32)
        counts = jnp.zeros(self.kernel_shape[0], jnp.float32).at[x.ravel()].add(1.0, mode="drop")
        return (counts / x.size)[:, None]

    last_output_axis = -1
    last_input_axis = -2
    is_lookup = True

    def input_moment(self, x: Array, moments: Moments) -> Array:
        """For completeness: taps collect the diagonal, which is all there is of it."""
        return jnp.diag(self.mean_input(x)[:, 0])

    def output_moment(self, dy: Array, moments: Moments) -> Array:
        samples = dy.shape[0] if dy.ndim > 1 else 1
        return output_moment(dy.reshape(samples, -1, 1, dy.shape[-1]), self.probe_shapes, -2, moments)

    def sketch(self, x: Array, rank: int, rows: int) -> Array:
        """The second moment of one-hot rows is diagonal, and has their mean on it."""
        return self.mean_input(x) * directions(self.kernel_shape[:1], rank, jnp.float32)

    def mean_square(self, x: Array, rows: int) -> Array:
        return jnp.sum(self.mean_input(x), keepdims=True)

    def sum_cotangent(self, dy: Array) -> Array:
        return jnp.sum(dy.reshape(-1, dy.shape[-1]), 0, dtype=accumulator(dy.dtype))[None]
