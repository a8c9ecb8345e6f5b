"""The models whose step is measured, in Linen, with the shapes of one batch: nothing here allocates an array."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array


@dataclass(frozen=True, eq=False)
class Case:
    """A model, the shapes of its batch and its loss.

    Attributes:
      model: the module, untapped.
      inputs: what it is called with.
      targets: what the loss compares its outputs with.
      loss: from outputs and targets, a mean.
      classes: how many values integers in `inputs` and `targets` take.
      columns, rows: names of the layers that tensor parallelism splits along their output and along their input axis.
    """

    model: nn.Module
    inputs: jax.ShapeDtypeStruct
    targets: jax.ShapeDtypeStruct
    loss: Callable[[Any, Any], Array]
    classes: int = 1
    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()


def cross_entropy(logits: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()


def squared_error(outputs: Array, targets: Array) -> Array:
    return jnp.mean((outputs - targets) ** 2)


class MLP(nn.Module):
    """Dense layers of one width, up and down in turn."""

    width: int
    layers: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for layer in range(self.layers):
            x = nn.Dense(self.width, name=f"{'down' if layer % 2 else 'up'}_{layer}")(x)
            x = x if layer == self.layers - 1 else nn.relu(x)
        return x


class DecoderBlock(nn.Module):
    """A pre-LN transformer block with the signature that `nn.scan` wants."""

    width: int
    heads: int

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        heads = (self.heads, self.width // self.heads)
        y = nn.LayerNorm()(x)
        query, key, value = (nn.DenseGeneral(heads, name=name)(y) for name in ("query", "key", "value"))
        y = nn.dot_product_attention(query, key, value, mask=nn.make_causal_mask(y[..., 0]))
        x = x + nn.DenseGeneral(self.width, axis=(-2, -1), name="out")(y)
        y = nn.gelu(nn.Dense(4 * self.width, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(self.width, name="down")(y), None


class GPT(nn.Module):
    """A decoder with embeddings tied to its output, as GPT-2; `scan` stacks and rematerialises the blocks."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    scan: bool = False

    @nn.compact
    def __call__(self, tokens: Array) -> Array:
        embed = nn.Embed(self.vocabulary, self.width, name="embed")
        positions = self.param("positions", nn.initializers.normal(0.02), (1, tokens.shape[1], self.width))
        x = embed(tokens) + positions
        if self.scan:
            block = nn.remat(DecoderBlock, prevent_cse=False)
            stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
            x, _ = stack(self.width, self.heads, name="blocks")(x, None)
        else:
            for layer in range(self.layers):
                x, _ = DecoderBlock(self.width, self.heads, name=f"block_{layer}")(x, None)
        return embed.attend(nn.LayerNorm()(x))


