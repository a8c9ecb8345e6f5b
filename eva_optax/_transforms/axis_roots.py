"""The driver of Shampoo: statistics of every step, roots of some, and the length of another method's step."""

import re
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any, Literal, NamedTuple, Self, get_args

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from eva_optax._curvature.amortized import in_stacks, renew
from eva_optax._curvature.blocks import Blocks, find_blocks
from eva_optax._curvature.roots import Power, power
from eva_optax._curvature.shampoo import Roots, apply, graft, moments
from eva_optax._probes.layers import Tree, take_apart
from eva_optax._probes.probe import accumulator, is_probe
from eva_optax._probes.stacking import stack, unstack
from eva_optax._probes.tap import replicate, shard_like
from eva_optax._transforms.hidden_probes import hide_places
from eva_optax._transforms.options import check_decay, check_names, check_nested, check_positive
from eva_optax._transforms.state import ShampooState, check_state

Graft = Literal["grad", "rms", "adam"]


class Options(NamedTuple):
    """The arguments of `scale_by_shampoo`."""

    epsilon: ArrayLike
    relative: bool
    decay: ArrayLike
    exponent: ArrayLike | None
    block: int
    merge: bool
    every: ArrayLike
    start: ArrayLike
    graft: Graft | None
    graft_decay: ArrayLike
    graft_epsilon: ArrayLike
    b1: ArrayLike

    @property
    def has_second_moments(self) -> bool:
        """Whether averages of squared gradients are kept."""
        return self.graft in ("rms", "adam")

    @property
    def has_means(self) -> bool:
        """Whether averages of gradients are kept: unless b1 is known to be 0."""
        return not (isinstance(self.b1, int | float) and self.b1 == 0)

    def check(self, caller: str) -> None:
        """Raises ValueError for an option out of its range."""
        check_positive(caller, epsilon=self.epsilon, every=self.every, start=self.start)
        check_positive(caller, graft_epsilon=self.graft_epsilon)
        if not (isinstance(self.decay, int | float) and self.decay == 1):
            check_decay(caller, self.decay)
        check_decay(caller, self.graft_decay, "graft_decay")
        check_decay(caller, self.b1, "b1")
        if isinstance(self.exponent, int | float) and not self.exponent < 0:
            raise ValueError(
                f"eva_optax.{caller}: exponent must be negative, say -0.5, or None for -1 / (2 * number of axes); "
                f"got {self.exponent}."
            )
        if not isinstance(self.block, int) or isinstance(self.block, bool) or self.block < 1:
            raise ValueError(
                f"eva_optax.{caller}: block must be an integer greater than 0, got {self.block!r}. Shapes depend on "
                'it: in optax.inject_hyperparams it is one of the static_args, ("block",).'
            )
        if self.graft is not None and self.graft not in get_args(Graft):
            raise ValueError(f"eva_optax.{caller}: graft must be one of {get_args(Graft)} or None, got {self.graft!r}.")


class _Stack(NamedTuple):
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


def _find_stacks(tree: Tree, options: Options) -> list[_Stack]:
    found: dict[Any, _Stack] = {}
    parameters = [(place, *item) for place, item in enumerate(tree.items()) if not is_probe(item[0])]
    for member, (place, path, leaf) in enumerate(parameters):
        shape, dtype = tuple(jnp.shape(leaf)), accumulator(leaf.dtype)
        kind = *(re.sub(r"\d+", "", name) for name in path), shape, dtype
        blocks = find_blocks(shape, options.block, options.merge)
        stacked = found.setdefault(kind, _Stack("/".join(path), [], [], blocks, dtype))
        stacked.members.append(member)
        stacked.places.append(place)
    return list(found.values())


def precondition_axes(caller: str, options: Options) -> optax.GradientTransformation:
    """The transformation of `scale_by_shampoo`, for another function's messages."""
    options.check(caller)

    def init(params: Any) -> ShampooState:
        tree = take_apart(params)
        check_nested(caller, tree)
        check_names(caller, tree)
        stacks = _find_stacks(tree, options)
        zeros = hide_places(tree, [jnp.zeros_like(leaf, accumulator(leaf.dtype)) for leaf in tree.leaves])
        # `optax.tree.map_params` gives no parameters: one leaf then stands for what has not the form of parameters.
        return ShampooState(
            count=jnp.zeros((), jnp.int32),
            observed={each.name: jnp.zeros(len(each.places), jnp.int32) for each in stacks} or jnp.zeros(()),
            statistics={each.name: each.statistics() for each in stacks} or jnp.zeros(()),
            roots={each.name: each.roots() for each in stacks} or jnp.zeros(()),
            second_moments=zeros if options.has_second_moments else (),
            means=zeros if options.has_means else (),
            skipped=jnp.zeros((), jnp.int32),
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ShampooState]:
        del params
        check_state(caller, state, ShampooState)
        tree = take_apart(updates)
        stacks = _find_stacks(tree, options)
        _check_fit(caller, stacks, state)
        step = jnp.asarray(optax.safe_increment(state.count))
        taken = [_Taken.of(each, tree.leaves, state, options) for each in stacks]
        roots, failed = _renew(taken, [state.roots[each.name] for each in stacks], step, options)

        leaves = [jnp.zeros_like(leaf) for leaf in tree.leaves]
        means, second_moments = (jax.tree.leaves(part) for part in (state.means, state.second_moments))
        started = step >= jnp.asarray(options.start, step.dtype)
        for each, kept in zip(taken, roots, strict=True):
            direction, length = each.gradient, None
            if options.has_means:
                mean = each.average(means, each.gradient, options.b1)
                direction = mean / each.total(options.b1, mean)
            if options.has_second_moments:
                square = each.average(second_moments, jnp.square(each.gradient), options.graft_decay)
                square = square / each.total(options.graft_decay, square) if options.graft == "adam" else square
                length = direction / (jnp.sqrt(square) + jnp.asarray(options.graft_epsilon, square.dtype))
            elif options.graft == "grad":
                length = direction
            each.place(_precondition(each.stack.blocks, direction, length, kept, started), tree.leaves, leaves)
        return tree.rebuild(leaves), ShampooState(
            count=step,
            observed={each.stack.name: each.observed for each in taken} or state.observed,
            statistics={each.stack.name: each.statistics for each in taken} or state.statistics,
            roots={each.stack.name: kept for each, kept in zip(taken, roots, strict=True)} or state.roots,
            second_moments=jax.tree.unflatten(jax.tree.structure(state.second_moments), second_moments),
            means=jax.tree.unflatten(jax.tree.structure(state.means), means),
            skipped=sum((jnp.sum(~each.valid, dtype=jnp.int32) for each in taken), state.skipped + failed),
        )

    return optax.GradientTransformation(init, update)


