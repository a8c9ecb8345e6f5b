"""Layer classes that users registered, for layers of somebody else's that one cannot edit."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eva_optax._flax.plans import Plan, equation_plan

Equation = str | Callable[[Any], str]


@dataclass(frozen=True)
class Registration:
    """A layer class that `register` made known; as a context manager it holds until the end of the block.

    Attributes:
      layer: the class.
      kernel: the name of the kernel.
      bias: the name of the bias, or None.
      equation: what the layer computes: an einsum equation, or a function from the layer to it.
    """

    layer: type
    kernel: str
    bias: str | None
    equation: Equation

    def remove(self) -> None:
        """Forgets the class. Models that are tapped already stay as they are."""
        if _REGISTRY.get(self.layer) == self:
            del _REGISTRY[self.layer]

    def __enter__(self) -> "Registration":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def plan(self, layer: Any, kernel_shape: tuple[int, ...], x_shape: tuple[int, ...]) -> Plan:
        """How a call of the layer with an input of shape `x_shape` is tapped."""
        return equation_plan(self.equation_of(layer), kernel_shape, x_shape, self.kernel, self.bias)

    def own_shape(self, layer: Any, full: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of a kernel without stacked axes: the last ones, as many as the equation gives it."""
        kernel = self.equation_of(layer).split("->")[0].split(",")[1].replace(" ", "")
        return full if "..." in kernel else full[len(full) - len(kernel) :]

    def equation_of(self, layer: Any) -> str:
        """The equation of one layer."""
        equation = self.equation if isinstance(self.equation, str) else self.equation(layer)
        check_equation("eva_optax.register", equation)
        return equation


Registration.__module__ = "eva_optax"

_REGISTRY: dict[type, Registration] = {}


def register(layer: type, *, kernel: str, equation: Equation, bias: str | None = None) -> Registration:
    """Makes a layer class known that contracts its input with a kernel, so that `tap` taps its instances.

    For classes that one cannot edit, Linen or NNX; subclasses that call `super().__call__` are tapped, too. Register
    before the model is tapped. Registering a class again replaces what was registered for it.

    Args:
      layer: a subclass of `flax.linen.Module` or `flax.nnx.Module`, whose `__call__` takes the input first and returns
        the output.
      kernel: the name of its kernel among its parameters.
      equation: the einsum equation "input,kernel->output" that it computes, with an ellipsis for any number of axes
        ("...i,oi->...o" for a kernel that is stored transposed); or a function from the layer to the equation.
      bias: the name of its bias, which has the kernel's output axes in their order; None without one, and ignored for
        a layer that has none.

    Returns:
      A `Registration`, whose `remove()` undoes it; `with eva_optax.register(...):` does so at the end of the block.

    Raises:
      TypeError: if `layer` is no class.
      ValueError: if the equation is not of this form.

    Source: as `tap`.

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp
      >>> class Transposed(nn.Module):
      ...   @nn.compact
      ...   def __call__(self, x):
      ...     return x @ self.param("weight", nn.initializers.ones, (2, x.shape[-1])).T
      >>> with eva_optax.register(Transposed, kernel="weight", equation="...i,oi->...o"):
      ...   params = eva_optax.tap(Transposed()).init(jax.random.key(0), jnp.ones((4, 3)))["params"]
      >>> params["kronecker"]["weight"]["a"].shape
      (1, 3)
    """
    if not isinstance(layer, type):
        raise TypeError(f"eva_optax.register: layer must be a class, got {layer!r}. Register its class.")
    if isinstance(equation, str):
        check_equation("eva_optax.register", equation)
    _REGISTRY[layer] = Registration(layer, kernel, bias, equation)
    return _REGISTRY[layer]


def registered_class(layer: type) -> Registration | None:
    """The registration of a class itself."""
    return _REGISTRY.get(layer)


def registered_call(layer: object, function: Callable[..., Any]) -> Registration | None:
    """The registration whose class defines the `__call__` that is `function`, of a layer of that class."""
    for registration in _REGISTRY.values():
        if isinstance(layer, registration.layer) and inspect.unwrap(registration.layer.__call__) is function:
            return registration
    return None


def split_input(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A layer's input, which is the first argument of its `__call__`, and the other arguments."""
    if args:
        return args[0], args[1:], kwargs
    name = list(inspect.signature(function).parameters)[1]  # after self
    return kwargs[name], (), {key: value for key, value in kwargs.items() if key != name}


def check_equation(caller: str, equation: str) -> None:
    """Raises ValueError if `equation` does not have the form "input,kernel->output"."""
    if equation.count("->") != 1 or equation.split("->")[0].count(",") != 1:
        raise ValueError(
            f'{caller}: equation must have the form "input,kernel->output", such as "...i,io->...o", got {equation!r}.'
        )
