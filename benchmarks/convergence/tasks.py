"""The tasks of the convergence benchmark: a model, its loss, its data, and the centres of the learning rates."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split

from benchmarks.common.models import ResNet, batch_norm
from benchmarks.common.training import Loss
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
      rates: centres of the grids of learning rates for optimizers that are compared with SGD, AdamW and Muon.
      evaluated: how many training, and how many validation, examples the reported losses are taken over.
    """

    name: str
    model: nn.Module
    loss: Loss
    load: Callable[[], Data]
    steps: int
    batch_size: int
    rates: tuple[float, float, float]
    evaluated: int = 1024

    def batches(self, seed: int, steps: int) -> np.ndarray:
        """For each step the indices of its mini-batch."""
        return digits.batches(seed, len(self.load().train.inputs), self.batch_size, steps)


class ConvolutionalNetwork(nn.Module):
    """Images with a pair of digits to 20 logits, with or without BatchNorm."""

    normalize: bool = False
    widths: tuple[int, ...] = (16, 32, 32)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for width, stride in zip(self.widths, (1, 2, 2), strict=True):
            x = nn.Conv(width, (3, 3), strides=stride)(x)
            if self.normalize:
                x = batch_norm(self)()(x)
            x = nn.relu(x)
        x = nn.relu(nn.Dense(64)(x.reshape(x.shape[0], -1)))
        return nn.Dense(20)(x)


class Mixer(nn.Module):
    """An MLP-Mixer: hidden layers along the patches and along the channels in turn; images of a pair to 20 logits."""

    width: int = 64
    depth: int = 2
    patch: int = 5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Conv(self.width, (self.patch,) * 2, (self.patch,) * 2, name="patches")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        for _ in range(self.depth):
            for axis in (1, 2):
                y = nn.LayerNorm()(x).swapaxes(axis, 2)
                y = nn.Dense(y.shape[-1])(nn.gelu(nn.Dense(2 * self.width)(y)))
                x = x + y.swapaxes(axis, 2)
        return nn.Dense(20, name="head")(nn.LayerNorm()(x).mean(1))


class Decoder(nn.Module):
    """A decoder without biases, with RMSNorm and SwiGLU: characters (batch, length) to their followers' logits."""

    width: int = 64
    depth: int = 2
    heads: int = 2

    @nn.compact
    def __call__(self, text: Array) -> Array:
        dense, heads = partial(nn.Dense, use_bias=False), (*text.shape, self.heads, -1)
        normal = nn.initializers.normal(0.02)
        positions = self.param("positions", normal, (1, text.shape[-1], self.width))
        x = nn.Embed(characters.VOCABULARY, self.width, embedding_init=normal)(text) + positions
        for _ in range(self.depth):
            y = nn.RMSNorm()(x)
            query, key, value = (dense(self.width)(y).reshape(heads) for _ in range(3))
            x = x + dense(self.width)(jax.nn.dot_product_attention(query, key, value, is_causal=True).reshape(x.shape))
            y = nn.RMSNorm()(x)
            x = x + dense(self.width)(nn.silu(dense(3 * self.width)(y)) * dense(3 * self.width)(y))
        return dense(characters.VOCABULARY, name="head")(nn.RMSNorm()(x))


class Perceptron(nn.Module):
    """Features to one number."""

    widths: tuple[int, ...] = (8, 8)

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for width in self.widths:
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(1)(x)[..., 0]


class Poisson(nn.Module):
    """Points of the unit square to −Δu there: u is a perceptron of them, times what makes it 0 on the boundary."""

    widths: tuple[int, ...] = (32, 32, 32)

    @nn.compact
    def __call__(self, points: Array) -> Array:
        network, jvp = Perceptron(self.widths), cast(Any, nn.jvp)  # whose annotations do not say what it returns

        def u(network: Perceptron, x: Array) -> Array:
            return jnp.prod(x * (1 - x), -1) * network(x)

        def second(along: Array) -> Array:
            def first(network: Perceptron, x: Array) -> Array:
                return jvp(u, network, (x,), (along,), {})[1]

            return jvp(first, network, (points,), (along,), {})[1]

        if self.is_initializing():  # no parameters can be made under a derivative
            network(points)
        axes = jnp.eye(points.shape[-1])
        return -jnp.sum(jnp.stack([second(jnp.broadcast_to(axis, points.shape)) for axis in axes]), 0)


