"""`scale_by_eva` against dense solves: every layout, both kinds of damping, running averages."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eva_optax
from tests.dense import LAYOUTS, LayoutCase, dense_case, draw, every_layout, expected, gradients, two_layers
from tests.helpers import assert_close, assert_probes_are_zero, averages, first_update, programs_of_a_gpu

DAMPING = 0.3


@cache
def updates(dtype: Any, relative: bool) -> dict:
    """The updates of a model with every layout, and those of one step that nothing went wrong in."""
    with jax.enable_x64(dtype == np.float64):
        tx, grads = eva_optax.scale_by_eva(DAMPING, relative=relative), every_layout(dtype)
        found, state = first_update(tx, grads)
        assert state.skipped == 0
        return found


def assert_solved(case: LayoutCase, found: dict, relative: bool, tolerance: float) -> None:
    wanted = expected(case, *draw(case), DAMPING, relative)
    for name, want in zip(("kernel", "bias"), wanted, strict=True):
        if want is not None:
            assert_close(np.asarray(found[name]), want, tolerance, floor=1.0)
    assert_probes_are_zero(found)


every_case = pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)


@every_case
def test_update_equals_dense_solve(case: LayoutCase):
    for dtype, relative in ((np.float64, True), (np.float64, False), (np.float32, True)):
        found = updates(dtype, relative)[case.name]
        assert found["kernel"].dtype == dtype
        assert_solved(case, found, relative, 1e-10 if dtype == np.float64 else 1e-6)


@pytest.fixture
def as_on_a_gpu() -> Iterator[None]:
    with programs_of_a_gpu():
        yield


def test_update_in_the_order_of_a_gpu_equals_dense_solve(as_on_a_gpu: None):
    with jax.enable_x64(True):
        tx, grads = eva_optax.scale_by_eva(DAMPING), every_layout()
        found, _ = first_update(tx, grads)
    for case in LAYOUTS:
        assert_solved(case, found[case.name], True, 1e-10)


def test_rounding_noise_is_recognised_in_the_order_of_a_gpu(as_on_a_gpu: None):
    """BatchNorm makes the cotangents before it, and the inputs after it, cancel."""
    model = eva_optax.tap(nn.Sequential([nn.Dense(8), nn.BatchNorm(use_running_average=False), nn.Dense(4, False)]))
    x = jax.random.normal(jax.random.key(0), (64, 5))
    variables = jax.jit(model.init)(jax.random.key(1), x)

    def loss(params):
        y, _ = model.apply(variables | {"params": params}, x, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y))

    before, after = eva_optax.vectors(jax.jit(jax.grad(loss))(variables["params"])).values()
    assert not np.count_nonzero(before.b)
    assert not np.count_nonzero(after.a)
    assert np.all(before.a)
    assert np.all(after.b)


@settings(max_examples=9, deadline=None)
@given(
    inputs=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    outputs=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    layers=st.sampled_from([0, 1, 2]),
    biased=st.booleans(),
    relative=st.booleans(),
    damping=st.floats(1e-3, 10),
    seed=st.integers(0, 2**16),
)
def test_update_equals_dense_solve_for_any_shape(inputs, outputs, layers, biased, relative, damping, seed):
    """Any number of input and output axes, stacked in front or not."""
    stack = [layers] * (layers > 0)
    ones = [1] * len(inputs), [1] * len(outputs)
    rank, offset = len(stack) + len(inputs) + len(outputs), len(stack)
    bias_axes = (*range(offset), *range(offset + len(inputs), rank)) if biased else None
    case = LayoutCase(
        "drawn",
        (*stack, *inputs, *outputs),
        (*stack, *inputs, *ones[1]),
        (*stack, *ones[0], *outputs),
        bias_axes,
        tuple(range(offset)),
    )
    kernel, bias, a, b = draw(case, seed)
    wanted = expected(case, kernel, bias, a, b, damping, relative)
    with jax.enable_x64(True):
        grads = gradients(kernel, bias, a, b, case.counter)
        tx = eva_optax.scale_by_eva(damping, relative=relative)
        updates, _ = first_update(tx, grads)
        for got, want in zip((updates["layer"]["kernel"], updates["layer"].get("bias")), wanted, strict=True):
            if want is not None:
                np.testing.assert_allclose(got, want, rtol=0, atol=1e-9 * max(1.0, np.abs(want).max()))


def test_running_average_takes_the_first_value_and_then_decays():
    with jax.enable_x64(True):
        tx = eva_optax.scale_by_eva(0.1, decay=0.3)
        state, mean = tx.init(dense_case(0)), None
        for seed in range(4):
            _, _, a, b = draw(LAYOUTS[0], seed)
            mean = (a, b) if mean is None else tuple(0.3 * m + 0.7 * v for m, v in zip(mean, (a, b), strict=True))
            updates, state = jax.jit(tx.update)(dense_case(seed), state)
            running = averages(state, "layer")
            np.testing.assert_allclose(running["a"], mean[0], rtol=1e-12)
            np.testing.assert_allclose(running["b"], mean[1], rtol=1e-12)
            kernel, bias, _, _ = draw(LAYOUTS[0], seed)
            wanted = expected(LAYOUTS[0], kernel, bias, *mean, 0.1, True)
            np.testing.assert_allclose(updates["layer"]["kernel"], wanted[0], rtol=0, atol=1e-10)
        assert state.count == 4


def test_relative_damping_is_scale_free():
    """A loss a thousand times larger gives an update a thousand times larger: no other effect."""
    tx = eva_optax.scale_by_eva()
    one, _ = first_update(tx, dense_case(0))
    thousand, _ = tx.update(dense_case(0, 1024.0), tx.init(dense_case(0)))
    np.testing.assert_allclose(thousand["layer"]["kernel"], 1024 * one["layer"]["kernel"], rtol=1e-5)


def test_update_does_not_depend_on_a_linear_factor_of_the_vectors_alone_being_counted():
    """Summing over devices or calls instead of averaging: a and its counter grow together, G and b grow together."""
    tx = eva_optax.scale_by_eva()
    once = dense_case(0)
    summed = jax.tree.map(lambda leaf: 8 * leaf, once)
    one, state_one = first_update(tx, once)
    eight, state_eight = tx.update(summed, tx.init(once))
    np.testing.assert_allclose(eight["layer"]["kernel"], 8 * one["layer"]["kernel"], rtol=1e-5)
    np.testing.assert_array_equal(averages(state_one)["a"], averages(state_eight)["a"])


def test_updates_and_averages_keep_their_dtypes():
    grads = dense_case(0)
    half = {"layer": dict(grads["layer"])}
    half["layer"] |= {name: grads["layer"][name].astype(jnp.bfloat16) for name in ("kernel", "bias")}
    tx = eva_optax.scale_by_eva()
    updates, state = first_update(tx, half)
    assert updates["layer"]["kernel"].dtype == updates["layer"]["bias"].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(state.vectors)} == {jnp.dtype(jnp.float32)}
    reference, _ = first_update(tx, grads)
    np.testing.assert_allclose(
        updates["layer"]["kernel"].astype(np.float32), reference["layer"]["kernel"], rtol=0, atol=0.03
    )


def test_state_is_masked_outside_of_probes_and_works_with_map_params():
    grads = two_layers(0)
    tx = eva_optax.scale_by_eva()
    state = tx.init(grads)
    assert isinstance(state.vectors["scale"], optax.MaskedNode)
    assert isinstance(state.vectors["dense"]["kernel"], optax.MaskedNode)
    doubled = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
    assert doubled.vectors["dense"]["kronecker"]["kernel,bias"]["a"][0, 0] == 1
    assert doubled.count == state.count
