"""MNIST and FashionMNIST: idx files, compressed or not."""

import gzip
import zlib
from pathlib import Path

import numpy as np

from examples.train.data.source import Images, find, folder
from examples.train.errors import data_error


def load(path: str) -> tuple[Images, Images]:
    """Training and validation images, 28×28×1."""
    place = folder(path)
    parts = []
    for name in ("train", "t10k"):
        image_file = find(place, f"{name}-images-idx3-ubyte.gz", f"{name}-images-idx3-ubyte")
        label_file = find(place, f"{name}-labels-idx1-ubyte.gz", f"{name}-labels-idx1-ubyte")
        images, labels = read(image_file, 3), read(label_file, 1)
        if images.shape[1:] != (28, 28):
            raise data_error(image_file, "images of 28×28 pixels", "×".join(map(str, images.shape[1:])))
        if len(images) != len(labels):
            raise data_error(label_file, f"as many labels as images in {image_file.name}, {len(images)}", len(labels))
        parts.append(Images(images[..., None], labels.astype(np.int32)))
    return parts[0], parts[1]


def read(path: Path, dimensions: int) -> np.ndarray:
    """The array of an idx file of bytes: two zeros, 8 for bytes, the number of dimensions, each of them, the bytes."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise data_error(path, "a whole gzip file", f"a broken one ({error})") from None
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes((0, 0, 8, dimensions)):
        raise data_error(
            path, f"an idx file of bytes in {dimensions} dimensions", f"a header of {content[:4].hex(' ')}"
        )
    shape = tuple(np.frombuffer(content, ">u4", dimensions, 4).tolist())
    if len(content) - header != np.prod(shape):
        raise data_error(path, f"{np.prod(shape)} bytes for {shape} behind the header", len(content) - header)
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)
