"""Transformers: a vision transformer and a decoder of bytes, on the same block."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

BYTES = 256


class Block(nn.Module):
    """Attention and a hidden layer, each behind a LayerNorm and with a residual connection."""

    heads: int
    causal: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, _: None = None) -> tuple[Array, None]:
        width, split = x.shape[-1], (*x.shape[:-1], self.heads, -1)
        y = nn.LayerNorm(1e-6, dtype=self.dtype)(x)
        query, key, value = (
            nn.Dense(width, dtype=self.dtype, name=name)(y).reshape(split) for name in ("query", "key", "value")
        )
        attention = jax.nn.dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + nn.Dense(width, dtype=self.dtype, name="out")(attention.reshape(x.shape))
        y = nn.Dense(4 * width, dtype=self.dtype, name="up")(nn.LayerNorm(1e-6, dtype=self.dtype)(x))
        return x + nn.Dense(width, dtype=self.dtype, name="down")(nn.gelu(y)), None


def blocks(depth: int, heads: int, causal: bool, dtype: Any) -> nn.Module:
    """So many blocks, stacked: one of them is compiled, and what it computes is computed again on the way back."""
    block = nn.remat(Block, prevent_cse=False)
    stacked = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=depth)
    return stacked(heads, causal, dtype, name="layers")


class ViT(nn.Module):
    """Dosovitskiy et al., 2021, with a class token; ViT-S by default."""

    classes: int
    width: int = 384
    depth: int = 12
    heads: int = 6
    patch: int = 16
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        sides = (self.patch, self.patch)
        x = nn.Conv(self.width, sides, sides, padding="VALID", dtype=self.dtype, name="patches")(x)
        x = x.reshape(len(x), -1, self.width)
        token = self.param("token", nn.initializers.zeros_init(), (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, self.width)).astype(x.dtype), x], 1)
        positions = self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], self.width))
        x, _ = blocks(self.depth, self.heads, False, self.dtype)(x + positions.astype(x.dtype), None)
        x = nn.LayerNorm(1e-6, dtype=jnp.float32)(x[:, 0])
        return nn.Dense(self.classes, dtype=jnp.float32, kernel_init=nn.initializers.zeros_init(), name="head")(x)


class Decoder(nn.Module):
    """A language model: bytes (batch, length) to the logits of the byte that follows each."""

    width: int = 384
    depth: int = 6
    heads: int = 6
    length: int = 256
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        init = nn.initializers.normal(0.02)
        positions = self.param("positions", init, (1, self.length, self.width))
        y = nn.Embed(BYTES, self.width, dtype=self.dtype, embedding_init=init, name="embedding")(x)
        y = y + positions[:, : x.shape[1]].astype(y.dtype)
        y, _ = blocks(self.depth, self.heads, True, self.dtype)(y, None)
        return nn.Dense(BYTES, dtype=jnp.float32, kernel_init=init, name="head")(
            nn.LayerNorm(1e-6, dtype=jnp.float32)(y)
        )
