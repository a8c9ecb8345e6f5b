"""Runs several optimizers on one task with equally many rates, and prints the table of the Eva paper, with a plot.

    python -m examples.train.compare --task cifar10-resnet20 --optimizers sgd,adamw,eva_adamw --rates 3
    python -m examples.train.compare --task cifar10-resnet110 --data PATH --optimizers sgd,kfac,eva --target 0.935

Rates lie around the default of each optimizer, two in a decade; the one with the best validation metric counts. The
target is, unless --target says otherwise, the best that the first optimizer comes to; ratios are seconds of the first
optimizer by those of another. What was run before, in part or to its end, is not run again. Other options are those of
`python -m examples.train`.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from examples.train import optimizers, tasks
from examples.train.command_line import Parser, add_settings, changes, fail, lists
from examples.train.errors import DivergedError, UserError
from examples.train.loop import train
from examples.train.objectives import Objective
from examples.train.processes import connect


@dataclass(frozen=True)
class Record:
    """A finished run: its result, and its validation metric along the way."""

    optimizer: str
    rate: float
    result: dict[str, Any]
    epochs: Sequence[float]
    seconds: Sequence[float]
    values: Sequence[float]

    def reached(self, target: float, objective: Objective) -> tuple[float, float] | None:
        """Epochs and seconds to the first evaluation that is as good as the target."""
        for place in zip(self.epochs, self.seconds, self.values, strict=True):
            if objective.better(place[2], target):
                return place[0], place[1]
        return None


def grid(center: float, number: int) -> list[float]:
    return [float(f"{center * 10 ** ((place - number // 2) / 2):.3g}") for place in range(number)]


def run(name: str, rate: float, given: dict[str, Any], folder: Path) -> Record | None:
    """One run, or what is stored of it; None if it diverged."""
    output = folder / name / f"rate-{rate:g}"
    config = tasks.configure({**given, "optimizer": name, "learning_rate": rate, "output": str(output)})
    try:
        result = train(config)
    except DivergedError as error:
        print(f"{name} at a rate of {rate:g}: {error}", flush=True)
        return None
    finally:
        jax.clear_caches()
    steps, seconds, values = zip(*result["curve"], strict=True)
    return Record(name, rate, result, [step / result["steps_per_epoch"] for step in steps], seconds, values)


def best(records: Sequence[Record | None], objective: Objective) -> Record | None:
    """The record with the best value of the metric along its way."""
    choose = max if objective.higher else min
    return choose((record for record in records if record), key=lambda record: record.result["best"], default=None)


def table(records: dict[str, Record | None], target: float, objective: Objective) -> Table:
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for header in (
        "optimizer",
        "rate",
        f"final\n{objective.metric}",
        "best",
        "epochs\nto target",
        "seconds\nto target",
    ):
        made.add_column(header, justify="left" if header == "optimizer" else "right", no_wrap=True)
    for header in ("ratio", "examples\na second", "peak GiB"):
        made.add_column(header, justify="right", no_wrap=True)
    first = next(iter(records.values()))
    start = first.reached(target, objective) if first else None
    for name, record in records.items():
        if record is None:
            made.add_row(name, "diverged at all rates")
            continue
        reached = record.reached(target, objective)
        way = (f"{reached[0]:.1f}", f"{reached[1]:.1f}") if reached else ("-", "-")
        ratio = f"{start[1] / reached[1]:.2f}" if start and reached else "-"
        result = record.result
        numbers = (
            f"{result['final']:.4g}",
            f"{result['best']:.4g}",
            *way,
            ratio,
            f"{result['examples_per_second']:.0f}",
        )
        made.add_row(name, f"{record.rate:g}", *numbers, f"{result['peak_memory_gib']:.2f}")
    return made


def plot(records: dict[str, Record | None], target: float, objective: Objective, path: Path) -> None:
    """The metric against epochs and against seconds."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    for axes, along in zip(figure.subplots(1, 2, sharey=True), ("epochs", "seconds"), strict=True):
        for name, record in records.items():
            if record:
                axes.plot(getattr(record, along), record.values, marker=".", label=f"{name}, rate {record.rate:g}")
        axes.axhline(target, color="gray", linestyle=":")
        axes.set(xlabel=along, ylabel=f"validation {objective.metric}")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=130)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(
        "python -m examples.train.compare",
        description=__doc__,
        epilog=lists(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--optimizers", default="sgd,adamw,muon,eva_adamw", help="names, separated by commas")
    parser.add_argument("--rates", type=int, default=3, help="number of rates of each optimizer")
    parser.add_argument("--target", type=float, help="value of the validation metric")
    parser.add_argument("--output", type=Path, help="folder of all runs")
    add_settings(parser, but=("optimizer", "learning_rate", "output", "target"))
    try:
        options, given = changes(parser, arguments)
        names = options.optimizers.split(",")
        config = tasks.configure(given)
        if arguments is None:
            connect(config.machine)
        folder = options.output or Path("results/compare") / config.task
        objective = tasks.find(config.task).objective
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))  # all rates take the same programs
        records = {}
        for name in names:
            rates = grid(optimizers.find(name).learning_rate, options.rates)
            records[name] = best([run(name, rate, given, folder) for rate in rates], objective)
    except UserError as error:
        fail(error)
    if jax.process_index() == 0:
        first = records[names[0]]
        target = options.target if options.target is not None else first.result["best"] if first else float("nan")
        console = Console(width=None if sys.stdout.isatty() else 110)
        console.print(table(records, target, objective), "")
        console.print(
            f"{config.task} on {config.input.data}; target: {objective.metric} {target:.4g}. The rate is the best of "
            f"{options.rates} by {objective.metric}. Seconds are those of training steps, without compilation and "
            "evaluation; peak memory is that of the device where it counts it, else of this process so far."
        )
        plot(records, target, objective, folder / "compare.png")
        console.print(f"Plot: {folder / 'compare.png'}", soft_wrap=True)


if __name__ == "__main__":
    main()
