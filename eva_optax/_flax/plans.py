"""How one call of a Flax layer is tapped: what Linen and NNX layers have in common, read from their attributes."""

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from eva_optax._probes.linear_map import LinearMap
from eva_optax._probes.probe import Shape
from eva_optax._statistics.convolution import Convolution
from eva_optax._statistics.einsum import Contraction, Lookup
from eva_optax._statistics.equation import parse_equation
from eva_optax._statistics.local_convolution import LocalConvolution
from eva_optax._statistics.transposed_convolution import TransposedConvolution

EMBEDDING_OFF = "embedding: off by default, pass embeddings=True"
MASKED = "masked kernel"
REPARAMETRISED = "kernel is computed from other parameters"
DIAGONAL = "einsum equation takes a diagonal"
BROADCASTS = "einsum broadcasts the kernel or the input"
DOES_NOT_FIT = "einsum equation {} does not fit an input of shape {} and a kernel of shape {}"
BIAS_ORDER = "bias axes are ordered unlike the kernel's"
COMPLEX = "complex kernel"
DEPENDS_ON_CALL = "what its layer computes depends on the call: tap with an example input, eva_optax.tap(model, x)"


@dataclass(frozen=True)
class Tap:
    """How one call of a layer is tapped: its linear map and the names of its parameters."""

    linear_map: LinearMap
    kernel: str = "kernel"
    bias: str | None = "bias"
    bias_reason: str = ""


@dataclass(frozen=True)
class Skip:
    """Why a call of a layer is not tapped."""

    reason: str


Plan = Tap | Skip


def beside(plan: Skip) -> str:
    """Why the bias of a layer is not tapped whose kernel is not."""
    return f"beside an untapped kernel ({plan.reason})"


def dense_plan(layer: Any, kernel_shape: Shape, x_shape: Shape) -> Plan:
    """The plan of a Dense or Linear layer."""
    return equation_plan("...i,io->...o", kernel_shape, x_shape)


def general_plan(axis: Any, batch_dims: Any, kernel_shape: Shape, x_shape: Shape) -> Plan:
    """The plan of a DenseGeneral or LinearGeneral layer, which contracts `axis` of its input."""
    axes = sorted(axis % len(x_shape) for axis in as_tuple(axis))
    batch = sorted(axis % len(x_shape) for axis in as_tuple(batch_dims))
    letters = [chr(ord("a") + axis) for axis in range(len(x_shape))]
    outputs = [chr(ord("A") + axis) for axis in range(len(kernel_shape) - len(axes) - len(batch))]
    kernel = [letters[axis] for axis in batch + axes] + outputs
    rest = [letter for axis, letter in enumerate(letters) if axis not in axes and axis not in batch]
    y = [letters[axis] for axis in batch] + rest + outputs
    return Tap(Contraction(kernel_shape, *map("".join, (letters, kernel, y, rest))))


def equation_plan(
    equation: str,
    kernel_shape: Shape,
    x_shape: Shape,
    kernel: str = "kernel",
    bias: str | None = "bias",
    y_shape: Shape | None = None,
) -> Plan:
    """The plan of a layer that computes an equation; without the output's shape, as if that fitted."""
    rule = parse_equation(equation, x_shape, kernel_shape, y_shape)
    if rule is None:
        return Skip(_why_no_contraction(equation, x_shape, kernel_shape))
    # Flax orders the axes of the bias as they come in the output.
    if rule.has_ordered_bias:
        return Tap(rule, kernel, bias)
    return Tap(rule, kernel, bias=None, bias_reason=BIAS_ORDER)


def _why_no_contraction(equation: str, x_shape: Shape, kernel_shape: Shape) -> str:
    terms = re.split(",|->", equation.replace(" ", "").replace("...", "."))
    if any(term.count(letter) > 1 for term in terms for letter in term if letter not in "()"):
        return DIAGONAL
    arrays = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (x_shape, kernel_shape))
    try:
        jax.eval_shape(partial(jnp.einsum, equation), *arrays)
    except (TypeError, ValueError):
        return DOES_NOT_FIT.format(repr(equation), x_shape, kernel_shape)
    return BROADCASTS


def convolution_plan(layer: Any, kernel_shape: Shape, x_shape: Shape) -> Plan:
    """The plan of a Conv or ConvLocal layer."""
    if layer.mask is not None:
        return Skip(MASKED)
    window = as_tuple(layer.kernel_size)
    strides, input_dilation, kernel_dilation = (
        _per_axis(value, len(window)) for value in (layer.strides, layer.input_dilation, layer.kernel_dilation)
    )
    geometry = (strides, _padding(layer.padding, len(window)), input_dilation, kernel_dilation)
    if getattr(layer, "shared_weights", True):
        return Tap(Convolution(kernel_shape, *geometry, layer.feature_group_count))
    return Tap(LocalConvolution(kernel_shape, window, *geometry))


def transposed_plan(layer: Any, kernel_shape: Shape, x_shape: Shape) -> Plan:
    """The plan of a ConvTranspose layer."""
    if layer.mask is not None:
        return Skip(MASKED)
    rank = len(as_tuple(layer.kernel_size))
    strides, kernel_dilation = _per_axis(layer.strides, rank), _per_axis(layer.kernel_dilation, rank)
    padding = _padding(layer.padding, rank)
    return Tap(TransposedConvolution(kernel_shape, strides, padding, kernel_dilation, layer.transpose_kernel))


def embedding_plan(layer: Any, kernel_shape: Shape, x_shape: Shape) -> Plan:
    """The plan of a lookup in an embedding table."""
    return Tap(Lookup((kernel_shape[0], kernel_shape[1])), kernel="embedding", bias=None)


def as_tuple(value: Any) -> tuple[int, ...]:
    """An int or a sequence of ints as a tuple."""
    return (value,) if isinstance(value, int) else tuple(value)


def _per_axis(value: Any, rank: int) -> tuple[int, ...]:
    return (1 if value is None else value,) * rank if value is None or isinstance(value, int) else tuple(value)


def _padding(padding: Any, rank: int) -> str | tuple[tuple[int, int], ...]:
    if isinstance(padding, str):
        return padding.upper()
    pairs = (padding,) * rank if isinstance(padding, int) else padding
    return tuple((pair, pair) if isinstance(pair, int) else tuple(pair) for pair in pairs)