def mean_squared_error(outputs: Array, targets: Array) -> Array:
    return optax.squared_error(outputs, targets).mean()


def summed_squared_error(outputs: Array, targets: Array) -> Array:
    """Summed over an example's pixels, as in the literature on deep autoencoders; the mean over examples."""
    return optax.squared_error(outputs, targets).sum((-2, -1)).mean()


def pair_cross_entropy(logits: Array, labels: Array) -> Array:
    """The mean over both digits of the pairs."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.reshape(*labels.shape, 10), labels).mean()


@cache
def images() -> Data:
    train, validation = digits.load(seed=0)
    return Data(*(Examples(np.asarray(split.images), np.asarray(split.images)) for split in (train, validation)))


@cache
def pairs(train: int = 8192, validation: int = 1024) -> Data:
    """Pairs of digits side by side, each shifted at random by up to two pixels, in noise: 10×20 pixels, one channel."""
    random = np.random.default_rng(0)

    def draw(split: digits.Split, number: int) -> Examples:
        images, labels = np.asarray(split.images), np.asarray(split.labels)
        chosen = random.integers(len(labels), size=(number, 2))
        canvas = np.zeros((number, 2, 10, 10), np.float32)
        for place, shift in zip(np.ndindex(number, 2), random.integers(3, size=(2 * number, 2)), strict=True):
            row, column = shift
            canvas[place][row : row + 8, column : column + 8] = images[chosen[place]]
        canvas += random.normal(0, 0.3, canvas.shape)
        return Examples(np.concatenate([canvas[:, 0], canvas[:, 1]], -1)[..., None], labels[chosen])

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


@cache
def square() -> Data:
    """Points of the unit square, and the f of −Δu = f whose solution is u = sin(πx) sin(πy)."""
    points = np.random.default_rng(0).uniform(size=(5120, 2)).astype(np.float32)
    forces = (2 * np.pi**2 * np.sin(np.pi * points).prod(-1)).astype(np.float32)
    return Data(Examples(points[:4096], forces[:4096]), Examples(points[4096:], forces[4096:]))


AUTOENCODER, RECTIFIED = digits.Autoencoder(), digits.Autoencoder(activation=nn.relu)
PLAIN, NORMALIZED, LANGUAGE = ConvolutionalNetwork(), ConvolutionalNetwork(normalize=True), characters.LanguageModel()
RESIDUAL, CHARACTERS, PAIRS = ResNet(20, (1, 1, 1), 8, small_images=True), characters.cross_entropy, pair_cross_entropy

TASKS = {
    task.name: task
    for task in (
        Task("diabetes", Perceptron(), mean_squared_error, diabetes, 400, 64, (0.1, 0.03, 0.03)),
        Task("poisson", Poisson(), mean_squared_error, square, 1000, 256, (1e-4, 0.01, 0.03)),
        Task("autoencoder", AUTOENCODER, mean_squared_error, images, 400, 256, (1, 0.01, 0.03)),
        Task("autoencoder_relu", RECTIFIED, mean_squared_error, images, 400, 256, (1, 0.01, 0.03)),
        Task("autoencoder_sum", AUTOENCODER, summed_squared_error, images, 400, 256, (0.02, 0.01, 0.03)),
        Task("cnn", PLAIN, PAIRS, pairs, 250, 128, (0.2, 0.01, 0.06)),
        Task("cnn_batchnorm", NORMALIZED, PAIRS, pairs, 250, 128, (0.3, 0.01, 0.06)),
        Task("resnet", RESIDUAL, PAIRS, pairs, 400, 128, (0.3, 0.01, 0.06)),
        Task("mixer", Mixer(), PAIRS, pairs, 400, 128, (0.2, 0.01, 0.03)),
        Task("lm_200", LANGUAGE, CHARACTERS, text, 200, 16, (0.3, 0.005, 0.03), 128),
        Task("lm_500", LANGUAGE, CHARACTERS, text, 500, 16, (0.3, 0.005, 0.03), 128),
        Task("decoder_1000", Decoder(), CHARACTERS, text, 1000, 16, (0.3, 0.01, 0.03), 128),
        Task("decoder_3000", Decoder(), CHARACTERS, text, 3000, 16, (0.3, 0.01, 0.03), 128),
    )
}
