"""One training run of the convergence benchmark, and the time of a step."""

import math
import statistics
from collections.abc import Callable, Mapping
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import eva_optax
from benchmarks.common.timing import Carrying, in_turn
from benchmarks.common.training import Loss, step_of
from benchmarks.convergence.optimizers import Optimizer
from benchmarks.convergence.tasks import Task

PERIOD = 10  # steps, of every optimizer here that makes inverses, roots or bases now and then
POINTS = 25  # evaluations of a run, the last one after its last step


class Run(NamedTuple):
    """The training and the validation loss after each of the equal parts of a run; of some, the last one alone."""

    steps: int
    curve: list[float]
    validation: list[float]

    @property
    def final(self) -> float:
        return self.curve[-1]

    def steps_to(self, loss: float) -> float:
        """The first step at which the training loss is down to `loss`, interpolated linearly; infinity if none."""
        return self._steps(self.curve, loss)

    def steps_to_validation(self, loss: float) -> float:
        """The first step at which the validation loss is down to `loss`, likewise."""
        return self._steps(self.validation, loss)

    def _steps(self, curve: list[float], loss: float) -> float:
        for index, (before, here) in enumerate(pairwise([math.inf, *curve])):
            if here <= loss < math.inf:
                share = 1 if math.isinf(before) else (before - loss) / (before - here)
                return (index + share) * self.steps / len(curve)
        return math.inf

    def loss_at(self, steps: float) -> float:
        """The training loss after so many steps, interpolated linearly; that at the end for more than were made."""
        return float(np.interp(steps / self.steps * len(self.curve), np.arange(1, len(self.curve) + 1), self.curve))


def schedule(rate: Array, steps: Array) -> optax.Schedule:
    """Linear warm-up over 5% of the steps, then a cosine to zero. Rate and number of steps may be traced."""
    return lambda count: (
        rate * jnp.minimum(1, (count + 1) / (0.05 * steps)) * 0.5 * (1 + jnp.cos(jnp.pi * count / steps))
    )


@cache
def train_step(model: Any, loss: Loss, optimizer: Optimizer) -> Callable[..., Any]:
    """A jitted step from (parameters, state, statistics): one compilation for all rates, seeds and horizons."""
    tapped = optimizer.tap(model)

    @partial(jax.jit, donate_argnums=0)
    def step(carry: Any, rate: Array, steps: Array, inputs: Array, targets: Array) -> Any:
        return step_of(tapped, loss, optimizer.build(schedule(rate, steps)))(*carry, inputs, targets)

    return step


@cache
def evaluation(model: Any, loss: Loss) -> Callable[..., Array]:
    """The loss from parameters without probes."""
    return jax.jit(lambda params, statistics, x, y: loss(model.apply({"params": params, **statistics}, x), y))


@cache
def _initialization(model: Any, tap: Callable[[Any], Any]) -> Callable[..., Any]:
    return jax.jit(tap(model).init)


def forget_programs() -> None:
    """Frees what was compiled for the tasks so far."""
    for cached in (train_step, evaluation, _initialization):
        cached.cache_clear()
    jax.clear_caches()


def start(task: Task, optimizer: Optimizer, seed: int) -> Any:
    """Parameters, state and statistics. The parameters are the same with and without probes."""
    variables = dict(_initialization(task.model, optimizer.tap)(jax.random.key(seed), task.load().train.inputs[:1]))
    params = variables.pop("params")
    return params, optimizer.build(schedule(jnp.ones(()), jnp.ones(()))).init(params), variables


def train(task: Task, optimizer: Optimizer, rate: float, seed: int, steps: int) -> Run:
    """Trains once. A run that diverges ends early, with infinite losses."""
    data, step, evaluate = task.load(), train_step(task.model, task.loss, optimizer), evaluation(task.model, task.loss)
    # Evaluated on the device's copies, taken once.
    train_part, validation_part = ([jnp.asarray(part[: task.evaluated]) for part in split] for split in data)
    arguments = jnp.float32(rate), jnp.float32(steps)
    carry, curve, validation = start(task, optimizer, seed), [], []

    def loss(inputs: Array, targets: Array) -> float:
        return float(evaluate(eva_optax.strip(carry[0]), carry[2], inputs, targets))

    for chunk in np.array_split(task.batches(seed, steps), POINTS):
        for batch in chunk:
            carry = step(carry, *arguments, data.train.inputs[batch], data.train.targets[batch])
        curve.append(loss(*train_part))
        validation.append(loss(*validation_part))
        if not math.isfinite(curve[-1]):
            rest = [math.inf] * (POINTS - len(curve) + 1)
            return Run(steps, curve[:-1] + rest, validation[:-1] + rest)
    return Run(steps, curve, validation)


def time_steps(task: Task, optimizers: Mapping[str, Optimizer], rounds: int = 10) -> dict[str, float]:
    """The seconds of a step of each optimizer: the median of periods, in which what is renewed now and then is once."""
    data = task.load().train
    rest = jnp.float32(1e-4), jnp.float32(100), data.inputs[: task.batch_size], data.targets[: task.batch_size]

    def repeated(optimizer: Optimizer) -> Carrying:
        step = train_step(task.model, task.loss, optimizer)
        return Carrying(lambda *all: (step(*all),), (start(task, optimizer, seed=0),), *rest, times=PERIOD)

    seconds = in_turn({name: repeated(optimizer) for name, optimizer in optimizers.items()}, rounds)
    return {name: statistics.median(times) / PERIOD for name, times in seconds.items()}
