"""K-FAC and Shampoo, whose packages need an older JAX: each runs beside SGD in an environment of its own, on a CPU.

`python -m benchmarks.cost.baselines kfac 20` is what runs there: it makes 20 steps of the MLP of this benchmark and
prints JSON. So this file imports nothing but what JAX has had for long.
"""

import json
import os
import statistics
import subprocess
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.common.timing import Carrying, in_turn

ROOT = Path(__file__).resolve().parents[2]
WIDTH, BATCH, LAYERS = 2048, 1024, 3
# The package and the newest JAX that it was seen to run with come first. Pinned: they work with no other versions.
BASELINES = {
    "kfac": ("kfac-jax==0.0.8", "jax==0.7.2", "jaxlib==0.7.2", "optax==0.2.8"),
    "shampoo": (
        *("optax-shampoo==0.0.6", "jax==0.4.13", "jaxlib==0.4.13", "optax==0.1.7", "flax==0.7.2", "chex==0.1.82"),
        *("numpy==1.25.2", "scipy==1.11.4"),
    ),
}


def run_baseline(name: str, repetitions: int) -> dict[str, float]:
    """Milliseconds of a step and their ratio to SGD's, in an environment that is made where it is missing.

    Raises:
      SystemExit: if the environment cannot be made, or the step does not run in it.
    """
    folder = ROOT / f".venv-{name}"
    done, python = folder / "complete", str(folder / "bin" / "python")
    if not done.exists():
        run_command(name, [sys.executable, "-m", "venv", "--clear", str(folder)])
        run_command(name, [python, "-m", "pip", "install", "--quiet", *BASELINES[name]])
        done.touch()
    output = run_command(name, [python, "-m", "benchmarks.cost.baselines", name, str(repetitions)])
    return json.loads(output.splitlines()[-1])


def run_command(name: str, command: list[str]) -> str:
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    if finished.returncode:
        raise SystemExit(
            f"benchmarks.cost: {name} does not run here. It needs {', '.join(BASELINES[name])}, for Python 3.11 or "
            f"older; this is {sys.version.split()[0]}. {' '.join(command[:3])} ended with\n{finished.stderr[-1500:]}"
        )
    return finished.stdout


def initial() -> tuple[Any, Any]:
    """Parameters and a batch."""
    keys = jax.random.split(jax.random.PRNGKey(0), LAYERS + 2)
    kernels = [jax.random.normal(key, (WIDTH, WIDTH)) * (2 / WIDTH) ** 0.5 for key in keys[:LAYERS]]
    batch = jax.random.normal(keys[-2], (BATCH, WIDTH)), jax.random.normal(keys[-1], (BATCH, WIDTH))
    return [{"w": kernel, "b": jnp.zeros(WIDTH)} for kernel in kernels], batch


def apply(params: Any, x: Any) -> Any:
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def repeated(tx: Any) -> Carrying:
    """The step of an optimizer of Optax."""
    params, batch = initial()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Any) -> Any:
        grads = jax.grad(lambda params: jnp.mean((apply(params, batch[0]) - batch[1]) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Carrying(step, (params, tx.init(params)), batch)


def kfac() -> Carrying:
    import kfac_jax  # pyright: ignore[reportMissingImports]

    params, batch = initial()

    def loss(params: Any, batch: Any) -> Any:
        outputs = apply(params, batch[0])
        kfac_jax.register_squared_error_loss(outputs, batch[1])
        return jnp.mean((outputs - batch[1]) ** 2)

    adaptive = dict.fromkeys(("use_adaptive_learning_rate", "use_adaptive_momentum", "use_adaptive_damping"), False)
    schedules = {"learning_rate_schedule": 1e-3, "momentum_schedule": 0.9, "damping_schedule": 0.03}
    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(loss),
        l2_reg=0.0,
        num_burnin_steps=0,
        multi_device=False,
        **adaptive,
        **{name: lambda step, value=value: value for name, value in schedules.items()},
    )
    key = jax.random.PRNGKey(1)
    return Carrying(
        lambda params, state: optimizer.step(params, state, key, batch=batch)[:2],
        (params, optimizer.init(params, key, batch)),
    )


def shampoo() -> Carrying:
    """Distributed Shampoo, written for a JAX that took a bool for the start of a float in a loop."""
    from optax_shampoo import distributed_shampoo as package  # pyright: ignore[reportMissingImports]

    def while_loop(condition: Any, body: Any, start: Any) -> Any:
        results = jax.eval_shape(body, start)
        return jax.lax.while_loop(
            condition, body, jax.tree_util.tree_map(lambda x, r: jnp.asarray(x, r.dtype), start, results)
        )

    package.lax = types.SimpleNamespace(**{**vars(jax.lax), "while_loop": while_loop})
    return repeated(package.distributed_shampoo(1e-3, block_size=1024, preconditioning_compute_steps=5))


def main(name: str, repetitions: int) -> None:
    steps = {"sgd": repeated(optax.sgd(1e-3, momentum=0.9)), name: {"kfac": kfac, "shampoo": shampoo}[name]()}
    seconds = in_turn(steps, repetitions)
    # Curvature is inverted in some steps only: the mean over all of them is what training pays.
    ratio = statistics.fmean(seconds[name]) / statistics.fmean(seconds["sgd"])
    print(json.dumps({"ms": 1000 * statistics.median(seconds[name]), "time_ratio": ratio}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
