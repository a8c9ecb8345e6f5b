"""What Eva adds to a step beside arithmetic: equations, arrays, instructions, and time to trace and compile.

docs/cost.md defines the figures. All are differences between a step with Eva and one of the same optimizer without it,
divided by the number of tapped layers; those of time are ratios.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
from jax.extend import core
from tqdm import tqdm

import eva_optax
from benchmarks.common.results import Key, read_rows, write_rows
from benchmarks.common.training import gradient_of
from benchmarks.cost.cases import Case, make_case
from benchmarks.cost.plans import ADDED_TO
from benchmarks.cost.program import Program
from benchmarks.cost.sharding import flat
from benchmarks.cost.steps import OPTIMIZERS, Step, training_step
from benchmarks.cost.targets import mesh_of, software_version

KEYS = ("case", "optimizer")
COUNTS, STAGES = ("gradient", "update", "step", "arrays", "entry", "kernels"), ("trace", "lower", "compile")
COLUMNS = (*KEYS, "layers", *COUNTS, *STAGES, "version")
REPETITIONS = 3


def count_equations(function: Callable[..., Any], *arguments: Any) -> int:
    """The equations of a function's jaxpr and of all that they hold."""
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    return sum(1 + sum(map(_count, _inner(equation.params))) for equation in jaxpr.eqns)


def _inner(params: Any) -> Iterator[core.Jaxpr]:
    kinds = core.Jaxpr, core.ClosedJaxpr
    for leaf in jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, kinds)):
        if isinstance(leaf, kinds):
            yield leaf.jaxpr if isinstance(leaf, core.ClosedJaxpr) else leaf


def tapped_layers(params: Any) -> tuple[int, int]:
    """How many probes there are, one for a stack of layers, and how many layers in all.

    The counter of a probe, called n, holds four numbers for each layer of its stack.
    """
    own = flat(eva_optax.strip(params))
    sizes = [leaf.size // 4 for path, leaf in flat(params).items() if path not in own and path[-1] == "n"]
    return len(sizes), sum(sizes)


def counts(case: Case, optimizer: str, step: Step) -> dict[str, float]:
    """The counts that need no compiler."""
    chosen = OPTIMIZERS[optimizer]
    params, state, *rest = step.arguments
    return {
        "gradient": count_equations(gradient_of(chosen.tap(case.model), case.loss), params, *rest),
        "update": count_equations(chosen.make().update, params, state, params),
        "step": count_equations(step.function, *step.arguments),
        "arrays": len(jax.tree.leaves((params, state))),
    }


def stages(step: Step) -> tuple[list[float], Any]:
    """Seconds of tracing, lowering and compiling a step anew, and the compiled step."""
    jax.clear_caches()
    marks, stage = [time.perf_counter()], step
    for name in STAGES:
        stage = getattr(stage, name)()
        marks.append(time.perf_counter())
    return [later - earlier for earlier, later in pairwise(marks)], stage


def overhead(case: Case, optimizer: str, mesh: Any, repetitions: int) -> dict[str, float]:
    """The figures of an optimizer against its baseline; no times without repetitions."""
    names = optimizer, ADDED_TO[optimizer]
    steps = [training_step(case, OPTIMIZERS[name], mesh) for name in names]
    both = [counts(case, name, step) for name, step in zip(names, steps, strict=True)]
    seconds: list[list[list[float]]] = [[], []]
    for turn in range(repetitions + 1):  # the first warms up
        for side, step in enumerate(steps):
            spent, compiled = stages(step)
            if turn == 0:
                program = Program(compiled.as_text())
                both[side] |= {"entry": program.entry_instructions(), "kernels": program.launches()}
            else:
                seconds[side].append(spent)
    probes, layers = tapped_layers(steps[0].arguments[0])
    shares = dict.fromkeys(COUNTS, probes) | {"kernels": layers}
    found = {"layers": layers} | {name: round((both[0][name] - both[1][name]) / shares[name], 2) for name in both[0]}
    found["arrays"] = int(found["arrays"])  # the few scalars that a state has once do not belong to any layer
    medians = [[statistics.median(times) for times in zip(*side, strict=True)] for side in seconds]
    return found | {name: round(a / b, 2) for name, a, b in zip(STAGES, *medians, strict=False)}


def measure(keys: Iterable[Key], path: Path, target: str) -> None:
    """Measures what the results file lacks, and writes it after each case."""
    version, rows = software_version(target), read_rows(path, KEYS)
    missing = [key for key in keys if rows.get(key, {}).get("version") != version]
    mesh = mesh_of("1 GPU" if target == "h100" else "1 device", "single", target)
    for key in (progress := tqdm(missing, desc=f"overhead on {target}", unit="step")):
        progress.set_postfix_str(" ".join(key))
        found = overhead(make_case(key[0]), key[1], mesh, REPETITIONS)
        rows[key] = dict(zip(KEYS, key, strict=True)) | found | {"version": version}
        write_rows(path, COLUMNS, rows.values())
