"""Each loader against files in the real format, written here byte by byte, and against broken ones."""

import gzip
import io
import struct

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from examples.train.data import augment, cifar, curves, digits, imagenet, mnist, text
from examples.train.data.source import DRAWS
from examples.train.errors import UserError

pytestmark = pytest.mark.train
RANDOM = np.random.default_rng(0)
ALL = np.arange


# CIFAR


def cifar_file(path, labels, images, coarse=None):
    """Records as the data set's page describes them: labels, then 1,024 red, green and blue bytes, row by row."""
    with path.open("wb") as file:
        for number, (label, image) in enumerate(zip(labels, images, strict=True)):
            if coarse is not None:
                file.write(bytes([coarse[number]]))
            file.write(bytes([label]))
            for channel in range(3):
                file.write(image[:, :, channel].tobytes())


@pytest.fixture
def cifar10(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    images = RANDOM.integers(256, size=(12, 32, 32, 3)).astype(np.uint8)
    for number in range(5):
        part = slice(2 * number, 2 * number + 2)
        cifar_file(folder / f"data_batch_{number + 1}.bin", range(10)[part], images[part])
    cifar_file(folder / "test_batch.bin", [9, 0], images[10:])
    return tmp_path, images


def test_cifar10(cifar10):
    path, images = cifar10
    training, validation = cifar.load(str(path), 10)
    batch = training.load(ALL(10), None)
    np.testing.assert_array_equal(batch["inputs"], images[:10])
    np.testing.assert_array_equal(batch["labels"], range(10))
    np.testing.assert_array_equal(validation.load(ALL(2), None)["inputs"], images[10:])
    assert cifar.load(str(path / "cifar-10-batches-bin"), 10)[1].labels.tolist() == [9, 0]


def test_cifar100_takes_the_fine_label(tmp_path):
    images = RANDOM.integers(256, size=(3, 32, 32, 3)).astype(np.uint8)
    for name in ("train", "test"):
        cifar_file(tmp_path / f"{name}.bin", [99, 3, 50], images, coarse=[1, 2, 3])
    training, _ = cifar.load(str(tmp_path), 100)
    assert training.labels.tolist() == [99, 3, 50]
    np.testing.assert_array_equal(training.images, images)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda file: file.unlink(), "expected a file data_batch_3.bin, found none"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "data_batch_3.bin: expected records of 3073 bytes"),
        (lambda file: file.write_bytes(b""), "found 0 bytes"),
        (lambda file: file.write_bytes(b"\x0a" * 3073), "expected labels below 10, found 10"),
    ],
)
def test_broken_cifar_is_named(cifar10, damage, says):
    path, _ = cifar10
    damage(path / "cifar-10-batches-bin" / "data_batch_3.bin")
    with pytest.raises(UserError, match=says) as caught:
        cifar.load(str(path), 10)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_is_named(tmp_path):
    for load in (lambda path: cifar.load(path, 10), mnist.load, lambda path: imagenet.load(path, 32, 10)):
        with pytest.raises(UserError, match="absent: expected a folder of data, found nothing"):
            load(str(tmp_path / "absent"))


# MNIST


def idx(values):
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_mnist(path, images, labels, pack):
    for name, number in (("train", len(labels)), ("t10k", 2)):
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx(values[:number])
            file = path / f"{name}-{kind}-ubyte{'.gz' if pack else ''}"
            file.write_bytes(gzip.compress(content) if pack else content)


@pytest.fixture(params=[True, False], ids=["gz", "plain"])
def mnist_folder(tmp_path, request):
    images = RANDOM.integers(256, size=(5, 28, 28)).astype(np.uint8)
    labels = np.array([5, 0, 4, 1, 9], np.uint8)
    write_mnist(tmp_path, images, labels, request.param)
    return tmp_path, images, labels


def test_mnist(mnist_folder):
    path, images, labels = mnist_folder
    training, validation = mnist.load(str(path))
    batch = training.load(np.array([4, 1]), None)
    np.testing.assert_array_equal(batch["inputs"], images[[4, 1], :, :, None])
    np.testing.assert_array_equal(batch["labels"], labels[[4, 1]])
    assert len(validation) == 2


