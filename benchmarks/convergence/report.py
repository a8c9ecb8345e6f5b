"""Tables and plot of the convergence benchmark, from its CSV files."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from benchmarks.common.results import publish, table
from benchmarks.convergence.optimizers import OPTIMIZERS, Optimizer
from benchmarks.convergence.records import Records
from benchmarks.convergence.tasks import TASKS

HEADER = ("optimizer", "rate", "train loss", "valid. loss", "ms per step", "steps to loss", "seconds to loss")


class Summary:
    """What the tests of one optimizer on one task say, and how they compare with those of its baseline.

    Steps and seconds are those to the final training loss of the baseline on the same seed, from the same parameters
    and with the same mini-batches. Ratios are above 1 where the optimizer is better than its baseline.
    """

    def __init__(self, records: Records, task: str, optimizer: Optimizer) -> None:
        runs, baseline = records.tests(task, optimizer.name), records.tests(task, optimizer.baseline)
        seeds = sorted(runs.keys() & baseline.keys())
        self.rate = records.tested_rate(task, optimizer.name)
        self.train, self.validation = [[getattr(runs[s], name) for s in seeds] for name in ("final", "validation")]
        # A seed on which the baseline itself diverged says nothing about the steps to its loss.
        reached = [(run.steps_to(run.final), runs[s].steps_to(run.final)) for s, run in baseline.items() if s in runs]
        reached = [(own, steps) for own, steps in reached if math.isfinite(own)]
        self.steps = [steps for _, steps in reached]
        self.fewer_steps = _median([own / steps for own, steps in reached])
        self.seconds, baseline_seconds = records.times.get((task, optimizer.name), (math.nan, math.nan))
        self.less_time = self.fewer_steps * baseline_seconds / self.seconds
        self.lower_train = _median([baseline[seed].final for seed in seeds]) / _median(self.train)
        self.lower_validation = _median([baseline[seed].validation for seed in seeds]) / _median(self.validation)

    def row(self, name: str) -> tuple[str, ...]:
        losses = _with_range(self.train, ".4g"), _with_range(self.validation, ".4g")
        steps = seconds = "–"
        if any(map(math.isfinite, self.steps)):
            steps = _with_range(self.steps, ".0f")
        if self.fewer_steps > 0:
            steps += f", {self.fewer_steps:.2f}×"
            seconds = f"{_median(self.steps) * self.seconds:.2g}, {self.less_time:.2f}×"
        return name, f"{self.rate:.2g}", *losses, f"{1000 * self.seconds:.2f}", steps, seconds


def _median(values: list[float]) -> float:
    return statistics.median(values) if values else math.nan


def _with_range(values: list[float], form: str) -> str:
    return f"{_median(values):{form}} ({min(values):{form}}–{max(values):{form}})".replace("inf", "∞")


def summaries(records: Records) -> dict[tuple[str, str], Summary]:
    """By task and optimizer, as far as both it and its baseline have been tested."""
    return {
        (task, name): Summary(records, task, optimizer)
        for task in TASKS
        for name, optimizer in sorted(OPTIMIZERS.items(), key=lambda item: list(OPTIMIZERS).index(item[1].baseline))
        if records.tests(task, name) and records.tests(task, optimizer.baseline)
    }


def tables(records: Records, found: dict[tuple[str, str], Summary]) -> str:
    """One Markdown table for each task."""
    parts = []
    for task in dict.fromkeys(task for task, _ in found):
        steps = next(iter(records.tests(task, next(n for t, n in found if t == task)).values())).steps
        rows = [summary.row(name) for (here, name), summary in found.items() if here == task]
        parts.append(f"### {task}: {steps} steps of {TASKS[task].batch_size} examples\n\n{table(HEADER, rows)}")
    return "\n\n".join(parts)


PANELS: dict[str, Callable[[Summary], float]] = {
    "steps to the baseline's final training loss": lambda summary: summary.fewer_steps,
    "seconds to the baseline's final training loss": lambda summary: summary.less_time,
    "final training loss": lambda summary: summary.lower_train,
    "final validation loss": lambda summary: summary.lower_validation,
}


def plot(found: dict[tuple[str, str], Summary]) -> Figure:
    """A panel for each figure: tasks against optimizers, as how many times better than the baseline."""
    tasks = list(dict.fromkeys(task for task, _ in found))
    names = list(dict.fromkeys(name for _, name in found if OPTIMIZERS[name].baseline != name))
    labels = [f"{name}  (against {OPTIMIZERS[name].baseline})" for name in names]
    figure = Figure(figsize=(5 + 1.5 * len(tasks), 2.5 + 0.6 * len(names)), layout="constrained")
    figure.suptitle("Baseline ÷ optimizer: above 1 (blue) is better. – never reached, × diverged")
    for number, (axes, (title, figure_of)) in enumerate(zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True)):
        known = {key: figure_of(found[key]) for key in ((t, n) for t in tasks for n in names) if key in found}
        colors = [[known.get((task, name)) or math.nan for task in tasks] for name in names]
        axes.imshow(colors, cmap="RdBu", norm=LogNorm(1 / 4, 4), aspect="auto")
        axes.set_facecolor("lightgrey")
        for (task, name), value in known.items():
            diverged = math.isinf(_median(found[task, name].train))
            text = "×" if diverged else f"{value:.2f}" if value else "–"
            color = "white" if value and not 1 / 2 < value < 2 else "black"
            axes.text(tasks.index(task), names.index(name), text, color=color, ha="center", va="center", fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right", fontsize=8)
        axes.set_yticks(range(len(names)), labels if number % 2 == 0 else [""] * len(names), fontsize=8)
    return figure


def write(records: Records, directory: Path) -> None:
    """Prints the tables, puts them into `convergence.md` of the directory, and draws `convergence.png` there."""
    found = summaries(records)
    if not found:
        print("Nothing to report: no optimizer has been tested together with its baseline yet.")
        return
    publish(tables(records, found), directory / "convergence.md", "convergence")
    if any(OPTIMIZERS[name].baseline != name for _, name in found):
        plot(found).savefig(directory / "convergence.png", dpi=110)
