"""The one style of the plots: a colour for each baseline, dashed without Eva and solid with it, bands over seeds."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Told apart with every kind of colour vision (Okabe and Ito).
COLORS = {"SGD": "#0072B2", "AdamW": "#D55E00", "Muon": "#009E73", "Adam": "#CC79A7"}


def panels(number: int) -> tuple[Figure, list[Axes]]:
    """A figure with panels side by side."""
    figure = Figure(figsize=(5.5 * number, 4), layout="constrained")
    return figure, list(figure.subplots(1, number, squeeze=False)[0])


def draw(axes: Axes, steps: np.ndarray, curves: np.ndarray, baseline: str, line: str, label: str) -> None:
    """The median of the curves of all seeds, (seeds, steps), and between the lowest and the highest a band."""
    curves = np.where(np.isnan(curves), np.inf, curves)  # a seed that diverged is worse than all others
    axes.plot(steps, np.median(curves, 0), line, color=COLORS[baseline], label=label)
    if len(curves) > 1:
        axes.fill_between(steps, curves.min(0), curves.max(0), color=COLORS[baseline], alpha=0.15, linewidth=0)


def save(figure: Figure, path: Path) -> None:
    """Finishes all panels and writes the figure; its directory is made."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", edgecolor="none", framealpha=0.7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
