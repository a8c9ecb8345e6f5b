"""How fast and how far SGD, AdamW and Muon train with and without each member of the family.

    python benchmarks/convergence.py                              # about an hour on one core; resumes where it stopped
    python benchmarks/convergence.py --small                      # a quick look
    python benchmarks/convergence.py --tasks cnn --optimizers muon eva_muon
    python benchmarks/convergence.py --report                     # only the tables and the plot, from the CSV files

docs/convergence.md describes the method and says what was found. Results are appended run by run to `convergence.csv`
and `step_times.csv`; runs that are there are not repeated. Processes with different tasks may share these files.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import report
from optimizers import OPTIMIZERS, Optimizer
from records import Key, Records, best_rate
from tasks import TASKS, Task
from tqdm import tqdm
from training import Run, forget_programs, time_steps, train

RATES = 6
PER_DECADE = 3
EXTENSIONS = 8  # at most; a best rate that is on an edge even then is reported as it is
TUNING_SEED, TEST_SEEDS = 0, (1, 2, 3)
SMALL = ("sgd", "adamw", "muon", "eva+sgd", "eva_adamw", "eva_muon")
ROOT = Path(__file__).resolve().parents[1]
Train = Callable[[float, int], Run]  # from a rate and a seed


def grid_rate(center: float, index: int) -> float:
    """The rate number `index`, counted from the centre, on the grid of `PER_DECADE` rates in a decade."""
    return float(f"{center * 10 ** (index / PER_DECADE):.3g}")


def tune(losses: dict[float, float], center: float, measure: Callable[[float], float], extensions: int) -> float:
    """The best rate of the grid, which grows while the best is on its edge. Rates that `losses` lacks are measured."""
    low, high = -(RATES // 2), RATES - RATES // 2 - 1
    for extension in range(extensions + 1):
        for index in range(low, high + 1):
            rate = grid_rate(center, index)
            if rate not in losses:
                losses[rate] = measure(rate)
        best = best_rate({rate: losses[rate] for rate in (grid_rate(center, i) for i in range(low, high + 1))})
        if best not in (grid_rate(center, low), grid_rate(center, high)) or extension == extensions:
            return best
        low, high = (low - 1, high) if best == grid_rate(center, low) else (low, high + 1)
    raise AssertionError("unreachable")


def measure(records: Records, task: Task, optimizer: Optimizer, steps: int, extensions: int, bar: Any) -> None:
    """Tunes and tests one optimizer on one task, but for the runs that are on record."""

    def run(role: str, rate: float, seed: int) -> Run:
        key = Key(task.name, optimizer.name, role, f"{rate:.3g}", seed)
        if key not in records.runs:
            bar.set_postfix_str(f"{task.name}, {optimizer.name}, {role} {rate:.3g}", refresh=False)
            records.add_run(key, train(task, optimizer, rate, seed, steps, bar.update))
        return records.runs[key]

    def tuning_loss(rate: float) -> float:
        if len(losses) >= RATES:
            bar.total += steps
        return run("tune", rate, TUNING_SEED).final

    losses = records.tuned(task.name, optimizer.name)
    rate = tune(losses, task.rates[optimizer.baseline], tuning_loss, extensions)
    for seed in TEST_SEEDS:
        run("test", rate, seed)


def measure_times(records: Records, task: Task, optimizers: Sequence[Optimizer]) -> None:
    """The step times that are not on record, together with those of their baselines."""
    missing = [o for o in optimizers if (task.name, o.name) not in records.times]
    baselines = {o.baseline: OPTIMIZERS[o.baseline] for o in missing}
    seconds = time_steps(task, list({o.name: o for o in (*baselines.values(), *missing)}.values())) if missing else {}
    for optimizer in missing:
        records.add_time(task.name, optimizer.name, seconds[optimizer.name], seconds[optimizer.baseline])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="SGD, AdamW and Muon with and without each member of the family.")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="default: all")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, help="default: all")
    parser.add_argument(
        "--results",
        type=Path,
        help="directory of the CSV files; default: benchmarks/results, or results/convergence if small",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help="directory of the plot and the tables; default: docs, or results/convergence if small",
    )
    parser.add_argument("--small", action="store_true", help="a few steps of six optimizers on the smallest task")
    parser.add_argument("--report", action="store_true", help="train nothing; tables and plot from the CSV files")
    options = parser.parse_args(arguments)

    small = Path("results", "convergence")
    tasks = [TASKS[name] for name in options.tasks or (["diabetes"] if options.small else TASKS)]
    optimizers = [OPTIMIZERS[name] for name in options.optimizers or (SMALL if options.small else OPTIMIZERS)]
    directory = options.results or (small if options.small else ROOT / "benchmarks" / "results")
    output = options.output or (small if options.small else ROOT / "docs")
    records = Records(directory)

    if not options.report:
        lengths = {task.name: 40 if options.small else task.steps for task in tasks}
        pairs = [(task.name, optimizer.name) for task in tasks for optimizer in optimizers]
        rates = {pair: max(RATES, len(records.tuned(*pair))) for pair in pairs}
        total = sum(lengths[pair[0]] * (rates[pair] + len(TEST_SEEDS)) for pair in pairs)
        done = sum(lengths[key.task] for key in records.runs if key[:2] in rates)
        with tqdm(total=total, initial=done, unit="step", smoothing=0.02) as bar:
            for task in tasks:
                for optimizer in optimizers:
                    measure(records, task, optimizer, lengths[task.name], 0 if options.small else EXTENSIONS, bar)
                measure_times(records, task, optimizers)
                forget_programs()  # hundreds of them: the process would run out of memory mappings
    report.write(records, output)


if __name__ == "__main__":
    main()
