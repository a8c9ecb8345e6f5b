"""Inputs and gradients near the end of float32: products overflow long before they do."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eva_optax
from tests.dense import gradients, solve_eva
from tests.helpers import assert_close, assert_finite

RNG = np.random.default_rng(0)
KERNEL, BIAS, A, B = (RNG.normal(1, 1, shape) for shape in ((5, 4), (4,), (5, 1), (1, 4)))
MEMBERS = {
    "conjugate": lambda: optax.chain(eva_optax.conjugate(optax.scale_by_adam()), optax.scale(-1.0)),
    "center": lambda: optax.chain(eva_optax.center(optax.scale_by_adam()), optax.scale(-1.0)),
    "eva_adamw": lambda: eva_optax.eva_adamw(1.0),
    "eva_muon": lambda: eva_optax.eva_muon(1.0),
}


def tree(inputs: float, cotangents: float) -> dict:
    """Gradients of a layer with inputs of this size, and cotangents of that."""
    scaled = (KERNEL * inputs * cotangents, BIAS * cotangents, A * inputs, B * cotangents)
    return gradients(*(part.astype(np.float32) for part in scaled), (1,))


@cache
def compiled(build):
    tx = build()
    return tx, jax.jit(tx.update)


@pytest.mark.parametrize("scale", [1e10, 1e18])
@pytest.mark.parametrize("name", MEMBERS)
def test_members_around_adam_stay_as_finite_as_adam(name, scale):
    grads = tree(scale, 1.0)
    tx, update = compiled(MEMBERS[name])
    state = tx.init(grads)
    for _ in range(2):
        updates, state = update(grads, state, grads)
        assert_finite((updates, state))
    eva_optax.check(state)


@pytest.mark.parametrize("scale", [1.0, 1e10, 1e18])
def test_coordinates_are_right_at_any_scale(scale):
    """In float64, by hand; Adam's first step is the sign of what it sees."""
    tx, update = compiled(MEMBERS["conjugate"])
    updates, state = update(tree(scale, 1.0), tx.init(tree(scale, 1.0)))
    row = np.vstack([A * scale, [[1.0]]])
    row /= np.linalg.norm(row)
    whitening = np.eye(6) + (1 / np.sqrt(1 + 1 / 0.1) - 1) * row @ row.T
    gradient = np.vstack([KERNEL * scale, BIAS])
    seen = whitening @ gradient
    wanted = -whitening @ np.where(np.abs(seen) > 1e-7, np.sign(seen), 0)
    assert_close(updates["layer"]["kernel"], wanted[:-1].astype(np.float32), 1e-5)
    share = np.linalg.norm(row.T @ gradient) / np.linalg.norm(gradient)
    np.testing.assert_allclose(eva_optax.diagnostics(state)["layer/cosine"], share, rtol=1e-5)


@pytest.mark.parametrize("build", [eva_optax.scale_by_eva, eva_optax.scale_by_eva_f], ids=["eva", "eva_f"])
def test_one_step_of_large_numbers_equals_that_of_small_ones(build):
    """P is as large as G, whatever the inputs are in; the bias's share of (a, 1) is lost in both."""
    tx, update = compiled(build)
    large, state = update(tree(1e15, 1.0), tx.init(tree(1.0, 1.0)))
    small, _ = update(tree(1e8, 1.0), tx.init(tree(1.0, 1.0)))
    assert int(state.skipped) == 0
    assert_close(large["layer"]["kernel"] / np.float32(1e15), small["layer"]["kernel"] / np.float32(1e8), 1e-5)
    if build is eva_optax.scale_by_eva:
        wanted, _ = solve_eva(KERNEL, None, A, B, 0.1, relative=True)
        assert_close(large["layer"]["kernel"] / np.float32(1e15), wanted.astype(np.float32), 1e-5)


@pytest.mark.parametrize(("inputs", "cotangents"), [(1e18, 1e2), (1e10, 1e9)])
def test_products_that_overflow_skip_the_layer_and_are_counted(inputs, cotangents):
    """‖a‖²‖b‖² overflows where ‖a‖², ‖b‖² and ‖G‖² are finite: the gradient passes, and it is said."""
    grads = tree(inputs, cotangents)
    grads["layer"] |= {"kernel": jnp.asarray(KERNEL, jnp.float32) * 1e18, "bias": jnp.asarray(BIAS, jnp.float32)}
    tx, update = compiled(eva_optax.scale_by_eva)
    updates, state = update(grads, tx.init(grads))
    assert_finite((updates, state))
    np.testing.assert_array_equal(updates["layer"]["kernel"], grads["layer"]["kernel"])
    assert int(state.skipped) == 1
    with pytest.raises(ValueError, match="the squares of these were not finite"):
        eva_optax.check(state)
