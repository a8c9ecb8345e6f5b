"""What steps are compiled for: the environment that JAX is started in, the devices, and the versions of the software.

JAX reads its environment when it is imported, so that nothing here imports it before `prepare_environment` has run.
"""

import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

TARGETS = ("cpu", "gpu", "h100", "tpu")
# Those whose programs are compiled and never run, with the package that has the compiler and what installs it.
COMPILED = {"tpu": ("libtpu", "libtpu"), "h100": ("jax_cuda12_plugin", "'jax[cuda12]'")}
# Leaves a TPU's compiler no on-chip memory to prefetch into, so that the traffic is the program's own.
NO_PREFETCH = {"xla_tpu_scoped_vmem_limit_kib": "120000"}


def prepare_environment(target: str, device: str = "1 device") -> None:
    """Sets what must be set before JAX is imported.

    Raises:
      SystemExit: if the compiler for the target is not installed.
    """
    package, requirement = COMPILED.get(target, ("jax", "jax"))
    if find_spec(package) is None:
        raise SystemExit(f"benchmarks.cost: --target {target} needs {package}: pip install {requirement}")
    flags = ""
    if target == "tpu":
        wanted = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
        os.environ.update(wanted, JAX_PLATFORMS="cpu")
    elif target == "h100":
        # No autotuning, which would need the GPU: every matrix product is one of cuBLAS.
        flags = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
        os.environ.update(CUDA_VISIBLE_DEVICES="-1", JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1", JAX_PLATFORMS="")
    elif target == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"
        if device != "1 device":
            flags = f"--xla_force_host_platform_device_count={device.split()[0]}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()


def devices_of(device: str, target: str) -> list[Any]:
    """The chips of a topology in its order, or the devices of this machine.

    Raises:
      SystemExit: if JAX sees no GPU and the target is one.
    """
    import jax
    from jax.experimental import topologies

    if target == "tpu":
        topology = topologies.get_topology_desc(platform="tpu", topology_name=device)
        return list(topologies.make_mesh(topology, (len(topology.devices),), ("data",)).devices.flat)
    if target == "h100":
        described = Path(__file__).with_name("h100.txtpb").read_text()
        shape = f"1x1x{device.split()[0]}"  # slices, hosts, GPUs of one host
        return list(topologies.get_topology_desc("", "cuda", target_config=described, topology=shape).devices)
    try:
        return list(jax.devices(target))
    except RuntimeError as error:
        raise SystemExit(f"benchmarks.cost: --target {target} needs a GPU that JAX sees ({error})") from error


def mesh_of(device: str, layout: str, target: str) -> Any:
    """The chips by rows that split the batch and columns that split layers; None for one device of this machine."""
    import numpy as np
    from jax.sharding import Mesh

    if target not in COMPILED and layout == "single":
        return None
    chips = np.array(devices_of(device, target))
    chips = chips[:1] if layout == "single" else chips
    # Tensor parallel: each row of the batch is shared by two chips, by four in a pod.
    columns = 1 if layout != "tensor" else 2 if len(chips) < 16 else 4
    return Mesh(chips.reshape(-1, columns), ("data", "model"))


def software_version(target: str) -> str:
    """What a row depends on; another version measures anew."""
    details = {"tpu": lambda: f", libtpu {version('libtpu')}", "h100": lambda: ", CUDA 12.9"}
    details["gpu"] = lambda: f", {devices_of('', 'gpu')[0].device_kind}"
    return f"jax {version('jax')}" + details.get(target, lambda: "")()
