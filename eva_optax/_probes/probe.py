"""A probe's leaves: what they are called, where they stand, which shapes they have, and the unit they are stored in.

Beside a kernel stand, as far as they were asked for, zeros for each *statistic*, and one counter:

    a     the kernel's shape, output axes of size 1   <- receives the mean input
    b     the kernel's shape, input axes of size 1    <- receives the summed output cotangent
    y     the shape of a, its last output axis of size r
                                                      <- receives a sketch of the input's second moment: XᵀXΩ / rows
    s     the shape of a, input axes of size 1        <- receives its trace: ‖X‖² / rows
    A     the shape of y with as many columns as inputs
                                                      <- receives the input's second moment: XᵀX / rows
    B     the shape of b, its last input axis of the size of the outputs
                                                      <- receives that of the output's cotangent: samples · dYᵀdY
    D     the shape of a, beside embeddings           <- receives the diagonal of A, which is all there is of it
    n     the bias's rank (the kernel's without a bias), its own last axis of size 4
                                                      <- receives 1 per call in the unit of a and b, 1 per call in
                                                         another unit, and the rounding noise of a and of b

The values of a probe are never used: only its gradient is. What A and B are to be made of stands in their names, behind
a comma, see `Moments`.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

KRONECKER = "kronecker"
COUNTER = "n"

Path = tuple[str, ...]
Shape = tuple[int, ...]
Probe = dict[str, Any]

NUMBERS = 4  # of a counter

# Stored in this unit the statistics are far below the rounding of any gradient, so that a global norm or a clip that
# is placed before Eva does not see them. A power of two: only exponents change. Half precision has no exponents
# that small; its unit is one that no sign or other function of single entries leaves behind (see `find_unit`).
UNIT = 2.0**-40
HALF_UNIT = 0.5

# The unit of a counter's second number, for each unit. Every linear operation changes both numbers alike, up to
# rounding. What divides entries by their own size and some eps does not, unless the eps is far larger than both: the
# second number is as large as norms allow: those of gradients from 2e-5 on do not see it.
CHECK_UNITS = {UNIT: 2.0**-28, HALF_UNIT: 0.25}
RATIO_TOLERANCE = 2.0**-16


class KernelShapes(Protocol):
    """What stands beside one kind of kernel."""

    @property
    def kernel_shape(self) -> Shape: ...

    @property
    def probe_shapes(self) -> tuple[Shape, Shape]:
        """Shapes of a and of b."""
        ...

    @property
    def last_output_axis(self) -> int | None:
        """The kernel's axis that has the vectors of a sketch instead, counted from the end; None without one."""
        ...

    @property
    def last_input_axis(self) -> int | None:
        """The kernel's axis that has the columns of B instead, counted from the end; None without B."""
        ...

    @property
    def is_lookup(self) -> bool:
        """Whether its inputs are one-hot, so that A is diagonal."""
        ...


class LinearMap(KernelShapes, Protocol):
    """How one kind of layer computes its statistics; hashable, because it is static under `jit`."""

    def mean_input(self, x: Array) -> Array:
        """a: the layer's input averaged over batch and positions, at least float32."""
        ...

    def sum_cotangent(self, dy: Array) -> Array:
        """b: the cotangent of the layer's output summed over batch and positions, at least float32."""
        ...

    def sketch(self, x: Array, rank: int, rows: int) -> Array:
        """y: XᵀXΩ / rows, with the rows of X the inputs of about so many positions, and Ω of `rank` columns."""
        ...

    def mean_square(self, x: Array, rows: int) -> Array:
        """s: ‖X‖² / rows, over the same rows."""
        ...

    def input_moment(self, x: Array, moments: "Moments") -> Array:
        """A: XᵀX / rows."""
        ...

    def output_moment(self, dy: Array, moments: "Moments") -> Array:
        """B: samples · dYᵀdY, with the rows of dY the cotangents of the layer's output."""
        ...


