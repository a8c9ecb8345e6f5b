"""Every task's model has the parameters that papers count; each takes a step that lowers its loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.train import optimizers
from examples.train.config import Config
from examples.train.data import pipeline
from examples.train.steps import make_mesh, make_program
from examples.train.tasks import TASKS, configure

pytestmark = [pytest.mark.train, pytest.mark.usefixtures("as_a_user")]

# In millions. He et al. 2016, table 6, and their model for ImageNet; Simonyan and Zisserman's layers with one linear
# layer; Zagoruyko and Komodakis 2016, table 5; Touvron et al. 2021 for ViT-S; Hinton and Salakhutdinov's layers; ours.
MILLIONS = {"resnet20": 0.27, "resnet110": 1.7, "vgg19": 20.0, "wrn28-10": 36.5, "resnet50": 25.6, "vit-s16": 22.1}
MILLIONS |= {"autoencoder": 2.84, "decoder": 10.94}
SMALL = {
    "resnet20": "depth=8,width=4",
    "vgg19": "blocks=(1,1,1,1,1),width=4",
    "wrn28-10": "depth=10,width=1",
    "resnet50": "blocks=(1,1,1,1),width=4",
    "vit-s16": "width=16,depth=2,heads=2",
    "autoencoder": "hidden=(32,16),code=4",
    "decoder": "width=16,depth=2,heads=2",
}


def kind(task: str) -> str:
    return task.partition("-")[2]


def program(config: Config):
    task = TASKS[config.task]
    training, _ = task.sources(config)
    batch = next(pipeline.training(training, config, 1))
    return make_program(task, config, batch, 20, make_mesh(config)), batch


@pytest.mark.parametrize("name", TASKS)
def test_parameters_are_as_many_as_published(name):
    task, config = TASKS[name], configure({"task": name, "length": 256})
    shape = (1, 256) if not task.side else (1, 784) if kind(name) == "autoencoder" else (1, task.side, task.side, 3)
    inputs = jnp.zeros(shape, jnp.float32 if task.side else jnp.int32)
    params = jax.eval_shape(lambda: task.build(config).init(jax.random.key(0), inputs, False))["params"]
    number = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert number == task.parameters
    if not name.startswith("cifar100"):
        digits = len(str(MILLIONS[kind(name)]).partition(".")[2])
        assert round(number / 1e6, digits) == MILLIONS[kind(name)]


@pytest.mark.parametrize(
    "name", [name for name in TASKS if not name.startswith(("cifar100", "fashion", "curves", "cifar10-resnet110"))]
)
def test_each_model_takes_steps_on_digits(name):
    size = {} if TASKS[name].side in (0, 28) else {"image_size": 32}
    given = {"task": name, "data": "digits", "batch": 16, "length": 24, "warmup": 0, **size}
    config = configure({**given, "model": SMALL[kind(name)], "rank": 2})
    made, batch = program(config)
    state, losses = made.create(jax.random.key(0)), []
    for _ in range(8):
        state, values = made.step(state, batch)
        losses.append(float(values["loss"]))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 0.01
    sums, weights = made.evaluate(state, batch | {"weights": np.ones(16, np.float32)})
    assert float(weights) == 16
    assert TASKS[name].objective.metric in sums
    assert all(np.isfinite(float(value)) for value in sums.values())


QUICK = {"sgd", "shampoo", "kfac", "eva_muon"}  # each has a tap, a momentum or a period of another kind


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in optimizers.OPTIMIZERS
        if name != "eva_adamw"
    ],
)
def test_each_optimizer_takes_steps(name):
    """Those around Muon on the decoder, whose kernels are stacked."""
    task = "text-decoder" if "muon" in name else "mnist-autoencoder"
    given = {"task": task, "model": SMALL[kind(task)], "batch": 16, "length": 24, "warmup": 0, "rank": 2}
    made, batch = program(configure({**given, "optimizer": name}))
    state, losses = made.create(jax.random.key(0)), []
    for _ in range(6):
        state, values = made.step(state, batch)
        losses.append(float(values["loss"]))
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


def test_bfloat16_computes_in_it_and_keeps_parameters_in_float32():
    given = {"task": "cifar10-resnet20", "model": SMALL["resnet20"], "batch": 16, "image_size": 16}
    made, batch = program(configure({**given, "dtype": "bfloat16"}))
    assert {leaf.dtype for leaf in jax.tree.leaves(made.state.params)} == {jnp.dtype(jnp.float32)}
    assert "bf16" in made.step.lower(made.state, batch).as_text()
    full, _ = program(configure(given))
    assert "bf16" not in full.step.lower(full.state, batch).as_text()


def test_fsdp_spreads_large_parameters_with_their_optimizer_state():
    given = {"task": "mnist-autoencoder", "data": "digits", "batch": 16, "model": "hidden=(128,64),code=8"}
    made, batch = program(configure({**given, "fsdp": 4, "optimizer": "eva_sgd"}))
    state = made.create(jax.random.key(0))
    kernel = state.params["Dense_0"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (784 // 4, 128)
    spread = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == kernel.shape]
    assert [leaf.sharding for leaf in spread] == [kernel.sharding]
    alone, _ = program(configure({**given, "fsdp": 1, "optimizer": "eva_sgd"}))
    other = alone.create(jax.random.key(0))
    for _ in range(3):
        (state, _), (other, _) = made.step(state, batch), alone.step(other, batch)
    for mine, theirs in zip(jax.tree.leaves(state.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5)
