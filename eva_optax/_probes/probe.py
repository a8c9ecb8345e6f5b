"""A probe's leaves: what they are called, where they stand, which shapes they have, and the unit they are stored in.

Beside a kernel stand, as far as they were asked for, zeros for each *statistic*, and one counter:

    a     the kernel's shape, output axes of size 1   <- receives the mean input
    b     the kernel's shape, input axes of size 1    <- receives the summed output cotangent
    y     the shape of a, its last output axis of size r
                                                      <- receives a sketch of the input's second moment: XᵀXΩ / rows
    s     the shape of a, input axes of size 1        <- receives its trace: ‖X‖² / rows
    n     the bias's rank (the kernel's without a bias), its own last axis of size 4
                                                      <- receives 1 per call in the unit of a and b, 1 per call in
                                                         another unit, and the rounding noise of a and of b

The values of a probe are never used: only its gradient is.
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


class LinearMap(KernelShapes, Protocol):
    """How one kind of layer computes its statistics; hashable, because it is static under `jit`."""

    def mean_input(self, x: Array) -> Array:
        """a: the layer's input averaged over batch and positions, at least float32."""
        ...

    def sum_cotangent(self, dy: Array) -> Array:
        """b: the cotangent of the layer's output summed over batch and positions, at least float32."""
        ...

    def sketch(self, x: Array, rank: int) -> Array:
        """y: XᵀXΩ / rows, with the rows of X the inputs of some positions, and Ω of `rank` columns."""
        ...

    def mean_square(self, x: Array) -> Array:
        """s: ‖X‖² / rows, over the same rows."""
        ...


class Statistic(NamedTuple):
    """What a probe's leaf receives.

    Attributes:
      of_input: whether it is made from the layer's input, else from the cotangent of its output.
      compute: makes it from a linear map, that array, and the shape of the leaf.
      shape: its shape beside a kernel, from the rank of sketches.
    """

    of_input: bool
    compute: Callable[[LinearMap, Array, Shape], Array]
    shape: Callable[[KernelShapes, int], Shape]


def _sketch_of(linear_map: LinearMap, x: Array, shape: Shape) -> Array:
    axis = linear_map.last_output_axis
    assert axis is not None
    return linear_map.sketch(x, shape[axis] // linear_map.probe_shapes[0][axis])


def _sketch_shape(shapes: KernelShapes, rank: int) -> Shape:
    """That of a, with as many vectors for each layer, or each group, as there are to tell apart."""
    a, b = shapes.probe_shapes
    axis, columns = shapes.last_output_axis, min(rank, math.prod(i for i, o in zip(a, b, strict=True) if o == 1))
    assert axis is not None
    return (*a[:axis], a[axis] * columns, *a[len(a) + axis + 1 :])


def _trace_shape(shapes: KernelShapes, rank: int) -> Shape:
    a, b = shapes.probe_shapes
    return tuple(1 if o == 1 else i for i, o in zip(a, b, strict=True))


STATISTICS = {
    "a": Statistic(True, lambda linear_map, x, _: linear_map.mean_input(x), lambda shapes, _: shapes.probe_shapes[0]),
    "b": Statistic(
        False, lambda linear_map, dy, _: linear_map.sum_cotangent(dy), lambda shapes, _: shapes.probe_shapes[1]
    ),
    "y": Statistic(True, _sketch_of, _sketch_shape),
    "s": Statistic(True, lambda linear_map, x, _: linear_map.mean_square(x), _trace_shape),
}
VECTORS = ("a", "b")
MOMENT, TRACE = SKETCH = ("y", "s")  # the trace is there wherever second moments are looked at
_RANK = "rank="  # what is collected is told by names; the rank of sketches is one of them


def accumulator(dtype: DTypeLike) -> Any:
    """The dtype in which sums and averages of `dtype` are taken: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def check_statistics(caller: str, statistics: Sequence[str], rank: int | None) -> tuple[str, ...]:
    """The names in their order, and that of the rank.

    Raises:
      ValueError: unless "a" is among them, and all are vectors; if the rank is negative.
    """
    if isinstance(statistics, str) or "a" not in statistics or not set(statistics) <= set(VECTORS):
        raise ValueError(
            f'eva_optax.{caller}: statistics must be ("a", "b") or ("a",), got {statistics!r}. "a" is the mean input, '
            'which every member of the family needs; "b" is the summed cotangent, which scale_by_eva and eva need.'
        )
    names = tuple(name for name in VECTORS if name in statistics)
    if rank is None:
        return names
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
        raise ValueError(
            f"eva_optax.{caller}: rank must be an integer, the number of vectors in the sketch of each layer's inputs "
            f"(16, say; 0 for their mean square alone), or None for no sketch; got {rank!r}."
        )
    return (*names, f"{_RANK}{rank}")


def probe_shapes(shapes: KernelShapes, statistics: Sequence[str], counter: Shape) -> dict[str, Shape]:
    """The shapes of a probe's leaves; `counter` is all 1 but for the axes that are counted each for itself.

    b is left out only where the axes of the kernel are clear without it: not beside a kernel with batch axes. Layers
    without an output axis have no sketch.
    """
    a, b = shapes.probe_shapes
    batched = any(i > 1 and o > 1 for i, o in zip(a, b, strict=True))
    wanted = VECTORS if batched else [name for name in VECTORS if name in statistics]
    rank = next((int(name.removeprefix(_RANK)) for name in statistics if name.startswith(_RANK)), None)
    if rank is not None and shapes.last_output_axis is not None:
        wanted = [*wanted, *(SKETCH if rank else SKETCH[1:])]
    return {name: STATISTICS[name].shape(shapes, rank or 0) for name in wanted} | {COUNTER: (*counter[:-1], NUMBERS)}


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
    return path[-3:-2] == (KRONECKER,) and (path[-1] in STATISTICS or path[-1] == COUNTER)


def name_is_taken(caller: str, path: Path) -> ValueError:
    """The refusal of a module or a parameter that has the name of probes."""
    return ValueError(
        f"eva_optax.{caller}: {'/'.join(path)!r} is no probe, but has {KRONECKER!r} in its path, the name under which "
        "the probes of a layer stand among its parameters. Give the module or parameter of this name another one."
    )
