"""JAX's own modes around whole steps, and depth: what a user turns on to find faults of their own."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.linen import fp8_ops
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict, unflatten_dict

import eva_optax
from benchmarks.cost.overhead import count_equations
from tests.helpers import FAMILY, WITHOUT_TAP, assert_close, assert_finite

X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5)), jnp.float32)


class Network(nn.Module):
    """So many layers, and a head."""

    depth: int = 1
    dot_general_cls: Any = None

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth):
            x = nn.tanh(nn.Dense(4, dot_general_cls=self.dot_general_cls)(x))
        return nn.Dense(3, name="head")(x)


MODEL = eva_optax.tap(Network())


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0), X)["params"]


def make_step(tx, model=MODEL):
    def step(params, state, x):
        grads = jax.grad(lambda params: jnp.mean(jnp.sin(model.apply({"params": params}, x))))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


@pytest.mark.parametrize("name", ["scale_by_eva", "conjugate"])
def test_compiled_steps_and_checks_move_nothing_between_host_and_device(name, params):
    tx = FAMILY[name]()
    step = jax.jit(make_step(tx))
    with jax.transfer_guard("disallow"):
        state = jax.jit(tx.init)(params)
        for _ in range(2):
            params, state = step(params, state, X)
        eva_optax.check(state)
        jax.jit(eva_optax.diagnostics)(state)


def test_steps_without_jit_are_the_compiled_ones():
    model, tx = eva_optax.tap(nn.Dense(3)), eva_optax.scale_by_eva()
    params = model.init(jax.random.key(0), X)["params"]
    step = make_step(tx, model)
    wanted = jax.jit(step)(params, tx.init(params), X)
    with jax.disable_jit():
        assert_close(jax.jit(step)(params, tx.init(params), X), wanted)


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "eva_muon"])
def test_float32_parameters_stay_so_beside_64_bit_numbers(name, params):
    """Optax's Muon keeps its coefficients in float64 there."""
    with jax.enable_x64(True):
        tx = FAMILY[name]()
        state = jax.eval_shape(tx.init, params)
        after = jax.eval_shape(make_step(tx), params, state, X)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves((state, after))} == {"float32", "int32"}
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), (params, state)
    )


def test_no_tracer_is_leaked():
    tx = eva_optax.scale_by_eva()
    model = eva_optax.tap(nn.Sequential([nn.remat(nn.Dense)(4), nn.RNN(nn.SimpleCell(4))]))
    x = jnp.ones((2, 3, 5))
    with jax.checking_leaks():
        params = model.init(jax.random.key(0), x)["params"]
        jax.jit(make_step(tx, model)).trace(params, tx.init(params), x)


@pytest.mark.filterwarnings("ignore:The Fp8DotGeneralOp")
@pytest.mark.parametrize("cls", [fp8_ops.Fp8DotGeneralOp, fp8_ops.Fp8DirectDotGeneralOp, fp8_ops.NANOOFp8DotGeneralOp])
def test_layers_in_8_bit_floats_are_tapped(cls):
    """b is the gradient of the bias, a the mean of what the layer is given; scales and gradients stay as they are."""
    plain = Network(dot_general_cls=cls)
    model = eva_optax.tap(plain)
    variables = jax.jit(model.init)(jax.random.key(0), X)
    assert "_overwrite_with_gradient" in variables

    def gradient(model, variables):
        return jax.jit(jax.grad(lambda variables: jnp.mean(jnp.sin(model.apply(variables, X)))))(variables)

    grads = gradient(model, variables)
    wanted = gradient(plain, {**variables, "params": eva_optax.strip(variables["params"])})
    assert_close({**grads, "params": eva_optax.strip(grads["params"])}, wanted, 1e-7)
    a, b = eva_optax.vectors(grads["params"])["Dense_0"]
    np.testing.assert_allclose(a.ravel(), X.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(b.ravel(), grads["params"]["Dense_0"]["bias"], rtol=1e-6)
    state = TrainState.create(apply_fn=model.apply, params=variables, tx=eva_optax.scale_by_eva())
    after = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))(state, grads)
    assert_finite(after.params)
    eva_optax.check(after)


@pytest.mark.parametrize("name", ["scale_by_eva", "eva_adamw"])
def test_equations_grow_with_the_layers_and_no_faster(name):
    """A step of 1,000 layers is traced in ten times the time of one of 100."""

    def equations(depth):
        model, tx = eva_optax.tap(Network(depth)), FAMILY[name]()
        params = jax.eval_shape(model.init, jax.random.key(0), X)["params"]
        return count_equations(make_step(tx, model), params, jax.eval_shape(tx.init, params), X)

    counts = [equations(depth) for depth in (8, 16, 32)]
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0])


@pytest.mark.parametrize("separator", [".", "/", ","])
def test_joined_names_are_refused_with_advice_and_nested_again(separator, params):
    joined = flatten_dict(params, sep=separator)
    for name in ("scale_by_eva", "conjugate", *WITHOUT_TAP):
        with pytest.raises(ValueError, match=rf"names .* are joined.*unflatten_dict\(params, sep='[{separator}]'\)"):
            FAMILY[name]().init(joined)
    if separator != ",":  # which is in the names of probes
        FAMILY["scale_by_eva"]().init(unflatten_dict(joined, sep=separator))


def test_names_may_hold_any_character():
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="a.b/c,d kernel,bias")(nn.Dense(4, name="kernel")(x))

    model, tx = eva_optax.tap(Odd()), eva_optax.scale_by_eva()
    params = model.init(jax.random.key(0), X)["params"]
    _, state = jax.jit(make_step(tx, model))(params, tx.init(params), X)
    assert set(eva_optax.vectors(params)) == {"a.b/c,d kernel,bias", "kernel"}
    assert {"a.b/c,d kernel,bias/cosine", "kernel/cosine"} <= eva_optax.diagnostics(state).keys()
    eva_optax.check(state)
