"""What the input pipeline reads from: examples by number, some of them at once."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from examples.train.errors import UserError

DRAWS = 5  # uniform numbers of each example of a batch, for its augmentation
Batch = dict[str, np.ndarray]
Augmentation = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Source(Protocol):
    """Examples of training or validation."""

    def __len__(self) -> int: ...

    def load(self, rows: np.ndarray, draws: np.ndarray | None) -> Batch:
        """The examples of these numbers, changed by their draws, (len(rows), DRAWS), if there are any."""
        ...


@dataclass(frozen=True)
class Images:
    """Images in memory, (number, height, width, channels) of bytes, with a label each."""

    images: np.ndarray
    labels: np.ndarray
    augment: Augmentation | None = None

    def __len__(self) -> int:
        return len(self.images)

    def read(self, rows: np.ndarray) -> np.ndarray:
        return self.images[rows]

    def load(self, rows: np.ndarray, draws: np.ndarray | None) -> Batch:
        images = self.read(rows)
        if draws is not None and self.augment is not None:
            images = self.augment(images, draws)
        return {"inputs": images, "labels": self.labels[rows]}


def folder(path: str) -> Path:
    """The folder of a data set."""
    found = Path(path).expanduser()
    if not found.is_dir():
        raise UserError(f"{found}: expected a folder of data, found {'a file' if found.exists() else 'nothing'}.")
    return found


def find(place: Path, *names: str) -> Path:
    """The first of these files that a folder has."""
    for name in names:
        if (place / name).is_file():
            return place / name
    raise UserError(f"{place}: expected a file {' or '.join(names)}, found none of that name.")
