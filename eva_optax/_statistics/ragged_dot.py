"""Kronecker vectors of `jax.lax.ragged_dot`: rows sorted by expert, one matrix for each expert."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from eva_optax._probes.directions import directions
from eva_optax._probes.linear_map import Moments, statistic_of
from eva_optax._probes.probe import COUNTER, Probe, Shape, accumulator
from eva_optax._probes.statistics import INPUTS, MOMENT, OUTPUTS, TRACE
from eva_optax._probes.tap import tap
from eva_optax._statistics.einsum import Contraction
from eva_optax._statistics.equation import parse_equation, split_terms
from eva_optax._statistics.grouped import GroupedContraction


@dataclass(frozen=True)
class RaggedDot:
    """Experts are the first axis of the kernel; `expert` is what one of them does with one row.

    This is no `LinearMap`: how the vectors are computed depends on the groups' sizes, see `tap_ragged`.
    """

    experts: int
    expert: Contraction | GroupedContraction

    @property
    def kernel_shape(self) -> Shape:
        return self.experts, *self.expert.kernel_shape

    @property
    def probe_shapes(self) -> tuple[Shape, Shape]:
        a, b = self.expert.probe_shapes
        return (self.experts, *a), (self.experts, *b)

    @property
    def last_output_axis(self) -> int | None:
        """Second moments are made where an expert is one matrix that maps a row."""
        rule = self.expert
        is_matrix = isinstance(rule, Contraction) and (rule.x, rule.y) == (*rule.kernel,) and not rule.positions
        return -1 if is_matrix else None

    @property
    def last_input_axis(self) -> int | None:
        return None if self.last_output_axis is None else -2

    is_lookup = False


@dataclass(frozen=True)
class _Expert(Contraction):
    """One expert, whose input holds the statistics of its rows one after the other: a, then A, or s and y if wanted."""

    def mean_input(self, x: Array) -> Array:
        return x[: self.kernel_shape[0], None]

    def mean_square(self, x: Array, rows: int) -> Array:
        return x[self.kernel_shape[0]].reshape(1, 1)

    def sketch(self, x: Array, rank: int, rows: int) -> Array:
        return x[self.kernel_shape[0] + 1 :].reshape(self.kernel_shape[0], rank)

    def input_moment(self, x: Array, moments: Moments) -> Array:
        size = self.kernel_shape[0]
        return x[size:].reshape(size, size)


class _Rows(Contraction):
    """The rows of all experts, whose input is how many each has."""

    def output_moment(self, dy: Array, moments: Moments, group_sizes: Array | None = None) -> Array:
        assert group_sizes is not None
        samples = jnp.sum(jnp.any(dy != 0, 1)) if moments.skip_padding else len(dy)
        return _moments(dy.astype(accumulator(dy.dtype)), group_sizes) * samples


def parse_ragged_dot(
    equation: str, x_shape: Shape, kernel_shape: Shape, y_shape: Shape, groups: Shape
) -> RaggedDot | None:
    """The experts of an equation whose terms begin with rows, experts and rows; None if that does not fit."""
    terms = split_terms(equation)
    if terms is None or groups != kernel_shape[:1] or x_shape[:1] != y_shape[:1] or not all(terms):
        return None
    (row, *x), (expert, *kernel), (first, *y) = terms
    if row != first or row in kernel or expert in (*x, *y, "...") or len({row, expert}) < 2:
        return None
    of_row = "{},{}->{}".format(*("".join(f"({axis})" for axis in term) for term in (x, kernel, y)))
    rule = parse_equation(of_row, x_shape[1:], kernel_shape[1:], y_shape[1:]) if "..." not in equation else None
    return None if rule is None else RaggedDot(groups[0], rule)


def tap_ragged(linear_map: RaggedDot, has_bias: bool, probe: Probe, x: Array, y: Array, group_sizes: Array) -> Array:
    """Returns `y`; differentiated, gives `probe` for each expert the mean of its rows and the sum of their cotangents.

    Args:
      linear_map: what the experts do.
      has_bias: whether a bias is added.
      probe: the probe; its counters have one entry for each expert.
      x: the input, (rows, ...).
      y: the output, (rows, ...).
      group_sizes: the number of rows of each expert, (experts,).

    Returns:
      `y`, unchanged.

    Raises:
      ValueError: if the batch is empty.
    """
    if x.size == 0 or y.size == 0:
        raise ValueError(
            f"eva_optax: a tapped layer got an empty batch (input of shape {x.shape}): its mean input is not defined. "
            "Drop empty batches before the training step."
        )
    (experts,) = group_sizes.shape
    dtype = accumulator(x.dtype)
    # The expert of each row; beyond the last group a number that no expert has.
    expert = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(x.shape[0]), side="right")
    sums = jax.ops.segment_sum(jax.lax.stop_gradient(x).astype(dtype), expert, experts, indices_are_sorted=True)
    rows = jnp.maximum(group_sizes, 1).astype(dtype)
    means, rule = sums / rows.reshape(-1, *(1,) * (x.ndim - 1)), linear_map.expert
    held = {statistic_of(name): leaf for name, leaf in probe.items()}
    if TRACE in held or INPUTS in held:
        rule = _Expert(rule.kernel_shape, "i", "io", "o", positions="")
        x = jax.lax.stop_gradient(x).astype(dtype)
        more = [_moments(x, group_sizes)] if INPUTS in held else []
        if TRACE in held:
            more.append(jax.ops.segment_sum(jnp.sum(x * x, 1), expert, experts, indices_are_sorted=True)[:, None])
        if MOMENT in held:
            more.append(_moments(x, group_sizes, directions(x.shape[1:], held[MOMENT].shape[-1], dtype)))
        more = [moment.reshape(experts, -1) / rows[:, None] for moment in more]
        means = jnp.concatenate([means, *more], 1)
    # An expert without rows counts as not used. The probe's values do not matter, its cotangent is what is scaled.
    used = group_sizes > 0
    probe = {name: leaf * used.astype(leaf.dtype).reshape(-1, *(1,) * (leaf.ndim - 1)) for name, leaf in probe.items()}
    outputs = {name: probe.pop(name) for name in list(probe) if statistic_of(name) == OUTPUTS}
    if outputs:
        # The counters of the experts are below; who asks for these gets nothing.
        outputs[COUNTER] = jnp.zeros_like(probe[COUNTER][0])
        rows_of_all = _Rows(linear_map.expert.kernel_shape, "i", "io", "o", positions="")
        y = tap(rows_of_all, False, outputs, group_sizes, y, keeps_input=True)
    # Zeros added to the rows of each expert: their cotangent is the sum over these rows.
    added = jnp.zeros((experts, *y.shape[1:]), accumulator(y.dtype))
    added = jax.vmap(partial(tap, rule, has_bias))(probe, means, added)
    return y + jnp.take(added, expert, axis=0, mode="fill", fill_value=0).astype(y.dtype)


def _moments(x: Array, group_sizes: Array, omega: Array | None = None) -> Array:
    """XᵀXΩ of the rows X of each expert; without Ω all of XᵀX."""
    product = partial(jax.lax.ragged_dot, x, group_sizes=group_sizes, precision=jax.lax.Precision.HIGHEST)
    columns = x.shape[1] if omega is None else omega.shape[1]
    kernel = jax.ShapeDtypeStruct((len(group_sizes), x.shape[1], columns), x.dtype)
    z = x if omega is None else product(jnp.broadcast_to(omega, kernel.shape))
    return jax.linear_transpose(product, kernel)(z)[0]
