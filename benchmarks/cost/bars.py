"""What Eva may cost at most: the bars that the page of the documentation shows and that the tests hold."""

import math
from typing import NamedTuple

from benchmarks.common.results import Key, Row


class Bar(NamedTuple):
    """The most that a figure of an optimizer may be, as a ratio to SGD's, less that of `beyond` where one is named.

    `possible` is False where docs/cost.md shows that no implementation can reach it.
    """

    what: str
    figure: str
    most: float
    case: str
    layout: str = "single"
    prefetch: str = "no"
    beyond: str = ""
    possible: bool = True
    optimizer: str = "eva+sgd"
    device: str = "v5e:2x2"
    target: str = "tpu"

    @property
    def group(self) -> Key:
        return self.device, self.case, self.layout, self.prefetch

    def value(self, rows: dict[Key, Row]) -> float | None:
        """What was measured, None if it was not; rows are those of the target's results file."""
        names = "sgd", self.optimizer, *filter(None, [self.beyond])
        found = [float(rows.get((*self.group, name), {}).get(self.figure) or 0) or math.nan for name in names]
        value = (found[1] - sum(found[2:])) / found[0]
        return None if math.isnan(value) else value


HBM, ACCESSED, PAYLOAD = "hbm_bytes", "bytes_accessed", "collective_bytes"
GPT = "GPT block, d = 768, 1,024 tokens a chip"
TPU_BARS = (
    Bar("update alone, 72 kernels: HBM", HBM, 1.21, "update"),
    Bar("update alone, 12 stacked layers: HBM", HBM, 1.21, "update-stacked"),
    # The gradient goes to memory and back, and nothing else.
    Bar("MLP, one chip: HBM", HBM, 1.25, "mlp"),
    Bar(f"{GPT}, data parallel: HBM", HBM, 1.01, "gpt-1", "data"),
    Bar("the same: bytes accessed", ACCESSED, 1.02, "gpt-1", "data"),
    Bar("the same on one chip: HBM", HBM, 1.01, "gpt-1", possible=False),
    Bar("the same on one chip: bytes accessed", ACCESSED, 1.02, "gpt-1"),
    Bar("ResNet bottlenecks, data parallel: HBM", HBM, 1.05, "bottlenecks", "data"),
    Bar("ResNet-50, data parallel: HBM", HBM, 1.05, "resnet50", "data"),
    Bar("MLP, data parallel: payload", PAYLOAD, 1.005, "mlp", "data"),
    Bar("MLP, FSDP: payload", PAYLOAD, 1.005, "mlp", "fsdp"),
    Bar("MLP, tensor parallel: payload", PAYLOAD, 1.015, "mlp", "tensor"),
    Bar("GPT block, data parallel: payload", PAYLOAD, 1.005, "gpt-1", "data"),
    Bar("GPT block, FSDP: payload", PAYLOAD, 1.005, "gpt-1", "fsdp"),
    Bar("GPT block, tensor parallel: payload", PAYLOAD, 1.015, "gpt-1", "tensor"),
    Bar("ResNet bottlenecks, data parallel: payload", PAYLOAD, 1.05, "bottlenecks", "data"),
    Bar("ResNet-50, data parallel: payload", PAYLOAD, 1.05, "resnet50", "data"),
    # 1.08 times AdamW's.
    Bar("GPT block, data parallel, rank 16: HBM", HBM, 1.225, "gpt-1", "data", optimizer="eva_adamw@16"),
    Bar("the same: payload", PAYLOAD, 1.02, "gpt-1", "data", optimizer="eva_adamw@16"),
    Bar("GPT-12, data parallel, rank 16: HBM", HBM, 1.164, "gpt-12", "data", optimizer="eva_adamw@16", possible=False),
    # AdamW's ratio less the one of Eva is to be 0.15 at least.
    Bar("MLP, data parallel, prefetching: bytes less AdamW's", ACCESSED, -0.15, "mlp", "data", "yes", "adamw"),
    Bar("MLP, data parallel: bytes less AdamW's", ACCESSED, -0.15, "mlp", "data", "no", "adamw", False),
    Bar("MLP, one chip, prefetching: bytes less AdamW's", ACCESSED, -0.15, "mlp", "single", "yes", "adamw", False),
    Bar("MLP, one chip: bytes less AdamW's", ACCESSED, -0.15, "mlp", "single", "no", "adamw", False),
)
H100 = Bar("", HBM, 1.21, "update", "single", "yes", device="1 GPU", target="h100")
CPU = Bar("", "flops", 1.02, "mlp", "data", "yes", device="8 devices", target="cpu")
BARS = (
    *TPU_BARS,
    *(
        H100._replace(what=f"H100, {case}, {name}: HBM", case=case, optimizer=name)
        for case in ("update", "update-stacked")
        for name in ("eva+sgd", "eva")
    ),
    *(
        CPU._replace(what=f"CPU, {case} on 8 devices: {what}", case=case, figure=figure, most=most or payload)
        for case, payload in (("mlp", 1.01), ("gpt-12-scan", 1.01), ("bottlenecks", 1.02))
        for what, figure, most in (
            ("flops", "flops", 1.02),
            ("arguments", "argument_bytes", 1.01),
            ("payload", PAYLOAD, None),
            ("number of collectives", "collectives", 1.0),
        )
    ),
    CPU._replace(what="CPU, mlp on 8 devices, tensor parallel: payload", layout="tensor", figure=PAYLOAD, most=1.015),
)


class OverheadBar(NamedTuple):
    """The most that an optimizer may add to a step, by a figure of `benchmarks.cost.overhead`."""

    what: str
    figure: str
    most: float
    optimizer: str
    cases: tuple[str, ...] = ("mlp-20",)
    target: str = "cpu"
    held: float | None = None  # what the tests hold where docs/cost.md says why the bar is missed


DEEP = ("mlp-20", "resnet50", "vit", "gpt-12", "gpt-12-scan")
OVERHEAD_BARS = (
    OverheadBar("equations of the gradient, a layer", "gradient", 16, "eva+sgd"),
    OverheadBar("equations of the update, a layer", "update", 80, "eva+sgd"),
    OverheadBar("equations of the update, a layer, more than AdamW's", "update", 110, "eva_adamw"),
    OverheadBar("arrays in and out, a layer", "arrays", 8, "eva+sgd"),
    OverheadBar("arrays in and out, a layer", "arrays", 5, "eva_adamw"),
    OverheadBar("entry instructions, a layer", "entry", 22, "eva+sgd", held=26),
    OverheadBar("kernels, a layer", "kernels", 8, "eva+sgd", DEEP, "h100"),
    *(
        OverheadBar(what, figure, most, optimizer, DEEP)
        for what, figure, most in (("time to trace, ratio", "trace", 2.0), ("time to compile, ratio", "compile", 1.4))
        for optimizer in ("eva+sgd", "eva_adamw")
    ),
)
