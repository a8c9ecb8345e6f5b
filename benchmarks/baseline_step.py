"""One optimizer that needs an older JAX, and SGD beside it, on the MLP of the cost benchmark: prints JSON.

Runs in an environment of its own, which `baselines.py` makes; so it imports nothing of this project, and only what JAX
has had for long.

    python benchmarks/baseline_step.py kfac --repetitions 20
"""

import argparse
import functools
import json
import statistics
import time
import types

import jax
import jax.numpy as jnp
import optax

WIDTH, BATCH, LAYERS = 2048, 1024, 3


def initial():
    keys = jax.random.split(jax.random.PRNGKey(0), LAYERS + 2)
    params = [
        {"w": jax.random.normal(key, (WIDTH, WIDTH)) * (2 / WIDTH) ** 0.5, "b": jnp.zeros(WIDTH)}
        for key in keys[:LAYERS]
    ]
    return params, (jax.random.normal(keys[-2], (BATCH, WIDTH)), jax.random.normal(keys[-1], (BATCH, WIDTH)))


def apply(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def optax_stepper(tx):
    params, batch = initial()
    carry = [params, tx.init(params)]

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        def loss(params):
            return jnp.mean((apply(params, batch[0]) - batch[1]) ** 2)

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    def run():
        carry[:] = step(*carry, batch)
        jax.block_until_ready(carry)

    return run


def kfac_stepper():
    import kfac_jax  # pyright: ignore[reportMissingImports]

    params, batch = initial()

    def loss(params, batch):
        outputs = apply(params, batch[0])
        kfac_jax.register_squared_error_loss(outputs, batch[1])
        return jnp.mean((outputs - batch[1]) ** 2)

    optimizer = kfac_jax.Optimizer(
        jax.value_and_grad(loss),
        l2_reg=0.0,
        use_adaptive_learning_rate=False,
        use_adaptive_momentum=False,
        use_adaptive_damping=False,
        learning_rate_schedule=lambda step: 1e-3,
        momentum_schedule=lambda step: 0.9,
        damping_schedule=lambda step: 0.03,
        num_burnin_steps=0,
        multi_device=False,
    )
    key = jax.random.PRNGKey(1)
    carry = [params, optimizer.init(params, key, batch)]

    def run():
        params, state, _ = optimizer.step(carry[0], carry[1], key, batch=batch)
        carry[:] = [params, state]
        jax.block_until_ready(carry)

    return run


def shampoo_stepper():
    """Distributed Shampoo, written for a JAX that took a bool for the start of a float in a loop."""
    from optax_shampoo import distributed_shampoo as package  # pyright: ignore[reportMissingImports]

    def while_loop(condition, body, start):
        results = jax.eval_shape(body, start)
        typed = tuple(jnp.asarray(x, result.dtype) for x, result in zip(start, results))  # noqa: B905
        return jax.lax.while_loop(condition, body, typed)

    package.lax = types.SimpleNamespace(**{**vars(jax.lax), "while_loop": while_loop})
    tx = package.distributed_shampoo(1e-3, block_size=1024, preconditioning_compute_steps=5)
    return optax_stepper(tx)


STEPPERS = {"kfac": kfac_stepper, "shampoo": shampoo_stepper}


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("optimizer", choices=sorted(STEPPERS))
    parser.add_argument("--repetitions", type=int, default=20)
    options = parser.parse_args()
    runs = {"sgd": optax_stepper(optax.sgd(1e-3, momentum=0.9)), options.optimizer: STEPPERS[options.optimizer]()}
    times = {name: [] for name in runs}
    for repetition in range(options.repetitions + 2):  # two to compile and to warm up
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if repetition >= 2:
                times[name].append(1000 * (time.perf_counter() - start))
    base = times["sgd"]
    found = {
        name: {
            "ms": statistics.median(mine),
            # Curvature is inverted in some steps only: the mean over all of them is what training pays.
            "time_ratio": statistics.fmean(mine) / statistics.fmean(base),
        }
        for name, mine in times.items()
    }
    print(json.dumps({"jax": jax.__version__, "times": found}))


if __name__ == "__main__":
    main()
