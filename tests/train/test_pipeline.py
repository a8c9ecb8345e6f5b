"""The batch of a step depends on the seed and on nothing else."""

import dataclasses
import json

import numpy as np
import pytest

from examples.train.data import pipeline
from examples.train.data.augment import pad_crop_flip
from examples.train.data.source import Images
from examples.train.tasks import configure

pytestmark = pytest.mark.train
EXAMPLES, BATCH = 50, 8


@pytest.fixture
def source():
    images = np.random.default_rng(0).integers(256, size=(EXAMPLES, 8, 8, 3)).astype(np.uint8)
    return Images(images, np.arange(EXAMPLES, dtype=np.int32), pad_crop_flip)


def config(**changes):
    return configure({"batch": BATCH, **changes})


def in_turn(epoch):
    return np.arange(EXAMPLES)


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name in got:
        np.testing.assert_array_equal(got[name], wanted[name])


def test_each_epoch_has_every_example_once_in_another_order(source):
    batches = list(pipeline.training(source, config(), steps=25))
    labels = np.concatenate([batch["labels"] for batch in batches])
    epochs = labels[: 4 * EXAMPLES].reshape(4, EXAMPLES)
    np.testing.assert_array_equal(np.sort(epochs, 1), np.tile(np.arange(EXAMPLES), (4, 1)))
    assert len(np.unique(epochs, axis=0)) == 4


def test_seeds_order_and_augment_alike_each_time_and_differ_among_each_other(source):
    first, again, other = (next(pipeline.training(source, config(seed=seed), 1)) for seed in (0, 0, 1))
    assert_same(first, again)
    assert not np.array_equal(first["labels"], other["labels"])
    plain = next(pipeline.training(source, config(augment="false"), 1))
    np.testing.assert_array_equal(plain["labels"], first["labels"])
    np.testing.assert_array_equal(plain["inputs"], source.images[plain["labels"]])
    assert not np.array_equal(plain["inputs"], first["inputs"])


def test_seeds_change_the_augmentation_of_the_same_rows(source):
    first, other = (pipeline.Loader(source, in_turn, BATCH, seed, True, 0, 1)(0) for seed in (0, 1))
    np.testing.assert_array_equal(first["labels"], other["labels"])
    assert not np.array_equal(first["inputs"], other["inputs"])


def test_a_state_goes_on_at_the_next_batch(source):
    wanted = list(pipeline.training(source, config(), steps=10))
    batches = pipeline.training(source, config(), steps=10)
    for _ in range(4):
        next(batches)
    again = pipeline.training(source, config(), steps=10)
    again.set_state(batches.get_state())
    rest = list(again)
    assert len(rest) == 6
    for got, want in zip(rest, wanted[4:], strict=True):
        assert_same(got, want)


def test_processes_load_the_parts_of_the_same_batch(source):
    whole = pipeline.Loader(source, in_turn, BATCH, 0, True, 0, 1)
    parts = [dataclasses.replace(whole, process=number, processes=4) for number in range(4)]
    for step in (0, 7):
        loaded = [part(step) for part in parts]
        assert_same({name: np.concatenate([part[name] for part in loaded]) for name in loaded[0]}, whole(step))


def test_validation_has_every_example_once_and_fills_up_with_weights_of_zero(source):
    batches = list(pipeline.validation(source, config()))
    assert [len(batch["labels"]) for batch in batches] == [BATCH] * 7
    weights, labels = (np.concatenate([batch[name] for batch in batches]) for name in ("weights", "labels"))
    np.testing.assert_array_equal(labels[weights == 1], np.arange(EXAMPLES))
    assert weights.sum() == EXAMPLES
    np.testing.assert_array_equal(batches[0]["inputs"], source.images[:BATCH])  # not augmented


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # Grain's, as it ends
def test_processes_that_prepare_batches_prepare_the_same(source):
    wanted = list(pipeline.training(source, config(), steps=5))
    batches = pipeline.training(source, config(workers=2), steps=5)
    assert_same(next(batches), wanted[0])
    state = json.loads(json.dumps(batches.get_state()))  # as a checkpoint keeps it
    batches.close()
    again = pipeline.training(source, config(workers=2), steps=5)
    again.set_state(state)
    assert_same(next(again), wanted[1])
    again.close()
