"""What the gradients of probes say: counters, and the Kronecker vectors as a user sees them."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from eva_optax._probes.layers import Layer, how_to_tap, take_apart
from eva_optax._probes.layout import Layout
from eva_optax._probes.probe import CHECK_UNITS, COUNTER, KRONECKER, UNIT, accumulator, find_unit
from eva_optax._probes.rounding_noise import without_noise


class Scales(NamedTuple):
    """What the statistics of some layers are multiplied by, to be rid of their unit and their scaling.

    Attributes:
      used: whether each layer was used in this step.
      mean: for a mean over the batch, such as a: the scaling of the gradients is undone, and calls are averaged.
      moment: for a second moment: the same, also where the mean is noise.
      total: for a sum over the batch, such as b: it keeps the scaling that the gradients have.
      unit: for a sum, also where it is noise.
    """

    used: Array
    mean: Array
    moment: Array
    total: Array
    unit: Array

    @property
    def square(self) -> Array:
        """For a second moment of sums, such as B: the square of the scaling that the gradients have is left in it."""
        return (self.unit / self.moment) * self.unit  # in this order: units squared would leave float32


def read_counters(numbers: Sequence[Array], vectors: Mapping[str, Array], names: tuple[str, ...]) -> Scales:
    """The scales of layers from the numbers of their counters; zero where a vector is nothing but rounding noise.

    All are NaN where the numbers are no gradients of a probe, because something changed them entry by entry.

    Args:
      numbers: those of the counters, each one array for some layers.
      vectors: the probes' "a", and "b" if it is needed, stacked in the same way.
      names: the layers, for the message, stacked along the first axis of all.

    Raises:
      ValueError: if they are no gradients, and the values are known (not under `jit`).
    """
    count, check, *bounds = numbers
    _refuse_foreign(count, check, names)
    used, safe, unit, foreign, _ = _units(count, check)
    scale = jnp.where(foreign, jnp.nan, 1.0).astype(count.dtype)
    inverse = jnp.where(used, scale / jnp.where(foreign, 1, unit), 0)
    scales = {"a": scale / safe, "b": inverse}
    pairs = zip(scales, bounds, strict=True)
    scales |= {name: without_noise(scales[name], vectors[name], bound) for name, bound in pairs if name in vectors}
    return Scales(used, scales["a"], scale / safe, scales["b"], inverse)


def _units(count: Array, check: Array) -> tuple[Array, Array, Array, Array, Array]:
    """Which layers were used, counts that may be divided by, units, what is no gradient, and the numbers' ratios."""
    used = count != 0
    safe = jnp.where(used, count, 1)
    ratio = safe / jnp.where(check == 0, 1, check)
    unit = find_unit(ratio)
    # Who applies a learning rate, with its sign, is an optimizer.
    return used, safe, unit, used & ((unit == 0) | (count < 0)), ratio


_compiled_units = jax.jit(_units)


