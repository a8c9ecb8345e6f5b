"""`examples/multihost.py` in one process, resumed, and in two processes that are killed and started again."""

import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

ROOT = Path(__file__).parent.parent
STEPS = 12

# Runs the example; with DIE_AT, ends itself without a word when the batch of that step is asked for.
WORKER = """
import os, signal, sys
sys.path.insert(0, "examples")
import multihost

batch, deadly = multihost.global_batch, int(os.environ.get("DIE_AT", -1))

def global_batch(images, size, step, mesh):
    if step == deadly:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch(images, size, step, mesh)

multihost.global_batch = global_batch
options = multihost.parse(sys.argv[1:])
multihost.connect(options)
multihost.train(options)
"""


def free_port() -> int:
    """A port below those that systems give to outgoing connections: none of these takes it until it is listened to."""
    for port in random.Random(os.urandom(8)).sample(range(20_000, 32_000), 100):
        with socket.socket() as server:
            try:
                server.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("none of a hundred ports is free")


def options(directory: Path, steps: int = STEPS) -> list[str]:
    sizes = {"--steps": steps, "--save-every": 4, "--batch": 16, "--width": 32}
    return ["--checkpoints", str(directory), *(str(part) for pair in sizes.items() for part in pair)]


def start(
    directory: Path, processes: int, devices: int, die_at: dict[int, int] | None = None
) -> list[subprocess.Popen]:
    """Starts the example in several processes, compiled as the tests are; pytest keeps what they print."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMPI", "JAX_"))}
    environment |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}"),
        "PYTHONPATH": str(ROOT),
    }
    address = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", str(processes)] if processes > 1 else []
    return [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                WORKER,
                *options(directory),
                *address,
                *(["--process", str(index)] if address else []),
            ],
            cwd=ROOT,
            env=environment | ({"DIE_AT": str(die_at[index])} if die_at and index in die_at else {}),
        )
        for index in range(processes)
    ]


def finish(processes: list[subprocess.Popen]) -> None:
    """Waits for all. Where one fails, the others would wait for it: they are ended."""
    try:
        for process in processes:
            assert process.wait(timeout=400) == 0
    finally:
        for process in processes:
            process.kill()
            process.wait()


def restored(directory: Path, step: int = STEPS):
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.CheckpointManager(directory, item_handlers=ocp.StandardCheckpointHandler()) as checkpoints:
        assert checkpoints.latest_step() == step
        found = checkpoints.item_metadata(step)
        wanted = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), found)
        saved = checkpoints.restore(step, args=ocp.args.StandardRestore(wanted))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(saved)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The last checkpoint of one process with four devices."""
    directory = tmp_path_factory.mktemp("one")
    finish(start(directory, processes=1, devices=4))
    return restored(directory)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The last checkpoint of two processes with two devices each, undisturbed."""
    directory = tmp_path_factory.mktemp("two")
    finish(start(directory, processes=2, devices=2))
    return restored(directory)


def test_two_processes_equal_one(one_process, two_processes):
    assert len(one_process) == len(two_processes) > 40
    for mine, theirs in zip(two_processes, one_process, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6 * max(1.0, float(np.abs(theirs).max())))


@pytest.mark.slow
def test_two_processes_killed_in_mid_run_end_where_an_undisturbed_run_ends(tmp_path, two_processes):
    bereft, killed = start(tmp_path, processes=2, devices=2, die_at={1: 10})
    try:
        assert killed.wait(timeout=400) == -signal.SIGKILL
    finally:
        bereft.kill()  # what a scheduler does with the rest of a job
        bereft.wait()
    saved = [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]
    assert max(saved) in (4, 8)  # the last one may not have been written to its end
    finish(start(tmp_path, processes=2, devices=2))
    for mine, theirs in zip(restored(tmp_path), two_processes, strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_one_process_resumes_on_other_devices(tmp_path, one_process, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    import multihost

    with jax.numpy_rank_promotion("allow"):
        multihost.train(multihost.parse(options(tmp_path, steps=8)))
        state = multihost.train(multihost.parse(options(tmp_path)))
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(state)} == {8}
    for mine, theirs in zip(restored(tmp_path), one_process, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-6 * max(1.0, float(np.abs(theirs).max())))
