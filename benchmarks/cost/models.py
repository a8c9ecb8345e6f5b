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
    columns: tuple[str, ...] = ("query", "key", "value", "up")
    rows: tuple[str, ...] = ("out", "down")


def cross_entropy(logits: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels).mean()


def squared_error(outputs: Array, targets: Array) -> Array:
    return jnp.mean((outputs - targets) ** 2)


class Kernels(nn.Module):
    """Dense kernels without biases, by name, input and output width; `stacked` of each in one array."""

    shapes: tuple[tuple[Any, ...], ...]
    stacked: int = 0

    @nn.compact
    def __call__(self) -> None:
        dense = nn.Dense
        if self.stacked:
            axes: dict[str, Any] = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "in_axes": None}
            dense = nn.vmap(dense, axis_size=self.stacked, **axes)
        for name, rows, columns in self.shapes:
            dense(columns, use_bias=False, name=name)(jnp.ones((1, rows)))


class MLP(nn.Module):
    """Dense layers of one width, up and down in turn."""

    width: int
    layers: int
    activation: Callable[[Array], Array] = nn.relu

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for layer in range(self.layers):
            x = x if layer == 0 else self.activation(x)
            x = nn.Dense(self.width, name=f"{'down' if layer % 2 else 'up'}_{layer}")(x)
        return x


class Block(nn.Module):
    """A pre-LN transformer block with the signature that `nn.scan` wants."""

    heads: int
    causal: bool = True

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        width = x.shape[-1]
        y = nn.LayerNorm()(x)
        query, key, value = (
            nn.DenseGeneral((self.heads, width // self.heads), name=name)(y) for name in ("query", "key", "value")
        )
        y = nn.dot_product_attention(query, key, value, mask=nn.make_causal_mask(y[..., 0]) if self.causal else None)
        x = x + nn.DenseGeneral(width, axis=(-2, -1), name="out")(y)
        y = nn.gelu(nn.Dense(4 * width, name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(width, name="down")(y), None


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
            block = nn.remat(Block, prevent_cse=False)
            stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
            x, _ = stack(self.heads, name="blocks")(x, None)
        else:
            for layer in range(self.layers):
                x, _ = Block(self.heads, name=f"block_{layer}")(x, None)
        return embed.attend(nn.LayerNorm()(x))


class ViT(nn.Module):
    """A vision transformer that pools by the mean."""

    classes: int
    width: int
    layers: int
    heads: int
    patch: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Conv(self.width, (self.patch,) * 2, (self.patch,) * 2, "VALID", name="patches")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for layer in range(self.layers):
            x, _ = Block(self.heads, causal=False, name=f"block_{layer}")(x, None)
        return nn.Dense(self.classes, name="head")(nn.LayerNorm()(x).mean(1))


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

    classes: int
    stages: tuple[int, ...] = (3, 4, 6, 3)
    filters: int = 64

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


def mlp(batch: int, width: int, layers: int = 3, activation: Callable[[Array], Array] = nn.relu) -> Case:
    x = jax.ShapeDtypeStruct((batch, width), jnp.float32)
    return Case(MLP(width, layers, activation), x, x, squared_error)


def gpt(batch: int, length: int, width: int, layers: int, heads: int, vocabulary: int, scan: bool = False) -> Case:
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    return Case(GPT(vocabulary, width, layers, heads, scan), tokens, tokens, cross_entropy, vocabulary)


def images(batch: int, size: int, model: ResNet | ViT) -> Case:
    x = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
    return Case(model, x, jax.ShapeDtypeStruct((batch,), jnp.int32), cross_entropy, model.classes)


def bottlenecks(batch: int, size: int, blocks: int, filters: int) -> Case:
    x = jax.ShapeDtypeStruct((batch, size, size, 2 * filters), jnp.float32)
    y = jax.ShapeDtypeStruct((batch, 4 * filters), jnp.float32)
    return Case(Bottlenecks(blocks, filters), x, y, squared_error)