def _refuse_foreign(count: Array, check: Array, names: tuple[str, ...]) -> None:
    if isinstance(count, Tracer) or not count.is_fully_addressable:
        return
    *_, foreign, ratio = map(np.asarray, _compiled_units(count, check))
    foreign = foreign & np.isfinite(ratio)
    if not foreign.any():
        return
    index = int(np.argmax(foreign.ravel()))
    name = names[index * len(names) // ratio.size]
    cause = (
        f"its counters have the ratio {float(ratio.ravel()[index]):.7g}, a gradient has {UNIT / CHECK_UNITS[UNIT]:.7g}."
        " Something before Eva changes gradients entry by entry (Adam, sign, noise)."
    )
    if float(count.ravel()[index]) < 0:
        cause = (
            "its count of calls is negative. An optimizer before Eva has applied its learning rate, with the sign; or "
            "gradients were negated to maximise: negate the loss, or what comes behind Eva."
        )
    raise ValueError(
        f"eva_optax: what layer {name!r} has below {KRONECKER!r} is not the gradient of a probe: {cause} "
        "Put Eva first: optax.chain(eva_optax.scale_by_eva(), optax.adam(1e-3)). Before it only linear operations make "
        "sense: averages, clip_by_global_norm, weight decay."
    )


Found = TypeVar("Found")
Numbers = list[Array]


def read_layer(read: Callable[[Layout, dict[str, Array], Numbers], Found], layer: Layer, grads: list[Any]) -> Found:
    """What `read` makes of a layer's probe, from its layout, the probe's leaves and its counter's numbers.

    Compiled once for all layers of a layout: op by op, each of some dozens of operations would be compiled for itself.
    Leaves and numbers are stacked, as those of one layer, at a new first axis.

    Raises:
      ValueError: if they are no gradients, and the values are known (not under `jit`).
    """
    leaves = {name: jnp.asarray(grads[place]) for name, place in layer.probe.items()}
    found, (count, check) = _read_compiled(read, layer.layout, leaves)
    _refuse_foreign(count, check, (layer.name,))
    return found


@partial(jax.jit, static_argnums=(0, 1))
def _read_compiled(read: Any, layout: Layout, leaves: dict[str, Array]) -> tuple[Any, Numbers]:
    stacked = {name: leaf.astype(accumulator(leaf.dtype))[None] for name, leaf in leaves.items()}
    numbers = layout.counter_to_kernel_axes(stacked[COUNTER])
    return read(layout, stacked, numbers), numbers[:2]


class KroneckerVectors(NamedTuple):
    """The Kronecker vectors of one layer, in the kernel's rank: `a * b` broadcasts to the kernel.

    Attributes:
      a: the mean input; the kernel's shape with its output axes set to 1.
      b: the summed output cotangent; the kernel's shape with its input axes set to 1. None where the model was tapped
        without it.
    """

    a: Array
    b: Array | None


KroneckerVectors.__module__ = "eva_optax"


def vectors(grads: Any) -> dict[str, KroneckerVectors]:
    """The Kronecker vectors in a tree of gradients, by layer path.

    .. math::  a = \\frac{1}{N P} \\sum_{n,p} x_{np}, \\qquad b = \\sum_{n,p} \\partial L / \\partial y_{np}

    Args:
      grads: gradients of a tapped model's parameters, as `jax.grad` returns them, at any nesting depth.

    Returns:
      A dict from layer path ("Block_0/Dense_1") to `KroneckerVectors`, float32 (float64 beside float64 parameters), in
      the kernel's rank. `a` is divided by the number of calls of the layer. A layer that the loss did not use has
      zeros. For a grouped convolution `a` is repeated, so that `a * b` broadcasts to the kernel here too.

    Raises:
      ValueError: if `grads` holds no probes, a probe does not fit its kernel, or what it holds is no longer a gradient
        (known only outside of `jit`).

    Source: Zhang, Shi and Li, "Eva: Practical Second-order Optimization with Kronecker-vectorized Approximation", ICLR
    2023 (the Kronecker vectors; b here is a sum, so that it equals the bias gradient).

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = eva_optax.tap(nn.Dense(2)), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> grads = jax.grad(lambda p: model.apply({"params": p}, x).sum())(params)
      >>> eva_optax.vectors(grads)[""].b
      Array([[4., 4.]], dtype=float32)
    """
    tree = take_apart(grads)
    if not tree.layers:
        raise ValueError(
            "eva_optax.vectors: no probes in the tree. Give it the gradients of a tapped model's parameters. "
            + how_to_tap(grads)
        )
    return {layer.name: read_layer(_of_layer, layer, tree.leaves) for layer in tree.layers}


def _of_layer(layout: Layout, leaves: dict[str, Array], numbers: Numbers) -> KroneckerVectors:
    pair = {name: layout.split_groups(leaves[name][0])[None] for name in ("a", "b") if name in leaves}
    scales = read_counters(numbers, pair, ())
    a = layout.merge_groups((pair["a"] * scales.mean)[0], layout.a)
    b = layout.merge_groups((pair["b"] * scales.total)[0], layout.b) if "b" in pair else None
    return KroneckerVectors(layout.repeat_groups(a), b)
