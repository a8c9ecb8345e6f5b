"""Tables and plot of the cost benchmark, from its CSV files into docs/."""

import csv
from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.markdown import Markdown

DOCS = Path(__file__).resolve().parents[1] / "docs"
BEGIN, END = "<!-- tables: written by benchmarks/cost.py -->", "<!-- end of the tables -->"
BASE = "sgd"
GROUP = ("device", "case", "layout", "prefetch")
TARGETS = {
    "tpu": "On the TPU compiler",
    "h100": "On the compiler for an H100",
    "cpu": "On a CPU",
    "gpu": "On a GPU",
}
# Title, column of the CSV, its unit for SGD, and what one unit is.
TABLES = {
    "tpu": (
        ("HBM traffic of a step", "hbm_bytes", "MB", 1e6),
        ("Bytes accessed, as XLA counts them", "bytes_accessed", "MB", 1e6),
        ("Peak memory", "peak_bytes", "MB", 1e6),
        ("Payload of the collectives", "collective_bytes", "MB", 1e6),
        ("Number of collectives", "collectives", "", 1),
    ),
    "cpu": (
        ("Time of a step", "ms", "ms", 1),
        ("Flops", "flops", "G", 1e9),
        ("Arguments: parameters, state and batch", "argument_bytes", "MB", 1e6),
        ("Peak memory", "peak_bytes", "MB", 1e6),
        ("Payload of the collectives", "collective_bytes", "MB", 1e6),
        ("Number of collectives", "collectives", "", 1),
    ),
}
TABLES["gpu"] = TABLES["cpu"][:4]
TABLES["h100"] = (TABLES["tpu"][0], ("Kernels and calls of libraries", "launches", "", 1), *TABLES["tpu"][2:])

Row = dict[str, str]
Rows = dict[tuple[str, ...], dict[str, Row]]  # by device, case, layout and prefetching, then by optimizer

# The bars: what, figure, case, layout, optimizer, and at most how many times SGD's, on a v5e without prefetching.
BARS = (
    ("update alone, 72 kernels: HBM", "hbm_bytes", "update", "single", 1.21),
    ("update alone, 12 stacked layers: HBM", "hbm_bytes", "update-stacked", "single", 1.21),
    ("GPT block, d = 768, 1,024 tokens a chip, data parallel: HBM", "hbm_bytes", "gpt-1", "data", 1.01),
    ("the same: bytes accessed", "bytes_accessed", "gpt-1", "data", 1.02),
    ("the same on one chip: HBM", "hbm_bytes", "gpt-1", "single", 1.01),
    ("the same on one chip: bytes accessed", "bytes_accessed", "gpt-1", "single", 1.02),
    ("ResNet bottlenecks, data parallel: HBM", "hbm_bytes", "bottlenecks", "data", 1.05),
    ("ResNet-50, data parallel: HBM", "hbm_bytes", "resnet50", "data", 1.05),
    ("MLP, data parallel: payload", "collective_bytes", "mlp", "data", 1.005),
    ("MLP, FSDP: payload", "collective_bytes", "mlp", "fsdp", 1.005),
    ("MLP, tensor parallel: payload", "collective_bytes", "mlp", "tensor", 1.015),
    ("GPT block, data parallel: payload", "collective_bytes", "gpt-1", "data", 1.005),
    ("GPT block, FSDP: payload", "collective_bytes", "gpt-1", "fsdp", 1.005),
    ("GPT block, tensor parallel: payload", "collective_bytes", "gpt-1", "tensor", 1.015),
    ("ResNet bottlenecks, data parallel: payload", "collective_bytes", "bottlenecks", "data", 1.05),
    ("ResNet-50, data parallel: payload", "collective_bytes", "resnet50", "data", 1.05),
)


def write_report(results: Path) -> None:
    """Writes the tables into docs/cost.md, draws docs/cost.png, and prints the tables."""
    rows = {target: read(results / f"cost_{target}.csv") for target in TARGETS}
    parts = ["\n\n".join((f"### {TARGETS[name]}", *tables(name, rows[name]))) for name in rows if rows[name]]
    text = "\n\n".join(([bars(rows["tpu"])] if rows["tpu"] else []) + parts)
    page = DOCS / "cost.md"
    before, _, rest = page.read_text().partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}")
    draw(rows, DOCS / "cost.png")
    console = Console()
    console.print(Markdown(text))
    console.print(f"Tables: {page}, plot: {DOCS / 'cost.png'}")


def read(path: Path) -> Rows:
    """The rows of a results file, in groups of what is compared; none if there is no file."""
    groups: Rows = {}
    if path.exists():
        with path.open() as file:
            for row in csv.DictReader(file):
                groups.setdefault(tuple(row[key] for key in GROUP), {})[row["optimizer"]] = row
    return {key: group for key, group in groups.items() if BASE in group}


