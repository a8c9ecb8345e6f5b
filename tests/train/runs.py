"""Runs of the program in processes of their own, which may be killed, and what their checkpoints hold."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).parent.parent.parent

# Runs the program; with DIE_AT, ends itself without a word when the line of that step is to be written.
WORKER = """
import os, signal
from examples.train import metrics
from examples.train.__main__ import main

write, deadly = metrics.Recorder.write, int(os.environ.get("DIE_AT", -1))

def write_or_die(self, step, *rest):
    if step == deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, step, *rest)

metrics.Recorder.write = write_or_die
main()
"""


def start(arguments: list[str], devices: int, die_at: int | None = None) -> subprocess.Popen:
    """Starts the program on so many devices of the CPU."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMPI", "JAX_"))}
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": " ".join([f"--xla_force_host_platform_device_count={devices}", *flags]),
        "PYTHONPATH": str(ROOT),
    }
    environment |= {"DIE_AT": str(die_at)} if die_at else {}
    command = [sys.executable, "-c", WORKER, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def finish(*processes: subprocess.Popen) -> None:
    for process in processes:
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors[-3000:]


def saved_steps(output: Path) -> list[int]:
    return sorted(int(path.name) for path in (output / "checkpoints").iterdir() if path.name.isdigit())


def restored(output: Path, step: int) -> dict[str, np.ndarray]:
    """The arrays of a checkpoint by their paths."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    handlers = {"state": ocp.StandardCheckpointHandler(), "notes": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(output / "checkpoints", item_handlers=handlers) as manager:
        assert manager.latest_step() == step
        metadata = manager.item_metadata(step)["state"]
        wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), metadata)
        state = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(wanted)))["state"]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def assert_equal(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float = 0.0) -> None:
    assert got.keys() == wanted.keys()
    for path, mine in got.items():
        largest = max(1.0, float(np.abs(wanted[path]).max(initial=0)))
        np.testing.assert_allclose(mine, wanted[path], rtol=0, atol=tolerance * largest, err_msg=path)
