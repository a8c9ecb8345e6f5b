"""The tables of docs/cost.md, from the results."""

from collections.abc import Iterator
from pathlib import Path

from benchmarks.common.results import Key, Row, publish, read_rows, table
from benchmarks.cost.bars import BARS, OVERHEAD_BARS
from benchmarks.cost.plans import KEYS

TARGETS = {
    "tpu": "On the TPU compiler",
    "h100": "On the compiler for an H100",
    "cpu": "On a CPU",
    "gpu": "On a GPU",
}
# Title, column of the results, its unit for SGD, and what one unit is.
HBM, ACCESSED = (
    ("HBM traffic of a step", "hbm_bytes", "MB", 1e6),
    ("Bytes accessed, as XLA counts them", "bytes_accessed", "MB", 1e6),
)
PEAK, PAYLOAD = ("Peak memory", "peak_bytes", "MB", 1e6), ("Payload of the collectives", "collective_bytes", "MB", 1e6)
NUMBER, KERNELS = ("Number of collectives", "collectives", "", 1), ("Kernels and calls of libraries", "launches", "", 1)
TIME, FLOPS = ("Time of a step", "ms", "ms", 1), ("Flops", "flops", "G", 1e9)
ARGUMENTS = ("Arguments: parameters, state and batch", "argument_bytes", "MB", 1e6)
TABLES = {
    "tpu": (HBM, ACCESSED, PEAK, PAYLOAD, NUMBER),
    "h100": (HBM, KERNELS, PEAK, PAYLOAD, NUMBER),
    "cpu": (TIME, FLOPS, ARGUMENTS, PEAK, PAYLOAD, NUMBER),
    "gpu": (TIME, FLOPS, ARGUMENTS, PEAK),
}


def write_report(results: Path, page: Path) -> None:
    """Writes the tables into the page, and prints them."""
    rows = {target: read_rows(results / f"cost_{target}.csv", KEYS) for target in TARGETS}
    overhead = {target: read_rows(results / f"overhead_{target}.csv", ("case", "optimizer")) for target in TARGETS}
    parts = [bars(rows), overhead_bars(overhead)]
    parts += [
        "\n\n".join((f"### {title}", *tables(target, rows[target], overhead[target])))
        for target, title in TARGETS.items()
        if rows[target] or overhead[target]
    ]
    publish("\n\n".join(filter(None, parts)), page, "cost")


def bars(rows: dict[str, dict[Key, Row]]) -> str:
    """What was aimed at and what was reached, as far as it was measured."""
    values = [(bar, bar.value(rows[bar.target])) for bar in BARS]
    lines = [
        (bar.what, f"≤ {bar.most}", f"{value:.4f}", verdict(value, bar.most))
        for bar, value in values
        if value is not None
    ]
    title = "**Eva, ratio to SGD with momentum (v5e 2x2 without prefetching, where nothing else is said)**"
    return f"{title}\n\n{table(('what', 'aim', 'measured', ''), lines)}" if lines else ""


def overhead_bars(rows: dict[str, dict[Key, Row]]) -> str:
    """The same of what is added to a step beside arithmetic."""
    lines = []
    for bar in OVERHEAD_BARS:
        for case in bar.cases:
            value = rows[bar.target].get((case, bar.optimizer), {}).get(bar.figure)
            if value:
                line = bar.what, f"{case}, {bar.optimizer}", f"≤ {bar.most}", value, verdict(float(value), bar.most)
                lines.append(line)
    title = "**What is added to a step beside arithmetic**"
    return f"{title}\n\n{table(('what', 'where', 'aim', 'measured', ''), lines, 2)}" if lines else ""


def verdict(value: float, most: float) -> str:
    return "reached" if value <= most else "missed"


def ratio(rows: dict[Key, Row], key: Key, figure: str) -> float | None:
    """A figure relative to SGD's, None where it was not measured. Times are compared step by step."""
    row, base = rows.get(key, {}), rows[(*key[:-1], "sgd")]
    if not row.get(figure) or not float(base[figure] or 0):
        return None
    return float(row["time_ratio"]) if figure == "ms" else float(row[figure]) / float(base[figure])


def tables(target: str, rows: dict[Key, Row], overhead: dict[Key, Row]) -> Iterator[str]:
    """What it was measured with, and a table for each figure: SGD's value, others' ratios to it."""
    yield "With " + "; ".join(sorted({row["version"] for row in (*rows.values(), *overhead.values())})) + "."
    groups = list(dict.fromkeys(key[:-1] for key in rows if (*key[:-1], "sgd") in rows))
    optimizers = list(dict.fromkeys(key[-1] for key in rows if key[-1] != "sgd"))
    for title, figure, unit, scale in TABLES[target]:
        lines = []
        for group in groups:
            ratios = [ratio(rows, (*group, optimizer), figure) for optimizer in optimizers]
            if any(value is not None for value in ratios):
                device, case, layout, prefetch = group
                layout += ", prefetching" if target == "tpu" and prefetch == "yes" else ""
                base = f"{float(rows[(*group, 'sgd')][figure]) / scale:,.5g} {unit}".rstrip()
                lines.append((device, case, layout, base, *map(show, ratios)))
        if lines:
            yield f"**{title}**\n\n{table(('device', 'model', 'layout', 'sgd', *optimizers), lines, 3)}"
    if overhead:
        columns = [name for name in next(iter(overhead.values())) if name != "version"]
        lines = [[row[name] for name in columns] for row in overhead.values()]
        yield f"**More than without Eva, a tapped layer; times as ratios**\n\n{table(columns, lines, 2)}"


def show(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if value < 10 else f"{value:.1f}"
