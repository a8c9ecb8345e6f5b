"""A physics-informed network with Adam, AdamW and Muon and their Eva counterparts.

    python examples/physics.py            # about five minutes on two cores
    python examples/physics.py --small    # shows that it runs

The network learns to solve the Poisson equation -Δu = f on the unit square, with u = 0 on the boundary and f chosen so
that u = sin(πx) sin(πy). The loss holds second derivatives of the network in its inputs: `jax.jvp` twice goes through
`eva_optax.tap(model)` as through the model itself, and `jax.grad` of all that brings the Kronecker vectors.

Every optimizer starts from the same parameters, sees the same points, and gets the same learning rates, schedule and
decay of second moments. The rate with the lowest final loss, by the median of the seeds, counts.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from language_model import schedule
from plots import draw, panels, save
from progress import SMALL, progress
from rich import box
from rich.console import Console
from rich.table import Table

import eva_optax

B2 = 0.95  # of every Adam here, by itself, inside Muon and inside of their Eva counterparts
BOUNDARY_WEIGHT = 100.0  # about the mean square of f, with which the equation's part of the loss starts
EVALUATIONS, INTERIOR, BOUNDARY = 40, 256, 64  # of a run; points, drawn once for each seed


class Network(nn.Module):
    """A small tanh network from a point to a number."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for _ in range(3):
            x = jnp.tanh(nn.Dense(32)(x))
        return nn.Dense(1)(x)[..., 0]


