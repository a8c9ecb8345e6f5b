"""SGD and AdamW with and without Eva, on handwritten digits: a convolutional classifier and a deep autoencoder.

    python examples/quickstart.py               # about four minutes on two cores
    python examples/quickstart.py --small       # a minute or so; shows that it runs
    python examples/quickstart.py --markdown    # also writes the tables as Markdown, next to the plot

Eva is two lines in a training script:

    model = eva_optax.tap(model, rank=16)          # 1
    tx = eva_optax.eva_adamw(learning_rate)        # 2

Every optimizer gets equally many learning rates, on the same grid with and without Eva, and every AdamW b2 = 0.95. The
rates are constant: with a decay the classifier's training losses end at zero, and no longer tell good rates from bad.
The rate with the lowest final loss on the training data of one seed counts. With it each optimizer trains on further
seeds: another split, other parameters, another order; the same for all optimizers. Tables and plot show those runs.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
from digits import TASKS, Split, Task, batches, evaluation, load
from jax import Array
from plots import draw, panels, save
from progress import SMALL, progress
from rich import box
from rich.console import Console
from rich.table import Table

import eva_optax

BATCH_SIZE = 128
EVALUATE_EVERY = 25

Rate = float | Array


@dataclass(frozen=True)
class Optimizer:
    """How an optimizer is made from a learning rate, what it is compared with, its rates' centre, and its tap."""

    name: str
    make: Callable[[Rate], optax.GradientTransformation]
    baseline: str
    center: float
    tap: Callable[[nn.Module], Any] | None = None


def sgd(rate: Rate) -> optax.GradientTransformation:
    return optax.sgd(rate, momentum=0.9)


def eva_sgd(rate: Rate) -> optax.GradientTransformation:
    return optax.chain(eva_optax.scale_by_eva(), sgd(rate))


OPTIMIZERS = (
    Optimizer("SGD", sgd, "SGD", 0.3),
    Optimizer("Eva + SGD", eva_sgd, "SGD", 0.3, eva_optax.tap),
    Optimizer("AdamW", partial(optax.adamw, b2=0.95), "AdamW", 0.003),
    Optimizer("Eva-AdamW", partial(eva_optax.eva_adamw, b2=0.95), "AdamW", 0.003, partial(eva_optax.tap, rank=16)),
)


class Data(NamedTuple):
    """What a seed decides: the split, its mini-batches, and the key of the initial parameters."""

    splits: tuple[Split, Split]
    batches: np.ndarray
    key: Array


def draw_data(seed: int, steps: int) -> Data:
    splits = load(seed)
    return Data(splits, batches(seed, len(splits[0].labels), BATCH_SIZE, steps), jax.random.key(seed))


class Run(NamedTuple):
    """One training run, evaluated every few steps, and the seconds of a step between two evaluations."""

    steps: np.ndarray
    step_seconds: list[float]
    train_loss: np.ndarray
    validation_loss: np.ndarray
    accuracy: np.ndarray

    def final_loss(self) -> float:
        return float(self.train_loss[-1]) if np.isfinite(self.train_loss[-1]) else math.inf

    def steps_to(self, loss: float) -> float:
        """The first evaluated step at which the training loss is no higher than `loss`; infinity if there is none."""
        reached = self.steps[self.train_loss <= loss]
        return float(reached[0]) if len(reached) and math.isfinite(loss) else math.inf


class Trainer:
    """Trains one task with one optimizer; all seeds and rates share one compilation."""

    def __init__(self, task: Task, optimizer: Optimizer) -> None:
        model: Any = optimizer.tap(task.model) if optimizer.tap else task.model
        self.init, self.evaluate, self.optimizer = jax.jit(model.init), evaluation(task), optimizer

        @jax.jit
        def step(params: Any, state: Any, rate: Rate, train: Split, batch: Array) -> tuple[Any, Any]:
            images, labels = train.images[batch], train.labels[batch]
            grads = jax.grad(lambda p: task.loss(model.apply({"params": p}, images), images, labels))(params)
            updates, state = optimizer.make(rate).update(grads, state, params)
            return optax.apply_updates(params, updates), state

        self.step = step

    def run(self, data: Data, rate: float, advance: Callable[[int], None]) -> Run:
        """One run; `advance` is told how many steps were made."""
        params = self.init(data.key, data.splits[0].images[:1])["params"]
        state = self.optimizer.make(rate).init(params)
        evaluated, measured = [0], [self.evaluate(eva_optax.strip(params), data.splits)]
        seconds = []
        for chunk in np.split(data.batches, range(EVALUATE_EVERY, len(data.batches), EVALUATE_EVERY)):
            start = time.perf_counter()
            for batch in chunk:
                params, state = self.step(params, state, rate, data.splits[0], batch)
            jax.block_until_ready(params)
            seconds.append((time.perf_counter() - start) / len(chunk))
            evaluated.append(evaluated[-1] + len(chunk))
            measured.append(self.evaluate(eva_optax.strip(params), data.splits))
            advance(len(chunk))
        return Run(np.array(evaluated), seconds, *np.array(measured).T)


class Result(NamedTuple):
    """An optimizer's best rate, its runs at that rate, one for each further seed, and the median time of a step."""

    rate: float
    runs: list[Run]
    step_seconds: float