class Bottleneck(nn.Module):
    """The block of ResNet-50."""

    filters: int
    strides: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv, norm = partial(nn.Conv, use_bias=False), partial(nn.BatchNorm, use_running_average=False)
        y = nn.relu(norm()(conv(self.filters, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.filters, (3, 3), self.strides)(y)))
        y = norm(scale_init=nn.initializers.zeros)(conv(4 * self.filters, (1, 1))(y))
        if x.shape != y.shape:
            x = norm(name="norm_proj")(conv(4 * self.filters, (1, 1), self.strides, name="conv_proj")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A residual network of bottlenecks; stages (3, 4, 6, 3) and 64 filters make ResNet-50."""

    stages: tuple[int, ...] = (3, 4, 6, 3)
    filters: int = 64
    classes: int = 1000

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Conv(self.filters, (7, 7), (2, 2), padding=3, use_bias=False, name="conv_init")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False, name="norm_init")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                x = Bottleneck(self.filters * 2**stage, 2 if stage > 0 and block == 0 else 1)(x)
        return nn.Dense(self.classes, name="head")(x.mean((1, 2)))


class Bottlenecks(nn.Module):
    """One stage without stem and head, from the block that halves the image: what a ResNet's step consists of.

    The normalisation before it stands for the stage before: inputs come from an activation and need a gradient.
    """

    blocks: int
    filters: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
        for block in range(self.blocks):
            x = Bottleneck(self.filters, 1 if block else 2)(x)
        return x.mean((1, 2))


class EncoderBlock(nn.Module):
    """A block of a vision transformer."""

    heads: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(y, y)
        y = nn.gelu(nn.Dense(4 * x.shape[-1], name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1], name="down")(y)


class ViT(nn.Module):
    """A vision transformer that pools by the mean."""

    width: int
    layers: int
    heads: int
    patch: int
    classes: int = 1000

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Conv(self.width, (self.patch,) * 2, (self.patch,) * 2, "VALID", name="patches")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for layer in range(self.layers):
            x = EncoderBlock(self.heads, name=f"block_{layer}")(x)
        return nn.Dense(self.classes, name="head")(nn.LayerNorm()(x).mean(1))


def mlp(batch: int, width: int, layers: int = 3) -> Case:
    x = jax.ShapeDtypeStruct((batch, width), jnp.float32)
    return Case(MLP(width, layers), x, x, squared_error, columns=("up",), rows=("down",))


def gpt(batch: int, length: int, width: int, layers: int, heads: int, vocabulary: int, scan: bool = False) -> Case:
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    model = GPT(vocabulary, width, layers, heads, scan)
    return Case(model, tokens, tokens, cross_entropy, vocabulary, ("query", "key", "value", "up"), ("out", "down"))


def images(model: nn.Module, batch: int, size: int, classes: int) -> Case:
    x = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    return Case(model, x, labels, cross_entropy, classes, ("query", "key", "value", "up"), ("out", "down"))


def bottlenecks(batch: int, size: int, blocks: int, filters: int) -> Case:
    x = jax.ShapeDtypeStruct((batch, size, size, 2 * filters), jnp.float32)
    y = jax.ShapeDtypeStruct((batch, 4 * filters), jnp.float32)
    return Case(Bottlenecks(blocks, filters), x, y, squared_error)


# A case from the number of chips that share the batch: its batch is so many times that of one chip. By size: "full" for
# accelerators and for compilers, "small" for a CPU, "tiny" for tests.
CASES: dict[str, dict[str, Callable[[int], Case]]] = {
    "mlp": {
        "full": lambda n: mlp(1024 * n, 2048),
        "small": lambda n: mlp(1024 * n, 2048),
        "tiny": lambda n: mlp(8 * n, 64),
    },
    "gpt-1": {  # one block: the vocabulary weighs most
        "full": lambda n: gpt(n, 1024, 768, 1, 12, 50304),
        "small": lambda n: gpt(n, 256, 256, 1, 4, 8192),
        "tiny": lambda n: gpt(n, 32, 32, 1, 2, 128),
    },
    "gpt-12": {
        "full": lambda n: gpt(n, 1024, 768, 12, 12, 50304),
        "small": lambda n: gpt(4 * n, 128, 256, 4, 4, 4096),
        "tiny": lambda n: gpt(n, 32, 32, 2, 2, 128),
    },
    "gpt-12-scan": {
        "full": lambda n: gpt(n, 1024, 768, 12, 12, 50304, scan=True),
        "small": lambda n: gpt(4 * n, 128, 256, 4, 4, 4096, scan=True),
        "tiny": lambda n: gpt(n, 32, 32, 2, 2, 128, scan=True),
    },
    "bottlenecks": {
        "full": lambda n: bottlenecks(16 * n, 56, 3, 128),
        "small": lambda n: bottlenecks(16 * n, 28, 3, 64),
        "tiny": lambda n: bottlenecks(n, 8, 1, 8),
    },
    "resnet50": {
        "full": lambda n: images(ResNet(), 16 * n, 224, 1000),
        "small": lambda n: images(ResNet(classes=100), 8 * n, 64, 100),
        "tiny": lambda n: images(ResNet((1, 1), 8, 16), n, 32, 16),
    },
    "vit": {
        "full": lambda n: images(ViT(768, 12, 12, 16), 8 * n, 224, 1000),
        "small": lambda n: images(ViT(192, 3, 3, 16, 100), 16 * n, 96, 100),
        "tiny": lambda n: images(ViT(32, 1, 2, 8, 16), n, 32, 16),
    },
}
