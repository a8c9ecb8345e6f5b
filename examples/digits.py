"""Two small tasks on scikit-learn's handwritten digits: a classifier and a deep autoencoder, in Flax Linen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


class Classifier(nn.Module):
    """A small convolutional network: images of 8×8 pixels to the logits of the ten digits."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(nn.Conv(16, (3, 3))(x[..., None]))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(64)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


class Autoencoder(nn.Module):
    """The deep autoencoder 64-256-128-64-12-64-128-256-64 with biases, and a linear code and output."""

    hidden: Sequence[int] = (256, 128, 64)
    code: int = 12
    activation: Callable[[Array], Array] = nn.tanh

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = x.shape
        x = x.reshape(shape[0], -1)
        pixels = x.shape[-1]
        for width in self.hidden:
            x = self.activation(nn.Dense(width)(x))
        x = nn.Dense(self.code)(x)
        for width in reversed(self.hidden):
            x = self.activation(nn.Dense(width)(x))
        return nn.Dense(pixels)(x).reshape(shape)


class Split(NamedTuple):
    """Images with pixels in [0, 1], and their labels."""

    images: Array
    labels: Array


@dataclass(frozen=True)
class Task:
    """A model and how it is trained.

    Attributes:
      loss: from the model's outputs, images and labels to the mean loss.
      steps: how many steps a full run makes.
      classifies: whether the outputs are logits of the classes.
    """

    name: str
    model: nn.Module
    loss: Callable[[Array, Array, Array], Array]
    steps: int
    classifies: bool


def cross_entropy(logits: Array, images: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def reconstruction_error(outputs: Array, images: Array, labels: Array) -> Array:
    """The mean squared error of a pixel."""
    return optax.squared_error(outputs, images).mean()


TASKS = (
    Task("Classifier", Classifier(), cross_entropy, steps=300, classifies=True),
    Task("Autoencoder", Autoencoder(), reconstruction_error, steps=2000, classifies=False),
)


def load(seed: int) -> tuple[Split, Split]:
    """Training and validation data, 80% and 20% of the 1,797 images, with the same share of every digit."""
    digits: Any = load_digits()
    images, labels = (digits.images / 16).astype(np.float32), digits.target.astype(np.int32)
    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=seed)
    train_images, validation_images, train_labels, validation_labels = map(jnp.asarray, parts)
    return Split(train_images, train_labels), Split(validation_images, validation_labels)


def batches(seed: int, examples: int, batch_size: int, steps: int) -> np.ndarray:
    """For each step the indices of its mini-batch, (steps, batch size): every epoch in a new random order."""
    random = np.random.default_rng(seed)
    per_epoch = examples // batch_size
    epochs = [random.permutation(examples)[: per_epoch * batch_size] for _ in range(-(-steps // per_epoch))]
    return np.concatenate(epochs).reshape(-1, batch_size)[:steps]


def evaluation(task: Task) -> Callable[[Any, tuple[Split, Split]], tuple[Array, Array, Array]]:
    """A jitted function from parameters without probes, and data, to training loss, validation loss and accuracy."""

    model: Any = task.model

    @jax.jit
    def evaluate(params: Any, splits: tuple[Split, Split]) -> tuple[Array, Array, Array]:
        outputs = [model.apply({"params": params}, split.images) for split in splits]
        losses = [task.loss(y, split.images, split.labels) for y, split in zip(outputs, splits, strict=True)]
        accuracy = jnp.mean(outputs[1].argmax(-1) == splits[1].labels) if task.classifies else jnp.array(jnp.nan)
        return losses[0], losses[1], accuracy

    return evaluate
