"""The time that steps take when they run in turn."""

import random
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

Name = TypeVar("Name")


def in_turn(steps: Mapping[Name, Callable[[], Any]], rounds: int, warm_up: int = 2) -> dict[Name, list[float]]:
    """Seconds of each step in each round. What slows the machine slows all of them.

    Each round has an order of its own: what one step leaves in caches and memory must not always meet the same other.

    Args:
      steps: each makes one step and returns its results, which are waited for.
      rounds: how many steps of each are timed.
      warm_up: rounds before them, in which steps compile and caches fill.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in steps}
    for turn in range(warm_up + rounds):
        for name in random.Random(turn).sample(list(steps), len(steps)):
            start = time.perf_counter()
            jax.block_until_ready(steps[name]())
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


class Carrying:
    """Some steps as a function without arguments; each takes what the one before returned."""

    def __init__(self, step: Callable[..., Any], carry: tuple[Any, ...], *rest: Any, times: int = 1) -> None:
        self.step, self.carry, self.rest, self.times = step, carry, rest, times

    def __call__(self) -> Any:
        for _ in range(self.times):
            self.carry = self.step(*self.carry, *self.rest)
        return self.carry
