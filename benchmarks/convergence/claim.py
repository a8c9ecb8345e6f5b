"""The paper's claim: seconds, and steps, to one loss, against optimizers with whole matrices."""

import math
import statistics
from typing import NamedTuple

from matplotlib.figure import Figure

from benchmarks.common.results import table
from benchmarks.convergence.records import Records
from benchmarks.convergence.tasks import TASKS

# Those with matrices at their best of two periods and two dampings, Eva as published or scale-free before SGD.
CANDIDATES = {
    "SGD": ("sgd",),
    "AdamW": ("adamw",),
    "Muon": ("muon",),
    "K-FAC": ("kfac", "kfac/10", "kfac+sgd", "kfac+sgd/10"),
    "Shampoo": ("shampoo", "shampoo/10"),
    "Eva": ("eva", "eva+sgd"),
    "eva_adamw, rank 16": ("eva_adamw@16",),
}
COLUMNS = 3  # of the figure


class Effort(NamedTuple):
    """What it takes to come to the loss; infinite where it is not reached."""

    seconds: float
    steps: float
    optimizer: str


Efforts = dict[str, dict[str, Effort]]  # by task and label


def efforts(records: Records) -> Efforts:
    """Of the best of each candidate's forms that have been measured, on tasks where each candidate has one."""
    found = {}
    for task in TASKS:
        measured = {
            label: [name for name in forms if records.tests(task, name) and (task, name) in records.times]
            for label, forms in CANDIDATES.items()
        }
        if all(measured.values()):
            found[task] = {
                label: min(_effort(records, task, name) for name in forms) for label, forms in measured.items()
            }
    return found


def _effort(records: Records, task: str, name: str) -> Effort:
    """Median of the seeds, to the final training loss of SGD on the same seed, but for those on which SGD diverged."""
    runs = records.tests(task, name)
    targets = {seed: run.final for seed, run in records.tests(task, "sgd").items() if math.isfinite(run.final)}
    steps = statistics.median(runs[seed].steps_to(loss) for seed, loss in targets.items())
    return Effort(steps * records.times[task, name][0], steps, name)


def text(found: Efforts) -> str:
    """A Markdown table; nothing where no task has all of them."""
    if not found:
        return ""
    rows = []
    for label in CANDIDATES:
        cells = []
        for task in found:
            effort, sgd = found[task][label], found[task]["SGD"]
            reached = math.isfinite(effort.seconds)
            times = f", {sgd.seconds / effort.seconds:.2f}×" if reached else ""
            cells.append(f"{effort.seconds:.2f} s ({effort.steps:.0f}){times}" if reached else "–")
        rows.append((label, *cells))
    return "### Seconds, and steps, to SGD's final training loss\n\n" + table(("optimizer", *found), rows)


def draw(found: Efforts) -> Figure:
    """Seconds as bars from 0, a panel for each task; a candidate that does not come to the loss has none."""
    rows = math.ceil(len(found) / COLUMNS)
    figure = Figure(figsize=(3.2 * COLUMNS, 2.3 * rows), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes in panels.flat[len(found) :]:
        axes.set_axis_off()
    for axes, (task, by_label) in zip(panels.flat, found.items(), strict=False):
        labels = list(by_label)[::-1]
        seconds = [by_label[label].seconds for label in labels]
        known = [value if math.isfinite(value) else 0 for value in seconds]
        colors = ["tab:blue" if label.lower().startswith("eva") else "tab:grey" for label in labels]
        bars = axes.barh(labels, known, color=colors)
        said = [f" {value:.2g}" if math.isfinite(value) else " not reached" for value in seconds]
        axes.bar_label(bars, said, fontsize=7)
        axes.set(title=task, xlabel="seconds to SGD's loss", xlim=(0, 1.25 * max(known)))
        if axes not in panels[:, 0]:
            axes.set_yticklabels([])
    return figure
