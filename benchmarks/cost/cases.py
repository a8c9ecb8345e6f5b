"""The models whose step is measured, by name, with the shapes of one batch: nothing here allocates an array."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import Array

from benchmarks.common.models import GPT, MLP, Bottlenecks, Kernels, ResNet, ViT


@dataclass(frozen=True, eq=False)
class Case:
    """A model, the shapes of its batch and its loss.

    Attributes:
      model: the module, untapped.
      inputs: what it is called with.
      targets: what the loss compares its outputs with.
      loss: from outputs and targets, a mean.
      classes: how many values integers in `inputs` and `targets` take.
    """

    model: nn.Module
    inputs: jax.ShapeDtypeStruct
    targets: jax.ShapeDtypeStruct
    loss: Callable[[Any, Any], Array]
    classes: int = 1


def cross_entropy(logits: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def squared_error(outputs: Array, targets: Array) -> Array:
    return jnp.mean((outputs - targets) ** 2)


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


# What makes a case, its arguments for accelerators and compilers, and for a CPU. The first is the batch of one chip.
CASES: dict[str, tuple[Callable[..., Case], tuple[Any, ...], tuple[Any, ...]]] = {
    "mlp": (mlp, (1024, 2048), (1024, 2048)),
    # As many layers as it takes for what each of them costs to outweigh what a step costs once.
    "mlp-20": (mlp, (16, 64, 21, nn.tanh), (16, 64, 21, nn.tanh)),
    "gpt-1": (gpt, (1, 1024, 768, 1, 12, 50304), (1, 256, 256, 1, 4, 8192)),  # the vocabulary weighs most
    "gpt-12": (gpt, (1, 1024, 768, 12, 12, 50304), (4, 128, 256, 4, 4, 4096)),
    "gpt-12-scan": (gpt, (1, 1024, 768, 12, 12, 50304, True), (4, 128, 256, 4, 4, 4096, True)),
    "bottlenecks": (bottlenecks, (16, 56, 3, 128), (16, 28, 3, 64)),
    "resnet50": (images, (16, 224, ResNet(1000)), (8, 64, ResNet(100))),
    "vit": (images, (8, 224, ViT(1000, 768, 12, 12, 16)), (16, 96, ViT(100, 192, 3, 3, 16))),
}
# Kernels of 12 blocks of a GPT with 768 features, without embeddings: 85 million parameters.
BLOCK = (*((name, 768, 768) for name in ("query", "key", "value", "out")), ("up", 768, 3072), ("down", 3072, 768))
UPDATES = {
    "update": Kernels(tuple((f"{name}_{layer}", *shape) for layer in range(12) for name, *shape in BLOCK)),
    "update-stacked": Kernels(BLOCK, stacked=12),
}


def make_case(name: str, small: bool = False, chips: int = 1) -> Case:
    """A case for a number of chips that share the batch: it is so many times that of one chip."""
    make, *sizes = CASES[name]
    batch, *rest = sizes[small]
    return make(batch * chips, *rest)
