"""`conjugate` and `center`: what they are by hand, in coordinates written out."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eva_optax
from tests.dense import gradients
from tests.helpers import assert_close, first_update

DAMPING = 0.1


def layer(seed: int, bias: bool = True) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return (
        rng.normal(size=(5, 4)),
        rng.normal(size=4) if bias else None,
        rng.normal(size=(5, 1)),
        rng.normal(size=(1, 4)),
    )


def tree(seed: int, a: np.ndarray, bias: bool = True) -> dict:
    kernel, bias_gradient, _, b = layer(seed, bias)
    counter = (1,) if bias else (1, 1)
    return gradients(kernel, bias_gradient, a, b, counter) | {"scale": jnp.arange(3.0)}


def whitening(a: np.ndarray, bias: bool, damping: float = DAMPING, relative: bool = True) -> np.ndarray:
    """R as a dense inverse square root, scaled so that it is the identity across a."""
    row = np.append(a.ravel(), 1.0) if bias else a.ravel()
    gamma = damping * row @ row if relative else damping
    values, vectors = np.linalg.eigh(np.outer(row, row) / gamma + np.eye(row.size))
    return vectors @ np.diag(values**-0.5) @ vectors.T


def rows(part: dict) -> np.ndarray:
    """[kernel; bias] of one layer."""
    kernel = np.asarray(part["kernel"])
    return np.concatenate([kernel, np.asarray(part["bias"])[None]]) if "bias" in part else kernel


@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_around_sgd_it_preconditions_with_the_square_of_the_whitening(bias, relative):
    with jax.enable_x64(True):
        _, _, a, _ = layer(0)
        tx = eva_optax.conjugate(optax.sgd(0.3), DAMPING, relative=relative)
        grads = tree(1, a, bias)
        updates, _ = jax.jit(tx.update)(grads, tx.init(grads))
        r = whitening(a, bias, relative=relative)
        np.testing.assert_allclose(rows(updates["layer"]), -0.3 * r @ r @ rows(grads["layer"]), rtol=0, atol=1e-12)
        np.testing.assert_allclose(updates["scale"], -0.3 * np.arange(3.0))
        assert not any(np.count_nonzero(leaf) for leaf in jax.tree.leaves(updates["layer"]["kronecker"]))


def test_around_adam_it_is_adam_on_the_reparametrised_model():
    """W = R V with a fixed R: Adam's steps in V, taken back to W."""
    with jax.enable_x64(True):
        _, _, a, _ = layer(0)
        tx, plain, r = eva_optax.conjugate(optax.adam(0.1)), optax.adam(0.1), whitening(a, True)
        state, plain_state = tx.init(tree(1, a)), plain.init(rows(tree(1, a)["layer"]))
        for seed in range(1, 5):
            updates, state = jax.jit(tx.update)(tree(seed, a), state)
            by_hand, plain_state = plain.update(jnp.asarray(r @ rows(tree(seed, a)["layer"])), plain_state)
            np.testing.assert_allclose(rows(updates["layer"]), r @ by_hand, rtol=0, atol=1e-12)


