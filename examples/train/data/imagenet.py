"""ImageNet: folders of JPEG files, one a class, or array records of TensorFlow examples, as TFDS writes them."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import grain
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from PIL import Image, UnidentifiedImageError

from examples.train.data.augment import central_box, random_box
from examples.train.data.source import Batch, folder
from examples.train.errors import UserError, data_error


def load(path: str, size: int, classes: int) -> tuple[Any, Any]:
    """Training and validation images of a folder with train/ and val/, or with files of array records."""
    place = folder(path)
    if (place / "train").is_dir():
        parts = [Files.find(place / name, size, classes) for name in ("train", "val")]
        if parts[0].classes != parts[1].classes:
            raise UserError(f"{place}: expected the same folders of classes in train and val, found others.")
    else:
        parts = [Records.find(place, name, size, classes) for name in ("train", "val")]
    return parts[0], parts[1]


def decode(content: bytes | Path, size: int, draws: np.ndarray | None) -> np.ndarray:
    """A square of so many pixels from an image: a random part of it, or its centre."""
    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
        box = central_box(*image.size) if draws is None else random_box(*image.size, draws)
        pixels = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box))
    return pixels if draws is None or draws[4] < 0.5 else pixels[:, ::-1]


@dataclass(frozen=True)
class Files:
    """JPEG files; a class is the rank of its folder's name."""

    paths: Sequence[Path]
    labels: np.ndarray
    classes: Sequence[str]
    size: int

    @classmethod
    def find(cls, place: Path, size: int, classes: int) -> "Files":
        names = sorted(entry.name for entry in place.iterdir() if entry.is_dir()) if place.is_dir() else []
        if not 0 < len(names) <= classes:
            raise UserError(f"{place}: expected 1 to {classes} folders, one a class, found {len(names)}.")
        paths, labels = [], []
        for label, name in enumerate(names):
            here = sorted(path for path in (place / name).iterdir() if path.suffix.lower() in (".jpeg", ".jpg"))
            if not here:
                raise UserError(f"{place / name}: expected files *.JPEG, found none.")
            paths += here
            labels += [label] * len(here)
        return cls(paths, np.array(labels, np.int32), names, size)

    def __len__(self) -> int:
        return len(self.paths)

    def load(self, rows: np.ndarray, draws: np.ndarray | None) -> Batch:
        images = []
        for place, row in enumerate(rows):
            try:
                images.append(decode(self.paths[row], self.size, None if draws is None else draws[place]))
            except (OSError, SyntaxError, ValueError, UnidentifiedImageError) as error:
                raise data_error(self.paths[row], "a whole JPEG image", f"a broken one ({error})") from None
        return {"inputs": np.stack(images), "labels": self.labels[rows]}


@dataclass(frozen=True)
class Records:
    """Array records of examples with the features "image" (JPEG) and "label"."""

    files: Sequence[Path]
    size: int
    classes: int

    @classmethod
    def find(cls, place: Path, name: str, size: int, classes: int) -> "Records":
        files = sorted(place.glob(f"*{name}*.array_record*"))
        if not files:
            raise UserError(f"{place}: expected folders train and val, or files *{name}*.array_record*, found neither.")
        records = cls(files, size, classes)
        for file in files:  # the library names no file
            try:
                number = len(open_records([file]))
            except Exception as error:
                raise data_error(file, "a whole file of array records", f"a broken one ({first_line(error)})") from None
            if not number:
                raise data_error(file, "array records", "none")
        return records

    @cached_property
    def reader(self) -> Any:
        return open_records(self.files)

    def __len__(self) -> int:
        return len(self.reader)

    def load(self, rows: np.ndarray, draws: np.ndarray | None) -> Batch:
        images, labels = [], []
        for place, row in enumerate(rows):
            try:
                image, label = parse(self.reader[int(row)])
                images.append(decode(image, self.size, None if draws is None else draws[place]))
            except Exception as error:
                where = f"{self.files[0].parent}, record {row}"
                wanted = 'an example with a JPEG "image" and a "label"'
                raise data_error(Path(where), wanted, f"a broken one ({first_line(error)})") from None
            if not 0 <= label < self.classes:
                raise data_error(self.files[0].parent, f"labels below {self.classes}", f"{label} in record {row}")
            labels.append(label)
        return {"inputs": np.stack(images), "labels": np.array(labels, np.int32)}


def open_records(files: Sequence[Path]) -> Any:
    return grain.sources.ArrayRecordDataSource([str(file) for file in files])


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def parse(record: bytes) -> tuple[bytes, int]:
    """Image and label of a serialized `tf.train.Example`."""
    example = example_class()()
    example.ParseFromString(record)
    features = {entry.key: entry.value for entry in example.features.feature}
    missing = {"image", "label"} - features.keys()
    if missing:
        raise ValueError(f"no feature {' or '.join(sorted(missing))} among {sorted(features)}")
    return features["image"].bytes_list.value[0], features["label"].int64_list.value[0]


@lru_cache(maxsize=1)
def example_class() -> Any:
    """The message `tf.train.Example`, from its description: TensorFlow is not needed for it."""
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="example", syntax="proto3")

    def message(name: str, **members: tuple[int, Any, str | int]) -> None:
        described = file.message_type.add(name=name)
        for member, (number, label, kind) in members.items():
            of_message = {"type": field.TYPE_MESSAGE, "type_name": f".example.{kind}"}
            described.field.add(
                name=member, number=number, label=label, **(of_message if isinstance(kind, str) else {"type": kind})
            )

    one, many = field.LABEL_OPTIONAL, field.LABEL_REPEATED
    message("BytesList", value=(1, many, field.TYPE_BYTES))
    message("Int64List", value=(1, many, field.TYPE_INT64))
    message("Feature", bytes_list=(1, one, "BytesList"), int64_list=(3, one, "Int64List"))
    message("Entry", key=(1, one, field.TYPE_STRING), value=(2, one, "Feature"))  # of a map, as it is on the wire
    message("Features", feature=(1, many, "Entry"))
    message("Example", features=(1, one, "Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("example.Example"))
