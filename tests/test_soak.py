"""Two thousand steps with a checkpoint every two hundred and random kills end where an undisturbed run ends."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import eva_optax

STEPS, EVERY = 2000, 200
ROOT = Path(__file__).parent.parent

model = eva_optax.tap(nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(2)]))
tx = optax.chain(eva_optax.scale_by_eva(), optax.sgd(optax.cosine_decay_schedule(0.1, STEPS), momentum=0.9))


def batch(number: int):
    rng = np.random.default_rng(number)
    x = rng.normal(size=(8, 4)).astype(np.float32)
    return x, np.sin(x[:, :2])


def start():
    params = model.init(jax.random.key(0), batch(0)[0])["params"]
    return params, tx.init(params)


@partial(jax.jit, donate_argnums=0)
def step(state, x, y):
    params, opt_state = state
    value, grads = jax.value_and_grad(lambda p: jnp.mean((model.apply({"params": p}, x) - y) ** 2))(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), value


def live(directory: Path, until: int, *, by_signal: bool = False) -> tuple[int, object]:
    """One life: goes on from the last checkpoint, trains until the given step, and ends there without a word."""
    options = ocp.CheckpointManagerOptions(save_interval_steps=EVERY, max_to_keep=2)
    checkpoints = ocp.CheckpointManager(directory, options=options)
    state, done = start(), checkpoints.latest_step() or 0
    if done:
        state = checkpoints.restore(
            done, args=ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
        )
    for number in range(done + 1, until + 1):
        state, _ = step(state, *batch(number))
        checkpoints.save(number, args=ocp.args.StandardSave(state))
    if by_signal and until < STEPS:
        os.kill(os.getpid(), signal.SIGKILL)
    checkpoints.wait_until_finished()
    checkpoints.close()
    return done, state


def deaths() -> list[int]:
    """Steps at which a life ends: at random, right after a checkpoint was begun, and right before one."""
    drawn = np.random.default_rng(0).integers(EVERY + 1, STEPS, 4).tolist()
    return [*sorted([*drawn, 4 * EVERY, 7 * EVERY - 1]), STEPS]


@pytest.fixture(scope="module")
def undisturbed():
    state, losses = start(), []
    for number in range(1, STEPS + 1):
        state, value = step(state, *batch(number))
        if number in (1, STEPS):
            losses.append(float(value))
    assert losses[1] < 0.1 * losses[0]
    assert optax.tree.get(state, "skipped") == 0
    return state


def assert_identical(got, want):
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_soak_with_lives_that_end_at_random(undisturbed, tmp_path):
    resumed, state = [], None
    for death in deaths():
        state = None  # what the last life held in memory is lost
        done, state = live(tmp_path, death)
        resumed.append(done)
    assert len(set(resumed)) > 3
    assert_identical(state, undisturbed)


@pytest.mark.slow
def test_soak_with_processes_that_are_killed(undisturbed, tmp_path):
    code = "import sys, pathlib, tests.conftest; from tests.test_soak import live; "
    code += "live(pathlib.Path(sys.argv[1]), int(sys.argv[2]), by_signal=True)"
    for death in deaths():
        finished = subprocess.run([sys.executable, "-c", code, str(tmp_path), str(death)], cwd=ROOT)
        assert finished.returncode == (0 if death == STEPS else -signal.SIGKILL)
    done, state = live(tmp_path, STEPS)
    assert done == STEPS
    assert_identical(state, undisturbed)
