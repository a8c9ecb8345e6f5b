"""Residual networks: for 32×32 pixels (ResNet-20, ResNet-110) and for ImageNet (ResNet-50)."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class BasicBlock(nn.Module):
    """Two convolutions; where the shape changes, the shortcut skips pixels and pads channels with zeros."""

    features: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        conv = partial(
            nn.Conv, self.features, (3, 3), padding=1, use_bias=False, dtype=self.dtype, kernel_init=he_normal
        )
        norm = partial(nn.BatchNorm, not train, momentum=0.9, dtype=self.dtype)
        y = nn.relu(norm()(conv(strides=self.stride)(x)))
        y = norm()(conv()(y))
        more = self.features - x.shape[-1]
        x = x[:, :: self.stride, :: self.stride]
        return nn.relu(y + jnp.pad(x, ((0, 0), (0, 0), (0, 0), (more // 2, more - more // 2))))


class CifarResNet(nn.Module):
    """He et al., 2016, section 4.2: three stages of (depth - 2) / 6 blocks."""

    classes: int
    depth: int
    width: int = 16
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = nn.Conv(self.width, (3, 3), padding=1, use_bias=False, dtype=self.dtype, kernel_init=he_normal)(x)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9, dtype=self.dtype)(x))
        for stage in range(3):
            for block in range((self.depth - 2) // 6):
                x = BasicBlock(self.width * 2**stage, 2 if stage and not block else 1, self.dtype)(x, train)
        return nn.Dense(self.classes, dtype=jnp.float32, name="head")(x.mean((1, 2)))


class Bottleneck(nn.Module):
    """1×1, 3×3 with the stride, 1×1 with four times the channels; a 1×1 shortcut where the shape changes."""

    features: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=he_normal)
        norm = partial(nn.BatchNorm, not train, momentum=0.9, dtype=self.dtype)
        y = nn.relu(norm()(conv(self.features, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.features, (3, 3), self.stride, padding=1)(y)))
        y = norm(scale_init=nn.initializers.zeros_init())(conv(4 * self.features, (1, 1))(y))
        if x.shape != y.shape:
            x = norm(name="shortcut_norm")(conv(4 * self.features, (1, 1), self.stride, name="shortcut")(x))
        return nn.relu(x + y)


class ImageNetResNet(nn.Module):
    """He et al., 2016, with the stride in the 3×3 convolution; blocks of ResNet-50 by default."""

    classes: int
    blocks: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = nn.Conv(self.width, (7, 7), 2, padding=3, use_bias=False, dtype=self.dtype, kernel_init=he_normal)(x)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9, dtype=self.dtype)(x))
        around: Any = ((1, 1), (1, 1))
        x = nn.max_pool(x, (3, 3), (2, 2), around)
        for stage, number in enumerate(self.blocks):
            for block in range(number):
                x = Bottleneck(self.width * 2**stage, 2 if stage and not block else 1, self.dtype)(x, train)
        return nn.Dense(self.classes, dtype=jnp.float32, name="head")(x.mean((1, 2)))
