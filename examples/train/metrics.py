"""Where numbers go: lines on the terminal, a file of JSON lines, and TensorBoard."""

import json
import resource
import sys
from pathlib import Path
from typing import Any, Self

import jax
from tensorboardX import SummaryWriter


class Recorder:
    """Writes the numbers of a run from the first process; goes on behind the step that a checkpoint was made at."""

    def __init__(self, folder: Path, done: int):
        self.active = jax.process_index() == 0
        self.path = folder / "metrics.jsonl"
        self.history = [line for line in read(self.path) if line["step"] <= done]
        if not self.active:
            return
        kept = self.path.with_suffix(".partial")
        kept.write_text("".join(json.dumps(line) + "\n" for line in self.history))
        kept.replace(self.path)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=done + 1 if done else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.active:
            self.board.close()

    def write(self, step: int, part: str, values: dict[str, float], seconds: float) -> None:
        """The values of one part (train, validation) at one step."""
        self.history.append({"step": step, "part": part, "seconds": round(seconds, 3), **values})
        if not self.active:
            return
        with self.path.open("a") as file:
            file.write(json.dumps(self.history[-1]) + "\n")
        for name, value in values.items():
            self.board.add_scalar(f"{part}/{name}", value, step)
        self.board.flush()

    def say(self, line: str) -> None:
        if self.active:
            print(line, flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a run as far as they are whole."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:  # the run ended while it wrote
            break
    return found


def peak_memory() -> tuple[float, str]:
    """The most memory that was in use, in GiB: of the first device if it counts, else of the process."""
    counted = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in counted:
        return counted["peak_bytes_in_use"] / 2**30, "device"
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, "process"
