"""The optimizers of the convergence benchmark: moments as long as their baselines', and NysAct as published."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eva_optax
from benchmarks.convergence.optimizers import OPTIMIZERS, nysact
from tests.dense import dense_case


@pytest.mark.parametrize("name", ["adamw", "muon", "eva_adamw", "eva_muon"])
def test_second_moments_of_every_adam_decay_alike(name):
    grads = {"dense": dense_case(0)["layer"], "scale": jnp.full(3, 2.0)}
    tx = OPTIMIZERS[name].build(optax.constant_schedule(0.1))
    _, state = jax.jit(tx.update)(grads, tx.init(grads), grads)
    (moments,) = [leaf for path, leaf in optax.tree.get_all_with_path(state, "nu") if leaf]
    np.testing.assert_allclose(moments["scale"], (1 - 0.95) * 2.0**2, rtol=1e-6)


def test_nysact_takes_the_damping_alone_for_what_its_sketch_does_not_see(x64):
    """(U Λ Uᵀ + γI)⁻¹ G with the eigenvalues Λ and vectors U of Nyström's approximation."""
    x = np.random.default_rng(0).normal(0.5, 1, (12, 7))
    model = eva_optax.tap(nn.Dense(2, use_bias=False, param_dtype=float), rank=3)

    @jax.jit
    def step(rate: jax.Array) -> tuple:
        params = model.init(jax.random.key(0), x)["params"]
        grads = jax.grad(lambda params: jnp.sin(model.apply({"params": params}, x)).mean())(params)
        tx = nysact(optax.constant_schedule(rate), damping=0.3)
        return grads, tx.update(grads, tx.init(params), params)[0]

    grads, updates = step(0.1)
    omega = np.asarray(eva_optax.sketches(grads)[""].directions)
    sketch = x.T @ x / len(x) @ omega
    seen = sketch @ np.linalg.solve(omega.T @ sketch, sketch.T)
    wanted = -0.1 * np.linalg.solve(seen + 0.3 * np.eye(7), grads["kernel"])
    np.testing.assert_allclose(updates["kernel"], wanted, rtol=1e-9)
