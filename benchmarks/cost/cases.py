"""The cases by name, in three sizes: full for accelerators and compilers, small for a CPU, tiny for tests."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from benchmarks.cost.models import Case, ResNet, ViT, bottlenecks, gpt, images, mlp

# What makes a case, and for each size its arguments, the first of which is the batch of one chip.
CASES: dict[str, tuple[Callable[..., Case], dict[str, tuple[Any, ...]]]] = {
    "mlp": (mlp, {"full": (1024, 2048), "small": (1024, 2048), "tiny": (8, 64)}),
    # As many layers as it takes for what each of them costs to outweigh what a step costs once.
    "mlp-20": (mlp, {"full": (16, 64, 21, nn.tanh), "small": (16, 64, 21, nn.tanh), "tiny": (16, 64, 6, nn.tanh)}),
    # One block: the vocabulary weighs most.
    "gpt-1": (
        gpt,
        {"full": (1, 1024, 768, 1, 12, 50304), "small": (1, 256, 256, 1, 4, 8192), "tiny": (1, 32, 32, 1, 2, 128)},
    ),
    "gpt-12": (
        gpt,
        {"full": (1, 1024, 768, 12, 12, 50304), "small": (4, 128, 256, 4, 4, 4096), "tiny": (1, 32, 32, 2, 2, 128)},
    ),
    "gpt-12-scan": (
        gpt,
        {
            "full": (1, 1024, 768, 12, 12, 50304, True),
            "small": (4, 128, 256, 4, 4, 4096, True),
            "tiny": (1, 32, 32, 2, 2, 128, True),
        },
    ),
    "bottlenecks": (bottlenecks, {"full": (16, 56, 3, 128), "small": (16, 28, 3, 64), "tiny": (1, 8, 1, 8)}),
    "resnet50": (
        images,
        {"full": (16, 224, ResNet(1000)), "small": (8, 64, ResNet(100)), "tiny": (1, 32, ResNet(16, (1, 1), 8))},
    ),
    "vit": (
        images,
        {
            "full": (8, 224, ViT(1000, 768, 12, 12, 16)),
            "small": (16, 96, ViT(100, 192, 3, 3, 16)),
            "tiny": (1, 32, ViT(16, 32, 1, 2, 8)),
        },
    ),
}


def make_case(name: str, size: str, chips: int = 1) -> Case:
    """A case for a number of chips that share the batch: it is so many times that of one chip."""
    make, sizes = CASES[name]
    batch, *rest = sizes[size]
    return make(batch * chips, *rest)
