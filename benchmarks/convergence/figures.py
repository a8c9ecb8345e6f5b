"""The figures of the convergence benchmark: how many times better than its baseline each optimizer is on each task."""

import math
import statistics
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from matplotlib import colormaps, rc_context
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from benchmarks.convergence.optimizers import OPTIMIZERS

# As wide as a page, with letters of the size of its text.
STYLE: Any = {
    "figure.dpi": 160,
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
WIDTH = 7.5
PANELS = {  # by the name of its file: the figure of a summary, and what it is of
    "steps": ("fewer_steps", "Steps to the baseline's final training loss"),
    "seconds": ("less_time", "Seconds to the baseline's final training loss"),
    "training": ("lower_train", "Final training loss"),
    "validation": ("lower_validation", "Final validation loss"),
}
RANKS = {"1": "eva_adamw", "4": "eva_adamw@4", "16": "eva_adamw@16", "64": "eva_adamw@64", "all": "foof_adamw"}
Found = Mapping[tuple[str, str], Any]  # summaries by task and optimizer


def draw(found: Found) -> dict[str, Figure]:
    """The figures by name; that of ranks as far as they have been measured."""
    with rc_context(STYLE):
        drawn = {name: ratios(found, *panel) for name, panel in PANELS.items()} if found else {}
        tasks = [task for task, name in found if name == RANKS["16"]]
        return drawn | ({"rank": ranks(found, tasks)} if tasks else {})


def ratios(found: Found, figure_of: str, title: str) -> Figure:
    """Tasks against optimizers, in groups of those that have the same baseline."""
    tasks, names = (list(dict.fromkeys(key[place] for key in found)) for place in (0, 1))
    names.sort(key=lambda name: list(OPTIMIZERS).index(OPTIMIZERS[name].baseline))
    figure = Figure(figsize=(WIDTH, 1.3 + 0.22 * len(names)), layout="constrained")
    axes = figure.subplots()
    known = {key: getattr(summary, figure_of) for key, summary in found.items()}
    colors = [[known.get((task, name), math.nan) or math.nan for task in tasks] for name in names]
    axes.imshow(colors, cmap="RdBu", norm=LogNorm(1 / 4, 4), aspect="auto")
    axes.set_facecolor("lightgrey")
    for row, name in enumerate(names):
        for column, task in enumerate(tasks):
            value, text = known.get((task, name)), ""
            if value is None or math.isnan(value):
                axes.add_patch(
                    Rectangle((column - 0.5, row - 0.5), 1, 1, fc="white", ec="lightgrey", hatch="////", lw=0)
                )
            elif not math.isfinite(statistics.median(found[task, name].train)):
                text = "×"
            else:
                text = f"{value:.2f}".replace("inf", "∞") if value else "–"
            strong = value and math.isfinite(value) and not 1 / 2.2 < value < 2.2
            axes.text(column, row, text, color="white" if strong else "black", ha="center", va="center")
    bases = [OPTIMIZERS[name].baseline for name in names]
    for row, pair in enumerate(pairwise(bases)):
        if pair[0] != pair[1]:
            axes.axhline(row + 0.5, color="white", linewidth=3)
    axes.set_title(f"{title}: the baseline's ÷ the optimizer's\n– never reached, × diverged, hatched: not measured")
    axes.set_xticks(range(len(tasks)), tasks, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), [f"{n}  (against {b})" for n, b in zip(names, bases, strict=True)])
    axes.tick_params(length=0)
    return figure


def ranks(found: Found, tasks: list[str]) -> Figure:
    """How many fewer steps a sketch needs by its rank, and what its steps cost for that."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    colors = colormaps["tab20"](range(20))
    for axes in (left, right):
        axes.set_prop_cycle(color=[*colors[::2], *colors[1::2]])
    for task in tasks:
        here = {rank: found[task, name] for rank, name in RANKS.items() if (task, name) in found}
        fewer = [summary.fewer_steps for summary in here.values()]
        left.plot([list(RANKS).index(rank) for rank in here], fewer, marker="o")
        right.plot([summary.dearer for summary in here.values()], fewer, marker="o", label=task)
    first, limit = right.get_xlim()
    right.plot([first, limit], [first, limit], color="grey", linestyle=":")
    right.annotate("as many seconds as AdamW", (limit, 1), color="grey", ha="right")
    left.set(xlabel="rank", ylabel="AdamW's steps ÷ eva_adamw's, 0: not reached", ylim=(0, None))
    left.set_xticks(range(len(RANKS)), RANKS)
    right.set(xlabel="time of a step, ÷ AdamW's", xlim=(first, limit))
    right.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure
