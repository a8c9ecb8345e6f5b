"""The optimizers of the convergence benchmark keep second moments as long as their baselines do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.convergence.optimizers import OPTIMIZERS
from tests.dense import dense_case


@pytest.mark.parametrize("name", ["adamw", "muon", "eva_adamw", "eva_muon"])
def test_second_moments_of_every_adam_decay_alike(name):
    grads = {"dense": dense_case(0)["layer"], "scale": jnp.full(3, 2.0)}
    tx = OPTIMIZERS[name].build(optax.constant_schedule(0.1))
    _, state = jax.jit(tx.update)(grads, tx.init(grads), grads)
    (moments,) = [leaf for path, leaf in optax.tree.get_all_with_path(state, "nu") if leaf]
    np.testing.assert_allclose(moments["scale"], (1 - 0.95) * 2.0**2, rtol=1e-6)
