"""Models of usual kinds in Linen, any size of which either benchmark may take."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array


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


def batch_norm(module: nn.Module) -> Callable[..., nn.BatchNorm]:
    """BatchNorm with the batch's statistics where the running ones can be updated: in training."""
    running = not module.is_mutable_collection("batch_stats")
    return partial(nn.BatchNorm, use_running_average=running, momentum=0.9)


class Bottleneck(nn.Module):
    """The block of ResNet-50."""

    filters: int
    strides: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv, norm = partial(nn.Conv, use_bias=False), batch_norm(self)
        y = nn.relu(norm()(conv(self.filters, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.filters, (3, 3), self.strides)(y)))
        y = norm(scale_init=nn.initializers.zeros)(conv(4 * self.filters, (1, 1))(y))
        if x.shape != y.shape:
            x = norm(name="norm_proj")(conv(4 * self.filters, (1, 1), self.strides, name="conv_proj")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A residual network of bottlenecks; stages (3, 4, 6, 3) and 64 filters make ResNet-50.

    The stem quarters a photograph's sides. Small images stay as they are, and the head sees where things are.
    """

    classes: int
    stages: tuple[int, ...] = (3, 4, 6, 3)
    filters: int = 64
    small_images: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        window, stride = (3, 1) if self.small_images else (7, 2)
        stem = nn.Conv(self.filters, (window,) * 2, stride, window // 2, use_bias=False, name="conv_init")
        x = nn.relu(batch_norm(self)(name="norm_init")(stem(x)))
        if not self.small_images:
            x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                x = Bottleneck(self.filters * 2**stage, 2 if stage > 0 and block == 0 else 1)(x)
        x = x.reshape(x.shape[0], -1) if self.small_images else x.mean((1, 2))
        return nn.Dense(self.classes, name="head")(x)


class Bottlenecks(nn.Module):
    """One stage without stem and head, from the block that halves the image: what a ResNet's step consists of.

    The normalisation before it stands for the stage before: inputs come from an activation and need a gradient.
    """

    blocks: int
    filters: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(batch_norm(self)()(x))
        for block in range(self.blocks):
            x = Bottleneck(self.filters, 1 if block else 2)(x)
        return x.mean((1, 2))
