"""What a run is: frozen dataclasses that are printed, stored beside the results, and overridden by `--name value`."""

import ast
import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

from examples.train.errors import UserError


def setting(default: Any, about: str) -> Any:
    return field(default=default, metadata={"help": about})


@dataclass(frozen=True)
class Input:
    """Where examples come from, and how they reach the devices."""

    data: str = setting("digits", 'folder or file of the data; "digits" (or, for CURVES, "synthetic") needs none')
    batch: int = setting(128, "examples of a step, of all devices together")
    augment: bool = setting(True, "crop and flip images, shift windows of text")
    image_size: int = setting(0, "pixels of a side; 0: those of the task")
    length: int = setting(256, "bytes of a window of text")
    threads: int = setting(4, "threads that prepare batches")
    workers: int = setting(0, "processes that prepare batches, in place of threads")
    prefetch: int = setting(4, "batches prepared ahead")


@dataclass(frozen=True)
class Model:
    """How the model computes."""

    dtype: str = setting("float32", "of activations: float32 or bfloat16; parameters are float32")
    model: str = setting("", "fields of the model, as in depth=8,width=32")


@dataclass(frozen=True)
class Training:
    """Optimizer, schedule and what else shapes the updates."""

    optimizer: str = setting("eva_adamw", "one of the optimizers below")
    options: str = setting("", "arguments of the optimizer, as in damping=0.03,every=10")
    rank: int = setting(16, "vectors of a sketch, for optimizers that use sketches; -1: the mean input alone")
    learning_rate: float = setting(0.0, "peak rate; 0: the optimizer's default here")
    weight_decay: float = setting(-1.0, "of kernels; -1: the optimizer's default here")
    schedule: str = setting("cosine", "constant, cosine, linear, or step: a tenth at each milestone")
    milestones: str = setting("0.35,0.75,0.9", "shares of the steps, for the schedule step")
    warmup: float = setting(0.05, "share of the steps in which the rate rises to its peak")
    clip: float = setting(0.0, "largest norm of the gradient; 0: none")
    accumulate: int = setting(1, "parts of a batch whose gradients are averaged one after another")
    label_smoothing: float = setting(0.0, "share of a label that is spread over all classes")
    ema: float = setting(0.0, "decay of the average of parameters that is evaluated; 0: none")


@dataclass(frozen=True)
class Reports:
    """What is written, and how often."""

    output: str = setting("", "folder of checkpoints, metrics and TensorBoard files, for this run alone")
    log_every: int = setting(50, "steps between lines")
    evaluate_every: int = setting(0, "steps between evaluations; 0: once an epoch")
    save_every: int = setting(0, "steps between checkpoints; 0: at each evaluation")
    profile: bool = setting(False, "record steps 10 to 14 for TensorBoard's profiler")


@dataclass(frozen=True)
class Machine:
    """Devices and processes."""

    fsdp: int = setting(1, "devices that share the parameters; the others hold copies")
    coordinator: str = setting("", "address and port of process 0, if the cluster is not recognised")
    processes: int = setting(1, "number of processes, with --coordinator")
    process: int = setting(0, "number of this process, with --coordinator")


@dataclass(frozen=True)
class Config:
    """One run."""

    task: str = setting("cifar10-resnet20", "one of the tasks below")
    epochs: float = setting(100.0, "passes over the training data")
    steps: int = setting(0, "steps, in place of epochs")
    seed: int = setting(0, "of the initial parameters, the order of the data and its augmentation")
    target: float = setting(0.0, "stop when the validation metric is as good as this; 0: at the last step")
    input: Input = field(default_factory=Input)
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    reports: Reports = field(default_factory=Reports)
    machine: Machine = field(default_factory=Machine)

    def __str__(self) -> str:
        return "\n".join(f"{path} = {json.dumps(value)}" for path, value, _ in settings(self))


def settings(config: Config) -> Iterator[tuple[str, Any, str]]:
    """Path, value and meaning of each setting; the path is `name` or `group.name`."""
    for outer in fields(config):
        value = getattr(config, outer.name)
        if is_dataclass(value):
            for inner in fields(value):
                yield f"{outer.name}.{inner.name}", getattr(value, inner.name), inner.metadata["help"]
        else:
            yield outer.name, value, outer.metadata["help"]


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """The configuration with settings changed: by path or, as no two groups share a name, by name alone."""
    paths = {path: value for path, value, _ in settings(config)}
    for name, given in changes.items():
        path = full_path(name)
        group, _, last = path.rpartition(".")
        change = {last: convert(path, given, type(paths[path]))}
        config = replace(config, **({group: replace(getattr(config, group), **change)} if group else change))
    return config


def full_path(name: str) -> str:
    """The path of a setting that is named by its path or its name."""
    paths = [path for path, _, _ in settings(Config())]
    wanted = name.replace("-", "_")
    found = [path for path in paths if wanted in (path, path.rpartition(".")[2])]
    if not found:
        raise unknown("setting", name, [path.rpartition(".")[2].replace("_", "-") for path in paths])
    return found[0]


def convert(path: str, given: Any, kind: type) -> Any:
    if kind is bool and isinstance(given, str):
        words = {"true": True, "false": False}
        if given.lower() not in words:
            raise UserError(f"{path}: expected true or false, got {given!r}.")
        return words[given.lower()]
    try:
        return kind(given)
    except ValueError:
        raise UserError(f"{path}: expected a value of type {kind.__name__}, got {given!r}.") from None


def keywords(path: str, text: str) -> dict[str, Any]:
    """`a=1,b=(2,3),c=x` as a dictionary: Python literals, and words without quotes."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(call, ast.Call)
        found = {str(part.arg): part.value for part in call.keywords}
        values = {name: v.id if isinstance(v, ast.Name) else ast.literal_eval(v) for name, v in found.items()}
        if call.args or "None" in values:
            raise ValueError
    except (SyntaxError, ValueError):
        raise UserError(f"{path}: expected name=value, separated by commas, got {text!r}.") from None
    return values


def unknown(what: str, name: str, known: list[str]) -> UserError:
    close = difflib.get_close_matches(name, known, 1)
    return UserError(f"unknown {what} {name!r}; {f'did you mean {close[0]}?' if close else 'see --help.'}")


# A run goes on with other values of these: they change no number of it.
FREE = {"output", "target", "log_every", "evaluate_every", "save_every", "profile"}
FREE |= {"coordinator", "processes", "process", "fsdp", "threads", "prefetch"}


def differences(stored: Mapping[str, Any], config: Config) -> list[str]:
    """The settings in which a stored run is another one."""
    return [
        f"{path} is {stored.get(path)!r} there and {value!r} here"
        for path, value, _ in settings(config)
        if path.rpartition(".")[2] not in FREE and stored.get(path) != value
    ]


def as_dictionary(config: Config) -> dict[str, Any]:
    return {path: value for path, value, _ in settings(config)}
