"""The optimizers of the convergence benchmark: three baselines, and each member of the family chained with them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import optax

import eva_optax

Build = Callable[[optax.Schedule], optax.GradientTransformation]


@dataclass(frozen=True)
class Optimizer:
    """How an optimizer is made from its schedule.

    Attributes:
      baseline: the name of the one that it is compared with, its own for a baseline.
      tapped: whether it needs a tapped model. The baselines do without, so that they pay for nothing.
    """

    name: str
    baseline: str
    build: Build
    tapped: bool = True


def muon_dimensions(params: Any) -> Any:
    """Every kernel is orthogonalised, stacked ones one by one, those of convolutions as (patch, channels).

    Embeddings and the language model's head go to Adam, as is usual; so it trains better than with the head included.
    """
    numbers = optax.contrib.MuonDimensionNumbers
    by_rank = {2: numbers(0, 1), 3: numbers(1, 2), 4: numbers((0, 1, 2), 3)}  # Dense, stacked Dense, Conv

    def dimensions(path: tuple[Any, ...], leaf: Any) -> Any:
        return by_rank[leaf.ndim] if path[-1].key == "kernel" and path[0].key != "head" else None

    return jax.tree_util.tree_map_with_path(dimensions, params)


def sgd(rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.sgd(rate, momentum=0.9)


def adamw(rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(rate, b2=0.95, weight_decay=0.0)


def muon(rate: optax.Schedule) -> optax.GradientTransformation:
    return optax.contrib.muon(rate, adam_b2=0.95, muon_weight_dimension_numbers=muon_dimensions)


BASELINES: dict[str, Build] = {"sgd": sgd, "adamw": adamw, "muon": muon}


def _chained(member: Callable[[], optax.GradientTransformation], base: Build) -> Build:
    return lambda rate: optax.chain(member(), base(rate))


def _optimizers() -> list[Optimizer]:
    found = [Optimizer(name, name, build, tapped=False) for name, build in BASELINES.items()]
    for name, base in BASELINES.items():
        found += [
            Optimizer(f"eva+{name}", name, _chained(lambda: eva_optax.scale_by_eva(), base)),
            Optimizer(f"eva_f+{name}", name, _chained(lambda: eva_optax.scale_by_eva_f(), base)),
            Optimizer(f"eva_s+{name}", name, _chained(lambda: eva_optax.scale_by_eva_s(), base), tapped=False),
            Optimizer(f"center+{name}", name, lambda rate, base=base: eva_optax.center(base(rate))),
        ]
    return [
        *found,
        Optimizer("conjugate+sgd", "sgd", lambda rate: eva_optax.conjugate(sgd(rate))),
        Optimizer("eva_adamw", "adamw", lambda rate: eva_optax.eva_adamw(rate, weight_decay=0.0)),
        Optimizer(
            "eva_muon", "muon", lambda rate: eva_optax.eva_muon(rate, muon_weight_dimension_numbers=muon_dimensions)
        ),
        Optimizer("eva", "sgd", lambda rate: eva_optax.eva(rate)),
        Optimizer("eva_f", "sgd", lambda rate: eva_optax.eva_f(rate)),
        Optimizer("eva_s", "sgd", lambda rate: eva_optax.eva_s(rate), tapped=False),
    ]


OPTIMIZERS = {optimizer.name: optimizer for optimizer in _optimizers()}
