"""Tables of the convergence benchmark, from its CSV files; `figures` draws the same numbers."""

import math
import statistics
from collections.abc import Iterable
from pathlib import Path

from matplotlib import rc_context

from benchmarks.common.results import publish, table
from benchmarks.convergence import claim, figures
from benchmarks.convergence.optimizers import BASELINES, OPTIMIZERS, Optimizer
from benchmarks.convergence.records import Records
from benchmarks.convergence.tasks import TASKS

LOSSES = ("train loss", "after as many seconds", "valid. loss", "best valid. loss")
HEADER = ("optimizer", "rate", *LOSSES, "ms per step", "steps to loss", "seconds to loss")


class Summary:
    """What the tests of one optimizer on one task say, and how they compare with those of its baseline.

    Steps and seconds are those to the final training loss of the baseline on the same seed, from the same parameters
    and with the same mini-batches. Ratios are above 1 where the optimizer is better than its baseline.
    """

    def __init__(self, records: Records, task: str, optimizer: Optimizer) -> None:
        runs, baseline = records.tests(task, optimizer.name), records.tests(task, optimizer.baseline)
        pairs = [(runs[seed], baseline[seed]) for seed in sorted(runs.keys() & baseline.keys())]
        self.rate = records.tested_rate(task, optimizer.name)
        self.train, self.validation = [run.final for run, _ in pairs], [run.validation[-1] for run, _ in pairs]
        followed = [(run, base) for run, base in pairs if min(len(run.validation), len(base.validation)) > 1]
        self.best_validation = _median(min(run.validation) for run, _ in followed)
        self.fewer_to_validation = _median(
            base.steps_to_validation(best) / run.steps_to_validation(best)
            for run, base, best in ((run, base, min(base.validation)) for run, base in followed)
            if math.isfinite(best)
        )
        # A seed on which the baseline itself diverged says nothing about the steps to its loss.
        reached = [(run.steps_to(base.final), base.steps_to(base.final)) for run, base in pairs]
        self.steps = [steps for steps, own in reached if math.isfinite(own)]
        self.fewer_steps = _median(own / steps for steps, own in reached if math.isfinite(own))
        self.seconds, baseline_seconds = records.times.get((task, optimizer.name), (math.nan, math.nan))
        self.dearer = self.seconds / baseline_seconds
        self.less_time = self.fewer_steps / self.dearer
        self.same_time = _median(run.loss_at(base.steps / self.dearer) for run, base in pairs)
        self.lower_train = _median(base.final for _, base in pairs) / _median(self.train)
        self.lower_validation = _median(base.validation[-1] for _, base in pairs) / _median(self.validation)

    def row(self, name: str) -> tuple[str, ...]:
        later = f"{self.same_time:.4g}".replace("inf", "∞").replace("nan", "–")
        best = ""  # nothing where the validation loss has not been followed
        if not math.isnan(self.best_validation):
            sooner = f"{self.fewer_to_validation:.2f}×" if self.fewer_to_validation > 0 else "–"
            best = f"{self.best_validation:.4g}, {sooner}"
        losses = _with_range(self.train, ".4g"), later, _with_range(self.validation, ".4g"), best
        timed = f"{1000 * self.seconds:.2f}".replace("nan", "")  # nothing as long as it has not been timed
        steps = seconds = "–"
        if any(map(math.isfinite, self.steps)):
            steps = _with_range(self.steps, ".0f")
        if self.fewer_steps > 0:
            steps += f", {self.fewer_steps:.2f}×"
            seconds = timed and f"{_median(self.steps) * self.seconds:.2g}, {self.less_time:.2f}×"
        return name, f"{self.rate:.2g}", *losses, timed, steps, seconds


def _median(values: Iterable[float]) -> float:
    found = list(values)
    return statistics.median(found) if found else math.nan


def _with_range(values: list[float], form: str) -> str:
    return f"{_median(values):{form}} ({min(values):{form}}–{max(values):{form}})".replace("inf", "∞")


def summaries(records: Records) -> dict[tuple[str, str], Summary]:
    """By task and optimizer, as far as both it and its baseline have been tested."""
    return {
        (task, name): Summary(records, task, optimizer)
        for task in TASKS
        for name, optimizer in sorted(OPTIMIZERS.items(), key=lambda item: list(BASELINES).index(item[1].baseline))
        if records.tests(task, name) and records.tests(task, optimizer.baseline)
    }


def tables(records: Records, found: dict[tuple[str, str], Summary]) -> str:
    """One Markdown table for each task."""
    parts = []
    for task in dict.fromkeys(task for task, _ in found):
        rows = {name: summary.row(name) for (here, name), summary in found.items() if here == task}
        steps = next(iter(records.tests(task, next(iter(rows))).values())).steps
        title = f"### {task}: {steps} steps of {TASKS[task].batch_size} examples"
        parts.append(f"{title}\n\n{table(HEADER, rows.values())}")
    return "\n\n".join(parts)


def write(records: Records, directory: Path) -> None:
    """Prints the tables, puts them into `convergence.md` of the directory, and draws the figures there."""
    found = summaries(records)
    if not found:
        print("Nothing to report: no optimizer has been tested together with its baseline yet.")
        return
    compared_in_seconds = claim.efforts(records)
    parts = claim.text(compared_in_seconds), tables(records, found)
    publish("\n\n".join(filter(None, parts)), directory / "convergence.md", "convergence")
    compared = {key: summary for key, summary in found.items() if key[1] not in BASELINES}
    drawn = figures.draw(compared)
    if compared_in_seconds:
        with rc_context(figures.STYLE):
            drawn["claim"] = claim.draw(compared_in_seconds)
    for name, figure in drawn.items():
        figure.savefig(directory / f"convergence_{name}.png")
