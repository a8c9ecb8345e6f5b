"""TrainState with BatchNorm and dropout, and every way in which Flax users save and restore it."""

import re
from collections import namedtuple
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import serialization
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import eva_optax
from tests.helpers import assert_close, assert_identical, assert_probes_are_zero, averages


class Network(nn.Module):
    """BatchNorm and dropout between two tapped layers."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(16, use_bias=False)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(nn.tanh(x)))


class State(TrainState):
    """A TrainState with running statistics and a random key."""

    batch_stats: Any
    key: Any


MODEL = eva_optax.tap(Network())
TX = optax.chain(eva_optax.scale_by_eva(step_rule="kl_clip"), optax.sgd(0.1, momentum=0.9))


def batch(step: int):
    rng = np.random.default_rng(step)
    return rng.normal(size=(8, 5)).astype(np.float32), rng.normal(size=(8, 3)).astype(np.float32)


def create(seed: int = 0, model=MODEL, tx=TX) -> State:
    variables = model.init(jax.random.key(seed), batch(0)[0], train=False)
    return State.create(
        apply_fn=None,
        params=variables["params"],
        tx=tx,
        batch_stats=variables["batch_stats"],
        key=jax.random.key_data(jax.random.key(7)),
    )


def objective(params, state: State, x, y, model=MODEL):
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    variables = {"params": params, "batch_stats": state.batch_stats}
    out, new = model.apply(variables, x, mutable=["batch_stats"], rngs={"dropout": key})
    return jnp.mean((out - y) ** 2), new["batch_stats"]


@partial(jax.jit, static_argnames="model")
def step(state: State, x, y, model=MODEL) -> tuple[State, jax.Array]:
    (value, stats), grads = jax.value_and_grad(objective, has_aux=True)(state.params, state, x, y, model)
    return state.apply_gradients(grads=grads, batch_stats=stats), value


def train(state: State, steps: int) -> State:
    for _ in range(steps):
        state, _ = step(state, *batch(int(state.step)))
    return state


@pytest.fixture(scope="module")
def trained() -> State:
    """After three steps."""
    return train(create(), 3)


@pytest.fixture(scope="module")
def later(trained) -> State:
    """After three more."""
    return train(trained, 3)


def shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def save(path, tree) -> None:
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def restore(path, template):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, template)


def test_tapping_changes_neither_loss_nor_statistics_nor_dropout(trained):
    plain = eva_optax.strip(trained.params)
    for number in range(3):
        got = objective(trained.params, trained, *batch(number))
        want = objective(plain, trained, *batch(number), MODEL.module)
        assert_identical(got, want)
    assert_probes_are_zero(trained.params)
    assert optax.tree.get(trained.opt_state, "skipped") == 0


def test_orbax_continues_bit_for_bit(trained, later, tmp_path):
    save(tmp_path / "state", trained)
    restored = restore(tmp_path / "state", jax.eval_shape(lambda: create(seed=1)))
    assert_identical(restored, trained)
    assert_identical(train(restored, 3), later)


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_orbax_restores_on_another_number_of_devices(devices, trained, later, tmp_path):
    """Saved from four devices with every kernel spread over them."""

    def spread(tree, count):
        mesh = Mesh(np.array(jax.devices()[:count]), ("fsdp",))

        def place(leaf):
            divides = leaf.ndim == 2 and leaf.shape[0] % count == 0
            return NamedSharding(mesh, P("fsdp") if divides else P())

        return jax.tree.map(place, tree)

    save(tmp_path / "state", jax.device_put(trained, spread(trained, 4)))
    template = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        trained,
        spread(trained, devices),
    )
    restored = restore(tmp_path / "state", template)
    assert len(restored.params["Dense_1"]["kernel"].sharding.device_set) == devices
    assert_identical(restored, trained)
    resumed = train(restored, 3)
    assert_close(resumed, later, floor=1.0)


def test_a_checkpoint_written_without_probes_is_attached_to(tmp_path):
    """Trained with Adam alone, then with Eva."""
    plain = create(model=MODEL.module, tx=optax.adam(1e-2))
    for number in range(2):
        plain, _ = step(plain, *batch(number), model=MODEL.module)
    save(tmp_path / "params", plain.params)
    params = restore(tmp_path / "params", shapes(eva_optax.strip(create().params)))
    params = eva_optax.attach(MODEL, params, batch(0)[0], train=False)
    assert_identical(eva_optax.strip(params), plain.params)
    assert jax.tree.structure(params) == jax.tree.structure(create().params)
    state = create().replace(params=params, opt_state=TX.init(params), batch_stats=plain.batch_stats)
    grads, _ = jax.grad(objective, has_aux=True)(params, state, *batch(2))
    state, _ = step(state, *batch(2))
    for name, (a, b) in eva_optax.vectors(grads).items():
        assert np.count_nonzero(a)
        assert_close(averages(state.opt_state, name), {"a": a, "b": b})


PAGE = " ".join((Path(__file__).parents[2] / "docs" / "reliability.md").read_text().split())


@pytest.mark.parametrize("way", ["Orbax", "from_bytes"])
def test_a_checkpoint_without_probes_is_restored_without_them_and_attached_to(way, trained, tmp_path):
    plain, tapped = eva_optax.strip(trained.params), trained.params
    if way == "Orbax":
        save(tmp_path / "params", plain)
        load = partial(restore, tmp_path / "params")
        said = "User-provided restore item and on-disk value metadata tree structures do not match"
    else:
        load = partial(serialization.from_bytes, encoded_bytes=serialization.to_bytes(plain))
        said = "target dict contains keys {'kronecker'} which are not present in state dict at path"
    assert said in PAGE
    with pytest.raises(ValueError, match=re.escape(said)):
        load(tapped)
    loaded = load(eva_optax.strip(tapped))
    assert_identical(eva_optax.attach(MODEL, loaded, batch(0)[0], train=False), tapped)


def test_flax_serialization_continues_bit_for_bit(trained, later):
    empty = create(seed=1)
    assert_identical(serialization.from_state_dict(empty, serialization.to_state_dict(trained)), trained)
    restored = serialization.from_bytes(empty, serialization.to_bytes(trained))
    assert_identical(train(jax.tree.map(jnp.asarray, restored), 3), later)


Extended = namedtuple("Extended", [*eva_optax.ScaleByEvaState._fields, "added"])


@pytest.mark.parametrize("form", ["restored without a template", "of other fields", "of another optimizer"])
def test_states_of_other_formats_are_refused_with_advice(form, trained):
    params, eva = trained.params, trained.opt_state[0]
    state, held = {
        "restored without a template": (eva._asdict(), r"dict with \('count', 'vectors', "),
        "of other fields": (Extended(*eva, added=1.0), r"Extended with \('count', .*'added'\)"),
        "of another optimizer": (trained.opt_state[1], r"got a tuple"),
    }[form]
    with pytest.raises(ValueError, match=rf"must be a ScaleByEvaState.*{held}.*go on with tx\.init\(params\)"):
        eva_optax.scale_by_eva().update(params, state, params)


def test_going_on_with_a_new_state_takes_one_step_to_fill_its_averages(trained):
    grads, _ = jax.jit(jax.grad(objective, has_aux=True))(trained.params, trained, *batch(3))
    tx = eva_optax.scale_by_eva(decay=0.9)
    _, state = jax.jit(tx.update)(grads, tx.init(trained.params))
    for name, (a, b) in eva_optax.vectors(grads).items():
        assert_identical(averages(state, name), {"a": a, "b": b})


def test_a_state_of_other_layers_is_refused(trained):
    part = {"Dense_0": trained.params["Dense_0"]}
    tx = eva_optax.scale_by_eva()
    with pytest.raises(ValueError, match=r"'Dense_1.*tx\.init\(params\)"):
        tx.update(trained.params, tx.init(part))
