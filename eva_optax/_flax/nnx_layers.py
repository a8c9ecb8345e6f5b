"""Which NNX layers have a rule: what stands beside their kernels, and how their calls are tapped."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from eva_optax._flax.call_arguments import split_input
from eva_optax._flax.nnx_stacking import stacked_axes
from eva_optax._flax.plans import (
    Plan,
    Shape,
    Skip,
    Tap,
    convolution_plan,
    dense_plan,
    embedding_plan,
    equation_plan,
    general_plan,
    transposed_plan,
)
from eva_optax._flax.raw_parameters import RECORDER, RecordedCall
from eva_optax._flax.registry import Registration, registered_class
from eva_optax._flax.verify import compare, is_verifying
from eva_optax._probes.collection import probe_shapes
from eva_optax._probes.linear_map import KernelShapes
from eva_optax._probes.probe import COUNTER, KRONECKER, Probe, accumulator, probe_axis_names, probe_name
from eva_optax._probes.statistics import STATISTICS, VECTORS
from eva_optax._probes.tap import tap
from eva_optax._statistics.equation import example_input

# A layer's own kernel shape, without the axes that `nnx.vmap` stacks, from the layer and the shape of its kernel.
OwnShape = Callable[[Any, Shape], Shape]


@dataclass(frozen=True)
class Kind:
    """How layers of one class are tapped, by the plan of a call and the shape that the kernel has in it."""

    build: Callable[..., Plan]
    own_shape: OwnShape
    kernel: str = "kernel"

    @property
    def beside(self) -> tuple[str, ...]:
        """The names of what is not tapped either, where the kernel is not."""
        return ("bias",)

    def kernel_of(self, layer: Any) -> str | None:
        """The name of the layer's kernel, or None if only a call tells."""
        return self.kernel

    def plans(self, layer: Any, path: str = "") -> list[Plan] | None:
        """One plan for each kernel of the layer, without a call: for an input with as few axes as can be.

        None if that takes a call. `path` is for messages.
        """
        shape = self.own_shape(layer, getattr(layer, self.kernel).shape)
        return [self.build(layer, shape, _example_input(layer, self, shape))]

    def tapped(self, layer: Any, y: Array, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Array:
        """The output `y` of a call of `function`, tapped."""
        x, args, kwargs = split_input(function, args, kwargs)
        kwargs = {key: value for key, value in kwargs.items() if key != "out_sharding"}
        plan = self.build(layer, getattr(layer, self.kernel).shape, jnp.shape(x), *args, **kwargs)
        return y if isinstance(plan, Skip) else tap_parameters(layer, plan, jnp.asarray(x), y)


@dataclass(frozen=True)
class RegisteredKind:
    """Layers of a registered class."""

    registration: Registration

    @property
    def beside(self) -> tuple[str, ...]:
        return () if self.registration.bias is None else (self.registration.bias,)

    def kernel_of(self, layer: Any) -> str | None:
        return self.registration.kernel_of(layer)

    def plans(self, layer: Any, path: str = "") -> list[Plan] | None:
        plan = self.registration.plan_of_layer(layer, path)
        return None if plan is None else [plan]

    def tapped(self, layer: Any, y: Array, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Array:
        call = self.registration.call_of(layer, args, kwargs)
        kernel, recorder = getattr(layer, call.kernel), vars(layer).get(RECORDER)
        path = None if recorder is None else "/".join(recorder.path)
        plan = self.registration.plan(layer, kernel.shape, jnp.shape(call.x), call=call, y=y, path=path)
        return tap_parameters(layer, plan, jnp.asarray(call.x), y)


AnyKind = Kind | RegisteredKind


class LoRAKind(Kind):
    """The two small matrices of a LoRA layer, whose intermediate result is hidden in its call."""

    @property
    def beside(self) -> tuple[str, ...]:
        return ("lora_b",)

    def plans(self, layer: Any, path: str = "") -> list[Plan]:
        return self._plans(layer, ())

    def _plans(self, layer: Any, positions: Shape) -> list[Plan]:
        kernels = {name: getattr(layer, name).shape[-2:] for name in ("lora_a", "lora_b")}
        return [
            equation_plan("...i,io->...o", shape, (*positions, shape[0]), name, bias=None)
            for name, shape in kernels.items()
        ]

    def tapped(self, layer: Any, y: Array, function: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Array:
        # The intermediate result is made anew. Zeros that are added to the output collect its cotangent, and pass it
        # back through the second matrix.
        given = (split_input(function, args, kwargs)[0], layer.lora_a[...], layer.lora_b[...])
        dtype = jnp.result_type(*given) if layer.dtype is None else layer.dtype
        x, a, b = (jax.lax.stop_gradient(jnp.asarray(value, dtype)) for value in given)
        precision = None  # as in the call: XLA keeps one of both results
        if not _has_moments(layer):  # all is linear, so that the mean input, as one row, tells the vectors
            x = jnp.mean(x, tuple(range(x.ndim - 1)), dtype=accumulator(dtype))
            a, b, precision = a.astype(x.dtype), b.astype(x.dtype), jax.lax.Precision.HIGHEST
        hidden = jnp.matmul(x, a, precision=precision)
        first, second = self._plans(layer, x.shape[:-1])
        assert isinstance(first, Tap)
        assert isinstance(second, Tap)
        inner = tap_parameters(layer, first, x, jnp.zeros_like(hidden))
        outer = tap_parameters(layer, second, hidden, jnp.matmul(inner, b, precision=precision))
        return y + jnp.broadcast_to(outer, y.shape).astype(y.dtype)


def _has_moments(layer: Any) -> bool:
    """Whether a probe of the layer collects more than vectors."""
    probes = (vars(layer).get(KRONECKER) or {}).values()
    return any(name not in (*VECTORS, COUNTER) for probe in probes for name in probe)


def tap_parameters(layer: Any, plan: Tap, x: Array, y: Array) -> Array:
    """`y`, tapped with the probe beside the plan's kernel; as it is if the layer has none."""
    bias = bias_name(layer, plan)
    if is_verifying() and RECORDER in vars(layer) and not plan.bias_reason:
        kernel, offset = getattr(layer, plan.kernel)[...], None if bias is None else getattr(layer, bias)[...]
        compare((*vars(layer)[RECORDER].path, plan.kernel), plan.linear_map, kernel, offset, x, y)
    probe = module_probe(layer, plan.linear_map, plan.kernel, bias)
    if probe is None:
        return y
    wanted = {name: STATISTICS[name].shape(plan.linear_map, 0) for name in VECTORS if name in probe}
    given = {name: probe[name].shape for name in wanted}
    if wanted != given:
        raise ValueError(
            f"eva_optax: the call of {type(layer).__name__} wants vectors of shapes {wanted} beside "
            f"{plan.kernel!r}, but its probe has {given}. An equation must be the one that the layer was made with, "
            "and a layer stacked by nnx.vmap must run under nnx.vmap or nnx.scan."
        )
    return tap(plan.linear_map, bias is not None, probe, x, y)


def bias_name(layer: Any, plan: Tap) -> str | None:
    """The name of the layer's bias, or None without one; an array that is no variable is none."""
    return plan.bias if plan.bias and isinstance(getattr(layer, plan.bias, None), nnx.Variable) else None


def module_probe(layer: Any, vectors: KernelShapes, kernel: str, bias: str | None, batch: Shape = ()) -> Probe | None:
    """The arrays of the probe beside these parameters; None without one, and while calls are recorded."""
    recorder = vars(layer).get(RECORDER)
    if recorder is not None:
        recorder.calls.append(RecordedCall(vectors, kernel, bias, batch))
        return None
    probe = (vars(layer).get(KRONECKER) or {}).get(probe_name(kernel, bias))
    return None if probe is None else {name: variable[...] for name, variable in probe.items()}


def new_probe(
    layer: Any,
    vectors: KernelShapes,
    statistics: tuple[str, ...],
    kernel_name: str,
    bias: str | None,
    batch: Shape = (),
) -> dict[str, nnx.Variable[Any]]:
    """A probe of zeros for these parameters, stacked as they are.

    Its variables have the kernel's type and its partition names: every filter finds the two together. `batch` are the
    leading axes of kernel and bias that are counted each for itself.
    """
    kernel = getattr(layer, kernel_name)
    counted = kernel if bias is None else getattr(layer, bias)
    own = vectors.kernel_shape
    stacked, beside = stacked_axes(type(layer).__name__, own, kernel.shape, counted.shape)
    sizes = [kernel.shape[axis] for axis in stacked]
    counter = (*batch, *(1,) * (counted.ndim - len(stacked) - len(batch)))
    shapes = {
        name: _insert(shape, beside if name == COUNTER else stacked, sizes)
        for name, shape in probe_shapes(vectors, statistics, counter).items()
    }
    known = kernel.get_metadata()
    kept = {name: known[name] for name in ("mesh", "sharding_rules", "eager_sharding") if name in known}

    def variable(name: str, shape: Shape) -> nnx.Variable[Any]:
        names = {
            key: probe_axis_names(name, shape, kernel.shape, known[key])
            for key in ("out_sharding", "sharding_names")
            if known.get(key) is not None
        }
        return type(kernel)(jnp.zeros(shape, accumulator(kernel.dtype)), **kept, **names)

    return {name: variable(name, shape) for name, shape in shapes.items()}


def _insert(shape: Shape, axes: tuple[int, ...], sizes: list[int]) -> Shape:
    grown = list(shape)
    for axis, size in zip(axes, sizes, strict=True):
        grown.insert(axis, size)
    return tuple(grown)


def _example_input(layer: Any, kind: Kind, kernel_shape: Shape) -> Shape:
    """The shape of an input that the layer may have."""
    if isinstance(layer, nnx.LinearGeneral):
        return (1,) * (2 * max(abs(int(axis)) + 1 for axis in (*layer.axis, *layer.batch_axis)))
    if kind.build is _einsum:
        return example_input(layer.einsum_str, kernel_shape)
    return kernel_shape[:1]


def _general(layer: Any, kernel_shape: Shape, x_shape: Shape) -> Plan:
    return general_plan(layer.axis, layer.batch_axis, kernel_shape, x_shape)


def _einsum(layer: Any, kernel_shape: Shape, x_shape: Shape, einsum_str: str | None = None) -> Plan:
    return equation_plan(einsum_str or layer.einsum_str, kernel_shape, x_shape)


_KINDS: dict[type, Kind] = {
    nnx.Linear: Kind(dense_plan, lambda layer, full: (layer.in_features, layer.out_features)),
    nnx.LinearGeneral: Kind(
        _general, lambda layer, full: (*layer.batch_axis.values(), *layer.in_features, *layer.out_features)
    ),
    nnx.Einsum: Kind(_einsum, lambda layer, full: tuple(layer.kernel_shape)),
    nnx.Conv: Kind(convolution_plan, lambda layer, full: tuple(layer.kernel_shape)),
    nnx.ConvTranspose: Kind(transposed_plan, lambda layer, full: tuple(layer.kernel_shape)),
    nnx.Embed: Kind(embedding_plan, lambda layer, full: (layer.num_embeddings, layer.features), "embedding"),
    nnx.LoRA: LoRAKind(dense_plan, lambda layer, full: full[-2:], "lora_a"),
}


def kind_of(layer: type) -> AnyKind | None:
    """How instances of this very class are tapped; its subclasses may do something else."""
    registration = registered_class(layer)
    return _KINDS.get(layer) if registration is None else RegisteredKind(registration)
