"""The tasks: a model, its data and the settings with which it is usually trained."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from examples.train.config import Config, keywords, override, unknown
from examples.train.data import cifar, curves, digits, imagenet, mnist, text
from examples.train.data.source import Source
from examples.train.errors import UserError
from examples.train.models.autoencoder import Autoencoder
from examples.train.models.resnet import CifarResNet, ImageNetResNet
from examples.train.models.transformer import Decoder, ViT
from examples.train.models.vgg import VGG
from examples.train.models.wide_resnet import WideResNet
from examples.train.objectives import CLASSIFICATION, LANGUAGE, RECONSTRUCTION, Objective, Scale

Sources = tuple[Source, Source]


@dataclass(frozen=True)
class Task:
    """What --task chooses.

    Attributes:
      about: one line for --help.
      model: from keyword arguments, dtype among them, to the Linen module.
      parameters: their number.
      load: from a configuration to the data of training and validation on disk.
      side: pixels of an image; 0 for text.
      scale: means and deviations of the channels.
      settings: defaults on the data set itself.
      digits: what changes on scikit-learn's digits.
    """

    about: str
    model: Callable[..., nn.Module]
    parameters: int
    objective: Objective
    load: Callable[[Config], Sources]
    side: int = 0
    scale: Scale = ((0.5,), (0.5,))
    settings: Mapping[str, Any] = field(default_factory=dict)
    digits: Mapping[str, Any] = field(default_factory=dict)

    def sources(self, config: Config) -> Sources:
        if config.input.data != "digits":
            return self.load(config)
        if self.objective is LANGUAGE:
            return digits.load_text(config.input.length)
        return digits.load(self.image_size(config), len(self.scale[0]))

    def image_size(self, config: Config) -> int:
        return config.input.image_size or self.side

    def build(self, config: Config) -> nn.Module:
        """The model, with the fields that the configuration changes."""
        dtypes = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
        if config.model.dtype not in dtypes:
            raise unknown("dtype", config.model.dtype, list(dtypes))
        model = self.model(dtype=dtypes[config.model.dtype])
        if isinstance(model, Decoder):
            model = model.clone(length=config.input.length)
        known = [member.name for member in fields(model) if member.name not in ("parent", "name", "dtype", "length")]
        changes = keywords("--model", config.model.model)
        for name in changes:
            if name not in known:
                raise unknown(f"field of {type(model).__name__} in --model", name, known)
        return model.clone(**changes)


CIFAR_SCALE = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
IMAGENET_SCALE = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SMALL = {"batch": 64, "epochs": 6}


def cifar_task(classes: int, name: str, model: Callable[..., nn.Module], parameters: int) -> Task:
    return Task(
        f"{name} on CIFAR-{classes}, binary version",
        partial(model, classes=classes),
        parameters,
        CLASSIFICATION,
        lambda config: cifar.load(config.input.data, classes),
        32,
        CIFAR_SCALE,
        {"batch": 128, "epochs": 100},
        SMALL,
    )


def imagenet_task(name: str, model: Callable[..., nn.Module], parameters: int, **settings: Any) -> Task:
    return Task(
        f"{name} on ImageNet, folders of JPEG or array records",
        partial(model, classes=1000),
        parameters,
        CLASSIFICATION,
        lambda config: imagenet.load(config.input.data, config.input.image_size or 224, 1000),
        224,
        IMAGENET_SCALE,
        {"batch": 1024, "label_smoothing": 0.1, "threads": 16, "dtype": "bfloat16", **settings},
        {"batch": 64, "epochs": 15, "image_size": 64, "dtype": "float32", "label_smoothing": 0.0},
    )


def autoencoder_task(name: str, load: Callable[[Config], Sources], scale: Scale, **settings: Any) -> Task:
    return Task(
        f"deep autoencoder on {name}",
        Autoencoder,
        2_837_314,
        RECONSTRUCTION,
        load,
        28,
        scale,
        {"batch": 1000, "epochs": 100, "schedule": "linear", "augment": False, **settings},
        {"batch": 128, "epochs": 60},
    )


def idx(config: Config) -> Sources:
    return mnist.load(config.input.data)


def drawn(config: Config) -> Sources:
    if config.input.data != "synthetic":
        raise UserError(f"CURVES is drawn by this program: --data synthetic, not {config.input.data!r}.")
    return curves.load(config.seed)


RESNET20, RESNET110 = partial(CifarResNet, depth=20), partial(CifarResNet, depth=110)
TASKS = {
    "cifar10-resnet20": cifar_task(10, "ResNet-20", RESNET20, 269_722),
    "cifar10-resnet110": cifar_task(10, "ResNet-110", RESNET110, 1_727_962),
    "cifar10-vgg19": cifar_task(10, "VGG-19 with BatchNorm", VGG, 20_040_522),
    "cifar10-wrn28-10": cifar_task(10, "WRN-28-10", WideResNet, 36_479_194),
    "cifar100-resnet20": cifar_task(100, "ResNet-20", RESNET20, 275_572),
    "cifar100-resnet110": cifar_task(100, "ResNet-110", RESNET110, 1_733_812),
    "cifar100-vgg19": cifar_task(100, "VGG-19 with BatchNorm", VGG, 20_086_692),
    "cifar100-wrn28-10": cifar_task(100, "WRN-28-10", WideResNet, 36_536_884),
    "imagenet-resnet50": imagenet_task("ResNet-50", ImageNetResNet, 25_557_032, epochs=90),
    "imagenet-vit-s16": imagenet_task("ViT-S/16", ViT, 22_050_664, epochs=90, clip=1.0),
    "mnist-autoencoder": autoencoder_task("MNIST, idx files", idx, ((0.5,), (0.5,))),
    "fashion-autoencoder": autoencoder_task("FashionMNIST, idx files", idx, ((0.5,), (0.5,))),
    "curves-autoencoder": autoencoder_task("CURVES, which it draws", drawn, ((0.0,), (1.0,)), data="synthetic"),
    "text-decoder": Task(
        "decoder of bytes on UTF-8 text, a file or a folder",
        Decoder,
        10_942_720,
        LANGUAGE,
        lambda config: text.load(config.input.data, config.input.length),
        settings={"batch": 64, "epochs": 1, "clip": 1.0},
        digits={"batch": 32, "epochs": 4, "length": 148},
    ),
}


def find(name: str) -> Task:
    if name not in TASKS:
        raise unknown("task", name, list(TASKS))
    return TASKS[name]


def configure(changes: Mapping[str, Any]) -> Config:
    """The configuration of a run: defaults of all, of the task, of the task on digits, and what is asked for."""
    task = find(changes.get("task", Config().task))
    config = override(Config(), task.settings)
    if {**task.settings, **changes}.get("data", config.input.data) == "digits":
        config = override(config, task.digits)
    config = override(config, changes)
    folder = config.reports.output or f"results/train/{config.task}-{config.training.optimizer}"
    return override(config, {"output": folder})
