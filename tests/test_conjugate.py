"""`conjugate` and `center`: what they are by hand, in coordinates written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eva_optax
from tests.dense import gradients

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
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates["layer"]["kronecker"]))


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
        for _ in range(4):
            grads = jax.grad(loss)(plain, np.zeros(5))
            probed = gradients(grads["kernel"], grads["bias"], mean[:, None], grads["bias"][None], (1,))
            updates, state = tx.update(probed, state)
            plain = {name: plain[name] + updates["layer"][name] for name in plain}
            steps, adam_state = adam.update(jax.grad(loss)(centred, mean), adam_state)
            centred = optax.apply_updates(centred, steps)
            np.testing.assert_allclose(plain["kernel"], centred["kernel"], rtol=0, atol=1e-12)
            np.testing.assert_allclose(plain["bias"] + mean @ plain["kernel"], centred["bias"], rtol=0, atol=1e-12)


def test_centring_leaves_a_layer_without_bias_to_the_inner_transformation():
    _, _, a, _ = layer(0)
    grads = tree(1, a.astype(np.float32), bias=False)
    tx = eva_optax.center(optax.sgd(1.0))
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates["layer"]["kernel"], -grads["layer"]["kernel"], rtol=1e-6)


def test_momentum_inside_holds_each_gradient_in_the_coordinates_of_its_step():
    with jax.enable_x64(True):
        means = [layer(seed)[2] for seed in (0, 1)]
        tx = eva_optax.conjugate(optax.trace(0.9), decay=0.0)
        state = tx.init(tree(1, means[0]))
        first, second = (whitening(a, True) for a in means)
        _, state = tx.update(tree(1, means[0]), state)
        updates, _ = tx.update(tree(2, means[1]), state)
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
    updates, _ = tx.update(grads, tx.init(grads))
    wanted, _ = plain.update(grads, plain.init(grads))
    np.testing.assert_allclose(rows(updates["layer"]), rows(wanted["layer"]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("wrapper", [eva_optax.conjugate, eva_optax.center])
def test_broken_mean_inputs_hold_the_average(wrapper):
    _, _, a, _ = layer(0)
    tx = wrapper(optax.sgd(1.0))
    state = tx.init(tree(1, a))
    _, state = tx.update(tree(1, a), state)
    clean, _ = tx.update(tree(2, a), state)
    broken, after = tx.update(tree(2, a * np.nan), state)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-6), broken, clean)
    assert after.skipped == 1


@pytest.mark.parametrize("wrapper", [eva_optax.conjugate, eva_optax.center])
def test_works_under_masked_partition_and_injected_hyperparameters(wrapper):
    _, _, a, _ = layer(0)
    grads = tree(1, a)
    plain, _ = wrapper(optax.sgd(0.1)).update(grads, wrapper(optax.sgd(0.1)).init(grads))
    labels = {"layer": "tapped", "scale": "rest"}
    for tx in (
        optax.masked(wrapper(optax.sgd(0.1)), {"layer": True, "scale": False}),
        optax.partition({"tapped": wrapper(optax.sgd(0.1)), "rest": optax.sgd(1.0)}, labels),
        optax.inject_hyperparams(lambda decay: wrapper(optax.sgd(0.1), decay=decay))(decay=0.05),
    ):
        updates, _ = jax.jit(tx.update)(grads, tx.init(grads))
        np.testing.assert_allclose(rows(updates["layer"]), rows(plain["layer"]), rtol=1e-6)


def test_options_and_trees_are_checked():
    with pytest.raises(ValueError, match="conjugate: damping must be greater than 0, got 0"):
        eva_optax.conjugate(optax.sgd(1.0), 0)
    with pytest.raises(ValueError, match=r"center: decay must lie in \[0, 1\), got 1"):
        eva_optax.center(optax.sgd(1.0), decay=1)
    with pytest.raises(ValueError, match="conjugate: the parameters hold no probes"):
        eva_optax.conjugate(optax.sgd(1.0)).init({"kernel": jnp.ones((2, 3))})
