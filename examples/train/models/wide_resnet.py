"""Wide residual networks."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from examples.train.models.resnet import he_normal


class WideBlock(nn.Module):
    """Norm and activation before each of two convolutions; a 1×1 shortcut where the channels change."""

    features: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        conv = partial(nn.Conv, self.features, use_bias=False, dtype=self.dtype, kernel_init=he_normal)
        norm = partial(nn.BatchNorm, not train, momentum=0.9, dtype=self.dtype)
        y = nn.relu(norm()(x))
        shortcut = x if x.shape[-1] == self.features else conv((1, 1), self.stride, name="shortcut")(y)
        y = nn.relu(norm()(conv((3, 3), self.stride, padding=1)(y)))
        return shortcut + conv((3, 3), padding=1)(y)


class WideResNet(nn.Module):
    """Zagoruyko and Komodakis, 2016: three stages of (depth - 4) / 6 blocks; WRN-28-10 by default."""

    classes: int
    depth: int = 28
    width: int = 10
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = nn.Conv(16, (3, 3), padding=1, use_bias=False, dtype=self.dtype, kernel_init=he_normal)(x)
        for stage in range(3):
            for block in range((self.depth - 4) // 6):
                x = WideBlock(16 * self.width * 2**stage, 2 if stage and not block else 1, self.dtype)(x, train)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9, dtype=self.dtype)(x))
        return nn.Dense(self.classes, dtype=jnp.float32, name="head")(x.mean((1, 2)))
