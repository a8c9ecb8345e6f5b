"""Parameters of a kind, stacked, and what is averaged of their gradients: for what needs no tap but whole gradients."""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from eva_optax._curvature.blocks import Blocks, find_blocks
from eva_optax._curvature.shampoo import Roots, moments
from eva_optax._probes.layers import Tree
from eva_optax._probes.placement import replicate, shard_like
from eva_optax._probes.probe import accumulator, is_probe
from eva_optax._probes.stacking import stack, unstack
from eva_optax._transforms.state import ShampooState


class Stack(NamedTuple):
    """Parameters of one shape, whose paths differ in numbers alone: one operation for all of them.

    Attributes:
      name: of the first of them.
      members: their places among all parameters that are no probes.
      places: their places among the leaves of the tree.
      blocks: how each is cut.
      dtype: of what is kept of them.
    """

    name: str
    members: list[int]
    places: list[int]
    blocks: Blocks
    dtype: Any

    @property
    def shapes(self) -> list[list[tuple[int, ...]]]:
        """Those of statistics and roots, by region and axis."""
        front = len(self.places)
        return [[(front, region.total, size, size) for size in region.block] for region in self.blocks.regions]

    def statistics(self) -> tuple[tuple[Array, ...], ...]:
        """Zeros."""
        return tuple(tuple(jnp.zeros(shape, self.dtype) for shape in axes) for axes in self.shapes)

    def roots(self) -> tuple[Roots, ...]:
        """Identities."""

        def start(*axes: tuple[int, ...]) -> Roots:
            matrices = tuple(jnp.broadcast_to(jnp.eye(shape[-1], dtype=self.dtype), shape) for shape in axes)
            numbers = (*axes[0][:2], 1, 1)
            return Roots(matrices, jnp.ones(numbers, self.dtype), jnp.zeros(numbers, jnp.int32))

        return tuple(start(*axes) for axes in self.shapes)


def find_stacks(tree: Tree, block: int, merge: bool) -> list[Stack]:
    """The parameters of a tree that are no probes, those of a kind together."""
    found: dict[Any, Stack] = {}
    parameters = [(place, *item) for place, item in enumerate(tree.items()) if not is_probe(item[0])]
    for member, (place, path, leaf) in enumerate(parameters):
        shape, dtype = tuple(jnp.shape(leaf)), accumulator(leaf.dtype)
        kind = *(re.sub(r"\d+", "", name) for name in path), shape, dtype
        blocks = find_blocks(shape, block, merge)
        stacked = found.setdefault(kind, Stack("/".join(path), [], [], blocks, dtype))
        stacked.members.append(member)
        stacked.places.append(place)
    return list(found.values())


def check_fit(caller: str, stacks: Sequence[Stack], state: ShampooState, averages: Mapping[str, bool]) -> None:
    """Raises ValueError if the state is of other parameters, or was made with other options.

    Args:
      caller: for the message.
      stacks: the parameters.
      state: the state.
      averages: which averages it must have.
    """
    for name, needed in averages.items():
        if stacks and needed != bool(jax.tree.leaves(getattr(state, name))):
            raise ValueError(
                f"eva_optax.{caller}: the state has {'no' if needed else 'unused'} {name}: it was made with another "
                "graft or b1. Make the state with tx.init(params), with the same options."
            )
    held = state.statistics if isinstance(state.statistics, dict) else {}
    wanted = {each.name: [shape for axes in each.shapes for shape in axes] for each in stacks}
    found = {name: [jnp.shape(leaf) for leaf in jax.tree.leaves(part)] for name, part in held.items()}
    for name in {**wanted, **found}:
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"eva_optax.{caller}: the state does not fit the gradients: of {name!r} it has statistics of shapes "
                f"{found.get(name, 'nothing')}, the gradients want {wanted.get(name, 'nothing')}. Make the state with "
                "tx.init(params), from the parameters that are trained, and with the same block and merge."
            )


class Taken(NamedTuple):
    """The gradients of some parameters in a step, as they are taken into averages.

    Attributes:
      stack: the parameters.
      gradient: theirs, stacked; zeros in the place of one that is not finite, or whose squares are not.
      valid: which have another.
      observed: how many each had until now.
      statistics: with these gradients taken in.
    """

    stack: Stack
    gradient: Array
    valid: Array
    observed: Array
    statistics: tuple[tuple[Array, ...], ...] = ()

    @classmethod
    def of(cls, each: Stack, leaves: Sequence[ArrayLike], state: ShampooState, decay: ArrayLike) -> Self:
        """Takes the gradients of a step in."""
        gradient = stack([replicate(jnp.asarray(leaves[place]).astype(each.dtype)) for place in each.places])
        # The sum of squares is the trace of every statistic, whose entries are not larger.
        valid = jnp.isfinite(jnp.sum(jnp.square(gradient), range(1, gradient.ndim)))
        gradient = jnp.where(_along(valid, gradient), gradient, 0)
        taken = cls(each, gradient, valid, state.observed[each.name] + valid)
        new = tuple(map(moments, each.blocks.cut(gradient)))
        mix = partial(taken._mix, decay=decay)
        return taken._replace(statistics=jax.tree.map(mix, state.statistics[each.name], new))

    def _mix(self, old: Array, new: Array, decay: ArrayLike) -> Array:
        """decay·old + (1 − decay)·new, the sum for a decay of 1; `new` is zero where it is not valid."""
        weight = jnp.asarray(decay, old.dtype)
        return _along(jnp.where(self.valid, weight, 1), old) * old + jnp.where(weight < 1, 1 - weight, 1) * new

    def average(self, averages: list[Array], new: Array, decay: ArrayLike) -> Array:
        """Takes `new` into the averages of these parameters among those of all."""
        old = stack([replicate(averages[member]) for member in self.stack.members])
        mixed = self._mix(old, new, decay)
        for member, part in zip(self.stack.members, unstack(mixed), strict=True):
            averages[member] = shard_like(part, averages[member])
        return mixed

    def total(self, decay: ArrayLike, average: Array) -> Array:
        """The weight of all that an average, which started at zero, has taken in."""
        weight = jnp.asarray(decay, average.dtype)
        some = self.observed > 0  # else zeros would be divided by zero
        totals = jnp.where((weight < 1) & some, 1 - weight**self.observed, 1)
        return _along(totals, average)

    def place(self, made: Array, gradients: Sequence[Any], leaves: list[Any]) -> None:
        """Puts updates among `leaves`; a gradient that was not taken passes as it is."""
        for index, (place, part) in enumerate(zip(self.stack.places, unstack(made), strict=True)):
            like = gradients[place]
            leaves[place] = jnp.where(self.valid[index], shard_like(part.astype(like.dtype), like), like)


def _along(numbers: Array, like: Array) -> Array:
    """One number for each of some stacked arrays."""
    return numbers.reshape(-1, *(1,) * (like.ndim - 1))
