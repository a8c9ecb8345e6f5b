"""A plot of what `diagnostics` found over training."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jax.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TITLES = {
    "nu": "step-size factor ν",
    "skipped": "skipped layers, in all",
    "untapped": "steps without vectors, in all",
    "cosine": "share of the gradient along the direction (cosine)",
    "explained": "share of the inputs' mean square in the directions of the sketch",
    "norm_a": "norm of the mean input ‖a‖",
    "norm_b": "norm of the summed cotangent ‖b‖",
    "norm": "norm of the means ‖V‖",
    "trace": "mean square of the inputs",
    "condition": "condition number",
    "residual": "residual of the inverse",
    "age": "steps since inverses and roots were made",
}
_OF_ALL_LAYERS = ("nu", "skipped", "untapped")
_MOST_IN_LEGEND = 10
_WIDE = 30  # a panel whose largest value is so many times its smallest has a logarithmic axis


def plot_diagnostics(history: Sequence[Mapping[str, ArrayLike]], steps: Sequence[int] | None = None) -> "Figure":
    """Plots a history of `diagnostics` over training: a panel for each quantity, a line for each layer.

    Beyond ten layers a bar of colours, from the first layer to the last, stands in the place of a legend. What is not
    of single layers and never changed, as ν = 1 and no layer skipped, is written above the panels.

    Args:
      history: what `diagnostics` returned at each logged step.
      steps: the numbers of these steps; 0, 1, 2, … by default.

    Returns:
      A matplotlib figure, to be shown or saved with ``figure.savefig("diagnostics.png")``.

    Raises:
      ValueError: if the history is empty, or `steps` has another length.
      ImportError: if matplotlib is not installed.

    Source: this library.

    Example:
      >>> import eva_optax
      >>> history = [{"nu": 1.0, "head/cosine": 0.5}, {"nu": 0.5, "head/cosine": 0.25}]
      >>> figure = eva_optax.plot_diagnostics(history, steps=[0, 10])
      >>> [axis.get_title() for axis in figure.axes]
      ['step-size factor ν', 'share of the gradient along the direction (cosine)']
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("eva_optax.plot_diagnostics needs matplotlib: pip install matplotlib") from error
    if not history:
        raise ValueError(
            "eva_optax.plot_diagnostics: history is empty. Give it what diagnostics returned, step by step."
        )
    steps = range(len(history)) if steps is None else steps
    if len(steps) != len(history):
        raise ValueError(f"eva_optax.plot_diagnostics: got {len(steps)} steps for a history of {len(history)}.")

    curves = {key: np.array([float(np.asarray(entry[key])) for entry in history]) for key in history[0]}
    panels: dict[str, list[str]] = {}
    for key in curves:
        panels.setdefault(key.rpartition("/")[2], []).append(key)
    constant = {
        quantity: float(curves[keys[0]][0])
        for quantity, keys in panels.items()
        if quantity in _OF_ALL_LAYERS and np.ptp([curves[key] for key in keys]) == 0
    }
    drawn = {quantity: keys for quantity, keys in panels.items() if quantity not in constant} or panels

    figure = Figure(figsize=(9, 0.4 + 2.4 * len(drawn)), layout="constrained")
    if drawn is not panels and constant:
        said = (f"{_TITLES[quantity]}: {value:g}" for quantity, value in constant.items())
        figure.suptitle("   ·   ".join(said), fontsize="small")
    rows = figure.subplots(len(drawn), squeeze=False, sharex=True)[:, 0]
    for axes, (quantity, keys) in zip(rows, drawn.items(), strict=True):
        _draw(axes, steps, {key: curves[key] for key in keys})
        axes.set_title(_TITLES.get(quantity, quantity), fontsize="medium")
    rows[-1].set_xlabel("step")
    return figure


def _draw(axes: "Axes", steps: Sequence[int], curves: Mapping[str, np.ndarray]) -> None:
    """A line for each layer, from dark to light in their order, and what tells them apart."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, NoNorm

    colors = colormaps["viridis"](np.linspace(0, 0.9, len(curves)))
    for (key, curve), color in zip(curves.items(), colors, strict=True):
        axes.plot(steps, curve, color=color, label=key, linewidth=1)
    values = np.array(list(curves.values()))
    if values.min() > 0 and values.max() > _WIDE * values.min():
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    names = [key.rpartition("/")[0] for key in curves]
    if 1 < len(names) <= _MOST_IN_LEGEND:
        axes.legend(names, fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    elif len(names) > _MOST_IN_LEGEND:
        ticks = np.linspace(0, len(names) - 1, 5).round().astype(int)
        bar = axes.figure.colorbar(ScalarMappable(NoNorm(), ListedColormap(colors)), ax=axes, ticks=ticks, pad=0.01)
        bar.ax.set_yticklabels([names[tick] for tick in ticks], fontsize="x-small")
        bar.ax.invert_yaxis()  # the first layer on top, as in a legend
