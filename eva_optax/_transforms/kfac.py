"""`scale_by_kfac`: Kronecker-factored curvature."""
import optax
from jax.typing import ArrayLike

from eva_optax._curvature.curvature import Damping
from eva_optax._curvature.kronecker import Recipe, Split
from eva_optax._transforms.driver import Rate
from eva_optax._transforms.factored import Averaging, precondition_by_factors
from eva_optax._transforms.step_size import StepRule


def scale_by_kfac(
    damping: ArrayLike = 0.1,
    *,
    relative: bool = True,
    split: Split = "pi",
    decay: ArrayLike = 0.95,
    every: ArrayLike = 10,
    step_rule: StepRule = "none",
    kl_clip: ArrayLike = 1e-3,
    learning_rate: Rate = 1.0,
) -> optax.GradientTransformation:
    kept = Damping(damping, relative, keep_scale=step_rule == "kl_norm")
    recipe = Recipe(two_sided=True, split=split)
    return precondition_by_factors(
        "scale_by_kfac", recipe, kept, Averaging(decay), every, step_rule, kl_clip, learning_rate
    )
