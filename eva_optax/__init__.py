"""Eva, curvature-aware preconditioning at the cost of a first-order step, for Optax and Flax."""

from eva_optax._alias import eva
from eva_optax._attach import attach, strip
from eva_optax._conjugate import ConjugateState, center, conjugate
from eva_optax._custom import tap_einsum, tap_ragged_dot
from eva_optax._eva import ScaleByEvaState, scale_by_eva
from eva_optax._flax import coverage, tap, tapping
from eva_optax._pairing import KroneckerVectors, vectors
from eva_optax._register import Registration, register

__version__ = "0.1.0"

__all__ = [
    "ConjugateState",
    "KroneckerVectors",
    "Registration",
    "ScaleByEvaState",
    "attach",
    "center",
    "conjugate",
    "coverage",
    "eva",
    "register",
    "scale_by_eva",
    "strip",
    "tap",
    "tap_einsum",
    "tap_ragged_dot",
    "tapping",
    "vectors",
]