class Moments(NamedTuple):
    """What a second moment is made of, as it stands in its name behind a comma: "A", "A,reduce", "B,rows=512".

    Attributes:
      sharing: "expand", each position is a row; "reduce", the mean of a sample's inputs and the sum of its cotangents
        are one row.
      rows: about so many rows are looked at; None for all, for sketches 512.
    """

    sharing: str = "expand"
    rows: int | None = None

    @classmethod
    def of(cls, leaf: str) -> "Moments":
        """Reads the name of a leaf."""
        words = leaf.split(",")[1:]
        rows = next((int(word.removeprefix(_ROWS)) for word in words if word.startswith(_ROWS)), None)
        return cls("reduce" if "reduce" in words else "expand", rows)

    def name(self, statistic: str) -> str:
        """The name of the leaf of a statistic."""
        rows = () if self.rows is None else (f"{_ROWS}{self.rows}",)
        return ",".join([statistic, *(() if self.sharing == "expand" else (self.sharing,)), *rows])


def statistic_of(leaf: str) -> str:
    """The statistic that a leaf of this name receives."""
    return leaf.partition(",")[0]


class Statistic(NamedTuple):
    """What a probe's leaf receives.

    Attributes:
      of_input: whether it is made from the layer's input, else from the cotangent of its output.
      compute: makes it from a linear map, that array, the shape of the leaf, and what its name says.
      shape: its shape beside a kernel, from the rank of sketches.
    """

    of_input: bool
    compute: Callable[[LinearMap, Array, Shape, Moments], Array]
    shape: Callable[[KernelShapes, int], Shape]


