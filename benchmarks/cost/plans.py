"""What is measured: which optimizers, in which layouts of which cases, on which devices."""

import itertools
from collections.abc import Iterable, Sequence

from benchmarks.common.results import Key

KEYS = ("device", "case", "layout", "prefetch", "optimizer")  # what but the last tells apart who is compared
ALL = ("sgd", "adamw", "muon", "eva+sgd", "eva_f+sgd", "eva", "eva_adamw")
FEW = ("sgd", "adamw", "eva+sgd")
RENEWED = ("eva_adamw", "eva_adamw@16", "foof+sgd/10", "kfac+sgd/10", "foof_adamw", "shampoo/10")
SINGLE, DATA, PARALLEL = ("single",), ("data",), ("data", "fsdp", "tensor")
UPDATES, SCANNED = ("update", "update-stacked"), ("gpt-12", "gpt-12-scan")
MODELS = ("mlp", "bottlenecks", *SCANNED, "vit", "resnet50")


def plan(
    device: str, cases: Iterable[str], layouts: Iterable[str], optimizers: Iterable[str], prefetch: str = "yes"
) -> list[Key]:
    return list(itertools.product((device,), cases, layouts, (prefetch,), optimizers))


PLANS: dict[str, list[Key]] = {
    "tpu": [
        *plan("v5e:2x2", UPDATES, SINGLE, ALL, "no"),
        *plan("v5e:2x2", ("mlp",), ("single", "data"), ALL, "no"),
        *plan("v5e:2x2", ("mlp",), ("single", *PARALLEL), FEW, "yes"),
        *plan("v5e:2x2", ("mlp",), ("fsdp", "tensor"), FEW, "no"),
        *plan("v5e:2x2", ("bottlenecks",), DATA, ALL, "no"),
        *plan("v5e:2x2", ("gpt-1",), ("single", *PARALLEL), FEW, "no"),
        *plan("v5e:2x2", ("gpt-12",), ("single", "data"), FEW, "no"),
        *plan("v5e:2x2", ("gpt-12-scan", "resnet50", "vit"), DATA, FEW, "no"),
        # The compiler takes longer than ten minutes for the eigenvectors of foof_adamw.
        *plan("v5e:2x2", ("update",), SINGLE, RENEWED[1:2], "no"),
        *plan("v5e:2x2", ("mlp",), DATA, RENEWED[1:2], "no"),
        *plan("v5e:2x2", ("gpt-1",), ("single", "data"), RENEWED[:4], "no"),
        *plan("v5e:2x2", ("gpt-12", "resnet50"), DATA, RENEWED[:2], "no"),
        *plan("v5e:16x16", ("mlp",), PARALLEL, FEW, "no"),
        *plan("v5e:16x16", ("gpt-1",), DATA, FEW, "no"),
        *plan("v5p:2x2x1", ("mlp",), PARALLEL, FEW, "no"),
        *plan("v6e:2x2", ("mlp",), PARALLEL, FEW, "no"),
        *plan("v6e:2x2", ("bottlenecks",), DATA, FEW, "no"),
    ],
    "h100": [
        *plan("1 GPU", (*UPDATES, "mlp", "bottlenecks"), SINGLE, ALL),
        *plan("1 GPU", (*SCANNED, "vit", "resnet50"), SINGLE, FEW),
        *plan("1 GPU", ("update",), SINGLE, RENEWED[1:2]),
        *plan("1 GPU", ("mlp", "gpt-12", "resnet50"), SINGLE, RENEWED[:4]),
        *plan("8 GPUs", ("mlp",), PARALLEL, FEW),
        *plan("8 GPUs", ("bottlenecks",), DATA, FEW),
    ],
    "cpu": [
        *plan("1 device", MODELS, SINGLE, ALL),
        *plan("1 device", ("mlp", "vit", "gpt-12"), SINGLE, RENEWED),
        *plan("8 devices", ("mlp", "bottlenecks", *SCANNED), DATA, ALL),
        *plan("8 devices", ("mlp",), ("fsdp", "tensor"), FEW),
    ],
    "gpu": plan("1 device", MODELS, SINGLE, (*ALL, *RENEWED[1:])),
}
ADDED_TO = {"eva+sgd": "sgd", "eva_adamw": "adamw"}  # with Eva, and the same without
OVERHEAD = [
    (case, name) for case in ("mlp-20", "resnet50", "vit", *SCANNED) for name in ADDED_TO
]  # enough layers to outweigh what a step costs once


def chosen(planned: Sequence[Key], words: Iterable[str]) -> list[Key]:
    """The keys that have one of the words in each place where there is a choice between them.

    Raises:
      SystemExit: for a word that stands in no key.
    """
    places = [set(values) for values in zip(*planned, strict=True)]
    for word in words:
        if not any(word in values for values in places):
            known = ", ".join(sorted(set().union(*places)))
            raise SystemExit(f"benchmarks.cost: --only {word!r} names nothing that is planned; there are {known}")
    wanted = [values.intersection(words) or values for values in places]
    return [key for key in planned if all(map(set.__contains__, wanted, key))]
