"""Eva, curvature-aware preconditioning at the cost of a first-order step, for Optax and Flax."""

from eva_optax._alias import eva, eva_f, eva_s
from eva_optax._alias_conjugate import eva_adamw, eva_muon
from eva_optax._attach import attach, strip
from eva_optax._conjugate import ConjugateState, center, conjugate
from eva_optax._custom import tap_einsum, tap_ragged_dot
from eva_optax._diagnostics import diagnostics, plot_diagnostics
from eva_optax._eva import scale_by_eva
from eva_optax._eva_f import scale_by_eva_f
from eva_optax._eva_s import scale_by_eva_s
from eva_optax._flax import coverage, tap, tapping
from eva_optax._pairing import KroneckerVectors, vectors
from eva_optax._precondition import ScaleByEvaState
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
    "diagnostics",
    "eva",
    "eva_adamw",
    "eva_f",
    "eva_muon",
    "eva_s",
    "plot_diagnostics",
    "register",
    "scale_by_eva",
    "scale_by_eva_f",
    "scale_by_eva_s",
    "strip",
    "tap",
    "tap_einsum",
    "tap_ragged_dot",
    "tapping",
    "vectors",
]
