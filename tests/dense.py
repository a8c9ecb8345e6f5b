"""Dense float64 oracle of the preconditioning: the curvature written out as a matrix, and solved."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from eva_optax._tap import UNIT


def solve_eva(
    kernel: np.ndarray, bias: np.ndarray | None, a: np.ndarray, b: np.ndarray, damping: float, relative: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """(vec(ab) vec(ab)ᵀ + γI)⁻¹ vec(G) of one layer, with the bias as the last row of G and 1 as the last entry of a.

    `kernel`, `a` and `b` broadcast. With `relative`, γ is damping · ‖(a, 1)‖² ‖b‖², and the update is times γ.
    """
    direction = (a * b).ravel()
    gradient = kernel.ravel()
    if bias is not None:
        direction = np.concatenate([direction, b.ravel()])
        gradient = np.concatenate([gradient, bias.ravel()])
    gamma = damping
    if relative:
        gamma = damping * (np.sum(a**2) + (bias is not None)) * np.sum(b**2)
    curvature = np.outer(direction, direction) + gamma * np.eye(direction.size)
    update = np.linalg.solve(curvature, gradient) * (gamma if relative else 1.0)
    kernel_update = update[: kernel.size].reshape(kernel.shape)
    return kernel_update, None if bias is None else update[kernel.size :].reshape(bias.shape)


def each_layer(
    kernel_shape: tuple[int, ...], a_shape: tuple[int, ...], b_shape: tuple[int, ...]
) -> Iterator[tuple[tuple, tuple, tuple]]:
    """Indices into kernel, a and b of one independent layer after the other.

    An axis that is full in both vectors counts layers; one where a has a divisor of b's size counts groups.
    """
    choices = []
    for size, i, o in zip(kernel_shape, a_shape, b_shape, strict=True):
        whole = slice(None)
        if i == 1 or o == 1:
            choices.append([(whole, whole, whole)])
        else:
            width = size // i
            spans = [slice(g * width, (g + 1) * width) for g in range(i)]
            choices.append([(span, slice(g, g + 1), span) for g, span in enumerate(spans)])
    for picks in itertools.product(*choices):
        kernel, a, b = zip(*picks, strict=True)
        yield kernel, a, b


def probe(a: Any, b: Any, counter: tuple[int, ...], calls: float = 1.0) -> dict[str, Any]:
    """The cotangent of a probe after `calls` calls whose mean input is `a` and whose cotangents sum to `b`."""
    a, b = jnp.asarray(a), jnp.asarray(b)
    count = jnp.full(counter, calls, a.dtype)
    return {"a": a * calls * UNIT, "b": b * UNIT, "n": count * UNIT, "unit": count * UNIT**2}


def gradients(kernel: Any, bias: Any | None, a: Any, b: Any, counter: tuple[int, ...]) -> dict[str, Any]:
    """The gradient tree of one layer called "layer"."""
    layer = {"kernel": jnp.asarray(kernel)}
    if bias is None:
        return {"layer": layer | {"kronecker": {"kernel": probe(a, b, counter)}}}
    return {"layer": layer | {"bias": jnp.asarray(bias), "kronecker": {"kernel,bias": probe(a, b, counter)}}}
