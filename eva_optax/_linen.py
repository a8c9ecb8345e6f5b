"""Tapping Flax Linen modules: which layers have a rule, and the interceptor that taps their calls."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import freeze
from flax.linen.recurrent import DenseParams
from jax import Array

from eva_optax._contraction import Contraction, Lookup, parse_equation
from eva_optax._convolution import Convolution, LocalConvolution, TransposedConvolution
from eva_optax._pairing import KRONECKER, Path, probe_name
from eva_optax._tap import Probe, Rule, make_probe, tap

EMBEDDING_OFF = "embedding: off by default, pass embeddings=True"
MASKED = "masked kernel"
REPARAMETRISED = "kernel is computed from other parameters"
DIAGONAL = "einsum equation takes a diagonal"
BIAS_ORDER = "bias axes are ordered unlike the kernel's"
COMPLEX = "complex kernel"


@dataclass(frozen=True)
class Tapped:
    """How one call of a layer is tapped: its rule and the names of its parameters."""

    rule: Rule
    kernel: str = "kernel"
    bias: str | None = "bias"
    bias_reason: str = ""


# What a layer's builder returns: how to tap this call, or the reason why it is not tapped.
Plan = Tapped | str


def _dense(layer: nn.Module, kernel_shape: tuple[int, ...], x: Array) -> Plan:
    return _equation("...i,io->...o", x, kernel_shape)


def _dense_general(layer: nn.DenseGeneral, kernel_shape: tuple[int, ...], x: Array) -> Plan:
    axes = [layer.axis] if isinstance(layer.axis, int) else layer.axis
    axes = sorted(axis % x.ndim for axis in axes)
    batch = sorted(axis % x.ndim for axis in _as_tuple(layer.batch_dims))
    letters = [chr(ord("a") + axis) for axis in range(x.ndim)]
    outputs = [chr(ord("A") + axis) for axis in range(len(kernel_shape) - len(axes) - len(batch))]
    kernel = [letters[axis] for axis in batch + axes] + outputs
    rest = [letter for axis, letter in enumerate(letters) if axis not in axes and axis not in batch]
    y = [letters[axis] for axis in batch] + rest + outputs
    return Tapped(Contraction(kernel_shape, *map("".join, (letters, kernel, y, rest))))


def _einsum(layer: nn.Einsum, kernel_shape: tuple[int, ...], x: Array, einsum_str: str | None = None) -> Plan:
    return _equation(einsum_str or layer.einsum_str or "", x, kernel_shape)


def _equation(equation: str, x: Array, kernel_shape: tuple[int, ...]) -> Plan:
    rule = parse_equation(equation, x.ndim, kernel_shape)
    if rule is None:
        return DIAGONAL
    # Flax orders the axes of the bias as they come in the output.
    order = [rule.kernel.index(letter) for letter in rule.y if letter in rule.kernel]
    return Tapped(rule) if order == sorted(order) else Tapped(rule, bias=None, bias_reason=BIAS_ORDER)


def _conv(layer: nn.Conv | nn.ConvLocal, kernel_shape: tuple[int, ...], x: Array) -> Plan:
    if layer.mask is not None:
        return MASKED
    window = _as_tuple(layer.kernel_size)
    strides, input_dilation, kernel_dilation = (
        _per_axis(value, len(window)) for value in (layer.strides, layer.input_dilation, layer.kernel_dilation)
    )
    geometry = (strides, _padding(layer.padding, len(window)), input_dilation, kernel_dilation)
    if layer.shared_weights:
        return Tapped(Convolution(kernel_shape, *geometry, layer.feature_group_count))
    return Tapped(LocalConvolution(kernel_shape, window, *geometry))


def _conv_transpose(layer: nn.ConvTranspose, kernel_shape: tuple[int, ...], x: Array) -> Plan:
    if layer.mask is not None:
        return MASKED
    rank = len(_as_tuple(layer.kernel_size))
    strides, kernel_dilation = _per_axis(layer.strides, rank), _per_axis(layer.kernel_dilation, rank)
    padding = _padding(layer.padding, rank)
    return Tapped(TransposedConvolution(kernel_shape, strides, padding, kernel_dilation, layer.transpose_kernel))


def _embed(layer: nn.Embed, kernel_shape: tuple[int, ...], ids: Array) -> Plan:
    return Tapped(Lookup((kernel_shape[0], kernel_shape[1])), kernel="embedding", bias=None)


def _as_tuple(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)


def _per_axis(value: Any, rank: int) -> tuple[int, ...]:
    return (1 if value is None else value,) * rank if value is None or isinstance(value, int) else tuple(value)


def _padding(padding: Any, rank: int) -> str | tuple[tuple[int, int], ...]:
    if isinstance(padding, str):
        return padding.upper()
    pairs = (padding,) * rank if isinstance(padding, int) else padding
    return tuple((pair, pair) if isinstance(pair, int) else tuple(pair) for pair in pairs)


# By the function that does the work, not by class: a subclass that overrides `__call__` and calls `super()` reaches the
# same function, a subclass that computes its output in its own way does not.
_PLANS: dict[Callable[..., Any], Callable[..., Plan]] = {
    inspect.unwrap(nn.Dense.__call__): _dense,
    inspect.unwrap(nn.DenseGeneral.__call__): _dense_general,
    inspect.unwrap(nn.Einsum.__call__): _einsum,
    inspect.unwrap(nn.Conv.__call__): _conv,
    inspect.unwrap(nn.ConvTranspose.__call__): _conv_transpose,
    inspect.unwrap(nn.Embed.__call__): _embed,
}
_GATE = inspect.unwrap(DenseParams.__call__)


@dataclass
class Interceptor:
    """Taps the layers that run under `nn.intercept_methods`, and notes what it finds at each module path.

    Attributes:
      embeddings: whether lookups in embedding tables are tapped.
      classes: the class of every module that ran.
      reasons: why a layer's kernel or bias is not tapped, by the path of the parameter.
    """

    embeddings: bool = False
    classes: dict[Path, type] = field(default_factory=dict)
    reasons: dict[Path, str] = field(default_factory=dict)
    _reparametrised: int = 0
    _gates: dict[Path, tuple[Rule, Probe, Array]] = field(default_factory=dict)

    def __call__(
        self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        if module.scope is None:
            return next_fun(*args, **kwargs)
        self.classes[module.path] = type(module)
        # Part of the key under which `nn.jit` caches a module: its untapped trace must not serve a tapped call.
        if KRONECKER not in module.scope.flags:
            module.scope.flags = freeze({**module.scope.flags, KRONECKER: self.embeddings})
        function: Any = getattr(context.orig_method, "func", None)
        if function is _GATE:
            return self._gate(module, next_fun(*args, **kwargs), *args, **kwargs)
        if isinstance(module, nn.WeightNorm | nn.SpectralNorm):
            with self._reparametrise():
                return next_fun(*args, **kwargs)
        y = next_fun(*args, **kwargs)
        if function not in _PLANS:
            return y
        plan = self._plan(module, _PLANS[function], *args, **kwargs)
        if isinstance(plan, str):
            for name in ("kernel", "embedding"):
                self.reasons[*module.path, name] = plan
            return y
        bias = plan.bias if plan.bias and module.has_variable("params", plan.bias) else None
        if plan.bias_reason:
            self.reasons[*module.path, "bias"] = plan.bias_reason
        probe = self._probe(module, plan, bias)
        return y if probe is None else tap(plan.rule, bias is not None, probe, _input(*args, **kwargs), y)

    @contextmanager
    def _reparametrise(self) -> Iterator[None]:
        self._reparametrised += 1
        try:
            yield
        finally:
            self._reparametrised -= 1

    def _plan(self, module: nn.Module, build: Callable[..., Plan], *args: Any, **kwargs: Any) -> Plan:
        if self._reparametrised or type(module).param is not nn.Module.param:
            return REPARAMETRISED
        if build is _embed and not self.embeddings:
            return EMBEDDING_OFF
        kernel = module.get_variable("params", "embedding" if build is _embed else "kernel")
        kernel = nn.meta.unbox(kernel)
        if jnp.iscomplexobj(kernel):
            return COMPLEX
        x = jnp.asarray(_input(*args, **kwargs))
        options = {name: value for name, value in kwargs.items() if name != "inputs"}
        return build(module, tuple(kernel.shape), x, *args[1:] if args else (), **options)

    def _probe(self, module: nn.Module, plan: Tapped, bias: str | None) -> Probe | None:
        """The layer's probe; made, and not returned, while the model is initialised; None without one."""
        name = probe_name(plan.kernel, bias)
        probes = module.get_variable("params", KRONECKER, {})
        if module.is_initializing() and module.is_mutable_collection("params"):
            if name not in probes:
                probe = _boxed_probe(module, plan, bias)
                module.put_variable("params", KRONECKER, {**probes, name: probe})
            return None
        return nn.meta.unbox(dict(probes[name])) if name in probes else None

    def _gate(self, module: nn.Module, params: tuple[Array, Array | None], inputs: Array) -> tuple[Array, Array | None]:
        """Taps the parameters of one gate of an `OptimizedLSTMCell`, which hides its gates' outputs.

        A gate's output is inputs·W_i + h·W_h + bias: the cotangent of the bias is that output's cotangent already
        summed. So the bias stands in for the output, of the recurrent kernel that owns it and of the input kernel
        before it.
        """
        kernel, bias = params
        letters = "".join(chr(ord("a") + axis) for axis in range(inputs.ndim - 1))
        rule = Contraction(kernel.shape, letters + "x", "xy", "y", positions=letters)
        probe = self._probe(module, Tapped(rule), None if bias is None else "bias")
        cell = module.path[:-1]
        if probe is not None and bias is None:
            self._gates[cell] = (rule, probe, inputs)
        elif probe is not None and bias is not None:
            bias = tap(rule, True, probe, inputs, bias)
            if cell in self._gates:
                input_rule, input_probe, x = self._gates.pop(cell)
                bias = tap(input_rule, False, input_probe, x, bias)
        return kernel, bias


def _input(*args: Any, **kwargs: Any) -> Array:
    return args[0] if args else kwargs["inputs"]


def _boxed_probe(module: nn.Module, plan: Tapped, bias: str | None) -> Probe:
    """A probe of zeros in the kernel's box, with the names of the axes that it shares with the kernel."""
    assert module.scope is not None
    params = module.scope.get_variable("params", plan.kernel)
    kernel = nn.meta.unbox(params)
    count_rank = kernel.ndim if bias is None else nn.meta.unbox(module.get_variable("params", bias)).ndim
    probe = make_probe(plan.rule, count_rank, kernel.dtype)
    if not isinstance(params, nn.meta.Partitioned):
        return probe
    names = (*params.names, *(None,) * (kernel.ndim - len(params.names)))

    def boxed(name: str, leaf: Array) -> Any:
        if name not in ("a", "b"):  # the counters have the bias's rank, and only axes of size 1
            return params.replace(value=leaf, names=(None,) * leaf.ndim)
        kept = [
            name if size == full > 1 else None for name, size, full in zip(names, leaf.shape, kernel.shape, strict=True)
        ]
        return params.replace(value=leaf, names=tuple(kept))

    return {name: boxed(name, leaf) for name, leaf in probe.items()}
