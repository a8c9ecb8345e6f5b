"""The tables of docs/cost.md, from the results."""

from collections.abc import Iterator
from pathlib import Path

from benchmarks.common.results import Key, Row, publish, read_rows, table
from benchmarks.cost.bars import BARS, OVERHEAD_BARS
from benchmarks.cost.plans import KEYS

FIGURES = {  # the title of its table, the unit of SGD's value, and how large that is
    "ms": ("Time of a step", "ms", 1),
    "flops": ("Flops", "G", 1e9),
    "hbm_bytes": ("HBM traffic of a step", "MB", 1e6),
    "between_bytes": ("HBM traffic of a step that renews nothing", "MB", 1e6),
    "bytes_accessed": ("Bytes accessed, as XLA counts them", "MB", 1e6),
    "launches": ("Kernels and calls of libraries", "", 1),
    "argument_bytes": ("Arguments: parameters, state and batch", "MB", 1e6),
    "peak_bytes": ("Peak memory", "MB", 1e6),
    "collective_bytes": ("Payload of the collectives", "MB", 1e6),
    "collectives": ("Number of collectives", "", 1),
}
TARGETS = {  # the title of its part of the page, and the figures there, in the order above
    "tpu": ("On the TPU compiler", "hbm_bytes between_bytes bytes_accessed peak_bytes collective_bytes collectives"),
    "h100": ("On the compiler for an H100", "hbm_bytes between_bytes launches peak_bytes collective_bytes collectives"),
    "cpu": ("On a CPU", "ms flops argument_bytes peak_bytes collective_bytes collectives"),
    "gpu": ("On a GPU", "ms hbm_bytes between_bytes launches peak_bytes"),  # XLA counts no flops of libraries
}


def write_report(results: Path, page: Path) -> None:
    """Writes the tables into the page, and prints them."""
    rows = {target: read_rows(results / f"cost_{target}.csv", KEYS) for target in TARGETS}
    overhead = {target: read_rows(results / f"overhead_{target}.csv", ("case", "optimizer")) for target in TARGETS}
    parts = [bars(rows), overhead_bars(overhead)]
    parts += ["\n\n".join(tables(target, rows[target], overhead[target])) for target in TARGETS]
    publish("\n\n".join(filter(None, parts)), page, "cost")


def bars(rows: dict[str, dict[Key, Row]]) -> str:
    """What was aimed at and what was reached, as far as it was measured."""
    values = [(bar, bar.value(rows[bar.target])) for bar in BARS]
    lines = [(bar.what, *aim(bar.most, value, ".4f")) for bar, value in values if value is not None]
    title = "**Eva, ratio to SGD with momentum (v5e 2x2 without prefetching, where nothing else is said)**"
    return f"{title}\n\n{table(('what', 'aim', 'measured', ''), lines)}" if lines else ""


def overhead_bars(rows: dict[str, dict[Key, Row]]) -> str:
    """The same of what is added to a step beside arithmetic."""
    lines = []
    for bar in OVERHEAD_BARS:
        for case in bar.cases:
            if value := rows[bar.target].get((case, bar.optimizer), {}).get(bar.figure):
                lines.append((bar.what, f"{case}, {bar.optimizer}", *aim(bar.most, float(value), "g")))
    title = "**What is added to a step beside arithmetic**"
    return f"{title}\n\n{table(('what', 'where', 'aim', 'measured', ''), lines, 2)}" if lines else ""


def aim(most: float, value: float, form: str) -> tuple[str, str, str]:
    return f"≤ {most}", f"{value:{form}}", "reached" if value <= most else "missed"


def tables(target: str, rows: dict[Key, Row], overhead: dict[Key, Row]) -> Iterator[str]:
    """A title, what it was measured with, and a table for each figure: SGD's value, others' ratios to it."""
    if not rows and not overhead:
        return
    title, figures = TARGETS[target]
    yield f"### {title}"
    yield "With " + "; ".join(sorted({row["version"] for row in (*rows.values(), *overhead.values())})) + "."
    groups = list(dict.fromkeys(key[:-1] for key in rows if (*key[:-1], "sgd") in rows))
    optimizers = list(dict.fromkeys(key[-1] for key in rows if key[-1] != "sgd"))
    for figure in figures.split():
        title, unit, scale = FIGURES[figure]
        lines = []
        for group in groups:
            ratios = [ratio(rows, (*group, optimizer), figure) for optimizer in optimizers]
            if any(ratios):
                device, case, layout, prefetch = group
                layout += ", prefetching" if target == "tpu" and prefetch == "yes" else ""
                base = f"{measure_of(rows, group, figure) / scale:,.5g} {unit}".rstrip()
                lines.append((device, case, layout, base, *ratios))
        if lines:
            yield f"**{title}**\n\n{table(('device', 'model', 'layout', 'sgd', *optimizers), lines, 3)}"
    if overhead:
        columns = [name for name in next(iter(overhead.values())) if name != "version"]
        lines = [[row[name] for name in columns] for row in overhead.values()]
        yield f"**More than without Eva, a tapped layer; times as ratios**\n\n{table(columns, lines, 2)}"


def measure_of(rows: dict[Key, Row], group: Key, figure: str) -> float:
    """SGD's value of a figure, which renews nothing in any step; 0 where it was not measured."""
    return float(rows[(*group, "sgd")][{"between_bytes": "hbm_bytes"}.get(figure, figure)] or 0)


def ratio(rows: dict[Key, Row], key: Key, figure: str) -> str:
    """A figure relative to SGD's, nothing where it was not measured. Times are compared step by step."""
    row, base = rows.get(key, {}), measure_of(rows, key[:-1], figure)
    if not row.get(figure) or not base:
        return ""
    value = float(row["time_ratio"]) if figure == "ms" else float(row[figure]) / base
    return f"{value:.4f}" if value < 10 else f"{value:.1f}"
