"""The tasks of the convergence benchmark: a model, its loss, its data, and the centres of the learning rates."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
import optax
from jax import Array
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split

from examples import characters, digits


class Examples(NamedTuple):
    inputs: np.ndarray
    targets: np.ndarray


class Data(NamedTuple):
    """Training and validation examples, the same for every seed."""

    train: Examples
    validation: Examples


@dataclass(frozen=True)
class Task:
    """What is trained, and for how long.

    Attributes:
      loss: from outputs and targets to a scalar.
      evaluated: how many training, and how many validation, examples the reported losses are taken over.
      rates: centre of the grid of learning rates for each kind of optimizer.
    """

    name: str
    model: nn.Module
    loss: Callable[[Array, Array], Array]
    load: Callable[[], Data]
    steps: int
    batch_size: int
    evaluated: int = 1024
    rates: Mapping[str, float] = field(default_factory=dict, hash=False)

    def batches(self, seed: int, steps: int) -> np.ndarray:
        """For each step the indices of its mini-batch."""
        return digits.batches(seed, len(self.load().train.inputs), self.batch_size, steps)


class ConvolutionalNetwork(nn.Module):
    """Images with a pair of digits to logits (batch, 2, 10), with or without BatchNorm."""

    normalize: bool = False
    widths: tuple[int, ...] = (16, 32, 32)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x[..., None]
        for width, stride in zip(self.widths, (1, 2, 2), strict=True):
            x = nn.Conv(width, (3, 3), strides=stride)(x)
            if self.normalize:  # running statistics where they cannot be updated: in evaluation
                x = nn.BatchNorm(use_running_average=not self.is_mutable_collection("batch_stats"), momentum=0.9)(x)
            x = nn.relu(x)
        x = nn.relu(nn.Dense(64)(x.reshape(x.shape[0], -1)))
        return nn.Dense(20)(x).reshape(-1, 2, 10)


class Perceptron(nn.Module):
    """Features to one number."""

    widths: tuple[int, ...] = (8, 8)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for width in self.widths:
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(1)(x)[..., 0]


def mean_squared_error(outputs: Array, targets: Array) -> Array:
    return optax.squared_error(outputs, targets).mean()


def summed_squared_error(outputs: Array, targets: Array) -> Array:
    """Summed over an example's pixels, as in the literature on deep autoencoders; the mean over examples."""
    return optax.squared_error(outputs, targets).sum((-2, -1)).mean()


def cross_entropy(logits: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@cache
def images() -> Data:
    train, validation = digits.load(seed=0)
    return Data(*(Examples(np.asarray(split.images), np.asarray(split.images)) for split in (train, validation)))


@cache
def pairs(train: int = 8192, validation: int = 1024) -> Data:
    """Pairs of digits side by side, each shifted at random by up to two pixels, in noise: 10×20 pixels."""
    random = np.random.default_rng(0)

    def draw(split: digits.Split, number: int) -> Examples:
        images, labels = np.asarray(split.images), np.asarray(split.labels)
        chosen = random.integers(len(labels), size=(number, 2))
        canvas = np.zeros((number, 2, 10, 10), np.float32)
        for place, shift in zip(np.ndindex(number, 2), random.integers(3, size=(2 * number, 2)), strict=True):
            row, column = shift
            canvas[place][row : row + 8, column : column + 8] = images[chosen[place]]
        canvas += random.normal(0, 0.3, canvas.shape)
        return Examples(np.concatenate([canvas[:, 0], canvas[:, 1]], -1), labels[chosen])

    splits = zip(digits.load(seed=0), (train, validation), strict=True)
    return Data(*(draw(split, number) for split, number in splits))


@cache
def text() -> Data:
    return Data(*(Examples(*windows) for windows in characters.load(length=48)))


@cache
def diabetes() -> Data:
    """Ten measurements of 442 patients, and how their disease progressed; both standardised."""
    source: Any = load_diabetes()
    x, y = (((part - part.mean(0)) / part.std(0)).astype(np.float32) for part in (source.data, source.target))
    x, x_validation, y, y_validation = map(np.asarray, train_test_split(x, y, test_size=0.2, random_state=0))
    return Data(Examples(x, y), Examples(x_validation, y_validation))


def _rates(sgd: float, adamw: float, muon: float) -> dict[str, float]:
    return {"sgd": sgd, "adamw": adamw, "muon": muon}


AUTOENCODER, LANGUAGE = digits.Autoencoder(), characters.LanguageModel()
RECTIFIED = digits.Autoencoder(activation=nn.relu)
PLAIN, NORMALIZED = ConvolutionalNetwork(), ConvolutionalNetwork(normalize=True)

TASKS = {
    task.name: task
    for task in (
        Task("diabetes", Perceptron(), mean_squared_error, diabetes, 400, 64, rates=_rates(0.1, 0.03, 0.03)),
        Task("autoencoder", AUTOENCODER, mean_squared_error, images, 400, 256, rates=_rates(1, 0.01, 0.03)),
        Task("autoencoder_relu", RECTIFIED, mean_squared_error, images, 400, 256, rates=_rates(1, 0.01, 0.03)),
        Task("autoencoder_sum", AUTOENCODER, summed_squared_error, images, 400, 256, rates=_rates(0.02, 0.01, 0.03)),
        Task("cnn", PLAIN, cross_entropy, pairs, 250, 128, rates=_rates(0.2, 0.01, 0.06)),
        Task("cnn_batchnorm", NORMALIZED, cross_entropy, pairs, 250, 128, rates=_rates(0.3, 0.01, 0.06)),
        Task("lm_200", LANGUAGE, characters.cross_entropy, text, 200, 16, 128, _rates(0.3, 0.005, 0.03)),
        Task("lm_500", LANGUAGE, characters.cross_entropy, text, 500, 16, 128, _rates(0.3, 0.005, 0.03)),
    )
}
