"""Faults in the middle of training a whole model: what one bad step does to that step, and to all later ones."""

from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eva_optax
from tests.helpers import assert_close, assert_finite, assert_identical, averages

STEPS = 5
LAYERS = {"Conv_0": "kernel", "Dense_0": "kernel,bias", "Dense_1": "kernel,bias"}
first_or_later = pytest.mark.parametrize("at", [0, 3], ids=["first step", "later step"])
bad_values = pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)


class Network(nn.Module):
    """A convolution, a layer that is called twice, or not at all, and a head."""

    @nn.compact
    def __call__(self, x, use):
        x = nn.relu(nn.Conv(4, (3, 3), use_bias=False)(x)).mean((1, 2))
        twice = nn.Dense(4)
        twice(x)  # so that it exists whether it is used or not
        return nn.Dense(3)(nn.cond(use, lambda _, x: nn.tanh(twice(nn.tanh(twice(x)))), lambda _, x: x, self, x))


MODEL = eva_optax.tap(Network())


def batch(number: int):
    rng = np.random.default_rng(number)
    return rng.normal(size=(8, 4, 4, 2)).astype(np.float32), rng.normal(size=(8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0), batch(0)[0], True)["params"]


def loss(params, x, y, scale=1.0, use=True):
    return scale * jnp.mean((MODEL.apply({"params": params}, x, use) - y) ** 2)


gradient = jax.jit(jax.grad(loss))


def train(params, tx, numbers=range(STEPS), spoil=None):
    """Trains on the numbered batches; `spoil` may change the arguments of the loss, and the gradients.

    Returns for each step parameters and optimizer state after it, and its gradients.
    """
    state, steps = tx.init(params), []
    for number in numbers:
        arguments, change = (spoil and spoil(number)) or ({}, lambda grads: grads)
        grads = change(gradient(params, *batch(number), **arguments))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        steps.append((params, state, grads))
    return steps


def compiled(tx):
    return optax.GradientTransformation(jax.jit(tx.init), jax.jit(tx.update))


@cache  # compiled once
def eva(**options):
    return compiled(optax.chain(eva_optax.scale_by_eva(**options), optax.scale(-0.1)))


GUARDED = compiled(optax.apply_if_finite(eva(), 3))


@first_or_later
@bad_values
@pytest.mark.parametrize("vector", ["a", "b"])
@pytest.mark.parametrize("layer", LAYERS)
def test_bad_vectors_of_one_layer_cost_it_one_plain_step(layer, vector, value, at, params):
    def spoil(number):
        def change(grads):
            probe = grads[layer]["kronecker"][LAYERS[layer]]
            bad = {**probe, vector: probe[vector] * (value if number == at else 1.0)}
            return {**grads, layer: {**grads[layer], "kronecker": {LAYERS[layer]: bad}}}

        return {}, change

    sound, faulty = train(params, eva()), train(params, eva(), spoil=spoil)
    before = params if at == 0 else sound[at - 1][0]
    (after, state, grads), (sound_after, sound_state, _) = faulty[at], sound[at]
    for name in LAYERS:
        if name == layer:
            plain = jax.tree.map(lambda p, g: p - 0.1 * g, eva_optax.strip(before[name]), eva_optax.strip(grads[name]))
            assert_close(eva_optax.strip(after[name]), plain)
            assert_identical(averages(state, name), averages(faulty[at - 1][1] if at else eva().init(params), name))
        else:
            assert_identical(after[name], sound_after[name])
            assert_identical(averages(state, name), averages(sound_state, name))
    assert [int(optax.tree.get(state, "skipped")) for _, state, _ in faulty] == [0] * at + [1] * (STEPS - at)
    assert_finite([(params, state) for params, state, _ in faulty])


@first_or_later
@bad_values
@pytest.mark.parametrize("spoiled", ["gradient", "loss"])
def test_a_bad_gradient_or_loss_is_as_if_its_step_had_not_been_under_apply_if_finite(spoiled, value, at, params):
    def spoil(number):
        if number != at:
            return None
        if spoiled == "loss":
            return {"scale": value}, lambda grads: grads
        return {}, lambda grads: {**grads, "Dense_0": {**grads["Dense_0"], "bias": grads["Dense_0"]["bias"] * value}}

    *_, (faulty, state, _) = train(params, GUARDED, spoil=spoil)
    *_, (wanted, _, _) = train(params, GUARDED, [number for number in range(STEPS) if number != at])
    assert_identical(faulty, wanted)
    assert state.total_notfinite == 1


