"""The optimizers by name, those of Optax and those of this library, and the schedules of their rates."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import optax
from jax.typing import ArrayLike

import eva_optax
from examples.train.config import Training, keywords, unknown
from examples.train.errors import UserError

B2 = 0.95  # of every Adam here
Transformation = optax.GradientTransformation
Rate = optax.ScalarOrSchedule


class Optimizer(NamedTuple):
    """How it is made from a rate and options, its defaults here, and how the model is tapped for it, if it is."""

    make: Callable[..., Transformation]
    learning_rate: float
    weight_decay: float
    tap: dict[str, Any] | None = None
    sketches: bool = False


def sgd(rate: Rate, momentum: float = 0.9, nesterov: bool = False, weight_decay: float = 0.0) -> Transformation:
    """SGD whose weight decay is a part of the gradient, as in the experiments of Eva's authors."""
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(rate, momentum, nesterov))


def eva_sgd(rate: Rate, damping: float = 0.1, momentum: float = 0.9, weight_decay: float = 0.0) -> Transformation:
    return optax.chain(eva_optax.scale_by_eva(damping), sgd(rate, momentum, weight_decay=weight_decay))


def center_adamw(rate: Rate, b2: float = B2, weight_decay: float = 0.0, mask: Any = None) -> Transformation:
    decay = optax.add_decayed_weights(weight_decay, mask)
    return optax.chain(eva_optax.center(optax.scale_by_adam(b2=b2)), decay, optax.scale_by_learning_rate(rate))


def kernels(params: Any) -> Any:
    """What decays under AdamW and Muon: no biases, scales and shifts."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def hidden_matrices(params: Any) -> Any:
    """For Muon: kernels but the head's; convolutions as patch × channels, stacked blocks one by one."""
    axes = {2: (0, 1), 3: (1, 2), 4: ((0, 1, 2), 3)}

    def numbers(path: tuple[Any, ...], leaf: Any) -> Any:
        names = [getattr(key, "key", None) for key in path]
        if names[-1] != "kernel" or "head" in names:
            return None
        return optax.contrib.MuonDimensionNumbers(*axes[leaf.ndim])

    return jax.tree_util.tree_map_with_path(numbers, params)


MUON = {"adam_b2": B2, "muon_weight_dimension_numbers": hidden_matrices}
MEAN_INPUT = {"statistics": ("a",)}
OPTIMIZERS = {
    "sgd": Optimizer(sgd, 0.1, 5e-4),
    "adamw": Optimizer(partial(optax.adamw, b2=B2), 2e-3, 0.05),
    "muon": Optimizer(partial(optax.contrib.muon, **MUON), 0.02, 0.05),
    "eva": Optimizer(eva_optax.eva, 0.1, 5e-4, {}),
    "eva_f": Optimizer(eva_optax.eva_f, 0.1, 5e-4, MEAN_INPUT),
    "eva_s": Optimizer(eva_optax.eva_s, 0.1, 5e-4),
    "eva_sgd": Optimizer(eva_sgd, 0.1, 5e-4, {}),
    "center_adamw": Optimizer(center_adamw, 2e-3, 0.05, MEAN_INPUT),
    "eva_adamw": Optimizer(partial(eva_optax.eva_adamw, b2=B2), 2e-3, 0.05, MEAN_INPUT, sketches=True),
    "eva_muon": Optimizer(partial(eva_optax.eva_muon, **MUON), 0.02, 0.05, MEAN_INPUT, sketches=True),
    # With matrices in the place of vectors.
    "kfac": Optimizer(eva_optax.kfac, 0.1, 5e-4, {"factors": "both", "sharing": "reduce"}),
    "foof": Optimizer(eva_optax.foof, 0.01, 0.0, {"factors": "input"}),
    "foof_adamw": Optimizer(partial(eva_optax.foof_adamw, b2=B2), 2e-3, 0.05, {"factors": "input"}),
    "foof_muon": Optimizer(partial(eva_optax.foof_muon, **MUON), 0.02, 0.05, {"factors": "input"}),
    "shampoo": Optimizer(partial(eva_optax.shampoo, graft_decay=B2), 2e-3, 0.05),
}


def find(name: str) -> Optimizer:
    if name not in OPTIMIZERS:
        raise unknown("optimizer", name, list(OPTIMIZERS))
    return OPTIMIZERS[name]


def tapped(model: nn.Module, training: Training) -> Any:
    """The model, tapped if the optimizer reads probes."""
    optimizer = find(training.optimizer)
    if optimizer.tap is None:
        return model
    rank = training.rank if optimizer.sketches and training.rank >= 0 else None
    return eva_optax.tap(model, rank=rank, **optimizer.tap)


def peak_rate(training: Training) -> float:
    return training.learning_rate or find(training.optimizer).learning_rate


def build(training: Training, steps: int, peak: ArrayLike) -> Transformation:
    """The optimizer with its schedule, behind a clipping of the gradient if there is one."""
    optimizer = find(training.optimizer)
    known = inspect.signature(optimizer.make).parameters
    decay = optimizer.weight_decay if training.weight_decay < 0 else training.weight_decay
    options = {"weight_decay": decay, "mask": kernels}
    options = {name: value for name, value in options.items() if name in known}
    for name, value in keywords("--options", training.options).items():
        if name not in known:
            raise unknown(f"option of {training.optimizer}", name, list(known)[1:])
        options[name] = value
    try:
        tx = optimizer.make(schedule(training, steps, peak), **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"{training.optimizer}: {error}") from None
    return optax.chain(optax.clip_by_global_norm(training.clip), tx) if training.clip else tx


def schedule(training: Training, steps: int, peak: ArrayLike) -> optax.Schedule:
    """A warm-up to the peak, and then the shape that is asked for."""
    warm = round(training.warmup * steps)
    rest = max(steps - warm, 1)
    milestones = [float(part) for part in training.milestones.split(",")]
    shapes: dict[str, Callable[[], optax.Schedule]] = {
        "constant": lambda: optax.constant_schedule(peak),
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest),
        "linear": lambda: optax.linear_schedule(peak, 0.0, rest),
        "step": lambda: optax.piecewise_constant_schedule(peak, {round(m * steps) - warm: 0.1 for m in milestones}),
    }
    if training.schedule not in shapes:
        raise unknown("schedule", training.schedule, list(shapes))
    main = shapes[training.schedule]()
    return optax.join_schedules([optax.linear_schedule(peak / (warm + 1), peak, warm), main], [warm]) if warm else main
