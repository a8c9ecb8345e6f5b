"""The deep autoencoder of Hinton and Salakhutdinov (2006) for 28×28 pixels."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array


class Autoencoder(nn.Module):
    """784-1000-500-250-30-250-500-1000-784, with ReLU, as in the experiments of Eva's authors; a linear code."""

    hidden: Sequence[int] = (1000, 500, 250)
    code: int = 30
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        pixels = x.shape[-1]
        for width in self.hidden:
            x = nn.relu(nn.Dense(width, dtype=self.dtype)(x))
        x = nn.Dense(self.code, dtype=self.dtype)(x)
        for width in reversed(self.hidden):
            x = nn.relu(nn.Dense(width, dtype=self.dtype)(x))
        return nn.Dense(pixels, dtype=jnp.float32)(x)
