"""A training step of a Linen model, as both benchmarks make it."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import Array

Loss = Callable[[Any, Any], Array]  # from outputs and targets to a scalar


def untapped(model: Any) -> Any:
    """In the place of `eva_optax.tap`, for optimizers that need no probes, so that they pay for none."""
    return model


def gradient_of(model: Any, loss: Loss) -> Callable[..., Any]:
    """From parameters, buffers (such as running statistics) and a batch to the gradient, and the new buffers."""

    def objective(params: Any, buffers: Any, x: Any, y: Any) -> Any:
        outputs, updated = model.apply({"params": params, **buffers}, x, mutable=list(buffers))
        return loss(outputs, y), updated

    return jax.grad(objective, has_aux=True)


def step_of(model: Any, loss: Loss, tx: optax.GradientTransformation) -> Callable[..., Any]:
    """From parameters, optimizer state, buffers and a batch to the first three anew."""

    def step(params: Any, state: Any, buffers: Any, x: Any, y: Any) -> Any:
        grads, buffers = gradient_of(model, loss)(params, buffers, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, buffers

    return step
