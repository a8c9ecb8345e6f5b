"""How tensors are cut into blocks: small axes are merged into one, large ones are cut into pieces.

Blocks of one shape lie side by side in a *region*: all whole ones in one, and those that are cut off at the end of an
axis in others. A matrix has up to four regions.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from eva_optax._probes.probe import Shape


class Region(NamedTuple):
    """Blocks of one shape.

    Attributes:
      start: where the region begins on each axis.
      counts: how many blocks it has along each axis.
      block: the shape of each.
    """

    start: Shape
    counts: Shape
    block: Shape

    @property
    def total(self) -> int:
        """How many blocks there are."""
        return math.prod(self.counts)


class Blocks(NamedTuple):
    """The blocks of tensors of one shape.

    Attributes:
      shape: of each tensor.
      merged: the shape that is cut.
      regions: in which order the blocks are given; none for a tensor with less than two entries.
    """

    shape: Shape
    merged: Shape
    regions: tuple[Region, ...]

    def cut(self, tensors: Array) -> list[Array]:
        """For each region the blocks of some tensors, stacked: (tensors, blocks, *block)."""
        count, order = len(tensors), len(self.merged)
        tensors = tensors.reshape(count, *self.merged)
        parts = []
        for start, counts, block in self.regions:
            stop = [at + number * size for at, number, size in zip(start, counts, block, strict=True)]
            part = tensors[(slice(None), *(slice(*ends) for ends in zip(start, stop, strict=True)))]
            part = part.reshape([count, *(size for pair in zip(counts, block, strict=True) for size in pair)])
            part = part.transpose([0, *range(1, 2 * order, 2), *range(2, 2 * order + 1, 2)])
            parts.append(part.reshape(count, -1, *block))
        return parts

    def join(self, parts: Sequence[Array]) -> Array:
        """Undoes `cut`."""
        count, order = len(parts[0]), len(self.merged)
        interleaved = [axis for first in range(1, order + 1) for axis in (first, first + order)]
        whole = []
        for part, (_, counts, block) in zip(parts, self.regions, strict=True):
            part = part.reshape(count, *counts, *block).transpose([0, *interleaved])
            whole.append(part.reshape([count, *(number * size for number, size in zip(counts, block, strict=True))]))
        for axis in reversed(range(order)):
            beside = len({region.start[axis] for region in self.regions})
            whole = [jnp.concatenate(whole[at : at + beside], axis + 1) for at in range(0, len(whole), beside)]
        return whole[0].reshape(count, *self.shape)


@lru_cache(maxsize=1024)
def find_blocks(shape: Shape, block: int, merge: bool) -> Blocks:
    """The blocks of a tensor of this shape, none longer than `block` on any axis."""
    merged = merge_axes(shape, block) if merge else shape
    pieces = [_pieces(size, block) for size in merged]
    regions = [Region(*(tuple(part) for part in zip(*each, strict=True))) for each in product(*pieces) if each]
    return Blocks(shape, merged, tuple(regions) if math.prod(shape) > 1 else ())


def _pieces(size: int, block: int) -> list[tuple[int, int, int]]:
    """Start, count and length of the whole pieces of an axis, and of the rest."""
    count, rest = divmod(size, block)
    return [(0, count, block)] * (count > 0) + [(count * block, 1, rest)] * (rest > 0)


def merge_axes(shape: Shape, block: int) -> Shape:
    """A shape with adjacent axes merged whose product is not greater than `block`, but for matrices, which stay so.

    Of all ways to merge them it is the one with the fewest axes, two at least, and the smallest matrices among these:
    (3, 3, 16, 32) becomes (144, 32), and (64, 4, 16) becomes (64, 64).
    """
    axes = [size for size in shape if size != 1]
    best: list[int] = axes
    for cuts in product((False, True), repeat=max(len(axes) - 1, 0)):
        groups = [axes[:1]]
        for cut, size in zip(cuts, axes[1:], strict=True):
            groups = [*groups, [size]] if cut else [*groups[:-1], [*groups[-1], size]]
        fits = all(len(group) == 1 or math.prod(group) <= block for group in groups)
        sizes = [math.prod(group) for group in groups if group]
        if fits and len(sizes) >= min(2, len(axes)) and _cost(sizes) < _cost(best):
            best = sizes
    return tuple(best)


def _cost(sizes: Sequence[int]) -> tuple[int, int]:
    return len(sizes), sum(size**2 for size in sizes)
