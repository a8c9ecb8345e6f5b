"""Tapping Flax Linen modules: which layers have a rule, and the interceptor that taps their calls."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import freeze
from flax.linen.recurrent import DenseParams
from jax import Array

from eva_optax._flax.call_arguments import split_input
from eva_optax._flax.findings import Findings
from eva_optax._flax.mapped_variables import params_are_mapped
from eva_optax._flax.plans import (
    COMPLEX,
    EMBEDDING_OFF,
    REPARAMETRISED,
    Plan,
    Shape,
    Skip,
    beside,
    convolution_plan,
    dense_plan,
    embedding_plan,
    equation_plan,
    general_plan,
    transposed_plan,
)
from eva_optax._flax.registry import registered_call
from eva_optax._flax.verify import compare, is_verifying
from eva_optax._probes.collection import probe_shapes
from eva_optax._probes.linear_map import KernelShapes
from eva_optax._probes.probe import KRONECKER, Path, Probe, make_probe, probe_axis_names, probe_name
from eva_optax._probes.tap import tap
from eva_optax._statistics.einsum import Contraction


def _dense_general(layer: nn.DenseGeneral, kernel_shape: Shape, x_shape: Shape) -> Plan:
    return general_plan(layer.axis, layer.batch_dims, kernel_shape, x_shape)


def _einsum(layer: nn.Einsum, kernel_shape: Shape, x_shape: Shape, einsum_str: str | None = None) -> Plan:
    return equation_plan(einsum_str or layer.einsum_str or "", kernel_shape, x_shape)


# By the function that does the work, not by class: a subclass that overrides `__call__` and calls `super()` reaches the
# same function, a subclass that computes its output in its own way does not.
_PLANS: dict[Callable[..., Any], Callable[..., Plan]] = {
    inspect.unwrap(nn.Dense.__call__): dense_plan,
    inspect.unwrap(nn.DenseGeneral.__call__): _dense_general,
    inspect.unwrap(nn.Einsum.__call__): _einsum,
    inspect.unwrap(nn.Conv.__call__): convolution_plan,
    inspect.unwrap(nn.ConvTranspose.__call__): transposed_plan,
    inspect.unwrap(nn.Embed.__call__): embedding_plan,
}
_CELL, _GATE = map(inspect.unwrap, (nn.OptimizedLSTMCell.__call__, DenseParams.__call__))


# Where tapped models meet inside of `tapping`, only the innermost interceptor taps: a layer must not be tapped twice.
_ACTIVE: ContextVar["Interceptor | None"] = ContextVar("active", default=None)


@contextmanager
def linen_tapping(
    embeddings: bool, statistics: tuple[str, ...], *, partial: bool = False, caller: str = "tap"
) -> Iterator["Interceptor"]:
    """Taps every Linen call inside."""
    interceptor = Interceptor(embeddings, statistics, is_verifying(), Findings(caller, partial))
    token = _ACTIVE.set(interceptor)
    try:
        with nn.intercept_methods(interceptor):
            yield interceptor
    finally:
        _ACTIVE.reset(token)
    interceptor.findings.check_probes()


@dataclass(eq=False)
class Interceptor:
    """Taps the layers that run under `nn.intercept_methods`, and notes what it finds at each module path.

    Attributes:
      embeddings: whether lookups in embedding tables are tapped.
      statistics: what new probes collect.
      verifying: whether outputs are compared with those of the rules.
      findings: what else is noted.
      reasons: why a layer's kernel or bias is not tapped, by the path of the parameter.
    """

    embeddings: bool
    statistics: tuple[str, ...]
    verifying: bool
    findings: Findings
    reasons: dict[Path, str] = field(default_factory=dict)
    _passed_on: dict[Path, bool] = field(default_factory=dict)
    _gates: dict[Path, list[Callable[[Array], Array]]] = field(default_factory=dict)

    def __call__(
        self, next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        if module.scope is None or _ACTIVE.get() is not self:
            return next_fun(*args, **kwargs)
        with self.findings.watching(module):
            return self._run(module, next_fun, args, kwargs, context)

    def _run(
        self,
        module: nn.Module,
        next_fun: Callable[..., Any],
        args: Any,
        kwargs: Any,
        context: nn.module.InterceptorContext,
    ) -> Any:
        assert module.scope is not None
        # Part of the key under which `nn.jit` caches a module: its untapped trace must not serve a tapped call.
        if KRONECKER not in module.scope.flags:
            options = (self.embeddings, self.statistics, self.verifying)
            module.scope.flags = freeze({**module.scope.flags, KRONECKER: options})
        function: Any = getattr(context.orig_method, "func", None)
        if function is _CELL:
            return self._cell(module, next_fun, args, kwargs)
        y = next_fun(*args, **kwargs)
        if function is _GATE:
            self._gate(module, y, *args, **kwargs)
        if context.method_name == "param":  # of a subclass that overrides it
            name = args[0] if args else kwargs["name"]
            self._passed_on[*module.path, name] = y is nn.meta.unbox(module.get_variable("params", name))
            return y
        registration, build = registered_call(module, function), _PLANS.get(function)
        if registration:
            call = registration.call_of(module, args, kwargs)
            x, kernel, args, kwargs = call.x, call.kernel, (), {}
            build = functools.partial(registration.plan, call=call, y=y, path="/".join(module.path))
        elif build is None:
            return y
        else:
            kernel = "embedding" if build is embedding_plan else "kernel"
            x, args, kwargs = split_input(function, args, kwargs)
        plan = self._plan(module, kernel, build, x, args, kwargs)
        if isinstance(plan, Skip):
            self.reasons[*module.path, kernel] = plan.reason
            bias = registration.bias if registration else "bias"
            if bias and module.has_variable("params", bias):
                self.reasons[*module.path, bias] = beside(plan)
            return y
        bias = plan.bias if plan.bias and module.has_variable("params", plan.bias) else None
        if plan.bias_reason:
            self.reasons[*module.path, "bias"] = plan.bias_reason
        elif self.verifying:
            weights, offset = (nn.meta.unbox(module.get_variable("params", name)) for name in (plan.kernel, bias or ""))
            compare((*module.path, plan.kernel), plan.linear_map, weights, offset, x, y)
        probe = layer_probe(module, plan.linear_map, plan.kernel, bias)
        return y if probe is None else tap(plan.linear_map, bias is not None, probe, jnp.asarray(x), y)

    def _plan(
        self, module: nn.Module, kernel: str, build: Callable[..., Plan], x: Any, args: Any, kwargs: dict[str, Any]
    ) -> Plan:
        if type(module).param is not nn.Module.param and not self._passed_on.get((*module.path, kernel)):
            # The layer runs with f(W): the gradient of W is JᵀG and Eva's vector Jᵀ(a⊗b), no product of two vectors.
            # Weight standardisation's J projects a constant out of both, behind a ReLU most of the mean input, so that
            # little is left for Eva to do.
            return Skip(f"computed by {type(module).__name__}.param")
        value = nn.meta.unbox(module.get_variable("params", kernel))
        if value is None:
            return Skip(f"{type(module).__name__} has no parameter {kernel!r}")
        if jnp.iscomplexobj(value):
            return Skip(COMPLEX)
        if build is embedding_plan and not self.embeddings:
            return Skip(EMBEDDING_OFF)
        return build(module, tuple(value.shape), jnp.shape(x), *args, **kwargs)

    def _cell(self, cell: Any, next_fun: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Taps the gates of an `OptimizedLSTMCell`, which hides their outputs: on the way into their activations."""
        gates = self._gates[cell.path] = []

        def tapped(activation: Callable[[Array], Array]) -> Callable[[Array], Array]:
            def activate(y: Array) -> Array:
                # Each gate has a kernel for the input, and one for the state; none is left for that of the new state.
                kernels, gates[:2] = gates[:2], []
                return activation(functools.reduce(lambda y, tap_kernel: tap_kernel(y), kernels, y))

            return activate

        activations = {name: getattr(cell, name) for name in ("gate_fn", "activation_fn")}
        try:
            for name, activation in activations.items():
                object.__setattr__(cell, name, tapped(activation))
            return next_fun(*args, **kwargs)
        finally:
            for name, activation in activations.items():
                object.__setattr__(cell, name, activation)
            del self._gates[cell.path]

    def _gate(self, module: nn.Module, params: tuple[Array, Array | None], inputs: Array) -> None:
        """Notes how the output of a gate is to be tapped for one of its kernels."""
        gates = self._gates.get(module.path[:-1])
        if gates is None:
            return
        letters = "".join(chr(ord("a") + axis) for axis in range(inputs.ndim - 1))
        kernel, bias = params
        rule = Contraction(kernel.shape, letters + "x", "xy", letters + "y", positions=letters)
        probe = layer_probe(module, rule, "kernel", None if bias is None else "bias")
        gates.append(lambda y: y if probe is None else tap(rule, bias is not None, probe, inputs, y))


