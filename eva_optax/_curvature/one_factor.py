"""One factor of a layer's curvature: what is known of the second moment of its inputs, or of its outputs' cotangents.

There is the whole matrix, its diagonal where that is all, a sketch of it, the mean and the mean square, or the mean
vector alone. Gradients are multiplied by powers of them along the kernel's input or output axes.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from eva_optax._curvature.along_axes import Along
from eva_optax._curvature.amortized import one_by_one
from eva_optax._curvature.curvature import Damping, Gradient
from eva_optax._curvature.inverses import Factor, Health, Moment, powers
from eva_optax._curvature.nystrom import Basis, whiten
from eva_optax._probes.directions import directions
from eva_optax._probes.layers import Layer
from eva_optax._probes.layout import Layout
from eva_optax._probes.sketch_axes import SketchAxes
from eva_optax._probes.statistics import DIAGONAL, INPUTS, MOMENT, OUTPUTS, SKETCH, TRACE


class Diagonal(NamedTuple):
    """A diagonal matrix over inputs, as they are looked up by an embedding; any axes in front.

    Attributes:
      kernel: (n, 1).
    """

    kernel: Array


Power = Factor | Basis | Diagonal


class Side(NamedTuple):
    """What is known of the second moment of one side of some layers; k of them, batch axes counted.

    Attributes:
      size: n, or n + 1 where the input is (x, 1).
      trace: (k,); for a vector alone its squared norm.
      matrix: (k, n, n); None where there is none.
      mean: the mean vector, (k, n); None where nobody asks for it.
      sketch: (k, n, r); None where there is none.
      omega: the directions of the sketch, (n, r).
      diagonal: (k, n), where all else is zero; else None.
      has_bias: whether the input is (x, 1).
      is_vector: whether the mean vector is all.
    """

    size: int
    trace: Array
    matrix: Array | None = None
    mean: Array | None = None
    sketch: Array | None = None
    omega: Array | None = None
    diagonal: Array | None = None
    has_bias: bool = False
    is_vector: bool = False

    @property
    def unit(self) -> Array:
        """The mean eigenvalue, (k,)."""
        return self.trace / self.size

    @property
    def moment(self) -> tuple[Array, Array | None]:
        """The matrix, and the mean where the input is (x, 1)."""
        assert self.matrix is not None
        return self.matrix, self.mean if self.has_bias else None

    def damped(self, damping: Damping) -> tuple[Array, Array]:
        """Shift and floor of each, (k,). With relative damping whatever a single vector does not tell counts as 1."""
        if self.is_vector and damping.relative:
            shift, _ = damping.shift_and_floor(self.trace)
            return shift, shift
        return damping.shift_and_floor(self.unit)


def input_side(layout: Layout, has_bias: bool, averages: Mapping[str, Array]) -> Side:
    """The inputs' side of a stack of layers."""
    axes = SketchAxes.of(layout)
    mean = _vectors(axes, averages["a"])
    size = mean.shape[1] + has_bias
    if DIAGONAL in averages:
        diagonal = _vectors(axes, averages[DIAGONAL])
        return Side(size, jnp.sum(diagonal, 1), diagonal=diagonal)
    if INPUTS in averages:
        matrix = axes.to_matrices(axes.unfold(averages[INPUTS], layout.split_shape(layout.a)))
        return Side(size, _trace(matrix) + has_bias, matrix, mean, has_bias=has_bias)
    if TRACE not in averages:
        trace = jnp.sum(jnp.square(mean), 1) + has_bias
        return Side(size, trace, mean=mean, has_bias=has_bias, is_vector=True)
    trace = axes.by_batch(averages[TRACE]).ravel() + has_bias
    if MOMENT not in averages:
        return Side(size, trace, mean=mean, has_bias=has_bias)
    sketch = axes.to_matrices(axes.unfold(averages[MOMENT], layout.split_shape(layout.a)))
    omega = directions(axes.sizes(axes.inputs), sketch.shape[-1], sketch.dtype).reshape(sketch.shape[1:])
    return Side(size, trace, mean=mean, sketch=sketch, omega=omega, has_bias=has_bias)


def output_side(layout: Layout, averages: Mapping[str, Array]) -> Side:
    """The outputs' side of a stack of layers."""
    axes = SketchAxes.of_outputs(layout)
    if OUTPUTS in averages:
        matrix = axes.to_matrices(axes.unfold(averages[OUTPUTS], layout.split_shape(layout.b)))
        return Side(matrix.shape[1], _trace(matrix), matrix)
    mean = _vectors(axes, averages["b"])
    return Side(mean.shape[1], jnp.sum(jnp.square(mean), 1), mean=mean, is_vector=True)


def input_names(layer: Layer) -> list[str]:
    """The statistics of its inputs that are averaged: the most that there is of their second moment, and their mean."""
    whole = [name for name in (INPUTS, DIAGONAL) if name in layer.shapes]
    return ["a", *(whole or [name for name in SKETCH if name in layer.shapes])]


