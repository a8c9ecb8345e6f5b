"""Optimizers whose packages need an older JAX: each runs in an environment of its own, beside SGD in the same one."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The package and the newest JAX that it was seen to run with come first. Pinned: they work with no other versions.
BASELINES = {
    "kfac": ("kfac-jax==0.0.8", "jax==0.7.2", "jaxlib==0.7.2", "optax==0.2.8"),
    "shampoo": (
        *("optax-shampoo==0.0.6", "jax==0.4.13", "jaxlib==0.4.13", "optax==0.1.7", "flax==0.7.2", "chex==0.1.82"),
        *("numpy==1.25.2", "scipy==1.11.4"),
    ),
}


def run_baseline(name: str, repetitions: int) -> dict[str, float]:
    """Milliseconds of a step and their ratio to SGD's, of the MLP of the cost benchmark on this machine's CPU.

    Raises:
      SystemExit: if the environment cannot be made, or the step does not run in it.
    """
    folder = ROOT / f".venv-{name}"
    done, python = folder / "complete", folder / "bin" / "python"
    if not done.exists():
        commands = ([sys.executable, "-m", "venv", "--clear", str(folder)], [str(python), "-m", "pip", "install", "-q"])
        for command, packages in zip(commands, ((), BASELINES[name]), strict=True):
            _run(name, [*command, *packages])
        done.touch()
    script = Path(__file__).with_name("baseline_step.py")
    output = _run(name, [str(python), str(script), name, "--repetitions", str(repetitions)])
    return json.loads(output.splitlines()[-1])["times"][name]


def _run(name: str, command: list[str]) -> str:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    if finished.returncode:
        raise SystemExit(
            f"benchmarks: {name} does not run here. It needs {', '.join(BASELINES[name])}, for Python 3.11 or older; "
            f"this is {sys.version.split()[0]}. {' '.join(command[:3])} ... ended with\n{finished.stderr[-1500:]}"
        )
    return finished.stdout
