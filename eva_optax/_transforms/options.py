"""Checks of options and trees that all transformations share. Only Python numbers are checked, never tracers."""

from collections.abc import Sequence

from jax.typing import ArrayLike

from eva_optax._probes.layers import Layer, Tree
from eva_optax._probes.probe import is_probe


def check_positive(caller: str, **options: ArrayLike) -> None:
    """Raises ValueError for an option that is not greater than 0."""
    for name, value in options.items():
        if isinstance(value, int | float) and not value > 0:
            raise ValueError(f"eva_optax.{caller}: {name} must be greater than 0, got {value}.")


def check_decay(caller: str, decay: ArrayLike) -> None:
    """Raises ValueError for a decay outside of [0, 1)."""
    if isinstance(decay, int | float) and not 0 <= decay < 1:
        raise ValueError(
            f"eva_optax.{caller}: decay must lie in [0, 1), got {decay}. It is the weight of the old average; the "
            "reference code's factor_decay is the weight of the new value, 1 - decay."
        )


def check_probes(caller: str, params: Tree, statistics: Sequence[str]) -> None:
    """Raises ValueError if there are leaves, but no probes among them, or without a statistic that is needed."""
    if () in params.paths:
        raise ValueError(
            f"eva_optax.{caller}: the parameters are one array, as optax.flatten makes them, which tells no layers. "
            f"Flatten only what comes after it: optax.chain(eva_optax.{caller}(...), optax.flatten(...))."
        )
    if params.leaves and not any(map(is_probe, params.paths)):
        raise ValueError(
            f"eva_optax.{caller}: the parameters hold no probes, so that no Kronecker vectors can be collected. "
            "Tap the model before its parameters are made: model = eva_optax.tap(model), then model.init(key, x). "
            "For parameters that exist already: params = eva_optax.attach(model, params, x)."
        )
    _check_statistics(caller, params.layers, statistics)


def check_updates(caller: str, updates: Tree, statistics: Sequence[str]) -> None:
    """Raises ValueError if there are leaves, but no layer, or none with the statistics that are needed."""
    if updates.leaves and not updates.layers:
        raise ValueError(
            f"eva_optax.{caller}: the updates hold no tapped layer. Give it the gradients of all parameters, "
            'probes included (below "kronecker" in each layer), before anything that flattens or drops them.'
        )
    _check_statistics(caller, updates.layers, statistics)


def _check_statistics(caller: str, layers: Sequence[Layer], statistics: Sequence[str]) -> None:
    for layer in layers:
        missing = [name for name in statistics if name not in layer.probe]
        if missing:
            raise ValueError(
                f"eva_optax.{caller}: needs the statistics {tuple(statistics)}, but the probe of layer {layer.name!r} "
                f"has no {missing}. Tap the model with eva_optax.tap(model, statistics={tuple(statistics)})."
            )
