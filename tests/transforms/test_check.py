"""Steps that went past the taps, and layers that were skipped: an error outside of jit, counted inside, and `check`."""

from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import eva_optax
from tests.dense import LAYOUTS, draw, gradients
from tests.helpers import FAMILY, assert_identical

PLAIN = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(3)])
MODEL = eva_optax.tap(PLAIN)
X = np.random.default_rng(0).normal(size=(8, 5)).astype(np.float32)
KINDS = ["scale_by_eva", "scale_by_eva_f", "conjugate", "center"]  # the others are chains around these


def gradient_of(model):
    return jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(model.apply({"params": params}, X)))))


tapped, past = gradient_of(MODEL), gradient_of(PLAIN)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0), X)["params"]


def counts(state) -> tuple[int, int]:
    return int(optax.tree.get(state, "skipped")), int(optax.tree.get(state, "untapped"))


@cache  # compiled once
def member(name: str):
    tx = FAMILY[name]()
    return tx, jax.jit(tx.update)


def test_gradients_of_an_apply_that_is_not_tapped_are_refused(params):
    tx = eva_optax.scale_by_eva()
    with pytest.raises(
        ValueError, match=r"eva_optax\.scale_by_eva: .*did not run the tapped model.*jit the step after"
    ):
        tx.update(past(params), tx.init(params), params)


@pytest.mark.parametrize("name", KINDS)
def test_under_jit_they_are_counted(name, params):
    tx, update = member(name)
    _, state = update(tapped(params), tx.init(params), params)
    assert counts(state) == (0, 0)
    eva_optax.check(state)
    for _ in range(2):
        _, state = update(past(params), state, params)
    assert counts(state) == (0, 2)
    assert int(eva_optax.diagnostics(state)["untapped"]) == 2
    with pytest.raises(ValueError, match=r"check: in 2 steps, tapped layers had gradients, but no layer had vectors"):
        eva_optax.check(state)
    eva_optax.check(optax.tree.set(state, untapped=0))


