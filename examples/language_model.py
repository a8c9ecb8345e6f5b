"""A small language model, character by character, with AdamW and Muon and their Eva counterparts.

    python examples/language_model.py                            # about two minutes on two cores
    python examples/language_model.py --small                    # shows that it runs
    python examples/language_model.py --width 256 --depth 6 --steps 5000 --batch-size 64

The text is that of the Python standard library; the model is a decoder-only transformer whose layers `nn.scan` stacks.
Every optimizer starts from the same parameters, sees the same mini-batches and gets equally many learning rates; the
rate with the lowest final loss on the training data counts. Every Adam has b2 = 0.95.
"""

import argparse
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from characters import LanguageModel, cross_entropy, load
from digits import batches
from jax import Array
from plots import draw, panels, save
from progress import SMALL, progress
from rich import box
from rich.console import Console
from rich.table import Table

import eva_optax

EVALUATIONS = 25  # of a run
EVALUATED = 64  # windows, of the training and of the validation text


def matrices(params: Any) -> Any:
    """For Muon: the last two axes of the layers' kernels, which are stacked along the first. The rest goes to Adam."""

    def axes(path: tuple[Any, ...], _: Array) -> optax.contrib.MuonDimensionNumbers | None:
        stacked_kernel = path[0].key == "layers" and path[-1].key == "kernel"
        return optax.contrib.MuonDimensionNumbers(1, 2) if stacked_kernel else None

    return jax.tree_util.tree_map_with_path(axes, params)


