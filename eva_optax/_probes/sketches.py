"""Sketches of second moments in the gradients of probes, as a user sees them."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from eva_optax._probes.directions import directions
from eva_optax._probes.layers import take_apart
from eva_optax._probes.layout import Layout
from eva_optax._probes.sketch_axes import SketchAxes
from eva_optax._probes.statistics import MOMENT, TRACE
from eva_optax._probes.vectors import Numbers, read_counters, read_layer


class Sketch(NamedTuple):
    """What a tap with a `rank` collects of the second moment A = XᵀX / rows of one layer's inputs.

    Attributes:
      moment: AΩ: (*batch, *inputs, r), the kernel's batch axes (experts, heads, groups) first; r = 0 for rank 0.
      directions: Ω, orthonormal columns over the input axes: (*inputs, r).
      trace: of A, the mean over positions of the squared norm of the input; the kernel's batch axes.
    """

    moment: Array
    directions: Array
    trace: Array


Sketch.__module__ = "eva_optax"


def sketches(grads: Any) -> dict[str, Sketch]:
    r"""The sketches of second moments in a tree of gradients, by layer path.

    .. math::  Y = A\,Ω, \qquad A = \frac{1}{N} \sum_{n} x_n x_n^\top

    Args:
      grads: gradients of the parameters of a model tapped with `tap(model, rank=r)`, at any nesting depth.

    Returns:
      A dict from layer path to `Sketch`, float32 (float64 beside float64 parameters), averaged over the calls of the
      layer. The rows x are the inputs, for a convolution the patches, at some of the positions: all of small batches,
      at least 512 of large ones. Where r is the number of inputs, Ω is orthogonal and A = YΩᵀ. Layers without a sketch
      are left out; a layer that the loss did not use has zeros.

    Raises:
      ValueError: if `grads` holds no sketches, or what they hold is no longer a gradient (known only outside of `jit`).

    Source: this library; sketches of a symmetric matrix: Tropp, Yurtsever, Udell and Cevher, "Fixed-rank approximation
    of a positive-semidefinite matrix from streaming data", 2017.

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = eva_optax.tap(nn.Dense(2), rank=2), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> grads = jax.grad(lambda p: model.apply({"params": p}, x).sum())(params)
      >>> sketch = eva_optax.sketches(grads)[""]
      >>> sketch.moment.shape, sketch.directions.shape, float(sketch.trace)
      ((3, 2), (3, 2), 3.0)
    """
    tree = take_apart(grads)
    found = {layer.name: read_layer(_of_layer, layer, tree.leaves) for layer in tree.layers if TRACE in layer.shapes}
    if not found:
        raise ValueError(
            "eva_optax.sketches: no sketches in the tree. Give it the gradients of the parameters of a model that is "
            "tapped with a rank: model = eva_optax.tap(model, rank=16), then model.init or eva_optax.attach."
        )
    return found


def _of_layer(layout: Layout, leaves: dict[str, Array], numbers: Numbers) -> Sketch:
    axes, mean = SketchAxes.of(layout), read_counters(numbers, {}, ()).moment

    def split(name: str) -> Array:
        return mean * leaves[name].reshape(1, *layout.split_shape(leaves[name].shape[1:]))

    trace = split(TRACE).reshape(axes.sizes(axes.batch))
    omega = jnp.zeros((*axes.sizes(axes.inputs), 0), trace.dtype)
    moment = jnp.zeros((*axes.sizes(axes.batch + axes.inputs), 0), trace.dtype)
    if MOMENT in leaves:
        matrices = axes.to_matrices(axes.unfold(split(MOMENT), layout.split_shape(layout.a)))
        moment = matrices.reshape(*axes.sizes(axes.batch + axes.inputs), matrices.shape[-1])
        omega = directions(axes.sizes(axes.inputs), moment.shape[-1], moment.dtype)
    return Sketch(moment, omega, trace)
