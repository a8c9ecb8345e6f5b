"""Grain from examples to batches: shuffled by seed, shared among processes, prepared ahead, resumable at any step.

The batch of a step depends on seed and step alone. Each process loads its own rows of it, so that the batch of all is
the same whatever the number of processes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import grain
import jax
import numpy as np
from absl import flags

from examples.train.config import Config
from examples.train.data.source import DRAWS, Batch, Source


@dataclass(frozen=True)
class Loader:
    """From the number of a batch to this process's part of it."""

    source: Source
    order: Callable[[int], np.ndarray] | None  # from an epoch to its rows; None for all rows in turn, once
    batch: int
    seed: int
    augment: bool
    process: int
    processes: int

    def __call__(self, number: int) -> Batch:
        share = self.batch // self.processes
        mine = slice(self.process * share, (self.process + 1) * share)
        places = np.arange(number * self.batch, (number + 1) * self.batch)[mine]
        if self.order is None:
            rows = np.minimum(places, len(self.source) - 1)
            return self.source.load(rows, None) | {"weights": (places < len(self.source)).astype(np.float32)}
        epochs, within = np.divmod(places, len(self.source))
        rows = np.concatenate([self.order(epoch)[within[epochs == epoch]] for epoch in np.unique(epochs)])
        draws = np.random.default_rng((1, self.seed, number)).random((self.batch, DRAWS)) if self.augment else None
        return self.source.load(rows, None if draws is None else draws[mine])


@lru_cache(maxsize=2)  # batches that are prepared ahead are of two epochs at most, if these are not tiny
def shuffled(examples: int, seed: int, epoch: int) -> np.ndarray:
    """All rows at once: Grain's own shuffle takes longer for each row than a row in memory takes to read."""
    return np.random.default_rng((0, seed, epoch)).permutation(examples)


def training(source: Source, config: Config, steps: int) -> grain.DatasetIterator:
    """The batches of all steps."""
    order = partial(shuffled, len(source), config.seed)
    return iterate(Loader(source, order, *options(config)), steps, config)


def validation(source: Source, config: Config) -> grain.DatasetIterator:
    """All examples once; those that fill the last batch up have a weight of zero."""
    return iterate(Loader(source, None, *options(config)), -(-len(source) // config.input.batch), config)


def options(config: Config) -> tuple[int, int, bool, int, int]:
    return config.input.batch, config.seed, config.input.augment, jax.process_index(), jax.process_count()


def iterate(loader: Loader, number: int, config: Config) -> grain.DatasetIterator:
    ahead = grain.ReadOptions(num_threads=config.input.threads, prefetch_buffer_size=config.input.prefetch)
    batches = grain.MapDataset.range(number).map(loader).to_iter_dataset(ahead)
    if config.input.workers:
        if not flags.FLAGS.is_parsed():  # those of Grain, which nobody gives
            flags.FLAGS.mark_as_parsed()
        batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=config.input.workers))
    return iter(batches)
