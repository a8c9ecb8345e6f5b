"""One program in several processes: on the hosts of a TPU slice or of a cluster, or of your own."""

import contextlib

import jax

from examples.train.config import Machine


def connect(machine: Machine) -> None:
    """Joins the other processes, if there are any; to be called before anything else asks for a device."""
    if machine.coordinator:
        jax.distributed.initialize(machine.coordinator, machine.processes, machine.process)
        return
    # Recognises TPU pod slices, Slurm, Kubernetes and Open MPI by their environment, and raises on a single machine.
    with contextlib.suppress(ValueError):
        jax.distributed.initialize()