def _check_fit(caller: str, stacks: Sequence[_Stack], state: ShampooState) -> None:
    """Raises ValueError if the state is of other parameters, or was made with other options."""
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


class _Taken(NamedTuple):
    """The gradients of some parameters in a step, as they are taken into averages.

    Attributes:
      stack: the parameters.
      gradient: theirs, stacked; zeros in the place of one that is not finite, or whose squares are not.
      valid: which have another.
      observed: how many each had until now.
      statistics: with these gradients taken in.
    """

    stack: _Stack
    gradient: Array
    valid: Array
    observed: Array
    statistics: tuple[tuple[Array, ...], ...] = ()

    @classmethod
    def of(cls, each: _Stack, leaves: Sequence[ArrayLike], state: ShampooState, options: Options) -> Self:
        """Takes the gradients of a step in."""
        gradient = stack([replicate(jnp.asarray(leaves[place]).astype(each.dtype)) for place in each.places])
        # The sum of squares is the trace of every statistic, whose entries are not larger.
        valid = jnp.isfinite(jnp.sum(jnp.square(gradient), range(1, gradient.ndim)))
        gradient = jnp.where(_along(valid, gradient), gradient, 0)
        taken = cls(each, gradient, valid, state.observed[each.name] + valid)
        new = tuple(map(moments, each.blocks.cut(gradient)))
        mix = partial(taken._mix, decay=options.decay)
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
        totals = jnp.where((weight < 1) & (self.observed > 0), 1 - weight**self.observed, 1)
        return _along(totals, average)

    def place(self, made: Array, gradients: Sequence[Any], leaves: list[Any]) -> None:
        """Puts updates among `leaves`; a gradient that was not taken passes as it is."""
        for index, (place, part) in enumerate(zip(self.stack.places, unstack(made), strict=True)):
            like = gradients[place]
            leaves[place] = jnp.where(self.valid[index], shard_like(part.astype(like.dtype), like), like)


def _along(numbers: Array, like: Array) -> Array:
    """One number for each of some stacked arrays."""
    return numbers.reshape(-1, *(1,) * (like.ndim - 1))


def _renew(
    taken: Sequence[_Taken], old: Sequence[tuple[Roots, ...]], step: Array, options: Options
) -> tuple[list[tuple[Roots, ...]], Array]:
    """The roots after a step, and how many blocks kept old ones that were to be renewed."""
    regions = [(each, axes) for each in taken for axes in each.statistics]

    def roots(stack: Array, exponents: Array, totals: Array) -> Power:
        return power(stack / totals[:, None, None], exponents, options.epsilon, options.relative)

    def make() -> list[Roots]:
        matrices, exponents, totals = [], [], []
        for each, axes in regions:
            matrices += axes
            exponents += [-1 / (2 * len(axes)) if options.exponent is None else options.exponent] * len(axes)
            totals += [each.total(options.decay, axes[0])[..., 0, 0]] * len(axes)
        powers = iter(in_stacks(roots, matrices, exponents, totals))
        made = []
        for _, axes in regions:
            chosen, conditions = zip(*(next(powers) for _ in axes), strict=True)
            made.append(Roots(chosen, reduce(jnp.maximum, conditions), jnp.full(conditions[0].shape, step)))
        return made

    start, every = (jnp.asarray(number, step.dtype) for number in (options.start, options.every))
    due = (step == start) | ((step > start) & (step % every == 0))
    chosen, new = renew(due, make, [each for kept in old for each in kept])
    failed = jnp.zeros((), jnp.int32)
    for (_, axes), made in zip(regions, new, strict=True):
        # Zeros are no failure: there was no gradient yet.
        failed += jnp.sum(due & ~made & (jnp.trace(axes[0], axis1=2, axis2=3) != 0), dtype=jnp.int32)
    remaining = iter(chosen)
    return [tuple(next(remaining) for _ in kept) for kept in old], failed


def _precondition(
    blocks: Blocks, direction: Array, length: Array | None, roots: Sequence[Roots], started: Array
) -> Array:
    """The updates of some parameters; `length` is what is grafted."""
    if not blocks.regions:
        return direction if length is None else length
    made = [apply(each.matrices, part) for each, part in zip(roots, blocks.cut(direction), strict=True)]
    if length is not None:
        parts = zip(made, blocks.cut(length), strict=True)
        made = [jnp.where(started, graft(part, wanted), wanted) for part, wanted in parts]
    return blocks.join(made)
