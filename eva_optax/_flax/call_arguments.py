"""The arguments of a layer's call: which of them is the input, and functions that are told of all."""

import inspect
from collections.abc import Callable
from typing import Any

# What is told of a layer: a word, or a function of the layer, or of the layer and the arguments of its call.
Telling = str | Callable[..., str]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def split_input(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A layer's input, which is the first argument of its `__call__`, and the other arguments."""
    if args:
        return args[0], args[1:], kwargs
    name = list(inspect.signature(function).parameters)[1]  # after self
    return kwargs[name], (), {key: value for key, value in kwargs.items() if key != name}


def bind_call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> inspect.BoundArguments:
    """The arguments of a call, the layer's first, as `function` lists them: by position where it can be, and all."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound


def find_argument(bound: inspect.BoundArguments, which: int | str) -> Any:
    """An argument after the layer, by its position or by its name."""
    return bound.args[1 + which] if isinstance(which, int) else {**bound.arguments, **bound.kwargs}[which]


def check_argument(layer: type, which: int | str) -> None:
    """Raises ValueError if a call of the layer has no such argument."""
    function: Any = layer.__call__
    parameters = list(inspect.signature(function).parameters.values())[1:]
    kinds = [p.kind for p in parameters]
    if isinstance(which, str):
        known = inspect.Parameter.VAR_KEYWORD in kinds or which in [p.name for p in parameters]
    else:
        count = sum(kind in _POSITIONAL for kind in kinds)
        known = which >= 0 and (which < count or inspect.Parameter.VAR_POSITIONAL in kinds)
    if not known:
        raise ValueError(
            f"eva_optax.register: input={which!r}, but {layer.__name__}.__call__ has the arguments "
            f"{[p.name for p in parameters]}. Give the position or the name of one of them."
        )


def depends_on_call(telling: Telling) -> bool:
    """Whether this is a function that wants more than the layer."""
    if isinstance(telling, str):
        return False
    try:
        further = list(inspect.signature(telling).parameters.values())[1:]
    except ValueError:  # has no signature, such as `operator.attrgetter`
        return False
    return any(p.kind is p.VAR_POSITIONAL or (p.kind in _POSITIONAL and p.default is p.empty) for p in further)


def tell(telling: Telling, *args: Any, **kwargs: Any) -> str:
    """What a call with these arguments, the layer's first, is told."""
    if isinstance(telling, str):
        return telling
    return telling(*args, **kwargs) if depends_on_call(telling) else telling(args[0])
