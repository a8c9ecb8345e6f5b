"""The figures of one compiled step, and the time that steps take when they run in turn."""

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import jax
from hlo import Program
from steps import Step

Key = TypeVar("Key")


@dataclass
class Figures:
    """What a compiler says about a step; bytes are those of one device, None what it does not say.

    Attributes:
      compile_s: seconds that compilation took.
      flops: XLA's floating-point operations; a loop's body counts once.
      bytes_accessed: XLA's bytes accessed; a loop's body counts once, and copies to on-chip memory count too.
      hbm_bytes: traffic by `benchmarks.hlo`, which states the convention.
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


@dataclass
class Times:
    """Milliseconds per step: median and quartiles, and the median ratio to the first step measured alongside."""

    ms: float
    ms_low: float
    ms_high: float
    time_ratio: float


def names(kind: type) -> list[str]:
    """The fields of `Figures` or `Times`."""
    return [field.name for field in fields(kind)]


def compile_step(step: Step, options: Mapping[str, str] | None = None) -> tuple[Any, Figures]:
    """The compiled step and its figures."""
    start = time.perf_counter()
    compiled = step.lower().compile(dict(options) if options else None)
    seconds = time.perf_counter() - start
    # There is no cost analysis where a GPU's compiler runs without a GPU.
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    program = Program.parse(compiled.as_text())
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


def time_in_turn(
    steps: Mapping[Key, tuple[Any, Step]], repetitions: int, tick: Callable[[], None] = lambda: None
) -> dict[Key, Times]:
    """Runs compiled steps in turn, so that what slows the machine slows all of them; the first is the measure.

    Each round has an order of its own: what one step leaves in caches and memory must not always meet the same other.
    """
    state: dict[Key, tuple[Any, ...]] = {}
    spent: dict[Key, list[float]] = {name: [] for name in steps}
    for name, (_, step) in steps.items():
        state[name] = step.make()
    for repetition in range(repetitions + 2):  # two to warm up
        for name in random.Random(repetition).sample(list(steps), len(steps)):
            compiled, step = steps[name]
            start = time.perf_counter()
            outputs = jax.block_until_ready(compiled(*state[name]))
            seconds = time.perf_counter() - start
            state[name] = (*outputs, *state[name][step.donated :])
            if repetition >= 2:
                spent[name].append(1000 * seconds)
        tick()
    base = next(iter(spent.values()))
    found = {}
    for name, times in spent.items():
        low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
        ratio = statistics.median(mine / theirs for mine, theirs in zip(times, base, strict=True))
        found[name] = Times(round(middle, 4), round(low, 4), round(high, 4), round(ratio, 4))
    return found
