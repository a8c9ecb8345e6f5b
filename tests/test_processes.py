"""`examples.train` in one process, on other devices, and in two processes that are killed and started again."""

import signal
import socket
from pathlib import Path

import jax
import pytest

from examples.train.__main__ import main
from tests.train.runs import assert_equal, finish, restored, saved_steps, start

STEPS = 12


def arguments(output: Path, **more) -> list[str]:
    """Augmented input, an average of parameters, and FSDP over two devices; an optimizer that forgives rounding."""
    given = {"task": "mnist-autoencoder", "model": "hidden=(64,32),code=8", "optimizer": "eva_sgd", "augment": "true"}
    given |= {"batch": 16, "steps": STEPS, "save_every": 4, "log_every": 2, "ema": 0.5, "fsdp": 2, "output": output}
    return [part for name, value in (given | more).items() for part in (f"--{name.replace('_', '-')}", str(value))]


def start_two(output: Path, die_at: int | None = None) -> list:
    """Two processes of two devices each, of which the first may be killed."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
    cluster = [{"coordinator": address, "processes": 2, "process": number} for number in range(2)]
    return [start(arguments(output, **part), 2, die_at if part["process"] == 0 else None) for part in cluster]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The last checkpoint of one process with four devices."""
    output = tmp_path_factory.mktemp("one")
    finish(start(arguments(output), devices=4))
    return restored(output, STEPS)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """The last checkpoint of two processes with two devices each, undisturbed."""
    output = tmp_path_factory.mktemp("two")
    finish(*start_two(output))
    return restored(output, STEPS)


@pytest.mark.train
def test_two_processes_equal_one(one_process, two_processes):
    assert len(two_processes) > 60
    assert_equal(two_processes, one_process, 1e-6)


@pytest.mark.train
def test_a_run_goes_on_with_other_devices(tmp_path, one_process, as_a_user):
    killed = start(arguments(tmp_path), devices=2, die_at=10)
    killed.communicate(timeout=900)
    assert killed.returncode == -signal.SIGKILL
    assert max(saved_steps(tmp_path)) in (4, 8)  # the last one may not have been written to its end
    assert jax.device_count() == 8
    main(arguments(tmp_path, fsdp=4))
    assert_equal(restored(tmp_path, STEPS), one_process, 1e-6)


@pytest.mark.train
@pytest.mark.slow
def test_two_processes_killed_in_mid_run_end_where_an_undisturbed_run_ends(tmp_path, two_processes):
    killed, bereft = start_two(tmp_path, die_at=10)
    killed.communicate(timeout=900)
    assert killed.returncode == -signal.SIGKILL
    bereft.kill()  # what a scheduler does with the rest of a job
    bereft.communicate(timeout=60)
    assert max(saved_steps(tmp_path)) in (4, 8)
    finish(*start_two(tmp_path))
    assert_equal(restored(tmp_path, STEPS), two_processes)
