"""Eva, curvature-aware preconditioning at the cost of a first-order step, for Optax and Flax."""

from eva_optax._alias import eva
from eva_optax._conjugate import ConjugateState, center, conjugate
from eva_optax._eva import ScaleByEvaState, scale_by_eva
from eva_optax._flax import attach, coverage, strip, tap, tapping
from eva_optax._pairing import KroneckerVectors, vectors

__version__ = "0.1.0"

__all__ = [
    "ConjugateState",
    "KroneckerVectors",
    "ScaleByEvaState",
    "attach",
    "center",
    "conjugate",
    "coverage",
    "eva",
    "scale_by_eva",
    "strip",
    "tap",
    "tapping",
    "vectors",
]
