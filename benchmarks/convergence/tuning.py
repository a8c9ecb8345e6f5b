"""Which rates and seeds are run for one optimizer on one task, as far as they are not on record yet."""

import math
from collections.abc import Callable, Sequence

from benchmarks.convergence.optimizers import BASELINES, OPTIMIZERS, Optimizer
from benchmarks.convergence.records import Key, Records
from benchmarks.convergence.tasks import Task
from benchmarks.convergence.training import Run, time_steps, train

FIRST_GRID = -3, 3  # numbers of its rates, counted from the centre of the task
PER_DECADE = 3
EXTENSIONS = 8  # at most; a best rate that is on an edge even then is reported as it is
TUNING_SEED, TEST_SEEDS = 0, (1, 2, 3)
MORE_SEEDS, OFTEN = (4, 5), ("adamw", "eva_adamw@16", "muon", "eva_muon@16")  # those that run on more seeds


def grid_rate(center: float, index: int) -> float:
    """The rate number `index`, counted from the centre, on the grid of `PER_DECADE` rates in a decade."""
    return float(f"{center * 10 ** (index / PER_DECADE):.3g}")


def tune(losses: dict[float, float], center: float, measure: Callable[[float], float], extensions: int) -> float:
    """The best rate of the grid, which grows while the best is on its edge. Rates that `losses` lacks are measured.

    NaN and infinity lose against every loss.
    """
    low, high = FIRST_GRID
    while True:
        rates = [grid_rate(center, index) for index in range(low, high)]
        losses |= {rate: measure(rate) for rate in rates if rate not in losses}
        best = min(rates, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)
        if best not in (rates[0], rates[-1]) or extensions == 0:
            return best
        low, high = (low - 1, high) if best == rates[0] else (low, high + 1)
        extensions -= 1


def measure(records: Records, task: Task, optimizer: Optimizer, steps: int, extensions: int) -> None:
    """Tunes and tests one optimizer on one task, but for the runs that are on record."""

    def run(role: str, rate: float, seed: int) -> Run:
        key = Key(task.name, optimizer.name, role, f"{rate:.3g}", seed)
        if key not in records.runs:
            records.add_run(key, train(task, optimizer, rate, seed, steps))
        return records.runs[key]

    center = dict(zip(BASELINES, task.rates, strict=True))[optimizer.baseline]
    tried = records.tuned(task.name, optimizer.name)
    rate = tune(tried, center, lambda rate: run("tune", rate, TUNING_SEED).final, extensions)
    for seed in TEST_SEEDS + (MORE_SEEDS if optimizer.name in OFTEN else ()):
        run("test", rate, seed)


def measure_times(records: Records, task: Task, optimizers: Sequence[Optimizer]) -> None:
    """The step times that are not on record, together with those of their baselines."""
    missing = [o for o in optimizers if (task.name, o.name) not in records.times]
    baselines = {o.baseline: OPTIMIZERS[o.baseline] for o in missing}
    seconds = time_steps(task, baselines | {o.name: o for o in missing}) if missing else {}
    for optimizer in missing:
        records.add_time(task.name, optimizer.name, seconds[optimizer.name], seconds[optimizer.baseline])
