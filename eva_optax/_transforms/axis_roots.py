"""The driver of Shampoo: statistics of every step, roots of some, and the length of another method's step."""

from collections.abc import Callable, Sequence
from functools import reduce
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


class _Parameter(NamedTuple):
    """A parameter that is no probe: its name, its place among the leaves, how it is cut, and the dtype of averages."""

    name: str
    place: int
    blocks: Blocks
    dtype: Any

    @property
    def shapes(self) -> list[list[tuple[int, int, int]]]:
        """Those of its statistics, and of its roots, by region and axis."""
        return [[(region.total, size, size) for size in region.block] for region in self.blocks.regions]

    def statistics(self) -> tuple[tuple[Array, ...], ...]:
        """Zeros."""
        return tuple(tuple(jnp.zeros(shape, self.dtype) for shape in axes) for axes in self.shapes)

    def roots(self) -> tuple[Roots, ...]:
        """Identities."""

        def identity(shape: tuple[int, int, int]) -> Array:
            return jnp.broadcast_to(jnp.eye(shape[-1], dtype=self.dtype), shape)

        return tuple(
            Roots(
                tuple(map(identity, axes)),
                jnp.ones((axes[0][0], 1, 1), self.dtype),
                jnp.zeros((axes[0][0], 1, 1), jnp.int32),
            )
            for axes in self.shapes
        )


def precondition_axes(caller: str, options: Options) -> optax.GradientTransformation:
    """The transformation of `scale_by_shampoo`, for another function's messages."""
    options.check(caller)

    def init(params: Any) -> ShampooState:
        tree = take_apart(params)
        check_nested(caller, tree)
        check_names(caller, tree)
        parameters = _find_parameters(tree, options)
        zeros = hide_places(tree, [jnp.zeros_like(leaf, accumulator(leaf.dtype)) for leaf in tree.leaves])
        # `optax.tree.map_params` gives no parameters: one leaf then stands for what has not the form of parameters.
        return ShampooState(
            count=jnp.zeros((), jnp.int32),
            observed=jnp.zeros(len(parameters), jnp.int32),
            statistics={each.name: each.statistics() for each in parameters} or jnp.zeros(()),
            roots={each.name: each.roots() for each in parameters} or jnp.zeros(()),
            second_moments=zeros if options.has_second_moments else (),
            means=zeros if options.has_means else (),
            skipped=jnp.zeros((), jnp.int32),
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ShampooState]:
        del params
        check_state(caller, state, ShampooState)
        tree = take_apart(updates)
        parameters = _find_parameters(tree, options)
        _check_fit(caller, parameters, state)
        step = jnp.asarray(optax.safe_increment(state.count))
        taken = _Taken.of([tree.leaves[each.place] for each in parameters], state.observed)
        gradients = taken.gradients

        cut = [each.blocks.cut(replicate(g)) for each, g in zip(parameters, gradients, strict=True)]
        new = [tuple(map(moments, parts)) for parts in cut]
        statistics = taken.average([state.statistics[each.name] for each in parameters], new, options.decay)
        old = [state.roots[each.name] for each in parameters]
        roots, failed = _renew(lambda: taken.correct(statistics, options.decay), statistics, old, step, options)

        means, second_moments, directions = [], [], gradients
        if options.has_means:
            means = taken.average(jax.tree.leaves(state.means), gradients, options.b1)
            directions = taken.correct(means, options.b1)
        lengths: Sequence[Array | None] = directions if options.graft == "grad" else [None] * len(parameters)
        if options.has_second_moments:
            squares = [jnp.square(gradient) for gradient in gradients]
            second_moments = taken.average(jax.tree.leaves(state.second_moments), squares, options.graft_decay)
            lengths = _normalize(directions, second_moments, taken, options)

        leaves = [jnp.zeros_like(leaf) for leaf in tree.leaves]
        started = step >= jnp.asarray(options.start, step.dtype)
        for index, each in enumerate(parameters):
            leaf = tree.leaves[each.place]
            made = _precondition(each.blocks, directions[index], lengths[index], roots[index], started)
            leaves[each.place] = jnp.where(taken.valid[index], shard_like(made.astype(leaf.dtype), leaf), leaf)
        names = [each.name for each in parameters]
        return tree.rebuild(leaves), ShampooState(
            count=step,
            observed=taken.observed,
            statistics=dict(zip(names, statistics, strict=True)) or state.statistics,
            roots=dict(zip(names, roots, strict=True)) or state.roots,
            second_moments=jax.tree.unflatten(jax.tree.structure(state.second_moments), second_moments),
            means=jax.tree.unflatten(jax.tree.structure(state.means), means),
            skipped=state.skipped + jnp.sum(~taken.valid, dtype=jnp.int32) + failed,
        )

    return optax.GradientTransformation(init, update)


def _find_parameters(tree: Tree, options: Options) -> list[_Parameter]:
    def blocks(leaf: Any) -> Blocks:
        return find_blocks(tuple(jnp.shape(leaf)), options.block, options.merge)

    return [
        _Parameter("/".join(path), place, blocks(leaf), accumulator(leaf.dtype))
        for place, (path, leaf) in enumerate(tree.items())
        if not is_probe(path)
    ]


