r"""Kronecker-factored curvature A ⊗ B of a layer, of which FOOF is the case B = I, and its damped inverse.

With z in units of the mean eigenvalues, δ the relative damping and γ the absolute one, the update of a gradient G is

    pi      (1 + δ)² (Ā + δI)⁻¹ G (B̄ + δI)⁻¹, or (A + π√γ I)⁻¹ G (B + √γ/π I)⁻¹ with π² = mean(A) / mean(B)
    eigen   (1 + δ) (Ā ⊗ B̄ + δI)⁻¹ G, or (A ⊗ B + γI)⁻¹ G, in the eigenvectors of A and B
    FOOF    (1 + δ) (Ā + δI)⁻¹ G, or (A + γI)⁻¹ G; or another power of the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from eva_optax._curvature.along_axes import Along
from eva_optax._curvature.curvature import Damping, Gradient, safe_divide
from eva_optax._curvature.inverses import EXACT, Eigenbasis, Factor, eigenbases
from eva_optax._curvature.nystrom import Basis
from eva_optax._curvature.one_factor import (
    Diagonal,
    Power,
    Side,
    input_side,
    knows_outputs,
    multiply,
    output_side,
    side_powers,
)
from eva_optax._probes.layout import Layout
from eva_optax._probes.placement import replicate
from eva_optax._probes.sketch_axes import SketchAxes

Split = Literal["pi", "eigen"]
LARGEST_RESIDUAL = 0.1


class Inverse(NamedTuple):
    """What a layer's gradients are multiplied by; the layer's batch axes in front.

    Attributes:
      inputs: along the input axes and the bias.
      outputs: along the output axes; None for one factor alone.
      rest: (1, 1), with eigenvectors what is added to the products of eigenvalues; else None.
      condition: its condition number when it was made, (1, 1); for matrices to the power −1 in the 1-norm.
      residual: its residual then, along one vector, (1, 1).
      age: steps since then, (1, 1).
    """

    inputs: Power | Eigenbasis
    outputs: Power | Eigenbasis | None
    rest: Array | None
    condition: Array
    residual: Array
    age: Array


class Known(NamedTuple):
    """What the inverses of a stack of layers are made of.

    Attributes:
      layout: of each.
      has_bias: whether each has a bias.
      averages: stacked.
      damping: of each, for those that have one of their own.
    """

    layout: Layout
    has_bias: bool
    averages: Mapping[str, Array]
    damping: Damping


class Recipe(NamedTuple):
    """Which inverses are made.

    Attributes:
      power: of each factor.
      two_sided: whether there is a factor of the outputs, where anything is known of it.
      split: how two factors share the damping.
    """

    power: ArrayLike = -1.0
    two_sided: bool = False
    split: Split = "pi"


def make_inverses(recipe: Recipe, known: Sequence[Known]) -> list[Inverse]:
    """The inverses of some stacks of layers, (stack, *batch, ...); not finite where there is none to be trusted."""
    sides = [
        (
            input_side(part.layout, part.has_bias, part.averages),
            output_side(part.layout, part.averages) if recipe.two_sided and knows_outputs(part.averages) else None,
        )
        for part in known
    ]
    exact = [
        recipe.split == "eigen" and all(side is not None and side.matrix is not None for side in pair) for pair in sides
    ]
    each = list(zip(sides, (part.damping for part in known), strict=True))
    in_eigenvectors = iter(_in_eigenvectors([pair for pair, by in zip(each, exact, strict=True) if by]))
    factored = iter(_factored(recipe.power, [pair for pair, by in zip(each, exact, strict=True) if not by]))
    made = [next(in_eigenvectors if by else factored) for by in exact]
    return [_by_layer(part, inverse) for part, inverse in zip(known, made, strict=True)]


Sides = tuple[Side, Side | None]


def _factored(power: ArrayLike, known: Sequence[tuple[Sides, Damping]]) -> list[Inverse]:
    damped = [
        [(side, *side.damped(share)) for side, share in zip(sides, _shares(sides, damping), strict=True) if side]
        for sides, damping in known
    ]
    made = iter(side_powers([side for pair in damped for side in pair], power))
    inverses = []
    for pair in damped:
        (inputs, health), *others = [next(made) for _ in pair]
        outputs = others[0][0] if others else None
        condition, residual = health
        for _, other in others:
            condition, residual = condition * other.condition, jnp.maximum(residual, other.residual)
        age = jnp.zeros_like(residual, jnp.int32)
        inverses.append(Inverse(inputs, outputs, None, condition, residual, age))
    return inverses


def _shares(sides: Sides, damping: Damping) -> tuple[Damping, Damping]:
    """The damping of each side: factored Tikhonov regularisation. Relative damping is so by itself."""
    inputs, outputs = sides
    if damping.relative or outputs is None:
        return damping, damping
    known = (inputs.unit > 0) & (outputs.unit > 0)
    pi = jnp.where(known, jnp.sqrt(safe_divide(inputs.unit, outputs.unit)), 1)
    root = jnp.sqrt(jnp.asarray(damping.value, pi.dtype))
    return damping._replace(value=root * pi), damping._replace(value=root / pi)


def _in_eigenvectors(known: Sequence[tuple[Sides, Damping]]) -> list[Inverse]:
    pairs = [(inputs, outputs) for (inputs, outputs), _ in known if outputs is not None]
    found = iter(eigenbases([side.moment for pair in pairs for side in pair]))
    inverses = []
    for (inputs, outputs), (_, damping) in zip(pairs, known, strict=True):
        shift, floor = damping.shift_and_floor(inputs.unit * outputs.unit)
        (of_inputs, residual), (of_outputs, other) = next(found), next(found)
        # The weights floor / (λμ + shift) as 1 / (λ(μ/floor) + rest).
        rest, floor = (shift / floor)[:, None, None], floor[:, None, None]
        of_outputs = of_outputs._replace(values=of_outputs.values / floor)
        largest, smallest = (
            of_inputs.values[..., at, None] * of_outputs.values[..., at, None] + rest for at in (-1, 0)
        )
        residual, age = jnp.maximum(residual, other), jnp.zeros_like(rest, jnp.int32)
        inverses.append(Inverse(of_inputs, of_outputs, rest, largest / smallest, residual, age))
    return inverses


def _by_layer(known: Known, inverse: Inverse) -> Inverse:
    """With stack and batch axes in front, and not finite where the residual is too large."""
    axes, stack = SketchAxes.of(known.layout), len(known.averages["a"])
    front = (stack, *axes.sizes(axes.batch))
    trusted = inverse.residual < LARGEST_RESIDUAL
    inverse = inverse._replace(residual=jnp.where(trusted, inverse.residual, jnp.nan))
    return jax.tree.map(lambda array: array.reshape(*front, *array.shape[1:]), inverse)


def identity_like(inverse: Any) -> Any:
    """What multiplies by one, in the form of an inverse of which shapes and dtypes are known."""

    def eye(part: Any) -> Array:
        return jnp.broadcast_to(jnp.eye(*part.shape[-2:], dtype=part.dtype), part.shape)

    def zeros(part: Any) -> Any:
        return None if part is None else jnp.zeros(part.shape, part.dtype)

    def ones(part: Any) -> Any:
        return None if part is None else jnp.ones(part.shape, part.dtype)

    def side(part: Any) -> Any:
        if isinstance(part, Factor):
            return Factor(eye(part.kernel), zeros(part.bias), ones(part.corner))
        if isinstance(part, Basis):
            return Basis(zeros(part.kernel), zeros(part.bias), ones(part.scale), zeros(part.explained))
        if isinstance(part, Diagonal):
            return Diagonal(ones(part.kernel))
        if isinstance(part, Eigenbasis):
            bias = None if part.bias is None else zeros(part.bias).at[..., -1].set(1)
            return Eigenbasis(eye(part.kernel), bias, zeros(part.values))
        return None

    rest, condition = ones(inverse.rest), ones(inverse.condition)
    inputs, outputs = side(inverse.inputs), side(inverse.outputs)
    return Inverse(inputs, outputs, rest, condition, zeros(inverse.residual), zeros(inverse.age))


def precondition(layout: Layout, gradient: Gradient, inverse: Inverse) -> Gradient:
    """A layer's gradient times its inverse."""
    inputs, outputs = inverse.inputs, inverse.outputs
    if isinstance(inputs, Eigenbasis):
        assert isinstance(outputs, Eigenbasis)
        assert inverse.rest is not None
        return _through_eigenvectors(layout, gradient, inputs, outputs, inverse.rest)
    assert not isinstance(outputs, Eigenbasis)
    kernel, bias = multiply(SketchAxes.of(layout), inputs, gradient)
    if outputs is None:
        return Gradient(kernel, bias)
    others = SketchAxes.of_outputs(layout)

    def along_outputs(array: Array) -> Array:
        return multiply(others, outputs, Gradient(array, None)).kernel

    return Gradient(along_outputs(kernel), None if bias is None else along_outputs(bias))


def _through_eigenvectors(
    layout: Layout, gradient: Gradient, inputs: Eigenbasis, outputs: Eigenbasis, rest: Array
) -> Gradient:
    kernel, bias = gradient
    along = Along(SketchAxes.of(layout), kernel)
    rows = along.to_columns(inputs.kernel, kernel, bias, inputs.bias)
    flat = replicate(rows).reshape(*inputs.values.shape[:-2], inputs.values.shape[-1], outputs.values.shape[-1])
    weights = 1 / (inputs.values.mT * outputs.values + rest)
    turned = weights * jnp.matmul(flat, outputs.kernel, precision=EXACT)
    rows = jnp.matmul(turned, outputs.kernel.mT, precision=EXACT).reshape(rows.shape)
    kernel = along.from_columns(inputs.kernel, rows)
    if bias is None or inputs.bias is None:
        return Gradient(kernel, None)
    return Gradient(kernel, along.to_bias(inputs.bias, rows, bias))