def test_broken_mnist_is_named(tmp_path):
    images = RANDOM.integers(256, size=(5, 28, 28)).astype(np.uint8)
    good = np.arange(5, dtype=np.uint8)

    def refused(says, file, content):
        write_mnist(tmp_path, images, good, pack=file.endswith(".gz"))
        (tmp_path / file).write_bytes(content)
        with pytest.raises(UserError, match=says) as caught:
            mnist.load(str(tmp_path))
        assert file in str(caught.value)
        assert "\n" not in str(caught.value)

    labels = "train-labels-idx1-ubyte"
    refused("4 bytes for .4,. behind the header, found 3", labels, idx(good[:4])[:-1])
    refused("as many labels as images", labels, idx(good[:4]))
    refused("an idx file of bytes in 1 dimensions, found a header of 00 00 08 03", labels, idx(images))
    refused("found a header of 00", labels, b"\0")
    refused("images of 28×28 pixels, found 8×8", "train-images-idx3-ubyte", idx(images[:, :8, :8].copy()))
    packed = gzip.compress(idx(good), mtime=0)
    refused("a whole gzip file", f"{labels}.gz", packed[:-9])
    refused("a whole gzip file", f"{labels}.gz", b"no gzip at all")
    refused("a whole gzip file", f"{labels}.gz", packed[:15] + b"\xff\xff\xff" + packed[18:])


# ImageNet


def jpeg(colour, size=(40, 30)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "JPEG", quality=95)
    return file.getvalue()


def is_colour(image, colour):
    return np.abs(image.astype(int) - colour).max() <= 4


RED, GREEN = (250, 10, 10), (10, 200, 30)


@pytest.fixture
def folders(tmp_path):
    for part, number in (("train", 2), ("val", 1)):
        for name, colour in (("n02", GREEN), ("n01", RED)):
            (tmp_path / part / name).mkdir(parents=True)
            for image in range(number):
                (tmp_path / part / name / f"{name}_{image}.JPEG").write_bytes(jpeg(colour))
    return tmp_path


def test_folders_of_jpeg(folders):
    training, validation = imagenet.load(str(folders), 16, 1000)
    assert (len(training), len(validation)) == (4, 2)
    for draws in (None, RANDOM.random((2, DRAWS))):
        batch = training.load(np.array([0, 3]), draws)
        assert batch["inputs"].shape == (2, 16, 16, 3)
        assert batch["labels"].tolist() == [0, 1]
        assert is_colour(batch["inputs"][0], RED)
        assert is_colour(batch["inputs"][1], GREEN)


def test_classes_are_in_the_order_of_their_names(tmp_path):
    names = [f"n{number:02}" for number in RANDOM.permutation(12)]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(jpeg(RED))
    found = imagenet.Files.find(tmp_path, 16, 12)
    assert [path.parent.name for path in found.paths] == sorted(names)
    assert found.labels.tolist() == list(range(12))


def test_images_are_mirrored_by_the_last_draw():
    image = Image.new("RGB", (40, 40), RED)
    image.paste(GREEN, (0, 0, 40, 20))
    image = image.rotate(90)  # green on the left, red on the right
    file = io.BytesIO()
    image.save(file, "JPEG", quality=95)
    for draws, left in ((None, GREEN), ([0.99, 0.5, 0.5, 0.5, 0.4], GREEN), ([0.99, 0.5, 0.5, 0.5, 0.6], RED)):
        pixels = imagenet.decode(file.getvalue(), 16, draws if draws is None else np.array(draws))
        assert is_colour(pixels[:, :4], left), draws