def test_a_step_that_was_compiled_before_the_model_was_tapped_is_found():
    """A function whose key in the cache of jit does not know about the context that taps it."""
    run = jax.jit(lambda params, x: PLAIN.apply({"params": params}, x))
    with eva_optax.tapping():
        params = PLAIN.init(jax.random.key(0), X)["params"]
    run(params, X)
    tx = optax.chain(eva_optax.scale_by_eva(), optax.sgd(0.1))
    with eva_optax.tapping():
        grads = jax.grad(lambda params: run(params, X).sum())(params)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    with pytest.raises(ValueError, match=r"in 1 step, .* jitted before the model was tapped"):
        eva_optax.check(state)


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx, optax.sgd(0.1)),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "masked": lambda tx: optax.masked(tx, lambda tree: jax.tree.map(lambda _: True, tree)),
    "around another": lambda tx: eva_optax.conjugate(optax.trace(0.9)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_states_are_found_in_wrappers(name, params):
    tx = WRAPPERS[name](eva_optax.scale_by_eva())
    update = jax.jit(tx.update)
    _, state = update(tapped(params), tx.init(params), params)
    eva_optax.check(state)
    _, state = update(past(params), state, params)
    with pytest.raises(ValueError, match="in 1 step"):
        eva_optax.check(state)


def test_train_states_and_injected_options(params):
    tx = optax.inject_hyperparams(eva_optax.eva)(learning_rate=0.1)
    state = TrainState.create(apply_fn=MODEL.apply, params=params, tx=tx)
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    for found in (state, (good := step(state, tapped(params))), good.opt_state):
        eva_optax.check(found)
    for found in ((bad := step(good, past(params))), bad.opt_state):
        with pytest.raises(ValueError, match="in 1 step"):
            eva_optax.check(found)


def test_optimizers_of_nnx():
    model = eva_optax.tap(nnx.Linear(5, 2, rngs=nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, eva_optax.scale_by_eva(), wrt=nnx.Param)
    grads = nnx.grad(lambda model: jnp.sum(model(X)))(model)
    optimizer.update(model, grads)
    eva_optax.check(optimizer)
    without = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if "kronecker" in jax.tree_util.keystr(path) else leaf, grads
    )
    nnx.jit(lambda model, optimizer: optimizer.update(model, without))(model, optimizer)
    for found in (optimizer, optimizer.opt_state):
        with pytest.raises(ValueError, match="in 1 step"):
            eva_optax.check(found)


@pytest.mark.parametrize("name", KINDS)
def test_no_gradients_and_one_unused_layer_are_no_faults(name, params):
    """Zeros stand where loss scaling drops a step, and where a tree of gradients holds a place."""
    tx, update = member(name)
    zeros, state = jax.tree.map(jnp.zeros_like, params), tx.init(params)
    _, state = update(zeros, state, params)
    grads = tapped(params)
    _, state = update(grads | {"layers_0": zeros["layers_0"]}, state, params)
    # Used outside of its tap alone, as tied weights are.
    untied = jax.tree.map(jnp.zeros_like, grads["layers_0"]["kronecker"])
    _, state = update(grads | {"layers_0": {**grads["layers_0"], "kronecker": untied}}, state, params)
    assert counts(state) == (0, 0)
    eva_optax.check(state)


def test_accumulation_asks_the_whole_batch(params):
    """Micro-steps between updates, and micro-batches that go past a layer, are no faults."""
    tx = optax.MultiSteps(eva_optax.scale_by_eva(), 2)
    update, zeros = jax.jit(tx.update), jax.tree.map(jnp.zeros_like, params)
    state = tx.init(params)
    for grads in (zeros, tapped(params), zeros):
        _, state = update(grads, state, params)
        eva_optax.check(state)


def test_gradients_that_were_cast_to_half_precision_are_found(params):
    halved = jax.tree.map(lambda leaf: leaf.astype(jnp.float16).astype(jnp.float32), tapped(params))
    tx, update = member("scale_by_eva")
    _, state = update(halved, tx.init(params), params)
    with pytest.raises(ValueError, match="cast of the gradients to float16"):
        eva_optax.check(state)


def test_a_second_member_in_a_chain_has_no_vectors_left(params):
    tx = optax.chain(eva_optax.scale_by_eva(), FAMILY["conjugate"]())
    _, state = jax.jit(tx.update)(tapped(params), tx.init(params), params)
    with pytest.raises(ValueError, match=r"before this one in the chain.*one of them is enough"):
        eva_optax.check(state)
    assert [int(part.untapped) for part in state] == [0, 1]


def test_skipped_layers_are_an_error_with_their_names(params):
    (tx, update), grads = member("scale_by_eva"), tapped(params)
    bad = jax.tree.map(lambda leaf: leaf, grads)
    bad["layers_2"]["kronecker"]["kernel,bias"]["a"] *= jnp.nan
    _, state = update(bad, tx.init(params), params)
    with pytest.raises(ValueError, match=r"skipped 1 times.*not finite.*never had an average: 'layers_2'\. Look"):
        eva_optax.check(state)
    _, state = update(grads, state, params)
    with pytest.raises(ValueError, match=r"skipped 1 times.*All layers had an average"):
        eva_optax.check(state)
    eva_optax.check(optax.tree.set(state, skipped=0))

    spoiled = optax.chain(optax.adam(1e-3), tx)
    _, state = jax.jit(spoiled.update)(grads, spoiled.init(params), params)
    with pytest.raises(ValueError, match=r"skipped 2 times.*each for itself.*'layers_0', 'layers_2'.*first in a chain"):
        eva_optax.check(state)


def test_skipped_layers_of_stacks_and_of_eva_s_have_names():
    case = next(case for case in LAYOUTS if case.name == "stacked at 0")
    grads = gradients(*draw(case), case.counter)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, grads["layer"])
    wanted = {"scale_by_eva": ("kronecker", "layer"), "scale_by_eva_s": ("kernel", "layer/kernel")}
    for name, (part, shown) in wanted.items():
        tx = FAMILY[name]()
        _, state = jax.jit(tx.update)({"layer": grads["layer"] | {part: broken[part]}}, tx.init(grads))
        with pytest.raises(ValueError, match=f"never had an average: '{shown}'"):
            eva_optax.check(state)


def test_an_ensemble_is_checked_as_a_whole(params):
    tx = eva_optax.scale_by_eva()
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), tapped(params), past(params))
    _, state = jax.jit(jax.vmap(lambda grads: tx.update(grads, tx.init(params))))(both)
    np.testing.assert_array_equal(state.untapped, [0, 1])
    with pytest.raises(ValueError, match="in 1 step"):
        eva_optax.check(state)


def test_center_asks_layers_with_a_bias_alone():
    plain = nn.Dense(3, use_bias=False)
    params = eva_optax.tap(plain).init(jax.random.key(0), X)["params"]
    tx = eva_optax.center(optax.identity())
    grads = gradient_of(plain)(params)
    updates, _ = tx.update(grads, tx.init(params))
    assert_identical(updates["kernel"], grads["kernel"])  # as it passes when it is tapped


def test_other_states_and_traced_ones_are_refused(params):
    with pytest.raises(ValueError, match=r"check: there is no ScaleByEvaState"):
        eva_optax.check(optax.adam(0.1).init(params))
    with pytest.raises(ValueError, match=r"check: the state is traced.*outside of jit"):
        jax.jit(eva_optax.check)(eva_optax.scale_by_eva().init(params))
