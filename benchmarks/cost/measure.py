"""Compiles and times the steps that a results file lacks."""

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.common.results import Key, Row, read_rows, write_rows
from benchmarks.common.timing import Carrying, in_turn
from benchmarks.cost.plans import KEYS
from benchmarks.cost.program import Program
from benchmarks.cost.steps import OPTIMIZERS, Step, make_step
from benchmarks.cost.targets import COMPILED, NO_PREFETCH, software_version

TIMES = ("ms", "time_ratio")  # the median of a step, and that of its ratio to SGD's, round by round
# What a compiler says about a step; bytes are those of one device. XLA's own flops and bytes accessed count the body of
# a loop once; traffic counts as `benchmarks.cost.program` says. The peak is of arguments (parameters, state, batch),
# results that replace none of them, and temporaries. On a GPU each launch is a kernel, or a call of a library.
# Traffic is that of a step that renews what is renewed now and then, and of one that does not.
FIGURES = ("flops", "bytes_accessed", "hbm_bytes", "between_bytes", "argument_bytes", "peak_bytes", "launches")
COLUMNS = (*KEYS, *TIMES, *FIGURES, "collectives", "collective_bytes", "version")
ROUNDS = 20


def compile_step(step: Step, options: Mapping[str, str] | None = None) -> tuple[Any, Row]:
    """The compiled step and its figures."""
    compiled = step.trace().lower().compile(dict(options) if options else None)
    # There is no cost analysis where a GPU's compiler runs without a GPU.
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    text = compiled.as_text()
    program = Program(text)
    moved = program.collectives().values()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return compiled, {
        "flops": cost.get("flops"),
        "bytes_accessed": cost.get("bytes accessed"),
        "hbm_bytes": program.hbm_bytes(),
        "between_bytes": Program(text, rare=False).hbm_bytes(),
        "argument_bytes": memory.argument_size_in_bytes,
        "peak_bytes": memory.argument_size_in_bytes + new + memory.temp_size_in_bytes,
        "launches": program.launches(),
        "collectives": sum(count for count, _ in moved),
        "collective_bytes": sum(payload for _, payload in moved),
    }


def time_in_turn(steps: Mapping[str, tuple[Any, Step]]) -> dict[str, Row]:
    """The times of compiled steps by name; the first is the measure. Where something has a period, that of a period."""
    repeated, seconds = {}, {}
    for name, (compiled, step) in steps.items():
        arguments = step.make()
        period = OPTIMIZERS[name].period
        repeated[name] = Carrying(compiled, arguments[: step.donated], *arguments[step.donated :], times=period)
    for name, times in in_turn(repeated, ROUNDS).items():
        seconds[name] = [turn / OPTIMIZERS[name].period for turn in times]
    base, found = next(iter(seconds.values())), {}
    for name, times in seconds.items():
        ratio = statistics.median(mine / theirs for mine, theirs in zip(times, base, strict=True))
        values = (round(1000 * statistics.median(times), 4), round(ratio, 4))
        found[name] = dict(zip(TIMES, values, strict=True))
    return found


def measure(keys: Iterable[Key], path: Path, target: str) -> None:
    """Measures what the results file lacks, and writes it after each step, or each group of steps that are timed."""
    version, rows = software_version(target), read_rows(path, KEYS)
    groups: dict[Key, list[str]] = {}
    for *group, optimizer in keys:
        groups.setdefault(tuple(group), ["sgd"]).append(optimizer)
    for group, optimizers in groups.items():
        stale = [name for name in dict.fromkeys(optimizers) if rows.get((*group, name), {}).get("version") != version]
        # Ratios of times are taken in one run, so that one missing optimizer means all of them again.
        timed, steps = target not in COMPILED and group[2] == "single", {}
        for optimizer in (progress := tqdm(dict.fromkeys(optimizers) if stale and timed else stale, unit="step")):
            key = (*group, optimizer)
            progress.set_description(f"{target}: {' '.join(key)}")
            step = make_step(key, target)
            compiled, figures = compile_step(step, NO_PREFETCH if group[3] == "no" else None)
            rows[key] = dict(zip(KEYS, key, strict=True)) | figures | {"version": version}
            if timed:
                steps[optimizer] = compiled, step
            else:
                write(path, rows)
        if steps:
            for optimizer, times in time_in_turn(steps).items():
                rows[(*group, optimizer)] |= times
            write(path, rows)


def write(path: Path, rows: dict[Key, Row]) -> None:
    write_rows(path, COLUMNS, sorted(rows.values(), key=lambda row: [row[key] for key in KEYS[:-1]]))
