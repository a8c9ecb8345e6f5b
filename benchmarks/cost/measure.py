"""Compiles and times the steps that a results file lacks."""

import argparse
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.common.results import Key, Row, read_rows, write_rows
from benchmarks.common.timing import Carrying, in_turn
from benchmarks.cost.cases import make_case
from benchmarks.cost.plans import KEYS, Group, Plans
from benchmarks.cost.program import Program
from benchmarks.cost.steps import OPTIMIZERS, UPDATES, Step, training_step, update_alone
from benchmarks.cost.targets import COMPILED, NO_PREFETCH, mesh_of, software_version


@dataclass
class Figures:
    """What a compiler says about a step; bytes are those of one device, None what it does not say.

    Attributes:
      compile_s: seconds that tracing and compilation took.
      flops: XLA's floating-point operations; a loop's body counts once.
      bytes_accessed: XLA's bytes accessed; a loop's body counts once, and copies to on-chip memory count too.
      hbm_bytes: traffic by `benchmarks.cost.program`, which states the convention.
      argument_bytes: what enters the step: parameters, state, batch.
      peak_bytes: arguments, results that replace none of them, and temporaries.
      launches: instructions that run; on a GPU each is a kernel, or a call of a library.
      collectives, collective_bytes: how many run and their payload.
    """

    compile_s: float
    flops: float | None
    bytes_accessed: float | None
    hbm_bytes: float
    argument_bytes: float
    peak_bytes: float
    launches: float
    collectives: float
    collective_bytes: float


# Milliseconds of a step: median and quartiles, and the median ratio to the step that is the measure, round by round.
TIMES = ("ms", "ms_low", "ms_high", "time_ratio")
COLUMNS = (*KEYS, *TIMES, *(field.name for field in fields(Figures)), "version")


def compile_step(step: Step, options: Mapping[str, str] | None = None) -> tuple[Any, Figures]:
    """The compiled step and its figures."""
    start = time.perf_counter()
    compiled = step.trace().lower().compile(dict(options) if options else None)
    seconds = time.perf_counter() - start
    # There is no cost analysis where a GPU's compiler runs without a GPU.
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    program = Program(compiled.as_text())
    moved = program.collectives().values()
    new = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return compiled, Figures(
        compile_s=round(seconds, 2),
        flops=cost.get("flops"),
        bytes_accessed=cost.get("bytes accessed"),
        hbm_bytes=program.hbm_bytes(),
        argument_bytes=memory.argument_size_in_bytes,
        peak_bytes=memory.argument_size_in_bytes + new + memory.temp_size_in_bytes,
        launches=program.launches(),
        collectives=sum(count for count, _ in moved),
        collective_bytes=sum(payload for _, payload in moved),
    )


def make_step(group: Group, optimizer: str, target: str, size: str) -> Step:
    device, case, layout, _ = group
    mesh = mesh_of(device, layout, target)
    if case in UPDATES:
        return update_alone(UPDATES[case], OPTIMIZERS[optimizer], mesh)
    chips = mesh.shape["data"] if mesh else 1
    return training_step(make_case(case, size, chips), OPTIMIZERS[optimizer], mesh, layout)


def time_in_turn(steps: Mapping[str, tuple[Any, Step]], repetitions: int) -> dict[str, Row]:
    """The times of compiled steps by name; the first is the measure."""
    repeated = {}
    for name, (compiled, step) in steps.items():
        arguments = step.make()
        repeated[name] = Carrying(compiled, arguments[: step.donated], *arguments[step.donated :])
    seconds = in_turn(repeated, repetitions)
    base, found = next(iter(seconds.values())), {}
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        ratio = statistics.median(mine / theirs for mine, theirs in zip(times, base, strict=True))
        values = (1000 * middle, 1000 * low, 1000 * high, ratio)
        found[name] = dict(zip(TIMES, (round(value, 4) for value in values), strict=True))
    return found


def measure(plans: Plans, path: Path, options: argparse.Namespace) -> None:
    """Measures what the results file lacks, and writes it after each step."""
    version, rows = software_version(options.target), read_rows(path, KEYS)
    missing: dict[Group, list[str]] = {}
    for group, optimizers in plans.items():
        stale = [o for o in optimizers if options.fresh or rows.get((*group, o), {}).get("version") != version]
        # Ratios of times are taken in one run, so that one missing optimizer means all of them again.
        missing[group] = list(optimizers) if stale and is_timed(group, options.target) else stale
    total = sum(map(len, missing.values()))
    with tqdm(total=total, desc=f"cost on {options.target}", unit="step", smoothing=0) as progress:
        for group, optimizers in missing.items():
            steps = {}
            for optimizer in optimizers:
                progress.set_postfix_str(" ".join((*group, optimizer)))
                step = make_step(group, optimizer, options.target, options.size)
                compiled, figures = compile_step(step, NO_PREFETCH if group[3] == "no" else None)
                key = (*group, optimizer)
                rows[key] = dict(zip(KEYS, key, strict=True)) | asdict(figures) | {"version": version}
                if is_timed(group, options.target):
                    steps[optimizer] = compiled, step
                else:
                    write(path, rows)
                progress.update()
            if steps:
                progress.set_postfix_str(" ".join((*group[:3], "timing")))
                for optimizer, times in time_in_turn(steps, options.repetitions).items():
                    rows[(*group, optimizer)] |= times
                write(path, rows)


def measure_baselines(path: Path, options: argparse.Namespace) -> None:
    """Adds the times of what runs only with an older JAX, as ratios to SGD with that JAX."""
    from benchmarks.cost.baselines import BASELINES, run_baseline

    rows = read_rows(path, KEYS)
    for name, packages in BASELINES.items():
        key, version = ("1 device", "mlp", "single", "yes", name), ", ".join(packages[:2])
        if options.fresh or rows.get(key, {}).get("version") != version:
            times = run_baseline(name, options.repetitions)
            rows[key] = dict(zip(KEYS, key, strict=True)) | times | {"version": version}
            write(path, rows)


def is_timed(group: Group, target: str) -> bool:
    """Whether steps run, on one device of this machine."""
    return target not in COMPILED and group[2] == "single"


def write(path: Path, rows: dict[Key, Row]) -> None:
    write_rows(path, COLUMNS, sorted(rows.values(), key=lambda row: [row[key] for key in KEYS[:-1]]))
