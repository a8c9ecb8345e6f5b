"""What Eva adds to a step beside arithmetic: equations, arrays, instructions, and time to trace and compile.

A step with Eva is compared with one of the same optimizer without it, and the difference divided by the number of
tapped layers, so that what is done once a step is shared out among them. A stack of layers counts as one, but for the
kernels, which run for each of its layers:

  gradient    equations of the gradient alone, tapped against untapped
  update      equations of the update alone: the optimizer with Eva against the one without
  step        equations of the whole step: gradient, update, new parameters
  arrays      leaves of parameters and state, each of which enters and leaves the step; whole ones
  entry       instructions of the ENTRY computation of the optimized program, but for names of buffers: parameters,
              constants, tuples and their elements, bitcasts
  kernels     instructions that run, those of loops as often as they do; on a GPU kernels and calls of libraries
  trace, lower, compile
              seconds, as ratios: the median of several measurements in turn, caches cleared before each

Equations are those of `jax.make_jaxpr`, in every jaxpr: one that holds others (jit, scan, a custom derivative) counts
as one, and each of those that it holds counts too, a loop's body once. So counted, SGD with momentum updates a Dense
layer with a bias in 6 equations, AdamW in 34, and the gradient takes 14 behind tanh.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
from jax.extend import core
from tqdm import tqdm

import eva_optax
from benchmarks.common.results import read_rows, write_rows
from benchmarks.common.training import gradient_of
from benchmarks.cost.cases import CASES, make_case
from benchmarks.cost.models import Case
from benchmarks.cost.plans import refuse_unknown
from benchmarks.cost.program import Program
from benchmarks.cost.sharding import flat
from benchmarks.cost.steps import OPTIMIZERS, Step, training_step
from benchmarks.cost.targets import mesh_of, software_version

BASELINES = {"eva+sgd": "sgd", "eva_adamw": "adamw"}  # with Eva, and the same without
DEEP = ("mlp-20", "resnet50", "vit", "gpt-12", "gpt-12-scan")  # enough layers to outweigh what a step costs once
KEYS = ("case", "optimizer")
COUNTS, STAGES = ("gradient", "update", "step", "arrays", "entry", "kernels"), ("trace", "lower", "compile")
COLUMNS = (*KEYS, "layers", *COUNTS, *STAGES, "version")


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
    own, sizes = flat(eva_optax.strip(params)), {}
    for path, leaf in flat(params).items():
        if path not in own and path[-1] == "n":
            sizes[path[:-1]] = leaf.size // 4
    return len(sizes), sum(sizes.values())


def counts(case: Case, optimizer: str, step: Step) -> dict[str, float]:
    """The counts that need no compiler."""
    chosen = OPTIMIZERS[optimizer]
    params, state, *rest = step.arguments
    model = eva_optax.tap(case.model) if chosen.tapped else case.model
    return {
        "gradient": count_equations(gradient_of(model, case.loss), params, *rest),
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
    names = optimizer, BASELINES[optimizer]
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


def measure_overhead(path: Path, options: argparse.Namespace) -> None:
    """Measures what the results file lacks, and writes it after each case.

    Raises:
      SystemExit: for a case or an optimizer that is not compared here.
    """
    refuse_unknown("case", options.cases, CASES)
    refuse_unknown("optimizer", options.optimizers, BASELINES)
    version, rows = software_version(options.target), read_rows(path, KEYS)
    keys = [(case, name) for case in options.cases or DEEP for name in options.optimizers or BASELINES]
    missing = [key for key in keys if options.fresh or rows.get(key, {}).get("version") != version]
    mesh = mesh_of("1 GPU" if options.target == "h100" else "1 device", "single", options.target)
    for key in (progress := tqdm(missing, desc=f"overhead on {options.target}", unit="step")):
        progress.set_postfix_str(" ".join(key))
        found = overhead(make_case(key[0], options.size), key[1], mesh, options.repetitions)
        rows[key] = dict(zip(KEYS, key, strict=True)) | found | {"version": version}
        write_rows(path, COLUMNS, rows.values())
