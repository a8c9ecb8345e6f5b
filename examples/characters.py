"""Text that every machine has, character by character, and a small transformer for it, in Flax Linen.

The text is the Python standard library's own sources, so that nothing needs to be downloaded.
"""

import sysconfig
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from jax import Array

VOCABULARY = 128  # ASCII


class Block(nn.Module):
    """Causal attention and a hidden layer, each behind a LayerNorm and with a residual connection."""

    heads: int

    @nn.compact
    def __call__(self, x: Array, _: None = None) -> tuple[Array, None]:
        width, split = x.shape[-1], (*x.shape[:-1], self.heads, -1)
        h = nn.LayerNorm()(x)
        query, key, value = (nn.Dense(width, name=name)(h).reshape(split) for name in ("query", "key", "value"))
        attention = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + nn.Dense(width, name="out")(attention.reshape(x.shape))
        h = nn.gelu(nn.Dense(4 * width, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(width, name="down")(h), None


class LanguageModel(nn.Module):
    """A decoder-only transformer: characters (batch, length) to logits (batch, length, VOCABULARY)."""

    width: int = 64
    depth: int = 2
    heads: int = 2

    @nn.compact
    def __call__(self, characters: Array) -> Array:
        positions = self.param("positions", nn.initializers.normal(0.02), (characters.shape[-1], self.width))
        x = nn.Embed(VOCABULARY, self.width, embedding_init=nn.initializers.normal(0.02))(characters) + positions[None]
        layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
        x, _ = layers(self.heads, name="layers")(x, None)
        return nn.Dense(VOCABULARY, name="head")(nn.LayerNorm()(x))


class Windows(NamedTuple):
    """Stretches of text, (number, length), and for each character the one that follows."""

    characters: np.ndarray
    following: np.ndarray


def cross_entropy(logits: Array, following: Array) -> Array:
    """The mean over all characters, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, following).mean()


def load(length: int, characters: int = 1_000_000) -> tuple[Windows, Windows]:
    """Windows of `length` characters for training, and a tenth as many, from other files, for validation.

    The text is cut into windows that do not overlap, shuffled so that the first few stand for all, the same each time.
    """
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    order = np.random.default_rng(0).permutation(len(files))
    texts = [files[i].read_text(encoding="utf-8", errors="replace") for i in order]
    tenth = len(texts) // 10
    return (
        _windows("".join(texts[tenth:]), length, characters),
        _windows("".join(texts[:tenth]), length, characters // 10),
    )


def _windows(text: str, length: int, characters: int) -> Windows:
    codes = np.frombuffer(text[:characters].encode("ascii", errors="replace"), np.uint8).astype(np.int32)
    number = (len(codes) - 1) // length
    order = np.random.default_rng(0).permutation(number)
    return Windows(*(codes[shift : shift + number * length].reshape(number, length)[order] for shift in (0, 1)))
