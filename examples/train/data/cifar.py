"""CIFAR-10 and CIFAR-100 in their binary version: records of labels, then red, green and blue planes of 32×32 bytes."""

from pathlib import Path

import numpy as np

from examples.train.data.augment import pad_crop_flip
from examples.train.data.source import Images, find, folder
from examples.train.errors import data_error

PIXELS = 3 * 32 * 32


def load(path: str, classes: int) -> tuple[Images, Images]:
    """Training and validation images of a folder, or of the folder in it that the archive unpacks to."""
    place = folder(path)
    inside = place / ("cifar-10-batches-bin" if classes == 10 else "cifar-100-binary")
    place = inside if inside.is_dir() else place
    training = [f"data_batch_{number}.bin" for number in range(1, 6)] if classes == 10 else ["train.bin"]
    images, labels = zip(*(read(find(place, name), classes) for name in training), strict=True)
    test_name = "test_batch.bin" if classes == 10 else "test.bin"
    return (
        Images(np.concatenate(images), np.concatenate(labels), pad_crop_flip),
        Images(*read(find(place, test_name), classes)),
    )


def read(path: Path, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of a file; CIFAR-100 has a coarse label before the one that counts."""
    header = 1 if classes == 10 else 2
    content = np.fromfile(path, np.uint8)
    size = header + PIXELS
    if not len(content) or len(content) % size:
        raise data_error(path, f"records of {size} bytes (CIFAR-{classes}, binary version)", f"{len(content)} bytes")
    records = content.reshape(-1, size)
    labels = records[:, header - 1].astype(np.int32)
    if labels.max() >= classes:
        raise data_error(path, f"labels below {classes}", f"{labels.max()}")
    images = records[:, header:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), labels
