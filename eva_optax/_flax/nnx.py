"""Tapping NNX modules: each layer's class is swapped for a tapped subclass, and probes become its variables."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from flax import nnx

from eva_optax._flax.coverage import largest_untapped
from eva_optax._flax.nnx_classes import TappedMixin, layer_class, tapped_class
from eva_optax._flax.nnx_layers import AnyKind, bias_name, new_probe
from eva_optax._flax.nnx_reasons import NEEDS_INPUT, raw_tap, skip_reason
from eva_optax._flax.plans import DEPENDS_ON_CALL, REPARAMETRISED, Plan, Shape, Skip, beside
from eva_optax._flax.raw_parameters import RECORDER, Recorder
from eva_optax._flax.tapped_module import TappedModule
from eva_optax._probes.layers import has_probes
from eva_optax._probes.linear_map import KernelShapes
from eva_optax._probes.probe import KRONECKER, Path, name_is_taken, probe_name
from eva_optax._probes.statistics import VECTORS

_REPARAMETRISING = (nnx.WeightNorm, nnx.SpectralNorm)


def tap_module(
    caller: str,
    model: nnx.Module,
    embeddings: bool,
    statistics: tuple[str, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> nnx.Module:
    """`tap` of an NNX module, for the user's call of `caller`."""
    survey = Survey(caller, model, embeddings, args, kwargs, statistics)
    if survey.without_input:
        path, called = next(iter(survey.without_input.items()))
        raise ValueError(
            f"eva_optax.{caller}: {survey.classes[path].__name__} at {'/'.join(path)!r} {NEEDS_INPUT.format(called)}."
        )
    survey.apply()
    if not (survey.bridges or has_probes(nnx.state(model))):
        from eva_optax._flax.nnx_coverage import survey_report

        untapped = largest_untapped(survey_report(model, survey, {}), survey.classes)
        raise ValueError(
            f"eva_optax.{caller}: {type(model).__name__} has no layer that can be tapped. "
            + (f"Most of its parameters are those of {untapped}. " if untapped else "")
            + "eva_optax.coverage(model) lists each parameter with the reason."
        )
    return model


def untapped_copy(model: nnx.Module) -> nnx.Module:
    """A model without probes, of the same arrays."""
    copy = nnx.merge(*nnx.split(model))
    for _, layer in modules(copy):
        if isinstance(layer, TappedMixin):
            object.__setattr__(layer, "__class__", layer.untapped_class)
        if KRONECKER in vars(layer):
            delattr(layer, KRONECKER)
        if isinstance(layer, nnx.bridge.ToNNX):
            _strip_bridge(layer)
    return copy


def _strip_bridge(bridge: Any) -> None:
    """Removes the probes among the variables of a Linen module, which are nested dicts."""
    if isinstance(bridge.to_nnx__module, TappedModule):
        bridge.to_nnx__module = bridge.to_nnx__module.module

    def stripped(value: Any) -> Any:
        return {key: stripped(inner) for key, inner in value.items() if key != KRONECKER} if _is_dict(value) else value

    for name, value in list(vars(bridge).items()):
        if _is_dict(value):
            setattr(bridge, name, nnx.data(stripped(value)))


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict | nnx.Dict)


def modules(model: nnx.Module) -> list[tuple[tuple[Any, ...], nnx.Module]]:
    """The modules in `model` with their paths, outer ones first; one that occurs twice by its first path."""
    found = [(path, node) for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Module)]
    return sorted(found, key=lambda item: (len(item[0]), list(map(str, item[0]))))


class Swap(NamedTuple):
    """What is done to one layer: its new class, if it gets one, and its new probes by name."""

    layer: nnx.Module
    cls: type | None
    probes: dict[str, dict[str, nnx.Variable[Any]]]