def adamw(rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(rate, b2=0.95)


def eva_adamw(rate: optax.Schedule) -> optax.GradientTransformation:
    return eva_optax.eva_adamw(rate, b2=0.95)


def muon(rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.contrib.muon(rate, adam_b2=0.95, muon_weight_dimension_numbers=matrices)


def eva_muon(rate: optax.Schedule) -> optax.GradientTransformation:
    return eva_optax.eva_muon(rate, adam_b2=0.95, muon_weight_dimension_numbers=matrices)


class Optimizer(NamedTuple):
    """How an optimizer is made from a learning rate, whether it needs a tapped model, and the centre of its rates."""

    make: Callable[[optax.Schedule], optax.GradientTransformation]
    tapped: bool
    center: float


OPTIMIZERS = {
    "AdamW": Optimizer(adamw, False, 0.005),
    "Eva-AdamW": Optimizer(eva_adamw, True, 0.005),
    "Muon": Optimizer(muon, False, 0.02),
    "Eva-Muon": Optimizer(eva_muon, True, 0.02),
}


class Run(NamedTuple):
    """One training run, evaluated every few steps, and what Eva's diagnostics say there."""

    rate: float
    steps: list[int]
    diagnostics: list[dict[str, Array]]
    train_loss: np.ndarray
    validation_loss: np.ndarray

    def final_loss(self) -> float:
        return float(self.train_loss[-1]) if np.isfinite(self.train_loss[-1]) else math.inf

    def steps_to(self, loss: float) -> int | None:
        """The first evaluated step at which the training loss is no higher than `loss`."""
        reached = (step for step, here in zip(self.steps, self.train_loss, strict=True) if here <= loss < math.inf)
        return next(reached, None)


def schedule(rate: float | Array, steps: int) -> optax.Schedule:
    """A warm-up and a cosine to zero. The rate is a factor, so that it may be an argument of a jitted function."""
    shape = optax.warmup_cosine_decay_schedule(0.1, 1.0, max(1, steps // 20), steps)
    return lambda count: rate * shape(count)


def train_step(model: Any, optimizer: Optimizer, steps: int) -> Callable[..., tuple[Any, Any]]:
    """A jitted step from (parameters, state, rate, batch) to (parameters, state)."""

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, rate: Array, characters: Array, following: Array) -> tuple[Any, Any]:
        grads = jax.grad(lambda p: cross_entropy(model.apply({"params": p}, characters), following))(params)
        # The rate is an argument, so that all rates share one compilation.
        updates, state = optimizer.make(schedule(rate, steps)).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def sweep(options: argparse.Namespace, advance: Callable[[str, int], Any]) -> dict[str, Run]:
    """The best run of each optimizer; `advance` is told of which one, and how many steps were made."""
    splits = load(options.length)
    train = splits[0]
    plain: Any = LanguageModel(options.width, options.depth, options.heads)
    tapped: Any = eva_optax.tap(plain)
    initial = jax.jit(tapped.init)(jax.random.key(options.seed), train.characters[:1])["params"]
    indices = batches(options.seed, len(train.characters), options.batch_size, options.steps)
    evaluated = [[jnp.asarray(part[:EVALUATED]) for part in split] for split in splits]

    @jax.jit
    def evaluate(params: Any) -> list[Array]:
        return [cross_entropy(plain.apply({"params": params}, x), following) for x, following in evaluated]

    best = {}
    for name, optimizer in OPTIMIZERS.items():
        step, runs = train_step(tapped if optimizer.tapped else plain, optimizer, options.steps), []
        for number in range(options.rates):
            rate = optimizer.center * 10 ** ((number - options.rates // 2) / 2)
            params = jax.tree.map(jnp.copy, initial if optimizer.tapped else eva_optax.strip(initial))
            state = optimizer.make(schedule(rate, options.steps)).init(params)
            steps, losses, history = [0], [evaluate(eva_optax.strip(params))], []
            for chunk in np.array_split(indices, min(EVALUATIONS, options.steps)):
                for batch in chunk:
                    params, state = step(params, state, rate, train.characters[batch], train.following[batch])
                steps.append(steps[-1] + len(chunk))
                losses.append(evaluate(eva_optax.strip(params)))
                jax.block_until_ready(losses)
                if optimizer.tapped:
                    history.append(jax.device_get(eva_optax.diagnostics(state)))
                advance(name, len(chunk))
            runs.append(Run(rate, steps, history, *np.array(losses).T))
        best[name] = min(runs, key=Run.final_loss)
    return best


def table(results: dict[str, Run]) -> Table:
    """The best run of each optimizer; the last columns are the steps to the final training loss of that baseline."""
    header = ("optimizer", "rate", "train\nloss", "valid.\nloss", "to AdamW's\nloss", "to Muon's\nloss")
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for name in header:
        made.add_column(name, justify="left" if name == "optimizer" else "right", no_wrap=True)
    for name, run in results.items():
        reached = (str(run.steps_to(results[baseline].final_loss()) or "-") for baseline in ("AdamW", "Muon"))
        made.add_row(name, f"{run.rate:.2g}", f"{run.final_loss():.3f}", f"{run.validation_loss[-1]:.3f}", *reached)
    return made


def plot(results: dict[str, Run], path: Path) -> None:
    """Training and validation loss against steps."""
    figure, rows = panels(2)
    for axes, part in zip(rows, ("train_loss", "validation_loss"), strict=True):
        for name, run in results.items():
            line, label = "-" if OPTIMIZERS[name].tapped else "--", f"{name}, rate {run.rate:.2g}"
            draw(axes, np.array(run.steps), getattr(run, part)[None], name.removeprefix("Eva-"), line, label)
        axes.set(title=part.replace("_", " "), xlabel="step", ylabel="nats per character")
    save(figure, path)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="AdamW and Muon with and without Eva, on a small language model.")
    parser.add_argument("--small", action="store_true", help="a small model, few steps, one rate, to see that it runs")
    sizes = {"width": 64, "depth": 2, "heads": 2, "length": 64, "batch-size": 16, "steps": 500, "rates": 3}
    small = {"width": 16, "depth": 2, "heads": 2, "length": 32, "batch-size": 8, "steps": 50, "rates": 1}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, help=f"default: {size}; with --small: {small[name]}")
    parser.add_argument("--seed", type=int, default=0, help="of the initial parameters and the batches")
    parser.add_argument("--output", type=Path, default=Path("results"), help="directory of the plot")
    options = parser.parse_args()
    defaults = {name.replace("-", "_"): size for name, size in (small if options.small else sizes).items()}
    given = {name: value for name, value in vars(options).items() if value is not None}
    return argparse.Namespace(**defaults | given)


def main() -> None:
    options, console = parse(), Console()
    model: Any = LanguageModel(options.width, options.depth, options.heads)
    console.print(eva_optax.coverage(model, jnp.zeros((1, options.length), int)), "")
    with progress(console, dict.fromkeys(OPTIMIZERS, int(options.rates * options.steps))) as advance:
        results = sweep(options, advance)
    console.print(table(results), "")
    console.print(
        f"{options.steps} steps of {options.batch_size} windows of {options.length} characters. The rate is the best "
        f"of {options.rates} by final loss on the training data. The last columns are the steps to that baseline's."
    )
    plot(results, options.output / "language_model.png")
    console.print(f"Plot: {options.output / 'language_model.png'}", soft_wrap=True)
    for name, run in results.items():
        if OPTIMIZERS[name].tapped:
            path = options.output / f"language_model_{name}.png"
            eva_optax.plot_diagnostics(run.diagnostics, run.steps[1:]).savefig(path, dpi=110)
            console.print(f"Diagnostics of {name}: {path}", soft_wrap=True)
    if options.small:
        console.print(SMALL)


if __name__ == "__main__":
    main()
