"""`scale_by_eva_s` against dense solves, for gradients of any rank."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import eva_optax
from tests.dense import two_layers
from tests.helpers import assert_finite, first_update


def solve_eva_s(gradient: np.ndarray, means: list[np.ndarray], damping: float, relative: bool) -> np.ndarray:
    """γ (vec(V) vec(V)ᵀ + γI)⁻¹ vec(G), with V the outer product of the means."""
    direction = means[0]
    for mean in means[1:]:
        direction = np.multiply.outer(direction, mean)
    gamma = damping * np.sum(direction**2) if relative else damping
    curvature = np.outer(direction, direction) + gamma * np.eye(direction.size)
    return gamma * np.linalg.solve(curvature, gradient.ravel()).reshape(gradient.shape)


@settings(max_examples=10, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    relative=st.booleans(),
    damping=st.floats(1e-2, 10),
    decay=st.floats(0, 0.9),
    seed=st.integers(0, 2**16),
)
def test_eva_s_equals_dense_solve_for_any_shape(shape, relative, damping, decay, seed):
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        options = {"damping": damping, "relative": relative, "decay": decay}
        both = [eva_optax.scale_by_eva_s(**options, step_rule="none"), eva_optax.scale_by_eva_s(**options)]
        states, means = [tx.init({"kernel": jnp.zeros(shape)}) for tx in both], None

        @jax.jit
        def update(gradient, states):
            steps = [tx.update({"kernel": gradient}, state) for tx, state in zip(both, states, strict=True)]
            return [updates["kernel"] for updates, _ in steps], [state for _, state in steps]

        for _ in range(2):
            gradient = rng.normal(0.5, 1, shape)
            new = [gradient.mean(tuple(o for o in range(len(shape)) if o != axis)) for axis in range(len(shape))]
            means = new if means is None else [decay * m + (1 - decay) * v for m, v in zip(means, new, strict=True)]
            (plain, rescaled), states = update(gradient, states)
            wanted = solve_eva_s(gradient, means, damping, relative)
            np.testing.assert_allclose(plain, wanted, rtol=0, atol=1e-9)
            # Then as long as the gradient. Damping is 0.01 at least, so that something of it is always left.
            wanted *= np.linalg.norm(gradient) / np.linalg.norm(wanted)
            np.testing.assert_allclose(rescaled, wanted, rtol=0, atol=1e-9)


def test_eva_s_passes_vectors_and_broken_gradients_on():
    params = {"matrix": jnp.ones((2, 3)), "bias": jnp.ones(3), "scale": jnp.ones(()), "empty": jnp.ones((0, 3))}
    tx = eva_optax.scale_by_eva_s()
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)
    updates, state = tx.update(grads, tx.init(params))
    assert not np.allclose(updates["matrix"], grads["matrix"])
    np.testing.assert_allclose(np.linalg.norm(updates["matrix"]), np.linalg.norm(grads["matrix"]), rtol=1e-6)
    for name in ("bias", "scale", "empty"):
        np.testing.assert_array_equal(updates[name], grads[name])
    broken = grads | {"matrix": grads["matrix"].at[0, 0].set(jnp.nan)}
    updates, after = jax.jit(tx.update)(broken, state)
    np.testing.assert_array_equal(updates["matrix"], broken["matrix"])
    jax.tree.map(np.testing.assert_array_equal, after.vectors, state.vectors)
    assert after.skipped == 1
    assert_finite(eva_optax.diagnostics(after))


def test_eva_s_needs_no_tap_and_leaves_probes_alone():
    grads = two_layers(0)
    tx = eva_optax.scale_by_eva_s()
    updates, _ = first_update(tx, grads)
    plain = eva_optax.strip(grads)
    wanted, _ = first_update(tx, plain)
    jax.tree.map(np.testing.assert_array_equal, eva_optax.strip(updates), wanted)
    assert not any(np.count_nonzero(leaf) for leaf in jax.tree.leaves(updates["dense"]["kronecker"]))


def test_eva_s_survives_gradients_whose_means_multiply_to_nothing():
    """In float32 ‖V‖² of this kernel is zero; its direction is as well known as ever."""
    gradient = np.random.default_rng(0).normal(0.5, 1, (3, 3, 4, 5)).astype(np.float32)
    tx = eva_optax.scale_by_eva_s(step_rule="none")
    one, _ = tx.update({"kernel": jnp.asarray(gradient)}, tx.init({"kernel": gradient}))
    tiny, _ = tx.update({"kernel": jnp.asarray(gradient * 2.0**-40)}, tx.init({"kernel": gradient}))
    np.testing.assert_allclose(tiny["kernel"] * 2.0**40, one["kernel"], rtol=1e-5)
    assert not np.allclose(one["kernel"], gradient)