def compare(task: Task, steps: int, rates: int, seeds: Sequence[int], advance: Callable[[int], None]) -> list[Result]:
    """The result of each optimizer: tuned on the first seed, then run on the others."""
    trainers = [Trainer(task, optimizer) for optimizer in OPTIMIZERS]
    tuned: list[dict[float, Run]] = [{} for _ in OPTIMIZERS]
    data = draw_data(seeds[0], steps)
    # Optimizers take turns: whatever else the computer does slows all of them alike.
    for number in range(rates):
        for trainer, runs in zip(trainers, tuned, strict=True):
            rate = trainer.optimizer.center * 10 ** ((number - rates // 2) / 2)
            runs[rate] = trainer.run(data, rate, advance)
    best = [min(runs, key=lambda rate: runs[rate].final_loss()) for runs in tuned]
    tested: list[list[Run]] = [[] for _ in OPTIMIZERS]
    for seed in seeds[1:]:
        data = draw_data(seed, steps)
        for trainer, rate, runs in zip(trainers, best, tested, strict=True):
            runs.append(trainer.run(data, rate, advance))
    # The median leaves the compilation out, which is in the first chunk.
    seconds = [statistics.median(time for run in runs for time in run.step_seconds) for runs in tested]
    return [Result(*parts) for parts in zip(best, tested, seconds, strict=True)]


# With the line breaks that fit a terminal of 80 columns.
HEADER = (
    *("optimizer", "rate", "train\nloss", "valid.\nloss", "valid.\nacc.", "ms per\nstep"),
    *("to SGD's\nloss", "to AdamW's\nloss"),
)


def table_rows(results: list[Result]) -> list[tuple[str, ...]]:
    """One row of texts for each optimizer, as `HEADER` names them: medians over the seeds."""
    by_name = {optimizer.name: result for optimizer, result in zip(OPTIMIZERS, results, strict=True)}

    def time_to(result: Result, baseline: str) -> str:
        pairs = zip(result.runs, by_name[baseline].runs, strict=True)
        steps = statistics.median(run.steps_to(theirs.final_loss()) for run, theirs in pairs)
        return "-" if math.isinf(steps) else f"{steps:.0f}, {steps * result.step_seconds:.2g} s"

    rows = []
    for name, result in by_name.items():
        ends = [[run.train_loss[-1], run.validation_loss[-1], run.accuracy[-1]] for run in result.runs]
        train, validation, accuracy = np.median(ends, 0)
        share = "-" if math.isnan(accuracy) else f"{accuracy:.1%}"
        times = f"{1000 * result.step_seconds:.2f}", time_to(result, "SGD"), time_to(result, "AdamW")
        rows.append((name, f"{result.rate:.2g}", f"{train:.3g}", f"{validation:.3g}", share, *times))
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


def plot(results: dict[str, list[Result]], path: Path) -> None:
    """Training loss against steps, a panel for each task."""
    figure, rows = panels(len(results))
    for axes, (title, of_task) in zip(rows, results.items(), strict=True):
        for optimizer, result in zip(OPTIMIZERS, of_task, strict=True):
            curves = np.array([run.train_loss for run in result.runs])
            line = "-" if optimizer.tap else "--"
            label = f"{optimizer.name}, rate {result.rate:.2g}"
            draw(axes, result.runs[0].steps, curves, optimizer.baseline, line, label)
        axes.set(title=title, xlabel="step", ylabel="loss on the training data", yscale="log")
        axes.set_ylim(
            top=1.5 * of_task[0].runs[0].train_loss[0]
        )  # what diverges leaves the panel, and squeezes nothing
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="SGD and AdamW with and without Eva, on handwritten digits.")
    parser.add_argument("--small", action="store_true", help="few steps, rates and seeds, to see that it runs")
    parser.add_argument("--seed", type=int, default=0, help="on which rates are tuned; the next ones are the tests")
    parser.add_argument("--output", type=Path, default=Path("results"), help="directory of the plot")
    parser.add_argument("--markdown", action="store_true", help="write the tables as Markdown, too")
    options = parser.parse_args()
    rates, tests, shorter = (2, 2, 5) if options.small else (7, 4, 1)
    seeds = range(options.seed, options.seed + 1 + tests)

    console = Console()
    train, _ = load(options.seed)
    console.print(f"{TASKS[0].name}:", eva_optax.coverage(TASKS[0].model, train.images), "")
    results, steps = {}, {task.name: task.steps // shorter for task in TASKS}
    totals = {name: (rates + tests) * len(OPTIMIZERS) * number for name, number in steps.items()}
    with progress(console, totals) as advance:
        for task in TASKS:
            title = f"{task.name}, {steps[task.name]} steps of {BATCH_SIZE} images"
            results[title] = compare(task, steps[task.name], rates, seeds, partial(advance, task.name))

    tables = {title: table_rows(of_task) for title, of_task in results.items()}
    for title, rows in tables.items():
        console.print(rich_table(title, rows), "")
    note = (
        f"The rate is the best of {rates} by final loss on the training data of one seed; all else are medians of "
        f"{tests} further seeds. The last columns are the steps, and the seconds, to that baseline's final training "
        "loss."
    )
    console.print(note)
    plot(results, options.output / "quickstart.png")
    console.print(f"Plot: {options.output / 'quickstart.png'}", soft_wrap=True)
    if options.markdown:
        texts = [*(markdown_table(title, rows) for title, rows in tables.items()), f"{note}\n"]
        (options.output / "quickstart.md").write_text("\n".join(texts))
        console.print(f"Tables: {options.output / 'quickstart.md'}", soft_wrap=True)
    if options.small:
        console.print(SMALL)


if __name__ == "__main__":
    main()
