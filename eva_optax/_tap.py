"""The tap: an identity on a layer's output whose backward pass yields the Kronecker vectors.

Next to every tapped kernel sits a *probe*, a small dict of zeros among the parameters:

    a     the kernel's shape, output axes of size 1   <- receives the mean input
    b     the kernel's shape, input axes of size 1    <- receives the summed output cotangent
    n     all axes of size 1                          <- receives 1 per call of the layer
    unit  as n                                        <- tells the unit that the others are stored in

The values of a probe are never used: only its gradient is. Nothing in this file knows Flax.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from eva_optax._fusion import keep_apart, on_gpu

Probe = dict[str, Any]
PROBE_LEAVES = ("a", "b", "n", "unit")

# Stored in this unit the vectors are far below the rounding of any gradient, so that a global norm or a clip that
# is placed before Eva does not see them. A power of two: only exponents change. Half precision has no exponents
# that small; its unit is one that no sign or other function of single entries leaves behind (see `is_probe_gradient`).
UNIT = 2.0**-40
HALF_UNIT = 0.5

# A sum of terms that cancel leaves rounding noise. Each term carries a rounding error of its own; those that BatchNorm
# shares out over all terms alike do not average out; a sequential sum adds an error of the accumulator at each term.
# The factors cover what was measured behind BatchNorm in bfloat16, float32 and float64, over up to 65,536 positions.
# The bound spares genuine vectors: the norm of a sum of independent terms is about the root of the sum of squares.
TERM_ROUNDINGS = 2.0
SHARED_ROUNDINGS = 1 / 8
ACCUMULATOR_ROUNDINGS = 2.0
MOST_NOISE = 0.25

# Every linear operation changes n and unit alike, up to rounding; Adam's eps of 1e-8 shifts their ratio by 9e-5.
RATIO_TOLERANCE = 2.0**-16


class VectorShapes(Protocol):
    """What a probe looks like beside one kind of kernel."""

    @property
    def kernel_shape(self) -> tuple[int, ...]: ...

    @property
    def probe_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of a and of b."""
        ...


class Rule(VectorShapes, Protocol):
    """How one kind of layer computes its two Kronecker vectors; hashable, because it is static under `jit`."""

    def mean_input(self, x: Array) -> Array:
        """a: the layer's input averaged over batch and positions, at least float32."""
        ...

    def sum_cotangent(self, dy: Array) -> Array:
        """b: the cotangent of the layer's output summed over batch and positions, at least float32."""
        ...


def accumulator(dtype: DTypeLike) -> Any:
    """The dtype in which sums and averages of `dtype` are taken: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def probe_shapes(rule: VectorShapes, counter: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The shapes of a probe's leaves; `counter` is in the bias's layout, or the kernel's without a bias."""
    a, b = rule.probe_shapes
    return {"a": a, "b": b, "n": counter, "unit": counter}


def make_probe(shapes: dict[str, tuple[int, ...]], dtype: DTypeLike) -> Probe:
    """A probe of zeros beside a kernel of `dtype`."""
    return {name: jnp.zeros(shape, accumulator(dtype)) for name, shape in shapes.items()}


def tap(rule: Rule, has_bias: bool, probe: Probe, x: Array, y: Array) -> Array:
    """Returns `y`; differentiated, gives `probe` the Kronecker vectors of the layer `y = x·W + bias` as cotangent.

    Args:
      rule: how the layer's vectors are computed.
      has_bias: whether the layer adds a bias, that is, whether its homogeneous input is (a, 1).
      probe: the layer's probe.
      x: the layer's input.
      y: the layer's output.

    Returns:
      `y`, unchanged.

    Raises:
      ValueError: when differentiated, if the batch is empty.
    """
    # Inside `shard_map` a cotangent must vary over the same mesh axes as its primal. Casting the probe also makes
    # JAX sum its cotangent over those axes, as it does for the kernel.
    varying = _varying_axes(x) | _varying_axes(y)
    probe = {name: _vary(leaf, varying) for name, leaf in probe.items()}
    return _tap(rule, has_bias, probe, x, y)


def _varying_axes(x: Array) -> frozenset[str]:
    """The mesh axes of the enclosing `shard_map` over which `x` may differ."""
    aval = jax.typeof(x)
    return aval.vma if hasattr(aval, "vma") else aval.manual_axis_type.varying  # renamed in JAX 0.10