def _check_fit(caller: str, parameters: Sequence[_Parameter], state: ShampooState) -> None:
    """Raises ValueError if the state is of other parameters, or was made with other options."""
    held = state.statistics if isinstance(state.statistics, dict) else {}
    wanted = {each.name: [shape for axes in each.shapes for shape in axes] for each in parameters}
    found = {name: [jnp.shape(leaf) for leaf in jax.tree.leaves(part)] for name, part in held.items()}
    for name in {**wanted, **found}:
        if wanted.get(name) != found.get(name):
            raise ValueError(
                f"eva_optax.{caller}: the state does not fit the gradients: of {name!r} it has statistics of shapes "
                f"{found.get(name, 'nothing')}, the gradients want {wanted.get(name, 'nothing')}. Make the state with "
                "tx.init(params), from the parameters that are trained, and with the same block and merge."
            )


class _Taken(NamedTuple):
    """The gradients of a step, as they are taken into averages.

    Attributes:
      gradients: at least float32; zeros in the place of one that is not finite, or whose squares are not.
      valid: which parameters have another.
      observed: how many each had until now.
    """

    gradients: list[Array]
    valid: Array
    observed: Array

    @classmethod
    def of(cls, leaves: Sequence[ArrayLike], observed: Array) -> Self:
        """Of the gradients of all parameters."""
        arrays = [jnp.asarray(leaf) for leaf in leaves]
        gradients = [array.astype(accumulator(array.dtype)) for array in arrays]
        # The sum of squares is the trace of every statistic, whose entries are not larger.
        valid = [jnp.isfinite(jnp.sum(jnp.square(gradient))) for gradient in gradients]
        usable = [jnp.where(good, gradient, 0) for good, gradient in zip(valid, gradients, strict=True)]
        return cls(usable, jnp.array(valid, bool), observed + jnp.array(valid, jnp.int32))

    def _weight(self, decay: ArrayLike) -> Array:
        return jnp.asarray(decay, jnp.result_type(jnp.float32, *self.gradients))

    def average(self, old: Sequence[Any], new: Sequence[Any], decay: ArrayLike) -> list[Any]:
        """decay·old + (1 − decay)·new for a tree of each parameter; the sum for a decay of 1."""
        weight = self._weight(decay)
        share = jnp.where(weight < 1, 1 - weight, 1)
        weights = jnp.where(self.valid, weight, 1)  # the new is zero where it is not valid
        return [
            jax.tree.map(_mix(weights[index], share), *trees) for index, trees in enumerate(zip(old, new, strict=True))
        ]

    def correct(self, averages: Sequence[Any], decay: ArrayLike) -> list[Any]:
        """Averages divided by the weight of all that they have taken in, which started at zero."""
        weight = self._weight(decay)
        totals = jnp.where((weight < 1) & (self.observed > 0), 1 - weight**self.observed, 1)
        return [jax.tree.map(_divide(totals[index]), tree) for index, tree in enumerate(averages)]


def _mix(weight: Array, share: Array) -> Callable[[Array, Array], Array]:
    return lambda old, new: weight.astype(old.dtype) * old + share.astype(old.dtype) * new


def _divide(total: Array) -> Callable[[Array], Array]:
    return lambda average: average / total.astype(average.dtype)


def _renew(
    corrected: Callable[[], Sequence[Any]], statistics: Sequence[Any], old: Sequence[Any], step: Array, options: Options
) -> tuple[list[tuple[Roots, ...]], Array]:
    """The roots of each parameter's regions after a step, and how many blocks kept old ones that were to be renewed."""

    def roots(stack: Array, exponents: Array) -> Power:
        return power(stack, exponents, options.epsilon, options.relative)

    def make() -> list[Roots]:
        regions = [axes for regions in corrected() for axes in regions]
        matrices = [matrix for axes in regions for matrix in axes]
        exponents = [
            -1 / (2 * len(axes)) if options.exponent is None else options.exponent for axes in regions for _ in axes
        ]
        powers = iter(in_stacks(roots, matrices, exponents))
        made = []
        for axes in regions:
            matrices, conditions = zip(*(next(powers) for _ in axes), strict=True)
            made.append(Roots(matrices, reduce(jnp.maximum, conditions), jnp.full(conditions[0].shape, step)))
        return made

    start, every = (jnp.asarray(number, step.dtype) for number in (options.start, options.every))
    due = (step == start) | ((step > start) & (step % every == 0))
    chosen, new = renew(due, make, [roots for regions in old for roots in regions])
    failed = jnp.zeros((), jnp.int32)
    for axes, made in zip((axes for regions in statistics for axes in regions), new, strict=True):
        # Zeros are no failure: there was no gradient yet.
        failed += jnp.sum(due & ~made & (jnp.trace(axes[0], axis1=1, axis2=2) != 0), dtype=jnp.int32)
    remaining = iter(chosen)
    return [tuple(next(remaining) for _ in regions) for regions in old], failed


def _normalize(
    directions: Sequence[Array], second_moments: Sequence[Array], taken: _Taken, options: Options
) -> list[Array]:
    """The steps of RMSprop or Adam."""
    squares = taken.correct(second_moments, options.graft_decay) if options.graft == "adam" else second_moments
    return [
        direction / (jnp.sqrt(square) + jnp.asarray(options.graft_epsilon, square.dtype))
        for direction, square in zip(directions, squares, strict=True)
    ]


def _precondition(
    blocks: Blocks, direction: Array, length: Array | None, roots: Sequence[Roots], started: Array
) -> Array:
    """A parameter's update; `length` is what is grafted."""
    if not blocks.regions:
        return direction if length is None else length
    made = [apply(root.matrices, part) for root, part in zip(roots, blocks.cut(replicate(direction)), strict=True)]
    if length is not None:
        parts = zip(made, blocks.cut(replicate(length)), strict=True)
        made = [jnp.where(started, graft(part, wanted), wanted) for part, wanted in parts]
    return blocks.join(made)
