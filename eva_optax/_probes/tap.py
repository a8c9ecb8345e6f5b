"""The tap: an identity on a layer's output whose transpose yields the layer's statistics.

Two primitives make it, so that it is right under every derivative:

* `tap` (y, x, probe) -> y. Its derivative in the probe alone is not zero, and computes from x what is needed of it; so
  evaluation, and differentiation that does not ask for the probe, compute nothing.
* `collect` (dy, statistics of x, flag, probe tangents) -> dy is that derivative: linear in dy and the probe together.
  Its transpose hands the cotangent on to dy, and to each leaf of the probe its statistic.

Statistics are taken of the values, as if they were constants: derivatives of a higher order do not see them, because
the derivative of `collect` leaves out that of its statistics.

Second moments are formed where the flag of `switch` says so. A flag that is traced goes with the primitives as an
operand of its own, and the products stand in a `lax.cond`; the counters outside of it count each call.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import jet
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from eva_optax._probes.linear_map import LinearMap, Moments, statistic_of
from eva_optax._probes.placement import cast_like, vary, varying_axes
from eva_optax._probes.probe import CHECK_UNITS, COUNTER, Probe, unit_of
from eva_optax._probes.rounding_noise import noise_bound, share_of_noise
from eva_optax._probes.statistics import FACTORS, INPUTS, SKETCH, STATISTICS
from eva_optax._probes.switch import forms_factors


def tap(linear_map: LinearMap, has_bias: bool, probe: Probe, x: Array, y: Array, *, keeps_input: bool = False) -> Array:
    """Returns `y`; differentiated, gives `probe` the statistics of the layer `y = x·W + bias` as cotangent.

    Args:
      linear_map: how the layer's statistics are computed.
      has_bias: whether the layer adds a bias, that is, whether its homogeneous input is (a, 1).
      probe: the layer's probe; the statistics are those that it has leaves for.
      x: the layer's input.
      y: the layer's output.
      keeps_input: whether what is made of cotangents is made of `x` too.

    Returns:
      `y`, unchanged.

    Raises:
      ValueError: when differentiated, if the batch is empty.
    """
    ordered = sorted((name for name in probe if name != COUNTER), key=_place)
    flag = forms_factors() if any(map(_is_moment, ordered)) else True
    if flag is False:
        ordered = [name for name in ordered if not _is_moment(name)]
    names = (*ordered, COUNTER)
    # Inside `shard_map` a cotangent must vary over the same mesh axes as its primal. Casting the probe also makes
    # JAX sum its cotangent over those axes, as it does for the kernel.
    varying = varying_axes(jax.typeof(x)) | varying_axes(jax.typeof(y))
    leaves = [vary(jnp.asarray(probe[name]), varying) for name in names]
    flags = [] if isinstance(flag, bool) else [vary(jnp.asarray(flag, bool), varying)]
    static = {"linear_map": linear_map, "names": names, "switched": bool(flags), "keeps_input": keeps_input}
    return _tap.bind(y, x, *flags, *leaves, has_bias=has_bias, levels=(), **static)


def _place(name: str) -> int:
    return list(STATISTICS).index(statistic_of(name))


def _is_moment(name: str) -> bool:
    return statistic_of(name) in (*FACTORS, *SKETCH)


def _is_of_both(name: str) -> bool:
    """Whether it is a moment of inputs that looks at cotangents."""
    return statistic_of(name) == INPUTS and Moments.of(name).skip_padding


def _is_of_input(name: str) -> bool:
    return name != COUNTER and STATISTICS[statistic_of(name)].of_input and not _is_of_both(name)


def _statistic(
    linear_map: LinearMap, name: str, arrays: Sequence[Array], shape: tuple[int, ...], flag: Any = None
) -> Array:
    """One statistic of one array, or two; zeros for a second moment that the flag does not want."""

    def compute(array: Array, *other: Array) -> Array:
        return STATISTICS[statistic_of(name)].compute(linear_map, array, shape, Moments.of(name), *other)

    if flag is None or not _is_moment(name):
        return compute(*arrays)
    wanted, varying = jax.eval_shape(compute, *arrays), varying_axes(jax.typeof(arrays[0]))
    return jax.lax.cond(flag, compute, lambda *arrays: vary(jnp.zeros(wanted.shape, wanted.dtype), varying), *arrays)


def _expand(primitive: Primitive, primals: Sequence[Any], series: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    """Taylor coefficients: those of y, as for the identity."""
    return primitive.bind(*primals, **params), series[0]


_tap, _collect = Primitive("eva_optax_tap"), Primitive("eva_optax_collect")
for _primitive in (_tap, _collect):
    _primitive.def_impl(lambda y, *others, **params: y)
    _primitive.def_abstract_eval(lambda y, *others, **params: y)
    mlir.register_lowering(_primitive, mlir.lower_fun(lambda y, *others, **params: y, multiple_results=False))
    jet.jet_rules[_primitive] = partial(_expand, _primitive)


def _differentiate_tap(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    linear_map, has_bias, names, levels = (params[name] for name in ("linear_map", "has_bias", "names", "levels"))
    y, x, *flags = primals[: -len(names)]
    probe, dy, dprobe = primals[-len(names) :], tangents[0], tangents[-len(names) :]
    out = _tap.bind(*primals, **params)
    if all(type(tangent) is ad.Zero for tangent in dprobe):
        return out, dy
    if _is_zero(x.size) or _is_zero(y.size):
        raise ValueError(
            f"eva_optax: a tapped layer got an empty batch (input of shape {x.shape}, kernel of shape "
            f"{linear_map.kernel_shape}): its mean input is not defined. Drop empty batches before the training step."
        )

    share = share_of_noise(probe[-1].shape[len(levels) :])

    def statistics_of_input(x: Array) -> list[Array]:
        statistics, bounds = [], []
        for name, leaf in zip(names, probe, strict=True):
            if not _is_of_input(name):
                continue
            shape = leaf.shape[len(levels) :]
            value, unit = _statistic(linear_map, name, [x], shape, *flags), unit_of(leaf.dtype)
            statistics.append(value * unit)
            # With a bias the homogeneous input (a, 1) is never noise.
            if name == "a" and not has_bias and jnp.issubdtype(x.dtype, jnp.floating):
                bounds.append(noise_bound(x, value, unit * share, mean=True))
        return [*statistics, *bounds, *([x] if params["keeps_input"] or any(map(_is_of_both, names)) else [])]

    sizes = y.shape[: len(levels)]
    of_input = _mapped(statistics_of_input, levels, sizes[::-1])(x)
    tangent = _collect.bind(
        ad.instantiate_zeros(dy),
        *of_input,
        *flags,
        *map(ad.instantiate_zeros, dprobe),
        level_count=len(levels),
        **{name: value for name, value in params.items() if name not in ("has_bias", "levels")},
    )
    return out, tangent


def _differentiate_collect(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    names = params["names"]
    dy, before, dprobe = tangents[0], primals[1 : -len(names)], tangents[-len(names) :]
    out = _collect.bind(*primals, **params)
    if all(type(tangent) is ad.Zero for tangent in dprobe):
        return out, dy
    return out, _collect.bind(ad.instantiate_zeros(dy), *before, *map(ad.instantiate_zeros, dprobe), **params)


def _transpose_collect(
    cotangent: Any,
    dy: Any,
    *others: Any,
    linear_map: LinearMap,
    names: tuple[str, ...],
    switched: bool,
    keeps_input: bool,
    level_count: int,
) -> tuple[Any, ...]:
    before, probe = others[: -len(names)], others[-len(names) :]
    of_input, flags = (before[:-1], before[-1:]) if switched else (before, ())
    to_dy = cotangent if ad.is_undefined_primal(dy) else None
    if type(cotangent) is ad.Zero:
        return (to_dy, *(None for _ in others))
    leaves = dict(zip(names, map(_aval, probe), strict=True))
    counter = leaves[COUNTER].shape[level_count:]

    def all_statistics(dy: Array, of_input: tuple[Array, ...]) -> list[Array]:
        known = list(filter(_is_of_input, names))
        unit, bounds, x = unit_of(leaves[COUNTER].dtype), of_input[len(known) :], ()
        if keeps_input or any(map(_is_of_both, names)):
            bounds, x = bounds[:-1], bounds[-1:]
        found = dict(zip(known, of_input[: len(known)], strict=True))
        numbers: list[Any] = [np.array([unit, CHECK_UNITS[unit]] if bounds else [unit, CHECK_UNITS[unit], 0]), *bounds]
        bound: Any = np.zeros(1)
        for name in names:
            if name in found or name == COUNTER:
                continue
            arrays = [*x, dy] if _is_of_both(name) else [dy, *(x if keeps_input else ())]
            value = _statistic(linear_map, name, arrays, leaves[name].shape[level_count:], *flags)
            found[name] = value * unit
            if name == "b":
                bound = noise_bound(dy, value, unit * share_of_noise(counter), mean=False)
        numbers.append(bound)
        found[COUNTER] = jnp.concatenate([part.astype(leaves[COUNTER].dtype) for part in numbers])
        return [jnp.broadcast_to(found[name], counter) if name == COUNTER else found[name] for name in names]

    for _ in range(level_count):
        all_statistics = jax.vmap(all_statistics)
    statistics = all_statistics(cotangent, of_input)
    to_probe = (
        cast_like(value, _aval(leaf)) if ad.is_undefined_primal(leaf) else None
        for value, leaf in zip(statistics, probe, strict=True)
    )
    return (to_dy, *(None for _ in before), *to_probe)


def _batch_tap(arguments: Sequence[Any], axes: Sequence[Any], *, levels: tuple[bool, ...], **params: Any) -> Any:
    """Every operand gets the new axis in front, but for an x without it, which is looked at once for all."""
    size = next(value.shape[axis] for value, axis in zip(arguments, axes, strict=True) if axis is not None)
    flags = arguments[2 : 2 + params["switched"]]
    _refuse_mapped(axes[2 : 2 + len(flags)])
    y, _, *others = (_with_axis(value, axis, size) for value, axis in zip(arguments, axes, strict=True))
    x = arguments[1] if axes[1] is None else jnp.moveaxis(arguments[1], axes[1], 0)
    return _tap.bind(y, x, *flags, *others[len(flags) :], levels=(*levels, axes[1] is not None), **params), 0


def _batch_collect(arguments: Sequence[Any], axes: Sequence[Any], *, level_count: int, **params: Any) -> Any:
    size = next(value.shape[axis] for value, axis in zip(arguments, axes, strict=True) if axis is not None)
    moved = [_with_axis(value, axis, size) for value, axis in zip(arguments, axes, strict=True)]
    if params["switched"]:
        place = -len(params["names"]) - 1
        _refuse_mapped(axes[place : place + 1])
        moved[place] = arguments[place]
    return _collect.bind(*moved, level_count=level_count + 1, **params), 0


def _refuse_mapped(axes: Sequence[Any]) -> None:
    if any(axis is not None for axis in axes):
        raise ValueError(
            "eva_optax.tapping: factors must be one flag for all examples, and was mapped by jax.vmap: a step forms "
            "matrices or it does not. Make it from the step's number, outside of the mapped function."
        )


ad.primitive_jvps[_tap], ad.primitive_jvps[_collect] = _differentiate_tap, _differentiate_collect
ad.primitive_transposes[_collect] = _transpose_collect
batching.primitive_batchers[_tap], batching.primitive_batchers[_collect] = _batch_tap, _batch_collect


def _with_axis(value: Array, axis: int | None, size: int) -> Array:
    """`value` with its mapped axis in front; broadcast along one without it, so that its cotangent is summed."""
    return jnp.broadcast_to(value[None], (size, *value.shape)) if axis is None else jnp.moveaxis(value, axis, 0)


def _mapped(
    function: Callable[[Array], list[Array]], levels: Sequence[bool], sizes: Sequence[int]
) -> Callable[[Array], list[Array]]:
    """`function` under as many `vmap`s as there are levels, innermost first; where x lacks an axis, repeated."""
    for mapped, size in zip(levels, sizes, strict=True):
        function = jax.vmap(function, 0 if mapped else None, axis_size=size)
    return function


def _is_zero(size: Any) -> bool:
    return isinstance(size, int) and size == 0  # a symbolic size is not known


def _aval(leaf: Any) -> Any:
    return leaf.aval if ad.is_undefined_primal(leaf) else jax.typeof(leaf)
