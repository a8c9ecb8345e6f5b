"""`coverage` of an NNX module."""

from typing import Any

from flax import nnx

from eva_optax._flax.coverage import Coverage, report
from eva_optax._flax.nnx import Survey

_ELEMENTWISE = (nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm)


def nnx_coverage(model: nnx.Module, *args: Any, embeddings: bool = False, **kwargs: Any) -> Coverage:
    """`coverage` of an NNX module, which stays as it is."""
    copy = nnx.clone(model)
    survey = Survey(copy, embeddings, args, kwargs)
    survey.apply()
    return report(nnx.state(copy, nnx.Param), survey.reasons, survey.classes, _ELEMENTWISE)
