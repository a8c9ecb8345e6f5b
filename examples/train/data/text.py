"""Any UTF-8 text, as bytes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from examples.train.data.source import Batch
from examples.train.errors import UserError, data_error


@dataclass(frozen=True)
class Text:
    """Windows of a text, each with the byte that follows it."""

    content: np.ndarray
    length: int

    def __len__(self) -> int:
        return (len(self.content) - 1) // self.length

    def load(self, rows: np.ndarray, draws: np.ndarray | None) -> Batch:
        starts = rows * self.length
        if draws is not None:  # anywhere between this window and the next
            starts = np.minimum(starts + (draws[:, 0] * self.length).astype(int), len(self.content) - self.length - 1)
        return {"inputs": self.content[starts[:, None] + np.arange(self.length + 1)]}


def load(path: str, length: int) -> tuple[Text, Text]:
    """A file, or all files *.txt of a folder in the order of their names: the last tenth of it is for validation."""
    place = Path(path).expanduser()
    files = sorted(place.rglob("*.txt")) if place.is_dir() else [place]
    if not files or not files[0].is_file():
        raise UserError(f"{place}: expected a text file, or a folder with files *.txt, found none.")
    content = np.frombuffer(b"\n".join(map(read, files)), np.uint8)
    cut = len(content) * 9 // 10
    if len(content) - cut <= length:
        raise data_error(place, f"more than {10 * length} bytes, for windows of {length}", f"{len(content)} bytes")
    return Text(content[:cut], length), Text(content[cut:], length)


def read(path: Path) -> bytes:
    content = path.read_bytes()
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise data_error(path, "UTF-8 text", f"the byte {content[error.start]:#04x} at {error.start}") from None
    return content
