"""The optimizers of the convergence benchmark: three baselines, and what is compared with them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

import eva_optax
from benchmarks.common.training import untapped

Build = Callable[[optax.Schedule], optax.GradientTransformation]


@dataclass(frozen=True)
class Optimizer:
    """How an optimizer is made from its schedule.

    Attributes:
      baseline: the name of the one that it is compared with, its own for a baseline.
      tap: what its model is tapped with. The baselines do without, so that they pay for nothing.
    """

    name: str
    baseline: str
    build: Build
    tap: Callable[[Any], Any] = eva_optax.tap


def muon_dimensions(params: Any) -> Any:
    """Every kernel is orthogonalised, stacked ones one by one, those of convolutions as (patch, channels).

    Embeddings and the language model's head go to Adam, as is usual; so it trains better than with the head included.
    """
    numbers = optax.contrib.MuonDimensionNumbers
    by_rank = {2: numbers(0, 1), 3: numbers(1, 2), 4: numbers((0, 1, 2), 3)}  # Dense, stacked Dense, Conv

    def dimensions(path: tuple[Any, ...], leaf: Any) -> Any:
        return by_rank[leaf.ndim] if path[-1].key == "kernel" and path[0].key != "head" else None

    return jax.tree_util.tree_map_with_path(dimensions, params)


MUON: dict[str, Any] = {"muon_weight_dimension_numbers": muon_dimensions}
BASELINES: dict[str, Build] = {
    "sgd": lambda rate: optax.sgd(rate, momentum=0.9),
    "adamw": lambda rate: optax.adamw(rate, b2=0.95, weight_decay=0.0),
    "muon": lambda rate: optax.contrib.muon(rate, adam_b2=0.95, **MUON),
}
eva_adamw = partial(eva_optax.eva_adamw, b2=0.95, weight_decay=0.0)
eva_muon = partial(eva_optax.eva_muon, adam_b2=0.95, **MUON)
SKETCHED = {rank: partial(eva_optax.tap, rank=rank) for rank in (0, 4, 16, 64)}


def before_sgd(rate: optax.Schedule, *first: optax.GradientTransformation) -> optax.GradientTransformation:
    """What comes before SGD with momentum, which keeps none of probes."""
    return optax.chain(*first, optax.masked(BASELINES["sgd"](rate), eva_optax.not_probes))


def nysact(rate: optax.Schedule, damping: float = 0.1) -> optax.GradientTransformation:
    """NysAct (Seung, Lee and Ko, arXiv:2506.08360): absolute damping alone tells what a sketch does not see.

    Traces are taken out, so that what is left of them is zero. A sketch is taken in each step and not in every fifth,
    and so decays by the fifth root of their 0.95; they draw other columns of A each time, and published dampings lie
    between 0.01 and 1, ranks between 5 and 50.
    """

    def without_traces(updates: Any, _: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: jnp.zeros_like(leaf) if path[-1] == jax.tree_util.DictKey("s") else leaf, updates
        )

    inverse = eva_optax.scale_by_eva_f(damping, relative=False, sketch_decay=0.95**0.2, every=50)
    return before_sgd(rate, optax.stateless(without_traces), inverse)


def _behind(base: str) -> list[Optimizer]:
    """The members of the family in front of a baseline, and the mean input taken out of its gradients."""
    build = BASELINES[base]
    return [
        Optimizer(f"eva+{base}", base, lambda rate: optax.chain(eva_optax.scale_by_eva(), build(rate))),
        Optimizer(f"eva_f+{base}", base, lambda rate: optax.chain(eva_optax.scale_by_eva_f(), build(rate))),
        Optimizer(f"eva_s+{base}", base, lambda rate: optax.chain(eva_optax.scale_by_eva_s(), build(rate)), untapped),
        Optimizer(f"center+{base}", base, lambda rate: eva_optax.center(build(rate))),
    ]


def _matrices() -> Iterator[Optimizer]:
    """Those with whole matrices; `/10` takes their inverses, or roots, in every tenth step and not in each."""

    def tapped(factors: str, sharing: str = "expand") -> Callable[[Any], Any]:
        return partial(eva_optax.tap, factors=factors, sharing=sharing)

    def preconditioned(rate: optax.Schedule, every: int) -> optax.GradientTransformation:
        return before_sgd(rate, eva_optax.scale_by_kfac(every=every))

    for every, suffix in ((1, ""), (10, "/10")):
        published = partial(eva_optax.kfac, every=every)
        yield Optimizer(f"kfac{suffix}", "sgd", published, tapped("both", "reduce"))
        yield Optimizer(f"kfac+sgd{suffix}", "sgd", partial(preconditioned, every=every), tapped("both"))
        yield Optimizer(
            f"shampoo{suffix}", "adamw", partial(eva_optax.shampoo, every=every, graft_decay=0.95), untapped
        )
    adamw = partial(eva_optax.foof_adamw, b2=0.95, weight_decay=0.0)
    muon = partial(eva_optax.foof_muon, adam_b2=0.95, **MUON)
    yield Optimizer("eva_adamw@both", "adamw", eva_adamw, tapped("both"))
    yield Optimizer("foof", "sgd", eva_optax.foof, tapped("input"))
    yield Optimizer("foof_adamw", "adamw", adamw, tapped("input"))
    yield Optimizer("foof_muon", "muon", muon, tapped("input"))


OPTIMIZERS = {
    optimizer.name: optimizer
    for optimizer in (
        *(Optimizer(name, name, build, untapped) for name, build in BASELINES.items()),
        *(optimizer for base in BASELINES for optimizer in _behind(base)),
        Optimizer("conjugate+sgd", "sgd", lambda rate: eva_optax.conjugate(BASELINES["sgd"](rate))),
        Optimizer("eva_adamw", "adamw", eva_adamw),
        *(Optimizer(f"eva_adamw@{rank}", "adamw", eva_adamw, tap) for rank, tap in SKETCHED.items()),
        Optimizer("eva_muon", "muon", eva_muon),
        Optimizer("eva_muon@16", "muon", eva_muon, SKETCHED[16]),
        Optimizer("eva", "sgd", eva_optax.eva),
        Optimizer("eva_f", "sgd", eva_optax.eva_f),
        Optimizer("eva_s", "sgd", eva_optax.eva_s, untapped),
        Optimizer("eva_f@16+sgd", "sgd", lambda rate: before_sgd(rate, eva_optax.scale_by_eva_f()), SKETCHED[16]),
        Optimizer("nysact", "sgd", nysact, SKETCHED[16]),
        *_matrices(),
    )
}
