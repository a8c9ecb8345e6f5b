"""Kronecker vectors of layers that contract their input with the kernel: Dense, DenseGeneral, Einsum, Embed."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from eva_optax._probes.probe import accumulator


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

    def sum_cotangent(self, dy: Array) -> Array:
        return jnp.sum(dy.reshape(-1, dy.shape[-1]), 0, dtype=accumulator(dy.dtype))[None]
