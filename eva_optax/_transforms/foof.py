"""`scale_by_foof`: the whole second moment of each layer's inputs."""
import optax
from jax.typing import ArrayLike

from eva_optax._curvature.curvature import Damping
from eva_optax._curvature.kronecker import Recipe
from eva_optax._transforms.driver import Rate
from eva_optax._transforms.factored import Averaging, precondition_by_factors
from eva_optax._transforms.step_size import StepRule


def scale_by_foof(
    damping: ArrayLike = 0.1,
    *,
    relative: bool = True,
    decay: ArrayLike = 0.95,
    power: ArrayLike = -1.0,
    every: ArrayLike = 10,
    step_rule: StepRule = "none",
    kl_clip: ArrayLike = 1e-3,
    learning_rate: Rate = 1.0,
) -> optax.GradientTransformation:
    kept = Damping(damping, relative, keep_scale=step_rule == "kl_norm")
    return precondition_by_factors(
        "scale_by_foof", Recipe(power), kept, Averaging(decay), every, step_rule, kl_clip, learning_rate
    )
