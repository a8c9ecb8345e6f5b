"""The compiled functions: the initial state on a mesh of devices, a step, an evaluation."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import eva_optax
from examples.train import optimizers
from examples.train.config import Config
from examples.train.errors import UserError
from examples.train.tasks import Task

AXES = ("data", "fsdp")  # batches are spread over both, parameters over the second
SMALLEST = 2**12  # entries of an array that is worth spreading
Batch = dict[str, Array]


class State(NamedTuple):
    """All that training changes.

    Attributes:
      rate: the highest learning rate: as a value, so that runs which differ in it share what is compiled.
      params: with the probes of a tapped model.
      statistics: the running statistics of BatchNorm, as a collection of variables.
      average: exponential averages of parameters without probes and of statistics; () without --ema.
    """

    step: Array
    rate: Array
    params: Any
    statistics: Any
    opt_state: Any
    average: Any


class Program(NamedTuple):
    """What a run calls.

    Attributes:
      state: the shapes of a state, and where each array of it lies.
      create: from a random key to the first state.
      step: from a state, which it consumes, and a batch to the next state and means over the batch; jitted.
      evaluate: from a state and a batch to the sums of its weighted values, and of its weights.
      rows: how the rows of a batch are spread.
    """

    state: State
    create: Callable[[Array], State]
    step: Any
    evaluate: Callable[[State, Batch], tuple[dict[str, Array], Array]]
    rows: NamedSharding


def make_mesh(config: Config, devices: Any = None) -> Mesh:
    """All devices of all processes, `fsdp` of which share the parameters."""
    number, batch = len(devices) if devices is not None else jax.device_count(), config.input.batch
    if config.machine.fsdp < 1 or number % config.machine.fsdp:
        raise UserError(f"--fsdp must divide the number of devices, {number}; got {config.machine.fsdp}.")
    if batch < 1 or batch % (number * config.training.accumulate):
        wanted = f"{number} devices times {config.training.accumulate} parts to accumulate"
        raise UserError(f"--batch must be a multiple of {wanted}; got {batch}.")
    shape, kinds = (number // config.machine.fsdp, config.machine.fsdp), (jax.sharding.AxisType.Auto,) * 2
    return jax.make_mesh(shape, AXES, axis_types=kinds, devices=devices)


def place(leaf: Any, mesh: Mesh) -> NamedSharding:
    """Where an array lies: large ones spread over "fsdp" along their longest axis that it divides."""
    fitting = [axis for axis, size in enumerate(leaf.shape) if size % mesh.shape["fsdp"] == 0]
    if mesh.shape["fsdp"] == 1 or leaf.size < SMALLEST or not fitting:
        return NamedSharding(mesh, P())
    longest = max(fitting, key=lambda axis: leaf.shape[axis])
    return NamedSharding(mesh, P(*(None,) * longest, "fsdp"))


def make_program(task: Task, config: Config, example: Any, steps: int, mesh: Mesh) -> Program:
    """The functions of a task; `example` is a batch of any size, of arrays or shapes."""
    training, objective = config.training, task.objective
    plain: nn.Module = task.build(config)
    model = optimizers.tapped(plain, training)
    first = {name: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype) for name, leaf in example.items()}

    def prepare(batch: Batch) -> tuple[Array, Array]:
        return objective.prepare(batch, task.scale)

    called_with = jax.eval_shape(prepare, first)[0]

    def create(key: Array, rate: Array) -> State:
        variables = model.init(key, jnp.zeros(called_with.shape, called_with.dtype), False)
        params = variables.pop("params")
        opt_state = optimizers.build(training, steps, rate).init(params)
        average = (eva_optax.strip(params), variables) if training.ema else ()
        return State(jnp.zeros((), jnp.int32), rate, params, variables, opt_state, average)

    def gradient(params: Any, statistics: Any, batch: Batch) -> tuple[Any, Any, dict[str, Array]]:
        inputs, targets = prepare(batch)

        def loss(params: Any) -> Any:
            outputs, updated = model.apply({"params": params, **statistics}, inputs, True, mutable=list(statistics))
            values = {
                name: each.mean() for name, each in objective.values(outputs, targets, training.label_smoothing).items()
            }
            return values["loss"], (updated, values)

        grads, (updated, values) = jax.grad(loss, has_aux=True)(params)
        return grads, updated, values

    def accumulated(params: Any, statistics: Any, batch: Batch) -> tuple[Any, Any, dict[str, Array]]:
        """Mean gradients and values of parts, each with rows of all devices; BatchNorm sees one part at a time."""
        parts = training.accumulate
        split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)

        def add(carry: Any, part: Batch) -> tuple[Any, None]:
            statistics, sums = carry
            grads, statistics, values = gradient(params, statistics, part)
            return (statistics, jax.tree.map(jnp.add, sums, (grads, values))), None

        shapes = jax.eval_shape(gradient, params, statistics, jax.tree.map(lambda x: x[0], split))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0], shapes[2]))
        (statistics, sums), _ = jax.lax.scan(add, (statistics, zeros), split)
        grads, values = jax.tree.map(lambda x: x / parts, sums)
        return grads, statistics, values

    def step(state: State, batch: Batch) -> tuple[State, dict[str, Array]]:
        compute = gradient if training.accumulate == 1 else accumulated
        grads, statistics, values = compute(state.params, state.statistics, batch)
        tx = optimizers.build(training, steps, state.rate)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        count, average = state.step + 1, state.average
        if training.ema:
            decay = jnp.minimum(training.ema, (1 + count) / (10 + count))  # the first values are soon forgotten
            average = optax.incremental_update((eva_optax.strip(params), statistics), average, 1 - decay)
        return State(count, state.rate, params, statistics, opt_state, average), values

    def evaluate(state: State, batch: Batch) -> tuple[dict[str, Array], Array]:
        params, statistics = state.average if training.ema else (eva_optax.strip(state.params), state.statistics)
        inputs, targets = prepare(batch)
        outputs: Any = plain.apply({"params": params, **statistics}, inputs, False)
        weights = batch["weights"]
        values = objective.values(outputs, targets, 0.0)
        return {name: (each * weights).sum() for name, each in values.items()}, weights.sum()

    rate = np.float32(optimizers.peak_rate(training))
    shapes = jax.eval_shape(create, jax.random.key(0), rate)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x, mesh)), shapes)
    places, copied = jax.tree.map(lambda x: x.sharding, state), NamedSharding(mesh, P())
    return Program(
        state,
        partial(jax.jit(create, out_shardings=places), rate=rate),
        jax.jit(step, donate_argnums=0, out_shardings=(places, copied)),
        jax.jit(evaluate, out_shardings=copied),
        NamedSharding(mesh, P(AXES)),
    )
