"""VGG-19 with BatchNorm for 32×32 pixels."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from examples.train.models.resnet import he_normal


class VGG(nn.Module):
    """Simonyan and Zisserman, 2015, configuration E, with one linear layer behind it."""

    classes: int
    blocks: tuple[int, ...] = (2, 2, 4, 4, 4)
    width: int = 64
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        for stage, number in enumerate(self.blocks):
            features = self.width * min(2**stage, 8)
            for _ in range(number):
                x = nn.Conv(features, (3, 3), padding=1, dtype=self.dtype, kernel_init=he_normal)(x)
                x = nn.relu(nn.BatchNorm(not train, momentum=0.9, dtype=self.dtype)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(self.classes, dtype=jnp.float32, name="head")(x.reshape(len(x), -1))