def knows_outputs(averages: Mapping[str, Array]) -> bool:
    """Whether anything is averaged of the outputs."""
    return "b" in averages or OUTPUTS in averages


def moment_names(layer: Layer) -> list[str]:
    """The same, and the second moment of its outputs' cotangents where there is one beside that of its inputs."""
    names = input_names(layer)
    return [*names, OUTPUTS] if len(names) > 1 and OUTPUTS in layer.shapes else names


def output_names(layer: Layer) -> list[str]:
    """The statistics of its outputs that are averaged."""
    return [OUTPUTS if OUTPUTS in layer.shapes else "b"]


def traces(layout: Layout, averages: Mapping[str, Array]) -> list[Array]:
    """Those of all matrices, laid out against the kernel, the layers stacked. Finite if and only if the matrix is."""
    sides = (INPUTS, SketchAxes.of(layout), layout.a), (OUTPUTS, SketchAxes.of_outputs(layout), layout.b)
    found = []
    for name, axes, vector in sides:
        if name in averages:
            stack, split = averages[name], layout.split_shape(vector)
            each = _trace(axes.to_matrices(axes.unfold(stack, split)))
            found.append(axes.against_kernel(each.reshape(len(stack), *axes.sizes(axes.batch))))
    return [*found, *(layout.total(averages[name]) for name in (DIAGONAL,) if name in averages)]


def _vectors(axes: SketchAxes, array: Array) -> Array:
    return axes.to_matrices(array.reshape(len(array), *axes.shape, 1))[..., 0]


def _trace(matrices: Array) -> Array:
    return jnp.trace(matrices, axis1=1, axis2=2)


def side_powers(sides: Sequence[tuple[Side, Array, Array]], power: ArrayLike) -> list[tuple[Power, Health]]:
    """((A + shift) / floor)^power of each side with its shifts and floors, not finite where there is none."""
    moments = [Moment(*side.moment, shift, floor) for side, shift, floor in sides if side.matrix is not None]
    of_matrices = iter(powers(moments, power))
    return [
        next(of_matrices) if side.matrix is not None else _by_vectors(side, shift, floor, power)
        for side, shift, floor in sides
    ]


def _by_vectors(side: Side, shift: Array, floor: Array, power: ArrayLike) -> tuple[Power, Health]:
    if side.diagonal is None:
        return _basis(side, shift, floor, power)
    scaled = ((side.diagonal + shift[:, None]) / floor[:, None]) ** jnp.asarray(power, shift.dtype)
    condition = (jnp.max(scaled, 1) / jnp.min(scaled, 1))[:, None, None]
    return Diagonal(scaled[:, :, None]), Health(condition, jnp.zeros_like(condition))


def _basis(side: Side, shift: Array, floor: Array, power: ArrayLike) -> tuple[Basis, Health]:
    assert side.mean is not None

    def one(sketch: Array | None, mean: Array, square: Array, shift: Array, floor: Array) -> Basis:
        return whiten(sketch, side.omega, mean, square, shift, floor, has_bias=side.has_bias, power=power)

    mapped = jax.vmap(one, (None if side.sketch is None else 0, 0, 0, 0, 0))
    basis = one_by_one(mapped, side.sketch, side.mean, side.trace - side.has_bias, shift, floor)
    squares = jnp.sum(jnp.square(basis.kernel), 1, keepdims=True)
    squares = squares if basis.bias is None else squares + jnp.square(basis.bias)
    condition = 1 / jnp.maximum(1 - jnp.max(squares, 2, keepdims=True), jnp.finfo(squares.dtype).eps)
    return basis, Health(condition, jnp.zeros_like(condition))


def multiply(axes: SketchAxes, power: Power, gradient: Gradient) -> Gradient:
    """A power times a gradient, along its input axes; the bias, if there is one, is its last row."""
    kernel, bias = gradient
    along = Along(axes, kernel)
    if isinstance(power, Diagonal):
        return Gradient(along.each(power.kernel) * kernel, bias)
    if isinstance(power, Basis):
        rows = along.to_columns(power.kernel, kernel, bias, power.bias)
        scale = along.scale(power.scale)
        changed = scale * (kernel - along.from_few_columns(power.kernel, rows))
        if bias is None or power.bias is None:
            return Gradient(changed, None)
        return Gradient(changed, scale * (bias - along.to_bias(power.bias, rows, bias)))
    if bias is None or power.bias is None or power.corner is None:
        return Gradient(along.to_kernel(along.to_columns(power.kernel, kernel)), None)
    rows = along.to_columns(power.kernel, kernel, bias, power.bias.mT)
    last = along.to_columns(power.bias, kernel, bias, power.corner)
    return Gradient(along.to_kernel(rows), along.to_bias(jnp.ones_like(power.corner), last, bias))
