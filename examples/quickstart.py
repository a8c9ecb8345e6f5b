"""SGD and AdamW with and without Eva, on handwritten digits: a convolutional classifier and a deep autoencoder.

    python examples/quickstart.py               # about two minutes on two cores
    python examples/quickstart.py --small       # a quick look
    python examples/quickstart.py --markdown    # also writes the tables as Markdown, next to the plot

Eva is two lines in a training script:

    model = eva_optax.tap(model)                                                         # 1
    tx = optax.chain(eva_optax.scale_by_eva(), optax.sgd(learning_rate, momentum=0.9))   # 2

Every optimizer starts from the same parameters, sees the same mini-batches and gets equally many learning rates, on the
same grid with and without Eva. The rate with the lowest final loss on the training data counts, for every optimizer.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from digits import TASKS, Split, Task, batches, evaluation, load
from jax import Array
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn
from rich.table import Table

import eva_optax

BATCH_SIZE = 128
EVALUATE_EVERY = 25

Rate = float | Array


@dataclass(frozen=True)
class Optimizer:
    """How an optimizer is made from a learning rate, whether it needs a tapped model, and the centre of its rates."""

    name: str
    make: Callable[[Rate], optax.GradientTransformation]
    eva: bool
    center: float


def sgd(rate: Rate) -> optax.GradientTransformation:
    return optax.sgd(rate, momentum=0.9)


def eva_sgd(rate: Rate) -> optax.GradientTransformation:
    return optax.chain(eva_optax.scale_by_eva(), optax.sgd(rate, momentum=0.9))


def eva_adamw(rate: Rate) -> optax.GradientTransformation:
    return optax.chain(eva_optax.scale_by_eva(), optax.adamw(rate))


OPTIMIZERS = (
    Optimizer("SGD", sgd, eva=False, center=0.3),
    Optimizer("Eva + SGD", eva_sgd, eva=True, center=0.3),
    Optimizer("AdamW", optax.adamw, eva=False, center=0.003),
    Optimizer("Eva + AdamW", eva_adamw, eva=True, center=0.003),
)


def train_step(task: Task, optimizer: Optimizer, train: Split) -> Callable[..., tuple[Any, Any]]:
    """A jitted step from (params, state, rate, batch) to (params, state)."""
    model: Any = eva_optax.tap(task.model) if optimizer.eva else task.model

    @jax.jit
    def step(params: Any, state: Any, rate: Rate, batch: Array) -> tuple[Any, Any]:
        images, labels = train.images[batch], train.labels[batch]
        grads = jax.grad(lambda p: task.loss(model.apply({"params": p}, images), images, labels))(params)
        # The rate is an argument, so that all rates share one compilation.
        updates, state = optimizer.make(rate).update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


class Run(NamedTuple):
    """One training run, evaluated every few steps."""

    rate: float
    steps: np.ndarray
    train_loss: np.ndarray
    validation_loss: np.ndarray
    accuracy: np.ndarray

    def final_loss(self) -> float:
        return float(self.train_loss[-1]) if np.isfinite(self.train_loss[-1]) else math.inf

    def steps_to(self, loss: float) -> int | None:
        """The first evaluated step at which the training loss is no higher than `loss`."""
        reached = self.steps[self.train_loss <= loss]
        return int(reached[0]) if len(reached) and math.isfinite(loss) else None


class Result(NamedTuple):
    """The best run of an optimizer, and the median time of one of its steps."""

    best: Run
    step_seconds: float


def sweep(task: Task, steps: int, rates: int, seed: int, advance: Callable[[int], None]) -> dict[str, Result]:
    """Trains with every optimizer at every rate; `advance` is told how many steps were made."""
    splits = load(seed)
    train = splits[0]
    indices = batches(seed, len(train.labels), BATCH_SIZE, steps)
    evaluate = evaluation(task, splits)
    tapped = jax.jit(eva_optax.tap(task.model).init)(jax.random.key(seed), train.images[:1])["params"]
    untapped = eva_optax.strip(tapped)
    jobs = [(o, train_step(task, o, train), tapped if o.eva else untapped) for o in OPTIMIZERS]
    runs: dict[str, list[Run]] = {optimizer.name: [] for optimizer in OPTIMIZERS}
    seconds: dict[str, list[float]] = {optimizer.name: [] for optimizer in OPTIMIZERS}

    # Optimizers take turns: whatever else the computer does slows all of them alike.
    for number in range(rates):
        for optimizer, step, params in jobs:
            rate = optimizer.center * 10 ** ((number - rates // 2) / 2)
            state = optimizer.make(rate).init(params)
            evaluated, measured = [0], [evaluate(eva_optax.strip(params))]
            for chunk in np.split(indices, range(EVALUATE_EVERY, steps, EVALUATE_EVERY)):
                start = time.perf_counter()
                for batch in chunk:
                    params, state = step(params, state, rate, batch)
                jax.block_until_ready(params)
                seconds[optimizer.name].append((time.perf_counter() - start) / len(chunk))
                evaluated.append(evaluated[-1] + len(chunk))
                measured.append(evaluate(eva_optax.strip(params)))
                advance(len(chunk))
            runs[optimizer.name].append(Run(rate, np.array(evaluated), *np.array(measured).T))

    # The median leaves the compilation out, which is in the first chunk.
    return {name: Result(min(runs[name], key=Run.final_loss), statistics.median(seconds[name])) for name in runs}


# With the line breaks that fit a terminal of 80 columns.
HEADER = (
    *("optimizer", "rate", "train\nloss", "valid.\nloss", "valid.\nacc.", "ms per\nstep"),
    *("to SGD's\nloss", "to AdamW's\nloss"),
)


def table_rows(results: dict[str, Result]) -> list[tuple[str, ...]]:
    """One row of texts for each optimizer, as `HEADER` names them."""

    def time_to(result: Result, baseline: str) -> str:
        steps = result.best.steps_to(results[baseline].best.final_loss())
        return "-" if steps is None else f"{steps}, {steps * result.step_seconds:.2g} s"

    rows = []
    for name, result in results.items():
        best, accuracy = result.best, result.best.accuracy[-1]
        losses = f"{best.train_loss[-1]:.3g}", f"{best.validation_loss[-1]:.3g}"
        share = "-" if math.isnan(accuracy) else f"{accuracy:.1%}"
        times = f"{1000 * result.step_seconds:.2f}", time_to(result, "SGD"), time_to(result, "AdamW")
        rows.append((name, f"{best.rate:.2g}", *losses, share, *times))
    return rows


def rich_table(title: str, rows: list[tuple[str, ...]]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for name in HEADER:
        table.add_column(name, justify="left" if name == "optimizer" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(title: str, rows: list[tuple[str, ...]]) -> str:
    header = tuple(name.replace("\n", " ") for name in HEADER)
    rule = ("---",) + ("---:",) * (len(HEADER) - 1)
    return "\n".join([f"**{title}**\n", *("| " + " | ".join(row) + " |" for row in (header, rule, *rows)), ""])


def plot(results: dict[str, dict[str, Result]], path: Path) -> None:
    """Training loss against steps, a panel for each task."""
    figure = Figure(figsize=(5.5 * len(results), 4), layout="constrained")
    for axes, (title, by_optimizer) in zip(figure.subplots(1, len(results)), results.items(), strict=True):
        for optimizer in OPTIMIZERS:
            best = by_optimizer[optimizer.name].best
            color, style = "tab:blue" if "SGD" in optimizer.name else "tab:orange", "-" if optimizer.eva else "--"
            label = f"{optimizer.name}, rate {best.rate:.2g}"
            axes.plot(best.steps, best.train_loss, color=color, linestyle=style, label=label)
        axes.set(title=title, xlabel="step", ylabel="loss on the training data", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="SGD and AdamW with and without Eva, on handwritten digits.")
    parser.add_argument("--small", action="store_true", help="fewer steps and learning rates")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the initial parameters and the batches")
    parser.add_argument("--output", type=Path, default=Path("results"), help="directory of the plot")
    parser.add_argument("--markdown", action="store_true", help="write the tables as Markdown, too")
    options = parser.parse_args()
    rates, shorter = (3, 5) if options.small else (7, 1)

    console = Console()
    train, _ = load(options.seed)
    console.print(f"{TASKS[0].name}:", eva_optax.coverage(TASKS[0].model, train.images), "")
    results = {}
    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), console=console) as progress:
        for task in TASKS:
            steps = task.steps // shorter
            bar = progress.add_task(task.name, total=rates * len(OPTIMIZERS) * steps)
            title = f"{task.name}, {steps} steps of {BATCH_SIZE} images"
            results[title] = sweep(task, steps, rates, options.seed, lambda n, bar=bar: progress.advance(bar, n))

    options.output.mkdir(parents=True, exist_ok=True)
    tables = {title: table_rows(by_optimizer) for title, by_optimizer in results.items()}
    for title, rows in tables.items():
        console.print(rich_table(title, rows), "")
    note = (
        f"The rate is the best of {rates} by final loss on the training data. The last columns are the steps, and the "
        "seconds, to the final training loss of that baseline."
    )
    console.print(note)
    plot(results, options.output / "quickstart.png")
    console.print(f"Plot: {options.output / 'quickstart.png'}", soft_wrap=True)
    if options.markdown:
        texts = [*(markdown_table(title, rows) for title, rows in tables.items()), f"{note}\n"]
        (options.output / "quickstart.md").write_text("\n".join(texts))
        console.print(f"Tables: {options.output / 'quickstart.md'}", soft_wrap=True)


if __name__ == "__main__":
    main()
