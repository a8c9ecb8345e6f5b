"""The classifier of the quickstart in Flax NNX: AdamW with and without Eva, on handwritten digits.

    python examples/quickstart_nnx.py            # seconds
    python examples/quickstart_nnx.py --steps 20

Eva is two lines in a training script; the training loop stays as it is:

    model = eva_optax.tap(model, rank=16)          # 1
    tx = eva_optax.eva_adamw(learning_rate)        # 2
"""

import argparse

import jax
import optax
from digits import Split, batches, load
from flax import nnx
from jax import Array
from rich.console import Console
from rich.table import Table

import eva_optax

BATCH_SIZE = 128


class Classifier(nnx.Module):
    """A small convolutional network: images of 8×8 pixels to the logits of the ten digits."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.hidden = nnx.Linear(4 * 4 * 32, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = nnx.relu(self.conv1(x[..., None]))
        x = nnx.relu(self.conv2(x))
        x = nnx.relu(self.hidden(x.reshape(x.shape[0], -1)))
        return self.head(x)


def loss_of(model: Classifier, images: Array, labels: Array) -> Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


@nnx.jit
def train_step(model: Classifier, optimizer: nnx.Optimizer, images: Array, labels: Array) -> Array:
    loss, grads = nnx.value_and_grad(loss_of)(model, images, labels)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def evaluate(model: Classifier, images: Array, labels: Array) -> tuple[Array, Array]:
    logits = model(images)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, (logits.argmax(-1) == labels).mean()


def train(model: Classifier, tx: optax.GradientTransformation, data: tuple[Split, Split], steps: int) -> list[float]:
    """Trains `model`; returns its final loss on the training data, and loss and accuracy on the validation data."""
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    split, validation = data
    for batch in batches(0, len(split.labels), BATCH_SIZE, steps):
        train_step(model, optimizer, split.images[batch], split.labels[batch])
    final, _ = evaluate(model, split.images, split.labels)
    return [float(value) for value in (final, *evaluate(model, validation.images, validation.labels))]


def main() -> None:
    parser = argparse.ArgumentParser(description="AdamW with and without Eva in Flax NNX, on handwritten digits.")
    parser.add_argument("--steps", type=int, default=300, help="training steps of each run")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="of both runs")
    options = parser.parse_args()

    data = load(seed=0)
    plain = train(Classifier(nnx.Rngs(0)), optax.adamw(options.learning_rate, b2=0.95), data, options.steps)

    model = eva_optax.tap(Classifier(nnx.Rngs(0)), rank=16)
    with_eva = train(model, eva_optax.eva_adamw(options.learning_rate, b2=0.95), data, options.steps)

    console = Console()
    console.print(eva_optax.coverage(model))
    table = Table("optimizer", "training loss", "validation loss", "validation accuracy")
    for name, results in (("AdamW", plain), ("Eva-AdamW", with_eva)):
        table.add_row(name, *(f"{value:.4g}" for value in results))
    console.print(table)
    console.print(f"{options.steps} steps of {BATCH_SIZE} images, both with b2 = 0.95, on {jax.devices()[0].platform}")


if __name__ == "__main__":
    main()