def eva_then_adamw(rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.chain(eva_optax.scale_by_eva(), optax.adamw(rate, b2=B2))


def centred_adam(rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.chain(eva_optax.center(optax.scale_by_adam(b2=B2)), optax.scale_by_learning_rate(rate))


class Optimizer(NamedTuple):
    """How it is made from a schedule, what it is compared with (itself, if it needs no probes), and its line."""

    make: Callable[[optax.Schedule], optax.GradientTransformation]
    baseline: str
    line: str


OPTIMIZERS = {
    "Adam": Optimizer(partial(optax.adam, b2=B2), "Adam", "--"),
    "center(Adam)": Optimizer(centred_adam, "Adam", "-"),
    "AdamW": Optimizer(partial(optax.adamw, b2=B2), "AdamW", "--"),
    "Eva + AdamW": Optimizer(eva_then_adamw, "AdamW", "-."),
    "Eva-AdamW": Optimizer(partial(eva_optax.eva_adamw, b2=B2), "AdamW", "-"),
    "Muon": Optimizer(partial(optax.contrib.muon, adam_b2=B2), "Muon", "--"),
    "Eva-Muon": Optimizer(partial(eva_optax.eva_muon, adam_b2=B2), "Muon", "-"),
}
PLAIN: Any = Network()
TAPPED: Any = eva_optax.tap(PLAIN)
MODELS = {name: PLAIN if name == optimizer.baseline else TAPPED for name, optimizer in OPTIMIZERS.items()}


def solution(x: Array) -> Array:
    return jnp.prod(jnp.sin(jnp.pi * x), -1)


def loss(model: Any, params: Any, interior: Array, boundary: Array) -> Array:
    """How far -Δu is from f inside, and u from 0 on the boundary."""

    def u(x: Array) -> Array:
        return model.apply({"params": params}, x)

    def second(x: Array, along: Array) -> Array:
        return jax.jvp(lambda x: jax.jvp(u, (x,), (along,))[1], (x,), (along,))[1]

    laplacian = jax.vmap(lambda x: jax.vmap(partial(second, x))(jnp.eye(2)).sum())(interior)
    residual = laplacian + 2 * jnp.pi**2 * solution(interior)
    return jnp.mean(residual**2) + BOUNDARY_WEIGHT * jnp.mean(jax.vmap(u)(boundary) ** 2)


@jax.jit
def evaluate(params: Any, data: tuple[Array, Array]) -> tuple[Array, Array]:
    """The loss, and the relative L2 error on a grid, of parameters without probes."""
    grid = jnp.stack(jnp.meshgrid(*2 * [jnp.linspace(0, 1, 50)]), -1)
    wanted = solution(grid)
    error = jnp.linalg.norm(PLAIN.apply({"params": params}, grid) - wanted) / jnp.linalg.norm(wanted)
    return loss(PLAIN, params, *data), error


@partial(jax.jit, static_argnames=("name", "steps"), donate_argnums=(0, 1))
def train(params: Any, state: Any, rate: float, data: tuple[Array, Array], name: str, steps: int) -> tuple[Any, Any]:
    """The steps from one evaluation to the next. The rate is an argument, so that all rates share one compilation."""

    def step(carry: tuple[Any, Any], _: None) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        grads = jax.grad(lambda p: loss(MODELS[name], p, *data))(params)
        updates, state = OPTIMIZERS[name].make(schedule(rate, steps)).update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, state), length=steps // EVALUATIONS)[0]


class Result(NamedTuple):
    """An optimizer at its best rate: loss and error of shape (seeds, evaluations), and the seconds of each chunk."""

    rate: float
    loss: np.ndarray
    error: np.ndarray
    seconds: list[float]

    def final_loss(self) -> float:
        return float(np.median(np.nan_to_num(self.loss[:, -1], nan=np.inf)))


def sweep(rates: Sequence[float], seeds: int, steps: int, advance: Callable[[int], None]) -> dict[str, Result]:
    """The best result of each optimizer; `advance` is told how many steps were made."""
    curves: dict[tuple[float, str], list[Any]] = {job: [] for job in product(rates, OPTIMIZERS)}
    seconds: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    # Optimizers take turns: whatever else the computer does slows all of them alike.
    for seed, (rate, name) in product(range(seeds), curves):
        random, side = np.random.default_rng(seed), np.arange(BOUNDARY)
        boundary = random.uniform(size=(BOUNDARY, 2))
        boundary[side, side % 2] = side // 2 % 2  # equally many on each side
        data = jnp.asarray(random.uniform(size=(INTERIOR, 2)), "float32"), jnp.asarray(boundary, "float32")
        params = MODELS[name].init(jax.random.key(seed), data[0])["params"]  # the same values, tapped or not
        state, measured = OPTIMIZERS[name].make(schedule(rate, steps)).init(params), []
        for _ in range(EVALUATIONS):
            measured.append(evaluate(eva_optax.strip(params), data))
            start = time.perf_counter()
            params, state = jax.block_until_ready(train(params, state, rate, data, name, steps))
            seconds[name].append(time.perf_counter() - start)
            advance(steps // EVALUATIONS)
        curves[rate, name].append([*measured, evaluate(eva_optax.strip(params), data)])
    arrays = {job: np.array(runs) for job, runs in curves.items()}
    found = {(r, name): Result(r, a[..., 0], a[..., 1], seconds[name]) for (r, name), a in arrays.items()}
    return {name: min((found[rate, name] for rate in rates), key=Result.final_loss) for name in OPTIMIZERS}


def report(results: dict[str, Result], steps: int, console: Console, path: Path) -> None:
    """Table, verdict and curves."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for header in ("optimizer", "rate", "final\nloss", "relative\nL2 error", "ms per\nstep", "steps to\nAdam's loss"):
        table.add_column(header, justify="left" if header == "optimizer" else "right", no_wrap=True)
    figure, rows = panels(2)
    at, better, worse = np.linspace(0, steps, EVALUATIONS + 1), [], []
    for name, (_, baseline, line) in OPTIMIZERS.items():
        rate, losses, errors, seconds = result = results[name]
        reached = losses <= results["Adam"].loss[:, -1:]
        to_adam = np.median(np.where(reached.any(1), at[reached.argmax(1)], np.inf))
        # The median leaves the compilation out, which is in the first chunk.
        numbers = f"{np.median(errors[:, -1]):.2g}", f"{1e3 * np.median(seconds) * EVALUATIONS / steps:.2f}"
        table.add_row(name, f"{rate:g}", f"{result.final_loss():.3g}", *numbers, f"{to_adam:.0f}".replace("inf", "-"))
        ratio = result.final_loss() / results[baseline].final_loss()
        if name != baseline:
            (better if ratio < 1 else worse).append(f"{name}, {ratio:.2g} times the final loss of {baseline}")
        for axes, curves, label in zip(rows, (losses, errors), ("loss", "relative L2 error"), strict=True):
            draw(axes, at, curves, baseline, line, f"{name}, rate {rate:g}")
            axes.set(xlabel="step", ylabel=label, yscale="log")
    save(figure, path)
    console.print(table, "", f"Helps: {'; '.join(better) or 'none'}.", f"Does not: {'; '.join(worse) or 'none'}.")


def main(arguments: Sequence[str] | None = None) -> dict[str, Result]:
    parser = argparse.ArgumentParser(description="Adam, AdamW and Muon with and without Eva, on a Poisson equation.")
    parser.add_argument("--small", action="store_true", help="few steps, two rates, one seed, to see that it runs")
    parser.add_argument("--output", type=Path, default=Path("results"), help="directory of the plot")
    options = parser.parse_args(arguments)
    rates, seeds, steps = ((0.003, 0.01), 1, 80) if options.small else ((0.001, 0.003, 0.01, 0.03, 0.1), 3, 1600)
    console, path = Console(), options.output / "physics.png"
    with progress(console, {"Poisson": seeds * len(rates) * len(OPTIMIZERS) * steps}) as advance:
        results = sweep(rates, seeds, steps, partial(advance, "Poisson"))
    report(results, steps, console, path)
    console.print(f"{steps} steps, medians of {seeds} seed(s), best of {len(rates)} rates by final loss. Plot: {path}")
    if options.small:
        console.print(SMALL)
    return results


if __name__ == "__main__":
    main()