@first_or_later
@bad_values
def test_a_bad_loss_reaches_the_user_and_not_the_averages(value, at, params):
    def spoil(number):
        return ({"scale": value}, lambda grads: grads) if number == at else None

    sound, faulty = train(params, eva(), range(at + 1)), train(params, eva(), range(at + 1), spoil)
    before = sound[at - 1][1] if at else eva().init(params)
    after, state, _ = faulty[at]
    for name in LAYERS:
        assert not np.all(np.isfinite(after[name]["kernel"]))
        assert_identical(averages(state, name), averages(before, name))
    assert optax.tree.get(state, "skipped") == 0
    assert_finite(state)


@first_or_later
@bad_values
def test_a_bad_gradient_of_one_layer_reaches_the_user_and_not_its_averages(value, at, params):
    def spoil(number):
        def change(grads):
            kernel = grads["Dense_0"]["kernel"].at[0, 0].set(value)
            return {**grads, "Dense_0": {**grads["Dense_0"], "kernel": kernel}}

        return ({}, change) if number == at else None

    sound, faulty = train(params, eva(), range(at + 1)), train(params, eva(), range(at + 1), spoil)
    before = sound[at - 1][1] if at else eva().init(params)
    (after, state, _), (sound_after, sound_state, _) = faulty[at], sound[at]
    assert not np.isfinite(after["Dense_0"]["kernel"][0, 0])
    assert_identical(averages(state, "Dense_0"), averages(before, "Dense_0"))
    for name in ("Conv_0", "Dense_1"):
        assert_identical(after[name], sound_after[name])
        assert_identical(averages(state, name), averages(sound_state, name))
    assert optax.tree.get(state, "skipped") == 0


@first_or_later
@pytest.mark.parametrize("step_rule", ["none", "kl_clip", "kl_norm", "grad_norm"])
def test_a_step_without_gradient_moves_nothing(step_rule, at, params):
    def spoil(number):
        return ({"scale": 0.0}, lambda grads: grads) if number == at else None

    steps = train(params, eva(step_rule=step_rule), spoil=spoil)
    assert_finite([(params, state) for params, state, _ in steps])
    before = params if at == 0 else steps[at - 1][0]
    assert_identical(steps[at][0], before)
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: np.any(a != b), steps[-1][0]["Conv_0"], before["Conv_0"]))
    assert any(moved)


@first_or_later
def test_an_unused_layer_rests_and_joins_again(at, params):
    def spoil(number):
        return ({"use": False}, lambda grads: grads) if number == at else None

    steps = train(params, eva(), spoil=spoil)
    before = (params, eva().init(params)) if at == 0 else steps[at - 1][:2]
    assert_identical(steps[at][0]["Dense_0"], before[0]["Dense_0"])
    assert_identical(averages(steps[at][1], "Dense_0"), averages(before[1], "Dense_0"))
    assert np.count_nonzero(steps[at + 1][0]["Dense_0"]["kernel"] != before[0]["Dense_0"]["kernel"])
    assert optax.tree.get(steps[-1][1], "skipped") == 0
    if at == 0:  # its first use, in the second step, is taken as it is
        assert_close(averages(steps[1][1], "Dense_0"), eva_optax.vectors(steps[1][2])["Dense_0"]._asdict())


@pytest.mark.parametrize("stripped", [False, True], ids=["all", "without probes"])
def test_norms_of_parameters_in_the_loss_are_counted_unless_they_leave_out_probes(stripped, params):
    def penalised(params):
        norms = map(jnp.linalg.norm, jax.tree.leaves(eva_optax.strip(params) if stripped else params))
        return loss(params, *batch(0)) + 0.01 * sum(norms)

    params = jax.tree.map(lambda p: p + 0.1, eva_optax.strip(params))  # no norm of zero among them
    params = eva_optax.attach(MODEL, params, batch(0)[0], True)
    grads = jax.jit(jax.grad(penalised))(params)
    updates, state = eva().update(grads, eva().init(params))
    assert optax.tree.get(state, "skipped") == (0 if stripped else len(LAYERS))
    assert_finite((updates, state))
    plain = jax.tree.map(lambda g: -0.1 * g, eva_optax.strip(grads))
    for got, want in zip(jax.tree.leaves(eva_optax.strip(updates)), jax.tree.leaves(plain), strict=True):
        assert np.allclose(got, want, rtol=1e-6) != stripped


def test_an_empty_batch_is_refused_when_the_step_is_traced(params):
    x, y = batch(0)
    with pytest.raises(ValueError, match=r"empty batch.*shape \(0, "):
        jax.eval_shape(jax.grad(loss), params, x[:0], y[:0])