def _vary(leaf: Array, axes: frozenset[str]) -> Array:
    missing = tuple(sorted(axes - _varying_axes(leaf)))
    return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf


def shard_like(value: Array, leaf: Array) -> Array:
    """`value` with the sharding of `leaf`, where shardings are part of the types (explicit mesh axes)."""
    wanted = jax.typeof(leaf).sharding
    return value if jax.typeof(value).sharding.spec == wanted.spec else jax.sharding.reshard(value, wanted)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tap(rule: Rule, has_bias: bool, probe: Probe, x: Array, y: Array) -> Array:
    return y


def _tap_forward(rule: Rule, has_bias: bool, probe: Probe, x: Array, y: Array) -> tuple[Array, tuple[Array, Probe]]:
    if x.size == 0 or y.size == 0:
        raise ValueError(
            f"eva_optax: a tapped layer got an empty batch (input of shape {x.shape}, kernel of shape "
            f"{rule.kernel_shape}): its mean input is not defined. Drop empty batches before the training step."
        )
    a = rule.mean_input(x)
    # With a bias the homogeneous input (a, 1) is never noise.
    if not has_bias and jnp.issubdtype(x.dtype, jnp.floating):
        a = _drop_noise(a, x, lambda terms: jnp.sum(terms, tuple(range(x.ndim - 1))), averaged=True)
    return y, (a, probe)


def _tap_backward(rule: Rule, has_bias: bool, residuals: tuple[Array, Probe], dy: Array) -> tuple[Probe, None, Array]:
    a, probe = residuals
    b = _drop_noise(rule.sum_cotangent(dy), dy, rule.sum_cotangent, averaged=False)
    # A 1 that depends on the data: under `vmap` it is batched, and so summed, whenever a or b is; inside `shard_map`
    # it varies over every axis that a or b varies over. XLA folds it.
    one = (jnp.any(jnp.isnan(a)) | jnp.any(jnp.isnan(b)) | True).astype(a.dtype)

    def cotangent(value: Array, name: str, power: int = 1) -> Array:
        leaf = probe[name]
        unit = HALF_UNIT if leaf.dtype == jnp.float16 else UNIT
        return shard_like(jnp.broadcast_to(value * (unit**power), leaf.shape).astype(leaf.dtype), leaf)

    counted = {"a": a * one, "b": b * one.astype(b.dtype), "n": one}
    cotangents = {name: cotangent(value, name) for name, value in counted.items()}
    return cotangents | {"unit": cotangent(one, "unit", power=2)}, None, dy


_tap.defvjp(_tap_forward, _tap_backward)


def is_probe_gradient(per_unit: Array) -> Array:
    """Whether `per_unit`, n over unit, is one that a tap leaves: linear operations on gradients cannot change it."""
    known = [jnp.abs(per_unit * unit - 1) < RATIO_TOLERANCE for unit in (UNIT, HALF_UNIT)]
    return known[0] | known[1]


def _drop_noise(vector: Array, terms: Array, sum_some: Callable[[Array], Array], *, averaged: bool) -> Array:
    """`vector`, or zeros if its norm is no larger than the rounding error of the sum that it came from.

    BatchNorm makes the cotangents before it, and the activations after it, cancel exactly in exact arithmetic. What
    floating point leaves has a random direction, and scale-free preconditioning would give it full weight.
    On a GPU the terms' squares are summed by `sum_some` first, in the pass that makes the vector.
    """

    def squares(terms: Array) -> Array:
        return jnp.square(terms.astype(vector.dtype))

    count = max(terms.size / vector.size, 1.0)
    roundings = (TERM_ROUNDINGS + SHARED_ROUNDINGS * count**0.5) * float(jnp.finfo(terms.dtype).eps)
    roundings = min(roundings + ACCUMULATOR_ROUNDINGS * count * float(jnp.finfo(vector.dtype).eps), MOST_NOISE)
    if averaged:
        roundings /= count
    total = on_gpu(
        lambda terms: jnp.sum(keep_apart(sum_some(squares(terms)))), lambda terms: jnp.sum(squares(terms)), terms
    )
    noise = roundings**2 * total
    return jnp.where(jnp.sum(jnp.square(vector)) <= noise, jnp.zeros_like(vector), vector)