def test_a_broken_jpeg_is_named(folders):
    broken = folders / "train" / "n01" / "n01_1.JPEG"
    for content in (jpeg(RED)[:200], jpeg(RED)[: len(jpeg(RED)) // 2], b"not a picture", b""):
        broken.write_bytes(content)
        training, _ = imagenet.load(str(folders), 16, 1000)
        with pytest.raises(UserError, match=r"n01_1.JPEG: expected a whole JPEG image, found a broken one"):
            training.load(np.array([0, 1]), None)


def test_folders_that_do_not_fit_are_named(folders):
    with pytest.raises(UserError, match="expected 1 to 1 folders, one a class, found 2"):
        imagenet.load(str(folders), 16, 1)
    (folders / "val" / "n02").rename(folders / "val" / "n03")
    with pytest.raises(UserError, match="same folders of classes in train and val"):
        imagenet.load(str(folders), 16, 1000)
    (folders / "train" / "n00").mkdir()
    with pytest.raises(UserError, match=r"n00: expected files \*.JPEG, found none"):
        imagenet.load(str(folders), 16, 1000)


def field(number, content):
    """A length-delimited field of a protocol buffer."""
    length, size = len(content), b""
    while length >= 128:
        size, length = size + bytes((length % 128 + 128,)), length // 128
    return bytes((8 * number + 2,)) + size + bytes((length,)) + content


def example(image, label, **more):
    """A `tf.train.Example`, as it is on the wire."""
    features = {b"image": field(1, field(1, image)), b"file_name": field(1, field(1, b"n01.JPEG"))}
    if label is not None:
        features[b"label"] = field(3, field(1, bytes((label % 128 + 128, label // 128))))
    return field(1, b"".join(field(1, field(1, name) + field(2, value)) for name, value in features.items()))


def write_records(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


@pytest.fixture
def records(tmp_path):
    for shard, (colour, label) in enumerate([(RED, 7), (GREEN, 999)]):
        path = tmp_path / f"imagenet2012-train.array_record-0000{shard}-of-00002"
        write_records(path, [example(jpeg(colour), label)] * 2)
    write_records(tmp_path / "imagenet2012-validation.array_record-00000-of-00001", [example(jpeg(RED), 0)])
    return tmp_path


def test_array_records(records):
    training, validation = imagenet.load(str(records), 16, 1000)
    assert (len(training), len(validation)) == (4, 1)
    batch = training.load(np.array([3, 0]), None)
    assert batch["labels"].tolist() == [999, 7]
    assert is_colour(batch["inputs"][0], GREEN)
    assert is_colour(batch["inputs"][1], RED)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (example(jpeg(RED)[:100], 7), "record 1: expected an example .* found a broken one"),
        (example(jpeg(RED), None), "no feature label among"),
        (b"\xff\xff\xff", "record 1: expected an example"),
        (example(jpeg(RED), 1000), "expected labels below 1000, found 1000 in record 1"),
    ],
    ids=["truncated image", "no label", "no example", "label"],
)
def test_broken_records_are_named(records, record, says):
    shard = records / "imagenet2012-train.array_record-00000-of-00002"
    write_records(shard, [example(jpeg(RED), 7), record])
    training, _ = imagenet.load(str(records), 16, 1000)
    with pytest.raises(UserError, match=says) as caught:
        training.load(np.array([0, 1]), None)
    assert "\n" not in str(caught.value)


def test_broken_files_of_records_are_named(records):
    shard = records / "imagenet2012-train.array_record-00001-of-00002"
    whole = shard.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no records"):
        shard.write_bytes(content)
        with pytest.raises(UserError, match=r"00001-of-00002: expected .*array records, found") as caught:
            imagenet.load(str(records), 16, 1000)
        assert "\n" not in str(caught.value)
    for path in records.glob("*validation*"):
        path.unlink()
    shard.write_bytes(whole)
    with pytest.raises(UserError, match=r"or files \*val\*.array_record\*, found neither"):
        imagenet.load(str(records), 16, 1000)


# Text


def test_text_is_bytes_in_the_order_of_files(tmp_path):
    (tmp_path / "b.txt").write_text("ö" * 300)
    (tmp_path / "a.txt").write_text("0123456789" * 40)
    training, validation = text.load(str(tmp_path), 16)
    whole = b"0123456789" * 40 + b"\n" + "ö".encode() * 300
    assert training.content.tobytes() + validation.content.tobytes() == whole
    assert len(validation.content) == len(whole) // 10 + 1
    windows = training.load(np.array([0, 2]), None)["inputs"]
    assert windows[1].tobytes() == whole[32 : 32 + 17]
    draws = np.full((2, DRAWS), 0.5)
    assert training.load(np.array([0, 2]), draws)["inputs"][0].tobytes() == whole[8 : 8 + 17]
    last = training.load(np.array([len(training) - 1]), np.full((1, DRAWS), 0.999))["inputs"]
    assert last.shape == (1, 17)


def test_broken_text_is_named(tmp_path):
    with pytest.raises(UserError, match=r"expected a text file, or a folder with files \*.txt, found none"):
        text.load(str(tmp_path), 16)
    file = tmp_path / "a.txt"
    file.write_bytes(b"abc\xffdef" * 100)
    with pytest.raises(UserError, match=r"a.txt: expected UTF-8 text, found the byte 0xff at 3"):
        text.load(str(file), 16)
    file.write_text("short")
    with pytest.raises(UserError, match="more than 160 bytes, for windows of 16, found 5 bytes"):
        text.load(str(file), 16)


# Made here


def test_curves_are_thin_lines_that_differ():
    images = curves.draw(0, 200)
    assert images.shape == (200, 28, 28, 1)
    np.testing.assert_array_equal(images, curves.draw(0, 200))
    assert not np.array_equal(images, curves.draw(1, 200))
    inked = (images > 40).mean((1, 2, 3))
    assert (inked > 0.01).all()
    assert (inked < 0.3).all()
    assert len(np.unique(images.reshape(200, -1), axis=0)) == 200
    for image in images[:20, :, :, 0]:  # each pixel of a line has a neighbour on it
        rows, columns = np.nonzero(image > 40)
        padded = np.pad(image > 40, 1)
        assert all(padded[r : r + 3, c : c + 3].sum() > 1 for r, c in zip(rows, columns, strict=True))


def test_digits_are_upscaled_and_split():
    training, validation = digits.load(32, 3)
    assert (len(training), len(validation)) == (1437, 360)
    images = training.load(ALL(4), None)["inputs"]
    assert images.shape == (4, 32, 32, 3)
    np.testing.assert_array_equal(images[:, ::4, ::4, 1], training.images[:4])
    np.testing.assert_array_equal(images[:, 3::4, 3::4, 2], training.images[:4])
    assert images.max() > 200
    assert {tuple(image.ravel()) for image in training.images}.isdisjoint(
        map(tuple, validation.images.reshape(360, -1))
    )


def test_digits_as_text_show_the_digit():
    training, _ = digits.load_text(74)
    drawing = training.content[:74].tobytes().decode().split("\n")
    assert drawing[0] in "0123456789"
    assert [len(line) for line in drawing[1:9]] == [8] * 8


# Augmentation


def test_pad_crop_takes_each_window_and_nothing_else():
    images = np.repeat(np.arange(1, 65, dtype=np.uint8).reshape(1, 8, 8, 1), 81, 0)
    corners = np.stack(np.meshgrid(range(9), range(9)), -1).reshape(81, 2)
    draws = np.zeros((81, DRAWS))
    draws[:, :2] = (corners + 0.5) / 9
    cropped = augment.pad_crop(images, draws)
    padded = np.pad(images[0], ((4, 4), (4, 4), (0, 0)))
    for window, (top, left) in zip(cropped, corners, strict=True):
        np.testing.assert_array_equal(window, padded[top : top + 8, left : left + 8])


def test_flip_mirrors_by_the_last_draw():
    images = RANDOM.integers(256, size=(2, 4, 4, 3)).astype(np.uint8)
    draws = np.array([[0, 0, 0, 0, 0.49], [0, 0, 0, 0, 0.51]])
    flipped = augment.flip(images, draws)
    np.testing.assert_array_equal(flipped[0], images[0, :, ::-1])
    np.testing.assert_array_equal(flipped[1], images[1])


def test_random_boxes_lie_inside_and_have_the_areas_and_ratios_drawn():
    for draws in RANDOM.random((200, DRAWS)):
        left, top, right, bottom = augment.random_box(100, 80, draws)
        assert 0 <= left < right <= 100.0001
        assert 0 <= top < bottom <= 80.0001
        if right - left < 99 and bottom - top < 79:  # not cut to the image
            area, ratio = (right - left) * (bottom - top) / 8000, (right - left) / (bottom - top)
            np.testing.assert_allclose(area, 0.08 + 0.92 * draws[0], rtol=1e-6)
            logs = np.log(3 / 4), np.log(4 / 3)
            np.testing.assert_allclose(np.log(ratio), logs[0] + draws[1] * (logs[1] - logs[0]), atol=1e-6)
    assert augment.central_box(512, 256) == (144, 16, 368, 240)
