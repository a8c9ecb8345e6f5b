"""Whole training steps: compiled once, donated, scanned, mapped, sharded, accumulated, clipped."""

from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import eva_optax
from tests.helpers import assert_probes_are_zero

DEVICES = 4


class Network(nn.Module):
    """A convolution, a layer that is called twice, and a head."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), use_bias=False, param_dtype=float)(x)).mean((1, 2))
        twice = nn.Dense(4, param_dtype=float)
        return nn.Dense(3, param_dtype=float)(nn.tanh(twice(nn.tanh(twice(x)))))


MODEL = eva_optax.tap(Network())


@pytest.fixture(scope="module", autouse=True)
def float64():
    """So that the order of a sum does not matter, and the tolerances can be tight."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def batch(size: int = 16, seed: int = 0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(size, 4, 4, 2)), rng.integers(0, 3, size)


def loss(params, x, y):
    logits = MODEL.apply({"params": params}, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0), batch()[0])["params"]


@pytest.fixture(scope="module")
def full(params):
    """Gradients and update of the whole batch on one device."""
    grads = jax.jit(jax.grad(loss))(params, *batch())
    return grads, first_update(params, grads)


def first_update(params, grads):
    tx = eva_optax.scale_by_eva(0.1, step_rule="kl_clip", learning_rate=1.0)
    return jax.jit(lambda grads: tx.update(grads, tx.init(params), params)[0])(grads)


def assert_vectors_equal(got, want, rtol=1e-9):
    got, want = eva_optax.vectors(got), eva_optax.vectors(want)
    assert got.keys() == want.keys() == {"Conv_0", "Dense_0", "Dense_1"}
    for name in want:
        for mine, theirs in zip(got[name], want[name], strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=rtol * np.abs(theirs).max())


def assert_trees_close(got, want, tolerance=2e-6):
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance * max(1e-6, np.abs(theirs).max()))


OPTIMIZERS = {
    "sgd": lambda: optax.chain(eva_optax.scale_by_eva(), optax.sgd(0.1, momentum=0.9)),
    "adamw": lambda: optax.chain(eva_optax.scale_by_eva(), optax.adamw(1e-2)),
    "lion": lambda: optax.chain(eva_optax.scale_by_eva(), optax.lion(1e-3)),
    "muon": lambda: optax.chain(eva_optax.scale_by_eva(), optax.contrib.muon(1e-2)),
    "eva": lambda: eva_optax.eva(optax.cosine_decay_schedule(0.1, 50), weight_decay=1e-4),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), eva_optax.scale_by_eva(), optax.sgd(0.1)),
    "injected": lambda: optax.inject_hyperparams(eva_optax.scale_by_eva)(damping=optax.constant_schedule(0.1)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_compiles_once_with_donated_state_and_learns(name, params):
    state = TrainState.create(apply_fn=MODEL.apply, params=jax.tree.map(jnp.copy, params), tx=OPTIMIZERS[name]())
    x, y = batch()
    chex.clear_trace_counter()

    @partial(jax.jit, donate_argnums=0)
    @chex.assert_max_traces(n=1)
    def step(state):
        def objective(params):
            logits = state.apply_fn({"params": params}, x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        value, grads = jax.value_and_grad(objective)(state.params)
        if name == "injected":
            grads = jax.tree.map(lambda g: -0.1 * g, grads)  # no learning rate in this one
        return state.apply_gradients(grads=grads), value

    old, losses = state, []
    for _ in range(8):
        state, value = step(state)
        losses.append(float(value))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old.params))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    assert_probes_are_zero(state.params)


def test_scan_over_steps_equals_a_loop(params):
    tx = OPTIMIZERS["sgd"]()

    def step(carry, _):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, *batch())
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    scanned, _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=3))((params, tx.init(params)))
    carry, jitted = (params, tx.init(params)), jax.jit(step)
    for _ in range(3):
        carry, _ = jitted(carry, None)
    assert_trees_close(scanned[0], carry[0])


