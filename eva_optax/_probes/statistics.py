"""The statistics by name: what each leaf of a probe receives, and which shape it has."""

import math
from collections.abc import Callable
from typing import NamedTuple

from jax import Array

from eva_optax._probes.linear_map import KernelShapes, LinearMap, Moments, PairsRows
from eva_optax._probes.probe import Shape

SKETCH_ROWS = 512  # running averages see other rows at each step


class Statistic(NamedTuple):
    """What a probe's leaf receives.

    Attributes:
      of_input: whether it is made from the layer's input, else from the cotangent of its output.
      compute: makes it from a linear map, that array, the shape of the leaf, what its name says, and where both
        are looked at from the other array too.
      shape: its shape beside a kernel, from the rank of sketches.
    """

    of_input: bool
    compute: Callable[..., Array]
    shape: Callable[[KernelShapes, int], Shape]


def _sketch_of(linear_map: LinearMap, x: Array, shape: Shape, moments: Moments) -> Array:
    axis = linear_map.last_output_axis
    assert axis is not None
    return linear_map.sketch(x, shape[axis] // linear_map.probe_shapes[0][axis], moments.rows or SKETCH_ROWS)


def _mean_square_of(linear_map: LinearMap, x: Array, shape: Shape, moments: Moments) -> Array:
    return linear_map.mean_square(x, moments.rows or SKETCH_ROWS)


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


def _input_moment_of(linear_map: LinearMap, x: Array, _: Shape, moments: Moments, dy: Array | None = None) -> Array:
    if dy is not None and isinstance(linear_map, PairsRows):
        x = linear_map.without_padding(x, dy, moments.sharing)
    return linear_map.input_moment(x, moments)


STATISTICS = {
    "a": Statistic(True, lambda layer, x, *_: layer.mean_input(x), lambda shapes, _: shapes.probe_shapes[0]),
    "b": Statistic(False, lambda layer, dy, *_: layer.sum_cotangent(dy), lambda shapes, _: shapes.probe_shapes[1]),
    "y": Statistic(True, _sketch_of, _sketch_shape),
    "s": Statistic(True, _mean_square_of, _trace_shape),
    "A": Statistic(True, _input_moment_of, _input_moment_shape),
    "B": Statistic(False, lambda layer, dy, _, *others: layer.output_moment(dy, *others), _output_moment_shape),
    "D": Statistic(True, lambda layer, x, *_: layer.mean_input(x), lambda shapes, _: shapes.probe_shapes[0]),
}
VECTORS = ("a", "b")
MOMENT, TRACE = SKETCH = ("y", "s")  # the trace is there wherever second moments are looked at
INPUTS, OUTPUTS, DIAGONAL = FACTORS = ("A", "B", "D")
