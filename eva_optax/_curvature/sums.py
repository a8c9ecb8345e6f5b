"""What one-directional curvatures share: sums over columns of gradients, multiples of (a, 1) taken from them."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

from eva_optax._curvature.curvature import Gradient
from eva_optax._probes.fusion import materialize
from eva_optax._probes.layout import Layout
from eva_optax._probes.stacking import stack, unstack


def paired_sums(kernels: Sequence[Array], vectors: Array, axes: Sequence[int]) -> tuple[Array, Array]:
    """The sums of vector · G and of G² over some axes, for some layers.

    Side by side over the same axes: one pass over a kernel's gradient gives both.
    """
    pairs = [
        [jnp.sum(factor * kernel, axes, keepdims=True) for factor in (vector, kernel)]
        for vector, kernel in zip(unstack(vectors), kernels, strict=True)
    ]
    along, squares = (stack(column) for column in zip(*materialize(pairs), strict=True))
    return along, squares


def column_products(layout: Layout, gradients: Sequence[Gradient], a: Array) -> Array:
    """(a, 1)ᵀG for some layers, laid out as b."""
    _, inputs = layout.sum_axes
    along = stack([jnp.sum(v * g.kernel, inputs, keepdims=True) for v, g in zip(unstack(a), gradients, strict=True)])
    bias = stack_biases(gradients)
    return along if bias is None else along + bias


def stack_biases(gradients: Sequence[Gradient]) -> Array | None:
    """The gradients of the biases of some layers, which all have one or none."""
    biases = [gradient.bias for gradient in gradients if gradient.bias is not None]
    return stack(biases) if biases else None


def write_columns(gradients: Sequence[Gradient], a: Array, rows: Array) -> list[Gradient]:
    """G − (a, 1) · row for some layers."""
    return [
        Gradient(kernel - vector * row, None if bias is None else bias - row)
        for (kernel, bias), vector, row in zip(gradients, unstack(a), unstack(rows), strict=True)
    ]
