"""Trains over all devices of all hosts, saves checkpoints, and goes on from the last one when it is started again.

    python examples/multihost.py       # on one host, or on each host of a TPU pod slice or of a Slurm job
    python examples/multihost.py --coordinator host0:1234 --processes 2 --process 0    # other clusters: on host 0 of 2
    python examples/multihost.py --coordinator host0:1234 --processes 2 --process 1    # and on host 1

All hosts run the same command at the same time; --checkpoints must name a directory that all of them see. The rows of
each batch, and every kernel with its optimizer state, are spread over all devices. Nothing below is about Eva but the
two lines that any script changes: probes are parameters, so they are sharded, saved and restored as parameters are.
"""

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from sklearn.datasets import load_digits

import eva_optax

DEVICES = "devices"  # the only mesh axis: batches and parameters are both spread over it


class Autoencoder(nn.Module):
    """Handwritten digits of 64 pixels through two wide layers; each kernel is spread along its wide axis."""

    width: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def dense(features: int, *axes: str | None) -> nn.Dense:
            init = nn.with_partitioning(nn.initializers.lecun_normal(), axes)
            return nn.Dense(features, kernel_init=init)

        x = nn.tanh(dense(self.width, None, DEVICES)(x))
        x = nn.tanh(dense(16, DEVICES, None)(x))
        x = nn.tanh(dense(self.width, None, DEVICES)(x))
        return dense(64, DEVICES, None)(x)


def connect(options: argparse.Namespace) -> None:
    """Joins the other hosts, if there are any."""
    if options.coordinator:
        jax.distributed.initialize(options.coordinator, options.processes, options.process)
        return
    # Recognises TPU pod slices, Slurm, Kubernetes and Open MPI by their environment, and raises on a single machine.
    with contextlib.suppress(ValueError):
        jax.distributed.initialize()


def global_batch(images: np.ndarray, size: int, step: int, mesh: Mesh) -> Array:
    """The batch of a step: the same rows whatever the number of devices, each host loading only its own."""
    rows = np.random.default_rng(step).integers(0, len(images), size)

    def load(index: Any) -> np.ndarray:
        return images[rows[index[0]]]

    return jax.make_array_from_callback((size, images.shape[1]), NamedSharding(mesh, P(DEVICES)), load)


def train(options: argparse.Namespace) -> Any:
    """Returns parameters and optimizer state after the last step."""
    mesh = jax.make_mesh((jax.device_count(),), (DEVICES,), axis_types=(jax.sharding.AxisType.Auto,))
    pixels, _ = load_digits(return_X_y=True)
    images = np.asarray(pixels / 16.0, np.float32)
    model = eva_optax.tap(Autoencoder(options.width))  # 1
    tx = optax.chain(eva_optax.scale_by_eva(), optax.sgd(0.05, momentum=0.9))  # 2

    def create(key: Array) -> Any:
        params = model.init(key, jnp.zeros((1, 64)))["params"]
        return params, tx.init(params)

    def step(state: Any, x: Array) -> tuple[Any, Array]:
        params, opt_state = state
        value, grads = jax.value_and_grad(lambda p: jnp.mean((model.apply({"params": p}, x) - x) ** 2))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    # Flax reads the places of parameters and optimizer state from the partition names; probes have their kernel's.
    abstract = jax.eval_shape(create, jax.random.key(0))
    places = nn.unbox(jax.tree.map(lambda spec: NamedSharding(mesh, spec), nn.get_partition_spec(abstract)))
    state = jax.jit(lambda key: nn.unbox(create(key)), out_shardings=places)(jax.random.key(0))
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(places, NamedSharding(mesh, P())))

    keep = ocp.CheckpointManagerOptions(save_interval_steps=options.save_every, max_to_keep=2)
    first = jax.process_index() == 0
    columns = (*Progress.get_default_columns(), TimeElapsedColumn(), TextColumn("loss {task.fields[loss]:.5f}"))
    with (
        ocp.CheckpointManager(Path(options.checkpoints).absolute(), options=keep) as checkpoints,
        Progress(*columns, console=Console(stderr=True), disable=not first) as progress,
    ):
        done = checkpoints.latest_step() or 0
        if done:
            wanted = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
            )
            state = checkpoints.restore(done, args=ocp.args.StandardRestore(wanted))
        task = progress.add_task(
            f"{jax.device_count()} devices", total=options.steps, completed=done, loss=float("nan")
        )
        for number in range(done + 1, options.steps + 1):
            state, value = compiled(state, global_batch(images, options.batch, number, mesh))
            checkpoints.save(number, args=ocp.args.StandardSave(state), force=number == options.steps)
            if number % 10 == 0 or number == options.steps:  # reading the loss waits for the device: not every step
                progress.update(task, completed=number, loss=float(value))
    return state


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coordinator", help="address and port of process 0, if the cluster is not recognised")
    parser.add_argument("--processes", type=int, help="number of processes, with --coordinator")
    parser.add_argument("--process", type=int, help="number of this process, with --coordinator")
    parser.add_argument("--checkpoints", default="results/multihost", help="directory that all hosts see")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=256, help="rows of all devices together")
    parser.add_argument("--width", type=int, default=512, help="a multiple of the number of devices")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    OPTIONS = parse()
    connect(OPTIONS)
    train(OPTIONS)