def test_vmap_over_models_equals_one_by_one(params):
    tx = OPTIMIZERS["sgd"]()
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), params)

    def step(params):
        updates, _ = tx.update(jax.grad(loss)(params, *batch()), tx.init(params), params)
        return updates

    together = jax.jit(jax.vmap(step))(many)
    for index in range(2):
        alone = jax.jit(step)(jax.tree.map(lambda leaf: leaf[index], many))  # noqa: B023
        assert_trees_close(jax.tree.map(lambda leaf: leaf[index], together), alone, 1e-5)  # noqa: B023


def test_vmap_over_examples_gives_the_vectors_of_the_batch(params, full):
    def objective(params, x, y):
        losses = jax.vmap(lambda x, y: loss(params, x[None], y[None]))(x, y)
        return losses.mean()

    grads = jax.jit(jax.grad(objective))(params, *batch())
    assert_vectors_equal(grads, full[0])


def test_gradient_accumulation_over_a_scan_gives_the_vectors_of_the_batch(params, full):
    x, y = (part.reshape(4, 4, *part.shape[1:]) for part in batch())

    def summed(params):
        total, _ = jax.lax.scan(lambda total, xy: (total + loss(params, *xy) / 4, None), 0.0, (x, y))
        return total

    assert_vectors_equal(jax.jit(jax.grad(summed))(params), full[0])

    def accumulate(total, xy):
        return jax.tree.map(jnp.add, total, jax.grad(loss)(params, *xy)), None

    sums, _ = jax.jit(lambda: jax.lax.scan(accumulate, jax.tree.map(jnp.zeros_like, params), (x, y)))()
    mean = jax.tree.map(lambda leaf: leaf / 4, sums)
    assert_vectors_equal(mean, full[0])
    assert_trees_close(first_update(params, mean), full[1], 1e-5)
    # Summed instead of averaged: b is four times as large, as the gradient is; a is the mean all the same.
    for name, (a, b) in eva_optax.vectors(sums).items():
        np.testing.assert_allclose(a, eva_optax.vectors(full[0])[name].a, rtol=0, atol=1e-6)
        np.testing.assert_allclose(b, 4 * eva_optax.vectors(full[0])[name].b, rtol=0, atol=1e-6)


def test_multi_steps_equals_the_batch(params, full):
    tx = optax.MultiSteps(eva_optax.scale_by_eva(step_rule="kl_clip"), 4)
    state, update = tx.init(params), jax.jit(tx.update)
    x, y = batch()
    for part in range(4):
        rows = slice(4 * part, 4 * part + 4)
        updates, state = update(jax.jit(jax.grad(loss))(params, x[rows], y[rows]), state, params)
    assert_trees_close(updates, full[1], 1e-5)


@pytest.mark.parametrize("scale", [2.0**10, 1e-3, 1024.0**2])
def test_loss_scaling_leaves_a_and_the_update_unchanged(scale, params, full):
    grads = jax.jit(jax.grad(lambda params: scale * loss(params, *batch())))(params)
    for name, (a, b) in eva_optax.vectors(grads).items():
        np.testing.assert_allclose(a, eva_optax.vectors(full[0])[name].a, rtol=1e-6)
        np.testing.assert_allclose(b, scale * eva_optax.vectors(full[0])[name].b, rtol=1e-4, atol=1e-6 * scale)
    unscaled = jax.tree.map(lambda leaf: leaf / scale, grads)
    assert_vectors_equal(unscaled, full[0], 1e-5)
    assert_trees_close(first_update(params, unscaled), full[1], 1e-5)


