"""`coverage` of an NNX module."""

from typing import Any

from flax import nnx

from eva_optax._flax.coverage import Coverage, report
from eva_optax._flax.nnx import Survey, modules
from eva_optax._flax.nnx_classes import layer_class
from eva_optax._flax.nnx_layers import Kind
from eva_optax._flax.raw_parameters import RECORDER, Recorder
from eva_optax._flax.verify import Errors, collect, perturbed, verifying
from eva_optax._probes.layers import take_apart
from eva_optax._probes.probe import Path

_ELEMENTWISE = (nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm)


def nnx_coverage(
    model: nnx.Module, *args: Any, verify: bool = False, embeddings: bool = False, **kwargs: Any
) -> Coverage:
    """`coverage` of an NNX module, which stays as it is."""
    if verify and not (args or kwargs):
        raise ValueError(
            f"eva_optax.coverage: verify=True runs {type(model).__name__}. Give what it is called with: "
            "eva_optax.coverage(model, x, verify=True)."
        )
    copy = nnx.clone(model)
    survey = Survey("coverage", copy, embeddings, args, kwargs)
    survey.apply()
    return survey_report(copy, survey, _errors(copy, args, kwargs) if verify else {})


def survey_report(model: nnx.Module, survey: Survey, errors: Errors) -> Coverage:
    """The report on a model from what a survey of it found."""
    params = nnx.state(model, nnx.Param)
    return report(params, survey.reasons, survey.classes, _ELEMENTWISE, errors, _ranks(model, params))


def _errors(model: nnx.Module, args: Any, kwargs: Any) -> Errors:
    """How far the outputs of a tapped model's layers are from their rules'."""
    graphdef, state = nnx.split(model)

    def run(errors: Errors, state: Any, *args: Any, **kwargs: Any) -> None:
        copy: Any = nnx.merge(graphdef, state)
        nnx.update(copy, perturbed(nnx.state(copy, nnx.Param)))
        for path, layer in modules(copy):
            setattr(layer, RECORDER, Recorder(tuple(map(str, path))))
        with verifying(errors):
            copy(*args, **kwargs)

    return collect(run, state, args, kwargs)


def _ranks(model: nnx.Module, params: Any) -> dict[Path, int]:
    """The ranks of parameters without the axes that `nnx.vmap` stacked, as far as layers near them tell.

    A module does not know that it is stacked; a layer with a rule knows the shape of its own kernel. What stands in the
    smallest module that has such layers is stacked as often as the least stacked of them.
    """
    stacks: dict[Path, int] = {}
    for path, layer in modules(model):
        _, kind = layer_class(type(layer)) or (None, None)
        kernel = getattr(layer, kind.kernel, None) if isinstance(kind, Kind) else None
        if isinstance(kind, Kind) and isinstance(kernel, nnx.Variable):
            stacks[tuple(map(str, path))] = len(kernel.shape) - len(kind.own_shape(layer, kernel.shape))
    ranks = {}
    for path, leaf in take_apart(params).items():
        for end in reversed(range(len(path))):
            near = [count for layer, count in stacks.items() if layer[:end] == path[:end]]
            if near:
                ranks[path] = len(leaf.shape) - min(near)
                break
    return ranks