@dataclass
class Survey:
    """What can be tapped in a model and what cannot; nothing is changed before `apply`.

    Attributes:
      caller: the function that the user called, for messages.
      swaps: the layers that will be tapped.
      reasons: why a layer's kernel or bias is not tapped, by the path of the parameter.
      classes: the class of every module.
      bridges: the number of tapped Linen modules inside.
      without_input: the modules that call a tap for raw parameters, and which, where there is no example input.
    """

    caller: str
    model: nnx.Module
    embeddings: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    statistics: tuple[str, ...] = VECTORS
    swaps: list[Swap] = field(default_factory=list)
    reasons: dict[Path, str] = field(default_factory=dict)
    classes: dict[Path, type] = field(default_factory=dict)
    bridges: int = 0
    _by_call: dict[int, type] = field(default_factory=dict)
    without_input: dict[Path, str] = field(default_factory=dict)
    _shared: dict[tuple[int, int], dict[str, nnx.Variable[Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        found = modules(self.model)
        reparametrised = {
            id(inner) for _, outer in found if isinstance(outer, _REPARAMETRISING) for _, inner in nnx.iter_graph(outer)
        }
        for index, (path, layer) in enumerate(found):
            names = tuple(map(str, path))
            self.classes[names] = getattr(layer, "untapped_class", type(layer))
            theirs = isinstance(vars(layer).get(KRONECKER), nnx.Variable)
            if theirs or KRONECKER in names:
                raise name_is_taken(self.caller, (*names, KRONECKER) if theirs else names)
            if isinstance(layer, nnx.bridge.ToNNX):
                self._survey_bridge(names, layer)
                continue
            known = layer_class(type(layer))
            if known is None:
                continue
            base, kind = known
            kernel = kind.kernel_of(layer)
            skip = skip_reason(layer, base, kernel, self.embeddings)
            reason = REPARAMETRISED if id(layer) in reparametrised else skip
            plans = kind.plans(layer, "/".join(names)) if reason is None else None
            if plans is not None:
                self._survey_layer(names, layer, kind, plans, tapped_class(type(layer), base, kind))
                continue
            self._skip(names, layer, kind, Skip(reason or DEPENDS_ON_CALL))
            if reason is None and not isinstance(layer, TappedMixin):
                self._by_call[index] = tapped_class(type(layer), base, kind)
        if self.args or self.kwargs:
            self._survey_calls(found)
        else:
            self._find_raw_taps(found)

    def apply(self) -> None:
        """Taps what was found."""
        for layer, cls, probes in self.swaps:
            if cls is not None:
                object.__setattr__(layer, "__class__", cls)
            if probes:
                setattr(layer, KRONECKER, nnx.data({**vars(layer).get(KRONECKER, {}), **probes}))

    def _survey_layer(self, names: Path, layer: nnx.Module, kind: AnyKind, plans: list[Plan], tapped: type) -> None:
        probes = {}
        for plan in plans:
            if isinstance(plan, Skip):
                self._skip(names, layer, kind, plan)
                return
            if plan.bias_reason:
                self.reasons[*names, "bias"] = plan.bias_reason
            probes |= self._probe(layer, plan.linear_map, plan.kernel, bias_name(layer, plan))
        if not isinstance(layer, TappedMixin):
            self.swaps.append(Swap(layer, tapped, probes))

    def _skip(self, names: Path, layer: nnx.Module, kind: AnyKind, plan: Skip) -> None:
        """Notes why kernel and bias of a layer are not tapped; where only a call tells which, all its parameters."""
        kernel = kind.kernel_of(layer)
        for name in vars(layer) if kernel is None else (kernel,):
            self.reasons[*names, name] = plan.reason
        for name in kind.beside:
            if isinstance(getattr(layer, name, None), nnx.Variable):
                self.reasons[*names, name] = beside(plan)

    def _find_raw_taps(self, found: list[tuple[tuple[Any, ...], nnx.Module]]) -> None:
        """Notes the modules that could be tapped with an example input, and are not."""
        for path, layer in found:
            names, called = tuple(map(str, path)), raw_tap(layer)
            if called is None or KRONECKER in vars(layer):
                continue
            self.without_input[names] = called
            for name, value in vars(layer).items():
                if isinstance(value, nnx.Variable):
                    self.reasons.setdefault((*names, name), f"its module {NEEDS_INPUT.format(called)}")

    def _probe(
        self, layer: nnx.Module, vectors: KernelShapes, kernel: str, bias: str | None, batch: Shape = ()
    ) -> dict[str, dict[str, nnx.Variable[Any]]]:
        """The layer's probe; layers that share their parameters share the probe, which then sees all their calls."""
        name = probe_name(kernel, bias)
        existing = vars(layer).get(KRONECKER, {})
        parameters = id(getattr(layer, kernel)), id(getattr(layer, bias or "", None))
        probe = existing[name] if name in existing else new_probe(layer, vectors, self.statistics, kernel, bias, batch)
        first = self._shared.setdefault(parameters, probe)
        same = all(first[leaf].shape == variable.shape for leaf, variable in probe.items())
        return {name: first if same else probe}

    def _survey_bridge(self, names: Path, bridge: Any) -> None:
        if isinstance(bridge, TappedMixin) or isinstance(bridge.to_nnx__module, TappedModule):
            self.bridges += 1
            return
        if nnx.state(bridge, nnx.Param):
            raise ValueError(
                f"eva_optax.{self.caller}: the Linen module at {'/'.join(names)!r} has its parameters already. Tap "
                "before lazy_init: eva_optax.tap(nnx.bridge.ToNNX(module, rngs=rngs)).lazy_init(x)."
            )
        self.bridges += 1
        self.swaps.append(
            Swap(bridge, tapped_class(type(bridge), nnx.bridge.ToNNX, None, self.embeddings, self.statistics), {})
        )

    def _survey_calls(self, found: list[tuple[tuple[Any, ...], nnx.Module]]) -> None:
        """Finds the calls of `tap_einsum` and its like, by tracing a copy of the model."""
        recorders = [Recorder(tuple(map(str, path))) for path, _ in found]
        graphdef, state = nnx.split(self.model)
        leaves, treedef = jax.tree.flatten((self.args, self.kwargs))
        # Flags and the like stay what they are.
        arrays = {index: leaf for index, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")}

        def call(state: Any, arrays: dict[int, Any]) -> None:
            copy: Any = nnx.merge(graphdef, state)
            for index, (recorder, (_, layer)) in enumerate(zip(recorders, modules(copy), strict=True)):
                if index in self._by_call:
                    object.__setattr__(layer, "__class__", self._by_call[index])
                setattr(layer, RECORDER, recorder)
            args, kwargs = treedef.unflatten([arrays.get(index, leaf) for index, leaf in enumerate(leaves)])
            copy(*args, **kwargs)

        jax.eval_shape(call, state, arrays)
        for index, (recorder, (_, layer)) in enumerate(zip(recorders, found, strict=True)):
            probes = {}
            for vectors, kernel, bias, batch in recorder.calls:
                probes |= self._probe(layer, vectors, kernel, bias, batch)
            if probes:
                self.swaps.append(Swap(layer, self._by_call.get(index), probes))
