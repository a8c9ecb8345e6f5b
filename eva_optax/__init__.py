"""Eva, curvature-aware preconditioning at the cost of a first-order step, for Optax and Flax.

Where to start: `eva_adamw`, for a model tapped with `tap(model, rank=16)`.
"""

from importlib import import_module
from typing import Any

from eva_optax._flax.attach import attach, strip
from eva_optax._flax.functions import coverage, tap, tapping
from eva_optax._flax.raw_convolutions import tap_conv
from eva_optax._flax.raw_parameters import tap_einsum, tap_ragged_dot
from eva_optax._flax.registry import Registration, register
from eva_optax._probes.factors import Factors, factors, merge_factors
from eva_optax._probes.sketches import Sketch, sketches
from eva_optax._probes.vectors import KroneckerVectors, vectors
from eva_optax._transforms.aliases import eva_adamw, eva_muon
from eva_optax._transforms.check import check
from eva_optax._transforms.coordinates import center, conjugate
from eva_optax._transforms.diagnostics import diagnostics
from eva_optax._transforms.diagnostics_plot import plot_diagnostics
from eva_optax._transforms.eva import scale_by_eva
from eva_optax._transforms.eva_f import scale_by_eva_f
from eva_optax._transforms.eva_s import scale_by_eva_s
from eva_optax._transforms.foof import scale_by_foof
from eva_optax._transforms.foof_aliases import foof_adamw, foof_muon
from eva_optax._transforms.hidden_probes import not_probes
from eva_optax._transforms.kfac import scale_by_kfac
from eva_optax._transforms.published import eva, eva_f, eva_s
from eva_optax._transforms.published_factored import foof, kfac
from eva_optax._transforms.shampoo import scale_by_shampoo, shampoo
from eva_optax._transforms.state import (
    CenterState,
    ConjugateState,
    ScaleByEvaState,
    ScaleByKfacState,
    ShampooState,
)

__version__ = "0.2.0"

__all__ = [
    "CenterState",
    "ConjugateState",
    "Factors",
    "KroneckerVectors",
    "Registration",
    "ScaleByEvaState",
    "ScaleByKfacState",
    "ShampooState",
    "Sketch",
    "attach",
    "center",
    "check",
    "conjugate",
    "coverage",
    "diagnostics",
    "eva",
    "eva_adamw",
    "eva_f",
    "eva_muon",
    "eva_s",
    "factors",
    "foof",
    "foof_adamw",
    "foof_muon",
    "kfac",
    "merge_factors",
    "not_probes",
    "plot_diagnostics",
    "register",
    "scale_by_eva",
    "scale_by_eva_f",
    "scale_by_eva_s",
    "scale_by_foof",
    "scale_by_kfac",
    "scale_by_shampoo",
    "shampoo",
    "sketches",
    "strip",
    "tap",
    "tap_conv",
    "tap_einsum",
    "tap_ragged_dot",
    "tapping",
    "vectors",
]

# Classes of objects that this library returns, which need Flax: imported when they are asked for, by pickle too.
_LAZY = {
    "BoundModule": "tapped_module",
    "Coverage": "coverage",
    "CoverageRow": "coverage",
    "TappedModule": "tapped_module",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"eva_optax._flax.{_LAZY[name]}"), name)
    if name.startswith("Tapped:"):  # the tapped subclass of an NNX layer's class
        return import_module("eva_optax._flax.nnx_classes").find_class(name)
    raise AttributeError(f"module 'eva_optax' has no attribute {name!r}")
