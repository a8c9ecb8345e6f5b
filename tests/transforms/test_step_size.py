"""The step-size rules: ν is its formula over all preconditioned parameters, for every member that has one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eva_optax
from tests.dense import dense_case, gradients, two_layers
from tests.helpers import assert_close, first_update

RULES = ["none", "kl_clip", "kl_norm", "grad_norm", "layer_grad_norm"]


def test_stacked_members_have_each_its_own_factor_under_vmap():
    tx = eva_optax.scale_by_eva(step_rule="kl_norm")
    members = [dense_case(seed, 1.0 + seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    updates, state = jax.jit(jax.vmap(lambda grads: tx.update(grads, tx.init(grads))))(stacked)
    for index, member in enumerate(members):
        wanted, alone = first_update(tx, member)
        assert_close(jax.tree.map(lambda leaf: leaf[index], updates), wanted)  # noqa: B023
        np.testing.assert_allclose(state.nu[index], alone.nu, rtol=1e-6)


def test_kl_clip_follows_the_schedule():
    rates = jnp.array([10.0, 1.0, 0.1])
    tx = eva_optax.scale_by_eva(step_rule="kl_clip", learning_rate=lambda count: rates[count])
    state, update, nus = tx.init(dense_case(0)), jax.jit(tx.update), []
    for _ in range(3):
        _, state = update(dense_case(0), state)
        nus.append(float(state.nu))
    np.testing.assert_allclose(np.array(nus[:2]) * [10, 1], nus[0] * 10, rtol=1e-5)
    assert nus[0] < nus[1] < nus[2]


def test_kl_clip_never_lengthens_the_step():
    tx = eva_optax.scale_by_eva(step_rule="kl_clip", kl_clip=1e6)
    _, state = first_update(tx, dense_case(0))
    assert state.nu == 1


@pytest.mark.parametrize("member", [eva_optax.scale_by_eva, eva_optax.scale_by_eva_f, eva_optax.scale_by_eva_s])
@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
def test_all_members_have_all_step_rules(member, relative):
    """Each rule is one factor on what "none" returns: its formula over all preconditioned parameters."""
    rate, clip, damping = 0.5, 1e-3, 0.2
    with jax.enable_x64(True):
        grads = two_layers(0)
        plain = member(damping, relative=relative, step_rule="none")
        p, _ = first_update(plain, grads)
        # Eva-s leaves biases to themselves, and has no outer 1/γ.
        own = member is not eva_optax.scale_by_eva_s
        names = ("kernel", "bias") if own else ("kernel",)
        parts = [[(p[layer][name], grads[layer][name]) for name in names] for layer in ("dense", "conv")]
        unscaled = damping if own and not relative else 1.0
        products = np.array([[[np.sum(p * g), np.sum(g * g), np.sum(p * p)] for p, g in layer] for layer in parts])
        pg, gg, pp = products.sum((0, 1))
        _, layer_gg, layer_pp = products.sum(1).T
        wanted = {
            "none": [1, 1],
            "kl_clip": [min(1.0, np.sqrt(clip / (rate**2 * pg)))] * 2,
            "kl_norm": [unscaled / np.sqrt(unscaled * pg)] * 2,
            "grad_norm": [np.sqrt(gg / pp)] * 2,
            "layer_grad_norm": np.sqrt(layer_gg / layer_pp),
        }
        for rule in RULES:
            tx = member(damping, relative=relative, step_rule=rule, kl_clip=clip, learning_rate=rate)
            updates, state = first_update(tx, grads)
            for layer, factor in zip(("dense", "conv"), wanted[rule], strict=True):
                np.testing.assert_allclose(updates[layer]["kernel"], factor * p[layer]["kernel"], rtol=1e-7)
            if rule != "layer_grad_norm":
                assert rule == "none" or abs(wanted[rule][0] - 1) > 1e-3
                nu = wanted[rule][0] / (unscaled if rule == "kl_norm" else 1)
                np.testing.assert_allclose(state.nu, nu, rtol=1e-9)


@pytest.mark.parametrize("member", [eva_optax.scale_by_eva, eva_optax.scale_by_eva_f, eva_optax.scale_by_eva_s])
def test_a_gradient_that_the_curvature_takes_out_keeps_its_direction(member):
    """All inputs equal: what is left of the gradient is rounding error, which must not get the gradient's length."""
    kernel = np.outer([1.0, 2.0, 3.0], [0.1, -0.3, 0.7, 0.2]).astype(np.float32)
    grads = gradients(kernel, None, np.array([[1.0], [2.0], [3.0]]), np.array([[0.1, -0.3, 0.7, 0.2]]), (1, 1))
    grads = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads)
    tx = member(1e-7, step_rule="layer_grad_norm")
    updates, _ = first_update(tx, grads)
    np.testing.assert_allclose(updates["layer"]["kernel"], kernel, rtol=1e-6)
