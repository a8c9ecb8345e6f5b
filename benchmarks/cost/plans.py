"""What is measured: which optimizers, in which layouts of which cases, on which devices."""

import argparse
import itertools
from collections.abc import Iterable

from benchmarks.cost.cases import CASES
from benchmarks.cost.steps import OPTIMIZERS, UPDATES

GROUP = ("device", "case", "layout", "prefetch")  # what tells apart the steps that are compared with each other
KEYS = (*GROUP, "optimizer")
Group = tuple[str, str, str, str]
Plans = dict[Group, tuple[str, ...]]  # the optimizers of each group; the first is the measure

ALL = ("sgd", "adamw", "muon", "eva+sgd", "eva_f+sgd", "eva", "eva_adamw")
FEW = ("sgd", "adamw", "eva+sgd")
SINGLE, DATA, PARALLEL = ("single",), ("data",), ("data", "fsdp", "tensor")
MODELS = ("mlp", "bottlenecks", "gpt-12", "gpt-12-scan", "vit", "resnet50")


def plan(
    device: str, cases: Iterable[str], layouts: Iterable[str], optimizers: tuple[str, ...], prefetch: str = "yes"
) -> Plans:
    return {(device, case, layout, prefetch): optimizers for case in cases for layout in layouts}


PLANS: dict[str, Plans] = {
    "tpu": {
        **plan("v5e:2x2", UPDATES, SINGLE, ALL, "no"),
        **plan("v5e:2x2", ["mlp"], ("single", "data"), ALL, "no"),
        **plan("v5e:2x2", ["mlp"], ("single", *PARALLEL), FEW, "yes"),
        **plan("v5e:2x2", ["mlp"], ("fsdp", "tensor"), FEW, "no"),
        **plan("v5e:2x2", ["bottlenecks"], DATA, ALL, "no"),
        **plan("v5e:2x2", ["gpt-1"], ("single", *PARALLEL), FEW, "no"),
        **plan("v5e:2x2", ["gpt-12-scan", "resnet50", "vit"], DATA, FEW, "no"),
        **plan("v5e:16x16", ["mlp"], PARALLEL, FEW, "no"),
        **plan("v5e:16x16", ["gpt-1"], DATA, FEW, "no"),
        **plan("v5p:2x2x1", ["mlp"], PARALLEL, FEW, "no"),
        **plan("v6e:2x2", ["mlp"], PARALLEL, FEW, "no"),
        **plan("v6e:2x2", ["bottlenecks"], DATA, FEW, "no"),
        **plan("v5e:2x2", ["gpt-12"], ("single", "data"), FEW, "no"),
    },
    "h100": {
        **plan("1 GPU", (*UPDATES, "mlp", "bottlenecks"), SINGLE, ALL),
        **plan("1 GPU", ("gpt-12", "gpt-12-scan", "vit", "resnet50"), SINGLE, FEW),
        **plan("8 GPUs", ["mlp"], PARALLEL, FEW),
        **plan("8 GPUs", ["bottlenecks"], DATA, FEW),
    },
    "cpu": {
        **plan("1 device", MODELS, SINGLE, ALL),
        **plan("8 devices", ("mlp", "bottlenecks", "gpt-12", "gpt-12-scan"), DATA, ALL),
        **plan("8 devices", ["mlp"], ("fsdp", "tensor"), FEW),
    },
    "gpu": plan("1 device", MODELS, SINGLE, ALL),
}


def chosen_plans(options: argparse.Namespace) -> Plans:
    """The plans of a target, narrowed by the options; what an option names beyond them is added.

    Raises:
      SystemExit: for a case or an optimizer that does not exist.
    """
    refuse_unknown("case", options.cases, (*CASES, *UPDATES))
    refuse_unknown("optimizer", options.optimizers, OPTIMIZERS)
    planned, chosen = PLANS[options.target], {}
    usual = "no" if options.target == "tpu" else "yes"
    for device in options.devices or dict.fromkeys(group[0] for group in planned):
        here = {group: optimizers for group, optimizers in planned.items() if group[0] == device}
        for case in options.cases or dict.fromkeys(group[1] for group in here):
            known = {group: optimizers for group, optimizers in here.items() if group[1] == case}
            known = known or plan(device, [case], SINGLE if case in UPDATES else DATA, FEW, usual)
            layouts = dict.fromkeys(options.layouts or [group[2] for group in known])
            prefetch = dict.fromkeys(options.prefetch or [group[3] for group in known])
            for layout, fetch in itertools.product(layouts, prefetch):
                if case not in UPDATES or layout == "single":
                    group = device, case, layout, fetch
                    wanted = options.optimizers or known.get(group, FEW)
                    chosen[group] = tuple(dict.fromkeys(("sgd", *wanted)))
    return chosen


def refuse_unknown(what: str, given: Iterable[str] | None, known: Iterable[str]) -> None:
    unknown = [name for name in given or () if name not in known]
    if unknown:
        raise SystemExit(f"benchmarks.cost: no {what} {unknown[0]!r}; there are {', '.join(known)}")