def layer_probe(
    module: nn.Module, shapes_of: KernelShapes, kernel: str, bias: str | None, batch: tuple[int, ...] = ()
) -> Probe | None:
    """The probe beside these parameters; made, and not returned, while the model is initialised; None without one.

    Under `nn.map_variables` there is none: a probe would be mapped like a kernel, to NaN where a map divides by norms.
    `batch` are the leading axes of kernel and bias that are counted each for itself.
    """
    name = probe_name(kernel, bias)
    probes = module.get_variable("params", KRONECKER, {})
    making = module.is_initializing() and module.is_mutable_collection("params")
    if making and name in probes:
        return None
    interceptor = _ACTIVE.get()
    if params_are_mapped():
        if interceptor is not None:
            interceptor.reasons[*module.path, kernel] = REPARAMETRISED
            if bias is not None:
                interceptor.reasons[*module.path, bias] = beside(Skip(REPARAMETRISED))
        return None
    if not making:
        if interceptor is not None:
            interceptor.findings.probed[*module.path, KRONECKER, name] = name in probes
        return nn.meta.unbox(dict(probes[name])) if name in probes else None
    assert module.scope is not None
    count_rank = nn.meta.unbox(module.get_variable("params", bias or kernel)).ndim
    _, statistics, _ = module.scope.flags[KRONECKER]
    shapes = probe_shapes(shapes_of, statistics, (*batch, *(1,) * (count_rank - len(batch))))
    module.put_variable("params", KRONECKER, {**probes, name: _boxed_probe(module, kernel, shapes)})
    return None


def _boxed_probe(module: nn.Module, kernel: str, shapes: dict[str, Shape]) -> Probe:
    """A probe of zeros in the kernel's box, with the names of the axes that it shares with the kernel."""
    assert module.scope is not None
    box = module.scope.get_variable("params", kernel)
    full = nn.meta.unbox(box)
    probe = make_probe(shapes, full.dtype)
    if not isinstance(box, nn.meta.Partitioned):
        return probe
    return {
        name: box.replace(value=leaf, names=probe_axis_names(name, leaf.shape, full.shape, box.names))
        for name, leaf in probe.items()
    }
