"""NNX layers and models that the tests run through, with their Linen counterparts."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def random_state(model: nnx.Module, seed: int = 0) -> nnx.Module:
    """`model` with random parameters, biases included."""
    rng = np.random.default_rng(seed)
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype), state))
    return model


def pure(state: Any) -> Any:
    """A state as nested dicts of arrays, with string keys."""
    if isinstance(state, nnx.State):
        state = nnx.to_pure_dict(state)
    return {str(key): pure(value) for key, value in state.items()} if isinstance(state, dict) else state


def inputs(shape: tuple[int, ...], integers: int = 0) -> jax.Array:
    """Random input, not centred."""
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.integers(integers, size=shape) if integers else rng.normal(0.5, 1, shape), dtype=None)


# Compiling is all that takes time in these tests.
fast_jit = partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
)


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit`, with NNX modules as arguments."""

    def call(*args: Any) -> Any:
        graphdef, state = nnx.split(args)
        return fast_jit(lambda state: function(*nnx.merge(graphdef, state)))(state)

    return call


@dataclass(frozen=True, eq=False)
class LayerPair:
    """An NNX layer and the Linen layer that computes the same from the same parameters."""

    name: str
    nnx: Callable[[nnx.Rngs], nnx.Module]
    linen: nn.Module
    x: tuple[int, ...]
    equal: bool = True  # whether equal inputs make all of the kernel's inputs equal
    integers: int = 0

    def __str__(self) -> str:
        return self.name

    def inputs(self) -> jax.Array:
        return inputs(self.x, self.integers)


LAYERS = [
    LayerPair("Linear", lambda r: nnx.Linear(5, 4, rngs=r), nn.Dense(4), (3, 2, 5)),
    LayerPair("Linear, no bias", lambda r: nnx.Linear(5, 4, use_bias=False, rngs=r), nn.Dense(4, False), (6, 5)),
    LayerPair("LinearGeneral", lambda r: nnx.LinearGeneral(5, (2, 3), rngs=r), nn.DenseGeneral((2, 3)), (4, 2, 5)),
    LayerPair(
        "LinearGeneral over two axes",
        lambda r: nnx.LinearGeneral((2, 5), 3, axis=(1, -1), rngs=r),
        nn.DenseGeneral(3, axis=(1, -1)),
        (4, 2, 3, 5),
    ),
    LayerPair(
        "LinearGeneral with a batch axis",
        lambda r: nnx.LinearGeneral(5, 3, batch_axis={0: 2}, rngs=r),
        nn.DenseGeneral(3, batch_dims=0),
        (2, 6, 5),
        equal=False,
    ),
    LayerPair(
        "Einsum",
        lambda r: nnx.Einsum("...i,ihd->...hd", (5, 2, 3), (2, 3), rngs=r),
        nn.Einsum((5, 2, 3), "...i,ihd->...hd"),
        (4, 3, 5),
    ),
    LayerPair(
        "Einsum with heads, no bias",
        lambda r: nnx.Einsum("bthi,hio->btho", (2, 5, 3), rngs=r),
        nn.Einsum((2, 5, 3), "bthi,hio->btho", use_bias=False),
        (4, 3, 2, 5),
    ),
    LayerPair(
        "Conv, strides and dilation",
        lambda r: nnx.Conv(3, 4, (3, 2), strides=2, kernel_dilation=(1, 2), rngs=r),
        nn.Conv(4, (3, 2), strides=2, kernel_dilation=(1, 2)),
        (2, 6, 5, 3),
        equal=False,
    ),
    LayerPair(
        "Conv, circular",
        lambda r: nnx.Conv(2, 4, 3, padding="CIRCULAR", rngs=r),
        nn.Conv(4, 3, padding="CIRCULAR"),
        (3, 7, 2),
    ),
    LayerPair(
        "Conv, groups",
        lambda r: nnx.Conv(6, 4, (3, 3), feature_group_count=2, padding="VALID", use_bias=False, rngs=r),
        nn.Conv(4, (3, 3), feature_group_count=2, padding="VALID", use_bias=False),
        (2, 5, 5, 6),
    ),
    LayerPair(
        "ConvTranspose",
        lambda r: nnx.ConvTranspose(3, 4, (3, 2), strides=(2, 1), transpose_kernel=True, rngs=r),
        nn.ConvTranspose(4, (3, 2), strides=(2, 1), transpose_kernel=True),
        (2, 4, 5, 3),
        equal=False,
    ),
    LayerPair("Embed", lambda r: nnx.Embed(7, 3, rngs=r), nn.Embed(7, 3), (4, 5), integers=7),
    LayerPair(
        "MultiHeadAttention",
        lambda r: nnx.MultiHeadAttention(2, 4, decode=False, rngs=r),
        nn.MultiHeadDotProductAttention(2),
        (2, 5, 4),
    ),
    LayerPair("LSTM", lambda r: nnx.RNN(nnx.LSTMCell(3, 2, rngs=r)), nn.RNN(nn.LSTMCell(2)), (2, 4, 3), equal=False),
]


class Doubled(nnx.Linear):
    """A subclass that does something around the layer."""

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return 3 * super().__call__(2 * inputs)


class Network(nnx.Module):
    """A convolution, a layer that is called twice, a block of a list, and a head."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(2, 4, (3, 3), use_bias=False, rngs=rngs)
        self.twice = nnx.Linear(4, 4, rngs=rngs)
        self.blocks = nnx.List([Doubled(4, 4, rngs=rngs)])
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.conv(x)).mean((1, 2))
        x = jnp.tanh(self.twice(jnp.tanh(self.twice(x))))
        for block in self.blocks:
            x = x + jnp.tanh(block(x))
        return self.head(self.norm(x))


class LinenDoubled(nn.Dense):
    """`Doubled` in Linen."""

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        return 3 * super().__call__(2 * inputs)


class LinenNetwork(nn.Module):
    """`Network` in Linen, with the same names."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(4, (3, 3), use_bias=False, name="conv")(x)).mean((1, 2))
        twice = nn.Dense(4, name="twice")
        x = jnp.tanh(twice(jnp.tanh(twice(x))))
        x = x + jnp.tanh(LinenDoubled(4, name="block")(x))
        return nn.Dense(3, name="head")(nn.LayerNorm(name="norm")(x))


class Block(nnx.Module):
    """A residual block."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(3, 5, rngs=rngs)
        self.down = nnx.Linear(5, 3, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.down(jnp.sin(self.up(x)))