def test_global_norm_does_not_see_probes_and_clipping_acts_as_without(params, full):
    grads = full[0]
    plain = eva_optax.strip(grads)
    np.testing.assert_allclose(optax.tree.norm(grads), optax.tree.norm(plain), rtol=1e-6)
    clip = optax.clip_by_global_norm(0.01)
    clipped, _ = clip.update(grads, clip.init(grads))
    wanted, _ = clip.update(plain, clip.init(plain))
    assert_trees_close(eva_optax.strip(clipped), wanted, 1e-6)
    vectors = eva_optax.vectors(clipped)
    factor = 0.01 / optax.tree.norm(plain)
    for name, (a, b) in eva_optax.vectors(grads).items():
        np.testing.assert_allclose(vectors[name].a, a, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(vectors[name].b, factor * b, rtol=1e-4, atol=1e-7)


def sharded(x, mesh, spec):
    return jax.device_put(x, NamedSharding(mesh, spec))


def test_jit_data_parallelism_gives_the_vectors_of_the_batch(params, full):
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("data",))
    x, y = (sharded(part, mesh, P("data")) for part in batch())
    grads = jax.jit(jax.grad(loss), out_shardings=NamedSharding(mesh, P()))(sharded(params, mesh, P()), x, y)
    assert_vectors_equal(grads, full[0])
    assert_trees_close(first_update(params, grads), full[1], 1e-5)


@pytest.mark.parametrize("reduce", ["automatic", "pmean", "psum"])
def test_shard_map_data_parallelism_gives_the_vectors_of_the_batch(reduce, params, full):
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("data",), axis_types=(AxisType.Auto,))

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P())
    def gradient(params, x, y):
        if reduce == "automatic":  # parameters do not vary over the mesh, so that JAX sums their cotangents
            return jax.grad(lambda params: loss(params, x, y) / DEVICES)(params)
        params = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, "data", to="varying"), params)
        grads = jax.grad(loss)(params, x, y)
        return jax.lax.pmean(grads, "data") if reduce == "pmean" else jax.lax.psum(grads, "data")

    grads = gradient(params, *batch())
    if reduce == "psum":
        for name, (a, b) in eva_optax.vectors(grads).items():
            np.testing.assert_allclose(a, eva_optax.vectors(full[0])[name].a, rtol=0, atol=1e-6)
            np.testing.assert_allclose(b, DEVICES * eva_optax.vectors(full[0])[name].b, rtol=0, atol=1e-6)
    else:
        assert_vectors_equal(grads, full[0])
        assert_trees_close(first_update(params, grads), full[1], 1e-5)


def test_shard_map_without_checks_gives_the_vectors_of_the_batch(params, full):
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("data",))

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P(), check_vma=False)
    def gradient(params, x, y):
        return jax.lax.pmean(jax.grad(loss)(params, x, y), "data")

    assert_vectors_equal(gradient(params, *batch()), full[0])


def test_pmap_data_parallelism_gives_the_vectors_of_the_batch(params, full):
    x, y = (part.reshape(DEVICES, -1, *part.shape[1:]) for part in batch())

    @partial(jax.pmap, axis_name="data", in_axes=(None, 0, 0), devices=jax.devices()[:DEVICES])
    def gradient(params, x, y):
        return jax.lax.pmean(jax.grad(loss)(params, x, y), "data")

    grads = jax.tree.map(lambda leaf: leaf[0], gradient(params, x, y))
    assert_vectors_equal(grads, full[0])


def test_whole_step_inside_shard_map_keeps_the_replicas_equal(params, full):
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), ("data",), axis_types=(AxisType.Auto,))
    tx = OPTIMIZERS["sgd"]()

    def step(params, state, x, y):
        grads = jax.grad(lambda params: jax.lax.pmean(loss(params, x, y), "data"))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    specs = {"in_specs": (P(), P(), P("data"), P("data")), "out_specs": (P(), P())}
    sharded_step = jax.jit(jax.shard_map(step, mesh=mesh, **specs))
    got, _ = sharded_step(params, tx.init(params), *batch())
    updates, _ = tx.update(full[0], tx.init(params), params)
    assert_trees_close(got, optax.apply_updates(params, updates), 1e-5)
