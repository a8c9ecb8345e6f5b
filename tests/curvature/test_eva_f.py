"""`scale_by_eva_f` against dense solves and dense FOOF."""

from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eva_optax
from tests.dense import LAYOUTS, LayoutCase, draw, each_layer, every_layout, gradients
from tests.helpers import assert_close, assert_probes_are_zero, first_update
from tests.transforms.test_reference import opened


def solve_eva_f(rows: np.ndarray, matrix: np.ndarray, damping: float, relative: bool) -> np.ndarray:
    """(aaᵀ + γI)⁻¹ G, times γ if it is relative to ‖a‖²."""
    gamma = damping * rows @ rows if relative else damping
    solved = np.linalg.solve(np.outer(rows, rows) + gamma * np.eye(rows.size), matrix)
    return gamma * solved if relative else solved


def beside_kernel(case: LayoutCase, bias: np.ndarray) -> np.ndarray:
    """A bias with its axes where the kernel has them."""
    shape = [case.kernel[axis] if axis in case.bias_axes else 1 for axis in range(len(case.kernel))]
    return bias.transpose(np.argsort(case.bias_axes)).reshape(shape)


def expected_eva_f(case: LayoutCase, kernel, bias, a, damping: float, relative: bool):
    """Solves each independent layer of the case by itself; the bias's update lies beside the kernel."""
    kernel_update = np.full_like(kernel, np.nan)
    bias_update = None if bias is None else np.full_like(beside_kernel(case, bias), np.nan)
    for at, at_a, at_b in each_layer(case.kernel, case.a, case.b):
        part, row = kernel[at], a[at_a]
        inputs = [axis for axis, size in enumerate(case.b) if size == 1]
        order = inputs + [axis for axis in range(part.ndim) if axis not in inputs]
        shape = part.transpose(order).shape
        matrix = part.transpose(order).reshape(row.size, -1)
        homogeneous = row.transpose(order).ravel()
        if bias is not None:
            at_bias = tuple(index if case.b[axis] > 1 else slice(None) for axis, index in enumerate(at_b))
            last = beside_kernel(case, bias)[at_bias]
            matrix = np.concatenate([matrix, last.reshape(1, -1)])
            homogeneous = np.append(homogeneous, 1.0)
        solved = solve_eva_f(homogeneous, matrix, damping, relative)
        kernel_update[at] = solved[: row.size].reshape(shape).transpose(np.argsort(order))
        if bias is not None:
            bias_update[at_bias] = solved[-1].reshape(last.shape)
    return kernel_update, bias_update


@cache
def updates(relative: bool) -> dict:
    """The updates of a model with every layout."""
    with jax.enable_x64(True):
        tx, grads = eva_optax.scale_by_eva_f(0.3, relative=relative), every_layout()
        found, state = first_update(tx, grads)
        assert state.skipped == 0
        return found


@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_eva_f_equals_dense_solve(case: LayoutCase, relative: bool):
    kernel, bias, a, _ = draw(case)
    found = updates(relative)[case.name]
    wanted, wanted_bias = expected_eva_f(case, kernel, bias, a, 0.3, relative)
    assert_close(np.asarray(found["kernel"]), wanted, 1e-10, floor=1.0)
    if bias is not None:
        assert_close(beside_kernel(case, np.asarray(found["bias"])), wanted_bias, 1e-10, floor=1.0)
    assert_probes_are_zero(found)


def test_eva_f_keeps_its_own_average():
    with jax.enable_x64(True):
        tx = eva_optax.scale_by_eva_f(0.1, decay=0.3)
        state, mean = tx.init(gradients(*draw(LAYOUTS[0]), (1,))), None
        for seed in range(3):
            kernel, bias, a, b = draw(LAYOUTS[0], seed)
            mean = a if mean is None else 0.3 * mean + 0.7 * a
            updates, state = jax.jit(tx.update)(gradients(kernel, bias, a, b, (1,)), state)
            wanted, _ = expected_eva_f(LAYOUTS[0], kernel, bias, mean, 0.1, True)
            np.testing.assert_allclose(updates["layer"]["kernel"], wanted, rtol=0, atol=1e-10)


def dense_foof(inputs: np.ndarray, matrix: np.ndarray, damping: float) -> np.ndarray:
    """V = G (A + γI)⁻¹ with A the mean of x xᵀ over all inputs; G is (outputs, inputs)."""
    return matrix @ np.linalg.inv(inputs.T @ inputs / len(inputs) + damping * np.eye(inputs.shape[1]))


def test_eva_f_is_foof_where_all_inputs_of_a_batch_are_equal():
    """The dense FOOF is first held against the authors' numbers, then Eva-f against it."""
    with opened("foof_mlp") as file:
        damping, keep = float(file["damping"]), float(file["factor_decay"])
        x = file["x"][0].astype(float)
        homogeneous = np.concatenate([x, np.ones((len(x), 1))], 1)
        gradient = np.concatenate([file["layer0.grad_weight"][0], file["layer0.grad_bias"][0][:, None]], 1)
        # Its first average is (f I + (1 − f) A) / (1 − f): more damping, in effect.
        wanted = dense_foof(homogeneous, gradient, damping + keep / (1 - keep))
        assert_close(wanted[:, :-1], file["layer0.pre_weight"][0], 1e-10)
        assert_close(wanted[:, -1], file["layer0.pre_bias"][0], 1e-10)

        equal = np.tile(x[:1], (len(x), 1))
        model = eva_optax.tap(nn.Dense(4, param_dtype=float))
        params = model.init(jax.random.key(0), equal)["params"]
        grads = jax.grad(lambda params: jnp.sum(jnp.sin(model.apply({"params": params}, equal))))(params)
        tx = eva_optax.scale_by_eva_f(damping, relative=False)
        updates, _ = tx.update(grads, tx.init(params))
        matrix = np.concatenate([grads["kernel"].T, grads["bias"][:, None]], 1)
        homogeneous = np.concatenate([equal, np.ones((len(x), 1))], 1)
        wanted = dense_foof(homogeneous, matrix, damping)
        assert_close(np.asarray(updates["kernel"]), wanted[:, :-1].T, 1e-10)
        assert_close(np.asarray(updates["bias"]), wanted[:, -1], 1e-10)
