"""Draws docs/opener.png: both sides of the README's first diff, eight seeds each. Run from the root of a clone."""

import re
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

SEEDS, WINDOW = 8, 10
diff = re.search(r"```diff\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
assert diff
figure = Figure(figsize=(7, 3.5), layout="constrained")
axes = figure.subplots()
for sign, name, color in (("-", "AdamW", "tab:gray"), ("+", "eva_adamw, rank 16", "tab:blue")):
    names: dict = {}
    exec("\n".join(line[1:] for line in diff[1].splitlines() if line[:1] in ("", " ", sign)), names)
    curves = np.array([names["train"](seed)[1] for seed in range(SEEDS)])
    kernel = np.ones(WINDOW) / WINDOW
    curves = np.array([np.convolve(curve, kernel, "valid") for curve in curves])
    steps = np.arange(curves.shape[1]) + WINDOW
    axes.fill_between(steps, curves.min(0), curves.max(0), color=color, alpha=0.2, linewidth=0)
    axes.plot(steps, np.median(curves, 0), color=color, label=name)
axes.set(xlabel="step", ylabel="loss on the mini-batch", yscale="log", title=f"Median and range of {SEEDS} seeds")
axes.grid(alpha=0.3)
axes.legend()
figure.savefig("docs/opener.png", dpi=130)
