"""The results of the convergence benchmark on disk: a row for each run, appended as soon as it ends."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from training import Run

COLUMNS = ("task", "optimizer", "role", "rate", "seed", "steps", "train_loss", "validation_loss", "curve")


class Key(NamedTuple):
    """Which run it is. The role is "tune", on the seed that the rate is chosen on, or "test", on the fresh ones."""

    task: str
    optimizer: str
    role: str
    rate: str  # as written, so that keys are equal after reading
    seed: int


class Records:
    """Runs by key, read from a directory and appended to it. Curves are kept for the test runs alone."""

    def __init__(self, directory: Path) -> None:
        self.runs: dict[Key, Run] = {}
        self.times: dict[tuple[str, str], tuple[float, float]] = {}
        self._runs, self._times = directory / "convergence.csv", directory / "step_times.csv"
        for row in _rows(self._runs):
            curve = [float(loss) for loss in row["curve"].split()] or [float(row["train_loss"])]
            key = Key(row["task"], row["optimizer"], row["role"], row["rate"], int(row["seed"]))
            self.runs[key] = Run(int(row["steps"]), curve, float(row["validation_loss"]))
        for row in _rows(self._times):
            times = float(row["seconds"]), float(row["baseline_seconds"])
            self.times[row["task"], row["optimizer"]] = times

    def add_run(self, key: Key, run: Run) -> None:
        curve = " ".join(f"{loss:.5g}" for loss in run.curve) if key.role == "test" else ""
        _append(self._runs, COLUMNS, (*key, run.steps, f"{run.final:.6g}", f"{run.validation:.6g}", curve))
        self.runs[key] = run

    def add_time(self, task: str, optimizer: str, seconds: float, baseline_seconds: float) -> None:
        columns = ("task", "optimizer", "seconds", "baseline_seconds")
        _append(self._times, columns, (task, optimizer, f"{seconds:.4g}", f"{baseline_seconds:.4g}"))
        self.times[task, optimizer] = seconds, baseline_seconds

    def tuned(self, task: str, optimizer: str) -> dict[float, float]:
        """The final training loss at each rate that was tried."""
        return {
            float(key.rate): run.final
            for key, run in self.runs.items()
            if (key.task, key.optimizer, key.role) == (task, optimizer, "tune")
        }

    def tested_rate(self, task: str, optimizer: str) -> float:
        return next(float(k.rate) for k in self.runs if (k.task, k.optimizer, k.role) == (task, optimizer, "test"))

    def tests(self, task: str, optimizer: str) -> dict[int, Run]:
        """The runs on fresh seeds, by seed."""
        wanted = task, optimizer, "test"
        return {key.seed: run for key, run in self.runs.items() if (key.task, key.optimizer, key.role) == wanted}


def best_rate(losses: dict[float, float]) -> float:
    """The rate of the lowest loss; NaN and infinity lose against everything."""
    return min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _append(path: Path, columns: Sequence[str], row: Sequence[object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:  # written at once when it closes, so that rows are whole
        csv.writer(file, lineterminator="\n").writerows([columns, row] if new else [row])
