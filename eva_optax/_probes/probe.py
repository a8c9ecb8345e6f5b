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

The values of a probe are never used: only its gradient is. What a second moment is to be made of stands in its name,
behind a comma, see `Moments`.
"""

from collections.abc import Hashable, Sequence
from typing import Any

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


def accumulator(dtype: DTypeLike) -> Any:
    """The dtype in which sums and averages of `dtype` are taken: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


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


def name_is_taken(caller: str, path: Path) -> ValueError:
    """The refusal of a module or a parameter that has the name of probes."""
    return ValueError(
        f"eva_optax.{caller}: {'/'.join(path)!r} is no probe, but has {KRONECKER!r} in its path, the name under which "
        "the probes of a layer stand among its parameters. Give the module or parameter of this name another one."
    )