def ratio(group: dict[str, Row], optimizer: str, figure: str) -> float | None:
    """An optimizer's figure relative to SGD's, None where it was not measured. Times are compared step by step."""
    row = group.get(optimizer)
    if row is None or not row.get(figure) or not group[BASE].get(figure) or float(group[BASE][figure]) == 0:
        return None
    return float(row["time_ratio"]) if figure == "ms" else float(row[figure]) / float(group[BASE][figure])


def tables(target: str, rows: Rows) -> Iterator[str]:
    """What it was measured with, and a Markdown table for each figure: SGD's value, others' ratios to it."""
    yield "With " + "; ".join(sorted({row["version"] for group in rows.values() for row in group.values()})) + "."
    optimizers = list(dict.fromkeys(name for group in rows.values() for name in group if name != BASE))
    for title, figure, unit, scale in TABLES[target]:
        lines = []
        for key, group in rows.items():
            ratios = [ratio(group, optimizer, figure) for optimizer in optimizers]
            if any(value is not None for value in ratios):
                base = f"{float(group[BASE][figure]) / scale:,.5g} {unit}".rstrip()
                device, case, layout, prefetch = key
                layout += ", prefetching" if target == "tpu" and prefetch == "yes" else ""
                lines.append("| " + " | ".join((device, case, layout, base, *map(show, ratios))) + " |")
        if lines:
            header = f"| device | model | layout | {BASE} | " + " | ".join(optimizers) + " |"
            rule = "| --- | --- | --- | ---: |" + " ---: |" * len(optimizers)
            yield "\n".join((f"**{title}**", "", header, rule, *lines))


def show(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if value < 10 else f"{value:.1f}"


def bars(rows: Rows) -> str:
    """What was aimed at and what was reached, as far as it was measured."""
    lines = ["**Eva in front of SGD with momentum, ratio to SGD with momentum (v5e 2x2, without prefetching)**", ""]
    lines += ["| what | aim | measured | |", "| --- | ---: | ---: | --- |"]
    for what, figure, case, layout, most in BARS:
        value = ratio(rows.get(("v5e:2x2", case, layout, "no"), {BASE: {figure: ""}}), "eva+sgd", figure)
        if value is not None:
            lines.append(f"| {what} | ≤ {most} | {value:.4f} | {'reached' if value <= most else 'missed'} |")
    for layout in ("data", "single"):
        for prefetch in ("yes", "no"):
            group = rows.get(("v5e:2x2", "mlp", layout, prefetch), {BASE: {"bytes_accessed": ""}})
            adamw, eva = (ratio(group, name, "bytes_accessed") for name in ("adamw", "eva+sgd"))
            if adamw is not None and eva is not None:
                what, less = f"MLP, {layout}, prefetching: {prefetch}: bytes accessed below AdamW's", adamw - eva
                lines.append(f"| {what} | ≥ 0.15 | {less:.4f} | {'reached' if less >= 0.15 else 'missed'} |")
    return "\n".join(lines)


def draw(rows: dict[str, Rows], path: Path) -> None:
    """Bars for each optimizer: HBM traffic on a v5e and an H100, and times where there are any."""
    panels = []
    tpu = {key: group for key, group in rows["tpu"].items() if key[0] == "v5e:2x2" and key[3] == "no"}
    if tpu:
        panels.append(("HBM traffic, v5e", "hbm_bytes", {f"{key[1]}, {key[2]}": group for key, group in tpu.items()}))
    h100 = {key[1]: group for key, group in rows["h100"].items() if key[0] == "1 GPU"}
    if h100:
        panels.append(("HBM traffic, H100", "hbm_bytes", h100))
    for target in ("cpu", "gpu"):
        timed = {key[1]: group for key, group in rows[target].items() if group[BASE]["ms"]}
        if timed:
            panels.append((f"Time of a step, {target.upper()}", "ms", timed))
    if not panels:
        return
    most = max(len(groups) for _, _, groups in panels)
    figure = Figure(figsize=(6 * len(panels), 1.5 + 0.55 * most), layout="constrained")
    for axes, (title, name, groups) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        optimizers = [o for o in ("adamw", "eva+sgd", "eva_f+sgd", "eva_adamw") if any(o in g for g in groups.values())]
        height = 0.8 / len(optimizers)
        for index, optimizer in enumerate(optimizers):
            values = [ratio(group, optimizer, name) for group in groups.values()]
            places = [place + index * height for place in range(len(groups))]
            axes.barh(places, [value or 0 for value in values], height, label=optimizer)
        found = (ratio(group, optimizer, name) for group in groups.values() for optimizer in optimizers)
        low = min(0.9, *(value for value in found if value is not None))
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks([place + 0.4 - height / 2 for place in range(len(groups))], list(groups))
        axes.invert_yaxis()
        axes.set(title=title, xlabel="ratio to SGD with momentum", xlim=(low - 0.05, None))
        axes.legend(loc="upper right")
    figure.savefig(path, dpi=150)
