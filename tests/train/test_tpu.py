"""Full-size ImageNet steps with `eva_adamw`, compiled for four chips of a TPU v5e, fit their memory.

ResNet-50 takes ten minutes of processor time, nearly all of it for the machine code of one operation after another.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
HBM = 16 * 2**30  # of a v5e chip

# libtpu wants its variables before JAX is imported, and one process at a time.
COMPILE = """
import sys
import jax
import jax.numpy as jnp
from jax.experimental import topologies
from examples.train.steps import make_mesh, make_program
from examples.train.tasks import configure, find

topology = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
given = {"task": sys.argv[1], "data": "unused", "optimizer": "eva_adamw", "batch": sys.argv[2], "fsdp": sys.argv[3]}
config = configure(given)
shapes = {"inputs": ((config.input.batch, 224, 224, 3), jnp.uint8), "labels": ((config.input.batch,), jnp.int32)}
batch = {name: jax.ShapeDtypeStruct(*of) for name, of in shapes.items()}
program = make_program(find(config.task), config, batch, 1000, make_mesh(config, topology.devices))
batch = {name: jax.ShapeDtypeStruct(*of, sharding=program.rows) for name, of in shapes.items()}
memory = program.step.lower(program.state, batch).compile().memory_analysis()
used = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
print(used + memory.temp_size_in_bytes)
"""


@pytest.mark.tpu_aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install libtpu")
@pytest.mark.parametrize(("task", "batch", "fsdp"), [("imagenet-resnet50", 512, 1), ("imagenet-vit-s16", 512, 4)])
def test_a_step_fits_the_memory_of_four_chips(task, batch, fsdp):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
    command = [sys.executable, "-c", COMPILE, task, str(batch), str(fsdp)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    used = int(done.stdout.split()[-1])
    assert 2**28 < used < HBM, f"{used / 2**30:.2f} GiB"
    print(f"{task}: {used / 2**30:.2f} GiB a chip")
