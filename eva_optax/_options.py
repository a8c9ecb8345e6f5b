"""Checks of options and trees that all transformations share. Only Python numbers are checked, never tracers."""

from typing import Any

from jax.typing import ArrayLike

from eva_optax._pairing import TappedLayer, find_layers, is_probe, leaves_by_path


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


def check_probes(caller: str, params: Any) -> list[TappedLayer]:
    """The tapped layers of `params`; raises ValueError if there are leaves, but no probes among them."""
    leaves = leaves_by_path(params)
    if () in leaves:
        raise ValueError(
            f"eva_optax.{caller}: the parameters are one array, as optax.flatten makes them, which tells no layers. "
            f"Flatten only what comes after it: optax.chain(eva_optax.{caller}(...), optax.flatten(...))."
        )
    if leaves and not any(map(is_probe, leaves)):
        raise ValueError(
            f"eva_optax.{caller}: the parameters hold no probes, so that no Kronecker vectors can be collected. "
            "Tap the model before its parameters are made: model = eva_optax.tap(model), then model.init(key, x). "
            "For parameters that exist already: params = eva_optax.attach(model, params, x)."
        )
    return find_layers(leaves)


def check_layers(caller: str, updates: Any) -> list[TappedLayer]:
    """The tapped layers of `updates`; raises ValueError if there are leaves, but no layer."""
    leaves = leaves_by_path(updates)
    layers = find_layers(leaves)
    if leaves and not layers:
        raise ValueError(
            f"eva_optax.{caller}: the updates hold no tapped layer. Give it the gradients of all parameters, "
            'probes included (below "kronecker" in each layer), before anything that flattens or drops them.'
        )
    return layers
