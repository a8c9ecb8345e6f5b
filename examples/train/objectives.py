"""What is learnt: from the outputs of a model to a loss and a metric for each example."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

Batch = dict[str, Array]
Scale = tuple[tuple[float, ...], tuple[float, ...]]


class Objective(NamedTuple):
    """Inputs and targets of a batch, the values of each example, and which of these is aimed at.

    Attributes:
      prepare: from a batch of bytes, and means and deviations of their channels, to inputs and targets.
      values: from outputs, targets and label smoothing to named values of each example, "loss" among them.
      metric: the value of validation examples that --target is about.
      higher: whether more of it is better.
    """

    prepare: Callable[[Batch, Scale], tuple[Array, Array]]
    values: Callable[[Array, Array, float], dict[str, Array]]
    metric: str
    higher: bool

    def better(self, value: float, than: float) -> bool:
        return value >= than if self.higher else value <= than


def standardised(batch: Batch, scale: Scale) -> Array:
    mean, deviation = (jnp.array(part, jnp.float32) for part in scale)
    return (batch["inputs"] / jnp.float32(255) - mean) / deviation


def classify(logits: Array, labels: Array, smoothing: float) -> dict[str, Array]:
    if smoothing:
        targets = optax.smooth_labels(jnp.eye(logits.shape[-1])[labels], smoothing)
        loss = optax.softmax_cross_entropy(logits, targets)
    else:
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {"loss": loss, "accuracy": (logits.argmax(-1) == labels).astype(jnp.float32)}


def reconstruct(outputs: Array, pixels: Array, _: float) -> dict[str, Array]:
    """The mean squared error of a pixel."""
    return {"loss": jnp.mean((outputs - pixels) ** 2, -1)}


def predict(logits: Array, following: Array, _: float) -> dict[str, Array]:
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, following).mean(-1)
    return {"loss": loss, "bits_per_byte": loss / jnp.log(2)}


def image_and_label(batch: Batch, scale: Scale) -> tuple[Array, Array]:
    return standardised(batch, scale), batch["labels"]


def image_twice(batch: Batch, scale: Scale) -> tuple[Array, Array]:
    pixels = standardised(batch, scale)
    pixels = pixels.reshape(len(pixels), -1)
    return pixels, pixels


def text_and_next(batch: Batch, scale: Scale) -> tuple[Array, Array]:
    tokens = batch["inputs"].astype(jnp.int32)
    return tokens[:, :-1], tokens[:, 1:]


CLASSIFICATION = Objective(image_and_label, classify, "accuracy", higher=True)
RECONSTRUCTION = Objective(image_twice, reconstruct, "loss", higher=False)
LANGUAGE = Objective(text_and_next, predict, "bits_per_byte", higher=False)
