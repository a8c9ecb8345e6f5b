"""The driver of Shampoo: statistics of every step, roots of some, and the length of another method's step."""

from collections.abc import Sequence
from functools import partial, reduce
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from eva_optax._curvature.amortized import in_stacks, renew
from eva_optax._curvature.blocks import Blocks
from eva_optax._curvature.roots import Power, power
from eva_optax._curvature.shampoo import Roots, apply, graft
from eva_optax._probes.layers import take_apart
from eva_optax._probes.placement import vary_like
from eva_optax._probes.probe import accumulator
from eva_optax._transforms.hidden_probes import hide_places
from eva_optax._transforms.options import check_decay, check_names, check_nested, check_positive
from eva_optax._transforms.parameter_stacks import Taken, check_fit, find_stacks
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
    def averages(self) -> dict[str, bool]:
        """Which averages are kept beside the statistics; those of gradients unless b1 is known to be 0."""
        no_means = isinstance(self.b1, int | float) and self.b1 == 0
        return {"second_moments": self.graft in ("rms", "adam"), "means": not no_means}

    def check(self, caller: str) -> None:
        """Raises ValueError for an option out of its range."""
        check_positive(caller, epsilon=self.epsilon, every=self.every, start=self.start)
        check_positive(caller, graft_epsilon=self.graft_epsilon)
        check_decay(caller, self.decay, up_to_one=True)
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


def precondition_axes(caller: str, options: Options) -> optax.GradientTransformation:
    """The transformation of `scale_by_shampoo`, for another function's messages."""
    options.check(caller)

    def init(params: Any) -> ShampooState:
        tree = take_apart(params)
        check_nested(caller, tree)
        check_names(caller, tree)
        stacks = find_stacks(tree, options.block, options.merge)

        def zeros() -> Any:
            return hide_places(tree, [jnp.zeros_like(leaf, accumulator(leaf.dtype)) for leaf in tree.leaves])

        averages = {name: zeros() if kept else () for name, kept in options.averages.items()}
        # `optax.tree.map_params` gives no parameters: one leaf then stands for what has not the form of parameters.
        return ShampooState(
            count=jnp.zeros((), jnp.int32),
            observed={each.name: jnp.zeros(len(each.places), jnp.int32) for each in stacks} or jnp.zeros(()),
            statistics={each.name: each.statistics() for each in stacks} or jnp.zeros(()),
            roots={each.name: each.roots() for each in stacks} or jnp.zeros(()),
            **averages,
            skipped=jnp.zeros((), jnp.int32),
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, ShampooState]:
        del params
        check_state(caller, state, ShampooState)
        tree = take_apart(updates)
        stacks = find_stacks(tree, options.block, options.merge)
        check_fit(caller, stacks, state, options.averages)
        step = jnp.asarray(optax.safe_increment(state.count))
        taken = [Taken.of(each, tree.leaves, state, options.decay) for each in stacks]
        roots, failed = _renew(taken, [state.roots[each.name] for each in stacks], step, options)

        leaves = [jnp.zeros_like(leaf) for leaf in tree.leaves]
        means, second_moments = (jax.tree.leaves(part) for part in (state.means, state.second_moments))
        started = step >= jnp.asarray(options.start, step.dtype)
        for each, kept in zip(taken, roots, strict=True):
            direction, length = each.gradient, None
            if options.averages["means"]:
                mean = each.average(means, each.gradient, options.b1)
                direction = mean / each.total(options.b1, mean)
            if options.averages["second_moments"]:
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


def _renew(
    taken: Sequence[Taken], old: Sequence[tuple[Roots, ...]], step: Array, options: Options
) -> tuple[list[tuple[Roots, ...]], Array]:
    """The roots after a step, and how many blocks kept old ones that were to be renewed."""
    regions = [(each, axes) for each in taken for axes in each.statistics]

    def damped(stack: Array, exponents: Array, totals: Array) -> Power:
        return power(stack / totals[:, None, None], exponents, options.epsilon, options.relative)

    def make() -> list[Roots]:
        matrices, exponents, totals = [], [], []
        for each, axes in regions:
            matrices += axes
            exponents += [-1 / (2 * len(axes)) if options.exponent is None else options.exponent] * len(axes)
            totals += [each.total(options.decay, axes[0])[..., 0, 0]] * len(axes)
        powers = iter(in_stacks(damped, matrices, exponents, totals))
        made = []
        for _, axes in regions:
            chosen, conditions = zip(*(next(powers) for _ in axes), strict=True)
            made.append(Roots(chosen, reduce(jnp.maximum, conditions), jnp.full(conditions[0].shape, step)))
        return made

    start, every = (jnp.asarray(number, step.dtype) for number in (options.start, options.every))
    due = (step == start) | ((step > start) & (step % every == 0))
    kept = [each for roots in old for each in roots]
    kept = [jax.tree.map(partial(vary_like, leaf=axes[0]), part) for part, (_, axes) in zip(kept, regions, strict=True)]
    chosen, new = renew(due, make, kept)
    failed = jnp.zeros((), jnp.int32)
    for (_, axes), made in zip(regions, new, strict=True):
        # Zeros are no failure: there was no gradient yet.
        failed += jnp.sum(due & ~made & (jnp.trace(axes[0], axis1=2, axis2=3) != 0), dtype=jnp.int32)
    remaining = iter(chosen)
    return [tuple(next(remaining) for _ in roots) for roots in old], failed


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