def test_centring_adam_is_adam_on_the_model_with_centred_inputs():
    """y = (x − μ)·W + β', differentiated by JAX itself."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, target = rng.normal(1, 1, (16, 5)), rng.normal(size=(16, 4))
        mean = x.mean(0)
        kernel, bias, _, _ = layer(3)

        def loss(params, shift):
            return jnp.mean(jnp.square(jnp.tanh((x - shift[None]) @ params["kernel"] + params["bias"][None]) - target))

        plain = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
        centred = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias + mean @ kernel)}
        tx, adam = eva_optax.center(optax.adam(0.05)), optax.adam(0.05)
        probed = gradients(kernel, bias, mean[:, None], np.ones((1, 4)), (1,))
        state, adam_state = tx.init(probed), adam.init(centred)
        update, adam_update = jax.jit(tx.update), jax.jit(adam.update)
        gradient = jax.jit(jax.grad(loss))
        for _ in range(4):
            grads = gradient(plain, np.zeros(5))
            probed = gradients(grads["kernel"], grads["bias"], mean[:, None], grads["bias"][None], (1,))
            updates, state = update(probed, state)
            plain = {name: plain[name] + updates["layer"][name] for name in plain}
            steps, adam_state = adam_update(gradient(centred, mean), adam_state)
            centred = optax.apply_updates(centred, steps)
            np.testing.assert_allclose(plain["kernel"], centred["kernel"], rtol=0, atol=1e-12)
            np.testing.assert_allclose(plain["bias"] + mean @ plain["kernel"], centred["bias"], rtol=0, atol=1e-12)


def test_centring_leaves_a_layer_without_bias_to_the_inner_transformation():
    _, _, a, _ = layer(0)
    grads = tree(1, a.astype(np.float32), bias=False)
    tx = eva_optax.center(optax.sgd(1.0))
    updates, _ = first_update(tx, grads)
    np.testing.assert_allclose(updates["layer"]["kernel"], -grads["layer"]["kernel"], rtol=1e-6)


def test_momentum_inside_holds_each_gradient_in_the_coordinates_of_its_step():
    with jax.enable_x64(True):
        means = [layer(seed)[2] for seed in (0, 1)]
        tx = eva_optax.conjugate(optax.trace(0.9), decay=0.0)
        state, update = tx.init(tree(1, means[0])), jax.jit(tx.update)
        first, second = (whitening(a, True) for a in means)
        _, state = update(tree(1, means[0]), state)
        updates, _ = update(tree(2, means[1]), state)
        by_hand = second @ (second @ rows(tree(2, means[1])["layer"]) + 0.9 * first @ rows(tree(1, means[0])["layer"]))
        np.testing.assert_allclose(rows(updates["layer"]), by_hand, rtol=0, atol=1e-12)


def test_momentum_on_a_quadratic_whose_directions_change_is_a_product_of_two_matrices():
    """L = ½κ‖W‖², whitened along the first input for t steps and along the second for t more, without averaging.

    Row by row R is a number, s or 1, and (W, m) ← (W − η·r·(μm + r·κW), μm + r·κW) is linear: what momentum holds stays
    as it was when r changes, and is then scaled by the new r. So the answer is M₁ᵗ Mₛᵗ for the first row, and MₛᵗM₁ᵗ
    for the second.
    """
    with jax.enable_x64(True):
        curvature, rate, momentum, steps = 0.7, 0.3, 0.8, 5
        s = (1 + 1 / DAMPING) ** -0.5

        def transition(r: float) -> np.ndarray:
            m = np.array([r * curvature, momentum])
            return np.array([np.array([1, 0]) - rate * r * m, m])

        power = np.linalg.matrix_power
        whitened, plain = power(transition(s), steps), power(transition(1.0), steps)
        start = np.array([[1.0, -2.0], [3.0, 0.5]])
        wanted = [(plain @ whitened)[0, 0] * start[0], (whitened @ plain)[0, 0] * start[1]]

        tx = eva_optax.conjugate(optax.trace(momentum), DAMPING, decay=0.0)
        state, update, kernel = None, jax.jit(tx.update), start
        for step in range(2 * steps):
            direction = np.eye(2)[:, [int(step >= steps)]]
            grads = gradients(curvature * kernel, None, direction, np.ones((1, 2)), (1, 1))
            state = tx.init(grads) if state is None else state
            updates, state = update(grads, state)
            kernel = kernel - rate * updates["layer"]["kernel"]
        np.testing.assert_allclose(kernel, wanted, rtol=0, atol=1e-12)


def test_a_large_damping_leaves_the_inner_transformation_alone():
    _, _, a, _ = layer(0)
    grads = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree(1, a))
    tx, plain = eva_optax.conjugate(optax.adam(0.1), 1e12), optax.adam(0.1)
    updates, _ = first_update(tx, grads)
    wanted, _ = first_update(plain, grads)
    np.testing.assert_allclose(rows(updates["layer"]), rows(wanted["layer"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("wrapper", [eva_optax.conjugate, eva_optax.center])
def test_broken_mean_inputs_hold_the_average(wrapper):
    _, _, a, _ = layer(0)
    tx = wrapper(optax.sgd(1.0))
    state, update = tx.init(tree(1, a)), jax.jit(tx.update)
    _, state = update(tree(1, a), state)
    clean, _ = update(tree(2, a), state)
    broken, after = update(tree(2, a * np.nan), state)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-6), broken, clean)
    assert after.skipped == 1


def test_options_and_trees_are_checked():
    with pytest.raises(ValueError, match="conjugate: damping must be greater than 0, got 0"):
        eva_optax.conjugate(optax.sgd(1.0), 0)
    with pytest.raises(ValueError, match=r"center: decay must lie in \[0, 1\), got 1"):
        eva_optax.center(optax.sgd(1.0), decay=1)
    with pytest.raises(ValueError, match="conjugate: the parameters hold no probes"):
        eva_optax.conjugate(optax.sgd(1.0)).init({"kernel": jnp.ones((2, 3))})


@pytest.mark.parametrize("name", ["conjugate", "center", "eva_adamw", "eva_muon"])
def test_the_inner_optimizer_keeps_nothing_for_probes(name):
    model = eva_optax.tap(nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(2)]))
    params = model.init(jax.random.key(0), jnp.ones((3, 5)))["params"]
    adam = optax.scale_by_adam()
    tx = {
        "conjugate": lambda: eva_optax.conjugate(adam),
        "center": lambda: eva_optax.center(adam),
        "eva_adamw": lambda: eva_optax.eva_adamw(1e-3),
        "eva_muon": lambda: eva_optax.eva_muon(1e-3),
    }[name]()
    state = tx.init(params)
    inner = state.inner if name in ("conjugate", "center") else state[0].inner
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(inner)]
    assert any("kernel" in path for path in paths)
    assert not any("kronecker" in path for path in paths)


def test_random_keys_by_leaf_do_not_shift():
    """An inner optimizer that draws a key for each leaf draws what it draws for the untapped model."""
    model = eva_optax.tap(nn.Dense(3))
    params = model.init(jax.random.key(0), jnp.ones((3, 5)))["params"]
    noise = optax.add_noise(1.0, 0.0, jax.random.key(1))
    grads = jax.tree.map(jnp.zeros_like, params)
    wrapped, bare = eva_optax.center(noise), eva_optax.strip(grads)
    got = wrapped.update(grads, wrapped.init(params))[0]
    want = noise.update(bare, noise.init(eva_optax.strip(params)))[0]
    assert_close(eva_optax.strip(got), want)
