"""scikit-learn's handwritten digits in the place of any data set: upscaled images, or text."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from examples.train.data.augment import pad_crop
from examples.train.data.source import Images
from examples.train.data.text import Text


@dataclass(frozen=True)
class Upscaled(Images):
    """Images of 8×8 pixels that are upscaled when they are read."""

    side: int = 8
    channels: int = 1

    def read(self, rows: np.ndarray) -> np.ndarray:
        nearest = np.arange(self.side) * 8 // self.side
        larger = self.images[rows][:, nearest][:, :, nearest, None]
        return np.repeat(larger, self.channels, -1)


def load(side: int, channels: int) -> tuple[Images, Images]:
    """80% and 20% of the 1,797 images, with the same share of every digit."""
    shift = pad_crop if side >= 28 else None  # four pixels of 28 are half of one of the 8
    training, validation = split()
    return (
        Upscaled(*training, augment=shift, side=side, channels=channels),
        Upscaled(*validation, side=side, channels=channels),
    )


def load_text(length: int) -> tuple[Text, Text]:
    """The same images as text: the digit, then eight lines of the 17 shades."""
    shades = np.frombuffer(b" .,:;-~=+*ox#%&$@", np.uint8)
    texts = []
    for images, labels in split():
        lines = np.full((len(images), 8, 9), ord("\n"), np.uint8)
        lines[:, :, :8] = shades[images // 15]
        header = np.stack([labels + ord("0"), np.full_like(labels, ord("\n"))], 1).astype(np.uint8)
        texts.append(Text(np.concatenate([header, lines.reshape(len(images), -1)], 1).ravel(), length))
    return texts[0], texts[1]


def split() -> list[tuple[np.ndarray, np.ndarray]]:
    digits: Any = load_digits()
    images, labels = (digits.images * 15).astype(np.uint8), digits.target.astype(np.int32)
    parts: Any = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    return [(parts[0], parts[2]), (parts[1], parts[3])]