def _sketch_of(linear_map: LinearMap, x: Array, shape: Shape, moments: Moments) -> Array:
    axis = linear_map.last_output_axis
    assert axis is not None
    return linear_map.sketch(x, shape[axis] // linear_map.probe_shapes[0][axis], moments.rows or _SKETCH_ROWS)


def _mean_square_of(linear_map: LinearMap, x: Array, shape: Shape, moments: Moments) -> Array:
    return linear_map.mean_square(x, moments.rows or _SKETCH_ROWS)


def _sketch_shape(shapes: KernelShapes, rank: int) -> Shape:
    """That of a, with as many vectors for each layer, or each group, as there are to tell apart."""
    a, axis, columns = shapes.probe_shapes[0], shapes.last_output_axis, min(rank, inputs_of(shapes))
    assert axis is not None
    return (*a[:axis], a[axis] * columns, *a[len(a) + axis + 1 :])


def _trace_shape(shapes: KernelShapes, rank: int) -> Shape:
    a, b = shapes.probe_shapes
    return tuple(1 if o == 1 else i for i, o in zip(a, b, strict=True))


def _input_moment_shape(shapes: KernelShapes, _: int) -> Shape:
    return _sketch_shape(shapes, math.prod(shapes.kernel_shape))


def _output_moment_shape(shapes: KernelShapes, _: int) -> Shape:
    """That of b, its last input axis with a column for each output of a layer, or of a group."""
    b, axis = shapes.probe_shapes[1], shapes.last_input_axis
    assert axis is not None
    return (*b[:axis], outputs_of(shapes), *b[len(b) + axis + 1 :])


def inputs_of(shapes: KernelShapes) -> int:
    """The number of inputs of a layer, or of each that stand side by side."""
    return math.prod(i for i, o in zip(*shapes.probe_shapes, strict=True) if o == 1)


def outputs_of(shapes: KernelShapes) -> int:
    """The number of outputs of a layer, or of each that stand side by side."""
    return math.prod(o // i for i, o in zip(*shapes.probe_shapes, strict=True) if o > 1)


STATISTICS = {
    "a": Statistic(True, lambda layer, x, *_: layer.mean_input(x), lambda shapes, _: shapes.probe_shapes[0]),
    "b": Statistic(False, lambda layer, dy, *_: layer.sum_cotangent(dy), lambda shapes, _: shapes.probe_shapes[1]),
    "y": Statistic(True, _sketch_of, _sketch_shape),
    "s": Statistic(True, _mean_square_of, _trace_shape),
    "A": Statistic(True, lambda layer, x, _, moments: layer.input_moment(x, moments), _input_moment_shape),
    "B": Statistic(False, lambda layer, dy, _, moments: layer.output_moment(dy, moments), _output_moment_shape),
    "D": Statistic(True, lambda layer, x, *_: layer.mean_input(x), lambda shapes, _: shapes.probe_shapes[0]),
}
VECTORS = ("a", "b")
MOMENT, TRACE = SKETCH = ("y", "s")  # the trace is there wherever second moments are looked at
INPUTS, OUTPUTS, DIAGONAL = FACTORS = ("A", "B", "D")
# What is collected is told by names, of statistics and of these.
_RANK, _FACTORS, _LARGEST, _SHARING, _ROWS = "rank=", "factors=", "max_dim=", "sharing=", "rows="
_SKETCH_ROWS = 512  # running averages see other rows at each step


def accumulator(dtype: DTypeLike) -> Any:
    """The dtype in which sums and averages of `dtype` are taken: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def check_statistics(
    caller: str,
    statistics: Sequence[str],
    rank: int | None,
    factors: str | None = None,
    max_dim: int = 8192,
    sharing: str = "expand",
    factor_rows: int | None = None,
) -> tuple[str, ...]:
    """The names of statistics in their order, and of what else says how they are collected.

    Raises:
      ValueError: unless "a" is among them, and all are vectors; if another option is out of its range.
    """
    if isinstance(statistics, str) or "a" not in statistics or not set(statistics) <= set(VECTORS):
        raise ValueError(
            f'eva_optax.{caller}: statistics must be ("a", "b") or ("a",), got {statistics!r}. "a" is the mean input, '
            'which every member of the family needs; "b" is the summed cotangent, which scale_by_eva and eva need.'
        )
    names = tuple(name for name in VECTORS if name in statistics)
    if rank is not None and not _is_integer(rank, 0):
        raise ValueError(
            f"eva_optax.{caller}: rank must be an integer, the number of vectors in the sketch of each layer's inputs "
            f"(16, say; 0 for their mean square alone), or None for no sketch; got {rank!r}."
        )
    names = names if rank is None else (*names, f"{_RANK}{rank}")
    if factors not in (None, "input", "both"):
        raise ValueError(
            f'eva_optax.{caller}: factors must be "input" (the second moment of each layer\'s inputs, for FOOF), '
            f'"both" (that of the cotangents of its outputs too, for K-FAC), or None; got {factors!r}.'
        )
    if factors and rank is not None:
        raise ValueError(
            f"eva_optax.{caller}: rank={rank} asks for a sketch of the second moments that factors={factors!r} "
            "collects whole. Leave one of them out."
        )
    if sharing not in ("expand", "reduce"):
        raise ValueError(
            f'eva_optax.{caller}: sharing must be "expand" (each position of a sequence or an image is a row) or '
            f'"reduce" (each sample is one), got {sharing!r}.'
        )
    for name, value in (("max_dim", max_dim), ("factor_rows", factor_rows)):
        if not (_is_integer(value, 1) or (name == "factor_rows" and value is None)):
            raise ValueError(f"eva_optax.{caller}: {name} must be a positive integer, got {value!r}.")
    if factor_rows is not None and sharing == "reduce":
        raise ValueError(
            f'eva_optax.{caller}: factor_rows={factor_rows} looks at some of the positions, sharing="reduce" sums over '
            "all of a sample. Leave one of them out."
        )
    if sharing == "reduce" and not factors:
        raise ValueError(
            f'eva_optax.{caller}: sharing="reduce" says what the rows of factors are; add factors="input" or "both".'
        )
    rows = () if factor_rows is None else (f"{_ROWS}{factor_rows}",)
    if factors:
        names = (*names, f"{_FACTORS}{factors}", f"{_LARGEST}{max_dim}", f"{_SHARING}{sharing}")
    return (*names, *rows) if factors or rank is not None else names


def _is_integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def probe_shapes(shapes: KernelShapes, statistics: Sequence[str], counter: Shape) -> dict[str, Shape]:
    """The shapes of a probe's leaves; `counter` is all 1 but for the axes that are counted each for itself.

    b is left out only where the axes of the kernel are clear without it: not beside a kernel with batch axes. Layers
    without an output axis have no sketch. A side that is too large for a matrix keeps its vector.
    """
    a, b = shapes.probe_shapes
    batched = any(i > 1 and o > 1 for i, o in zip(a, b, strict=True))
    factors = _factors(shapes, statistics)
    large = _option(statistics, _FACTORS) == "both" and OUTPUTS not in map(statistic_of, factors)
    wanted = VECTORS if batched or large else [name for name in VECTORS if name in statistics]
    rank = _option(statistics, _RANK)
    if rank is not None and shapes.last_output_axis is not None:
        rows = _moments(statistics)
        wanted = [*wanted, *(rows.name(name) for name in (SKETCH if int(rank) else SKETCH[1:]))]
    leaves = {name: STATISTICS[statistic_of(name)].shape(shapes, int(rank or 0)) for name in (*wanted, *factors)}
    return leaves | {COUNTER: (*counter[:-1], NUMBERS)}


def _factors(shapes: KernelShapes, statistics: Sequence[str]) -> list[str]:
    """The names of a probe's matrices."""
    wanted, largest = _option(statistics, _FACTORS), int(_option(statistics, _LARGEST) or 0)
    if wanted is None:
        return []
    moments, found = _moments(statistics), []
    if shapes.is_lookup:
        found.append(DIAGONAL)
    elif shapes.last_output_axis is not None and inputs_of(shapes) <= largest:
        found.append(moments.name(INPUTS))
    if wanted == "both" and shapes.last_input_axis is not None and outputs_of(shapes) <= largest:
        found.append(moments.name(OUTPUTS))
    return found


def _moments(statistics: Sequence[str]) -> Moments:
    rows = _option(statistics, _ROWS)
    return Moments(_option(statistics, _SHARING) or "expand", None if rows is None else int(rows))


def _option(statistics: Sequence[str], prefix: str) -> str | None:
    """What stands behind `prefix` among what is to be collected."""
    return next((name.removeprefix(prefix) for name in statistics if name.startswith(prefix)), None)


def make_probe(shapes: dict[str, Shape], dtype: DTypeLike) -> Probe:
    """A probe of zeros beside a kernel of `dtype`."""
    return {name: jnp.zeros(shape, accumulator(dtype)) for name, shape in shapes.items()}


def unit_of(dtype: DTypeLike) -> float:
    """The unit that a leaf of this dtype is stored in."""
    return HALF_UNIT if dtype == jnp.float16 else UNIT


def find_unit(ratio: Array) -> Array:
    """The unit of counters whose first number is `ratio` times the second; 0 if they are no tap's."""

    def otherwise(unit: float, other: ArrayLike) -> Array:
        return jnp.where(jnp.abs(ratio * (CHECK_UNITS[unit] / unit) - 1) < RATIO_TOLERANCE, unit, other)

    return otherwise(UNIT, otherwise(HALF_UNIT, jnp.zeros_like(ratio)))


def probe_name(kernel: str, bias: str | None) -> str:
    """The name under which the probe of these parameters stands in the layer's "kronecker" dict."""
    return kernel if bias is None else f"{kernel},{bias}"


def probe_axis_names(leaf: str, shape: Shape, kernel_shape: Shape, names: Sequence[Any]) -> tuple[Any, ...]:
    """The partition names of a probe's leaf: those of the kernel's axes that it shares; counters are replicated."""
    if leaf == COUNTER:
        return (None,) * len(shape)
    padded = (*names, *(None,) * (len(shape) - len(names)))
    sizes = zip(padded, shape, kernel_shape, strict=True)
    return tuple(name if size == full > 1 else None for name, size, full in sizes)


def path_names(path: Sequence[Hashable]) -> Path:
    """A JAX key path as a tuple of names, without the box around a leaf.

    Paths are compared as tuples of names, so that dicts, FrozenDicts, states and boxes with partition names (whose
    inner value adds a trailing ".value") all look alike.
    """
    names = tuple(_key_name(key) for key in path)
    return names[:-1] if names and isinstance(path[-1], jax.tree_util.GetAttrKey) and names[-1] == "value" else names


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def is_probe(path: Path) -> bool:
    """Whether the leaf at `path` belongs to a probe."""
    return KRONECKER in path


def is_probe_leaf(path: Path) -> bool:
    """Whether `path` has the form of a leaf of a probe; what else stands below their name is somebody else's."""
    return path[-3:-2] == (KRONECKER,) and (statistic_of(path[-1]) in STATISTICS or path[-1] == COUNTER)


def name_is_taken(caller: str, path: Path) -> ValueError:
    """The refusal of a module or a parameter that has the name of probes."""
    return ValueError(
        f"eva_optax.{caller}: {'/'.join(path)!r} is no probe, but has {KRONECKER!r} in its path, the name under which "
        "the probes of a layer stand among its parameters. Give the module or parameter of this name another one."
    )
