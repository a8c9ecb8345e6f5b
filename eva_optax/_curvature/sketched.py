"""Gradients in coordinates where the directions of a sketch are whitened: R G = f(ρ) (G − V VᵀG), see `nystrom`."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from eva_optax._curvature.curvature import Averages, Damping, Gradient
from eva_optax._curvature.nystrom import Basis, whiten
from eva_optax._probes.directions import directions
from eva_optax._probes.layout import Layout
from eva_optax._probes.probe import MOMENT, TRACE
from eva_optax._probes.sketch_axes import SketchAxes


def identity(axes: SketchAxes, columns: int, has_bias: bool, dtype: jnp.dtype) -> Basis:
    """R = I for one layer; `columns` are the vectors of the sketch."""
    batch = axes.sizes(axes.batch)
    columns = max(columns + has_bias, 1)
    bias = jnp.zeros((*batch, columns), dtype) if has_bias else None
    return Basis(jnp.zeros((*axes.shape, columns), dtype), bias, jnp.ones(batch, dtype), jnp.zeros(batch, dtype))


def whitening(layout: Layout, has_bias: bool, averages: Averages, damping: Damping) -> Basis:
    """R of a stack of layers from their averages a, s and, if there is a sketch, y."""
    axes = SketchAxes.of(layout)
    stack, batch = len(averages["a"]), axes.sizes(axes.batch)
    a = axes.to_matrices(averages["a"].reshape(stack, *axes.shape, 1))[..., 0]
    square = jnp.broadcast_to(averages[TRACE].reshape(stack, *batch), (stack, *batch)).ravel()
    sketch = omega = None
    if MOMENT in averages:
        sketch = axes.to_matrices(axes.unfold(averages[MOMENT], layout.split_shape(layout.a)))
        omega = directions(axes.sizes(axes.inputs), sketch.shape[-1], sketch.dtype).reshape(sketch.shape[1:])
    one = jax.vmap(lambda y, a, s: whiten(y, omega, a, s, has_bias, damping), (None if sketch is None else 0, 0, 0))
    basis = one(sketch, a, square)
    return Basis(
        axes.from_matrices(basis.kernel, stack),
        None if basis.bias is None else basis.bias.reshape(stack, *batch, -1),
        *(number.reshape(stack, *batch) for number in (basis.scale, basis.explained)),
    )


def choose(axes: SketchAxes, usable: Array, new: Basis, old: Basis) -> Basis:
    """The new basis of one layer where it is usable, batch axis by batch axis."""
    spread = [size if c in axes.batch else 1 for c, size in zip(axes.vectors, (*axes.shape, 1), strict=True)]
    return Basis(
        jnp.where(usable.reshape(spread), new.kernel, old.kernel),
        None if new.bias is None or old.bias is None else jnp.where(usable[..., None], new.bias, old.bias),
        jnp.where(usable, new.scale, old.scale),
        jnp.where(usable, new.explained, old.explained),
    )


def change(layout: Layout, gradients: list[Gradient], bases: list[Basis]) -> list[Gradient]:
    """R G of each layer."""
    axes = SketchAxes.of(layout)
    return [_change(axes, gradient, basis) for gradient, basis in zip(gradients, bases, strict=True)]


def _change(axes: SketchAxes, gradient: Gradient, basis: Basis) -> Gradient:
    kernel, bias = gradient
    spec = jax.typeof(kernel).sharding.spec
    names = dict(zip(axes.kernel, spec, strict=True)) if any(spec) else {}

    def place(letters: str) -> PartitionSpec | None:
        """Where shardings are part of the types: along the kernel's axes as the kernel."""
        return PartitionSpec(*map(names.get, letters)) if names else None

    def product(x: str, y: str, result: str, vectors: Array, array: Array) -> Array:
        vectors = jax.sharding.reshard(vectors, place(x)) if names else vectors
        exact = jax.lax.Precision.HIGHEST
        return jnp.einsum(f"{x},{y}->{result}", vectors, array, precision=exact, out_sharding=place(result))

    rows = product(axes.vectors, axes.kernel, axes.rows, basis.kernel, kernel)
    sizes = zip(axes.kernel, kernel.shape, strict=True)
    scale = basis.scale.reshape([size if c in axes.batch else 1 for c, size in sizes])
    changed = None
    if bias is not None and basis.bias is not None:
        last = axes.batch + axes.vectors[-1]
        flat = bias.reshape([size for c, size in zip(axes.kernel, bias.shape, strict=True) if c in axes.bias])
        rows = rows + product(last, axes.bias, axes.rows, basis.bias, flat)
        changed = scale * (bias - product(last, axes.rows, axes.bias, basis.bias, rows).reshape(bias.shape))
    return Gradient(scale * (kernel - product(axes.vectors, axes.rows, axes.kernel, basis.kernel, rows)), changed)
