"""`coverage` of an NNX module."""

from typing import Any

from flax import nnx

from eva_optax._flax.coverage import Coverage, report
from eva_optax._flax.nnx import Survey, modules
from eva_optax._flax.raw_parameters import RECORDER, Recorder
from eva_optax._flax.verify import Errors, collect, perturbed, verifying

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
    survey = Survey(copy, embeddings, args, kwargs)
    survey.apply()
    params = nnx.state(copy, nnx.Param)
    errors = _errors(copy, args, kwargs) if verify else {}
    return report(params, survey.reasons, survey.classes, _ELEMENTWISE, errors)


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
