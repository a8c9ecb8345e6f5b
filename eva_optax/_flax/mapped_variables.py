"""Which layers run under `nn.map_variables`, so that their kernels are computed from what stands in the tree.

Flax gives such a layer a scope like any other. Which collections are mapped is known to the function alone that maps
them, and that is on the stack while the layer runs.
"""

import inspect
from types import CodeType

from flax.core import lift
from flax.core.scope import in_filter

_MAPPING = {code for code in lift.map_variables.__code__.co_consts if isinstance(code, CodeType)}


def params_are_mapped() -> bool:
    """Whether the code that calls this runs under `nn.map_variables` over "params"."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code in _MAPPING and in_filter(frame.f_locals.get("mapped_collections", True), "params"):
            return True
        frame = frame.f_back
    return False
