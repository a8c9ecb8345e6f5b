"""The runs of the convergence benchmark on disk: a row for each, appended as soon as it ends."""

from pathlib import Path
from typing import NamedTuple

from benchmarks.common.results import Row, append_row, read_rows
from benchmarks.convergence.training import Run


class Key(NamedTuple):
    """Which run it is. The role is "tune", on the seed that the rate is chosen on, or "test", on the fresh ones."""

    task: str
    optimizer: str
    role: str
    rate: str  # as written, so that keys are equal after reading
    seed: int


COLUMNS = (*Key._fields, "steps", "train_loss", "validation_loss", "curve", "validation_curve")
KINDS = ("curve", "train_loss"), ("validation_curve", "validation_loss")
TIMES = ("task", "optimizer", "seconds", "baseline_seconds")


def _losses(row: Row, curve: str, final: str) -> list[float]:
    """A curve, or the final loss alone where there is none."""
    return [float(loss) for loss in row[curve].split()] or [float(row[final])]


class Records:
    """Runs and step times by key, read from a directory and appended to it; curves of the test runs alone."""

    def __init__(self, directory: Path) -> None:
        self.runs: dict[Key, Run] = {}
        self.times: dict[tuple[str, str], tuple[float, float]] = {}
        self._runs, self._times = directory / "convergence.csv", directory / "step_times.csv"
        for row in read_rows(self._runs, Key._fields).values():
            key = Key(row["task"], row["optimizer"], row["role"], row["rate"], int(row["seed"]))
            self.runs[key] = Run(int(row["steps"]), *(_losses(row, *kind) for kind in KINDS))
        for (task, optimizer), row in read_rows(self._times, TIMES[:2]).items():
            self.times[task, optimizer] = float(row["seconds"]), float(row["baseline_seconds"])

    def add_run(self, key: Key, run: Run) -> None:
        finals = f"{run.final:.6g}", f"{run.validation[-1]:.6g}"
        curves = (" ".join(f"{loss:.5g}" for loss in curve) if key.role == "test" else "" for curve in run[1:])
        append_row(self._runs, COLUMNS, (*key, run.steps, *finals, *curves))
        self.runs[key] = run

    def add_time(self, task: str, optimizer: str, seconds: float, baseline_seconds: float) -> None:
        append_row(self._times, TIMES, (task, optimizer, f"{seconds:.4g}", f"{baseline_seconds:.4g}"))
        self.times[task, optimizer] = seconds, baseline_seconds

    def tuned(self, task: str, optimizer: str) -> dict[float, float]:
        """The final training loss at each rate that was tried."""
        wanted = task, optimizer, "tune"
        return {float(key.rate): run.final for key, run in self.runs.items() if key[:3] == wanted}

    def tests(self, task: str, optimizer: str) -> dict[int, Run]:
        """The runs on fresh seeds, by seed."""
        wanted = task, optimizer, "test"
        return {key.seed: run for key, run in self.runs.items() if key[:3] == wanted}

    def tested_rate(self, task: str, optimizer: str) -> float:
        return next(float(key.rate) for key in self.runs if key[:3] == (task, optimizer, "test"))
