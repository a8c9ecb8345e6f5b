"""Layer classes that users registered, for layers of somebody else's that one cannot edit."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from eva_optax._flax.call_arguments import Telling, bind_call, check_argument, depends_on_call, find_argument, tell
from eva_optax._flax.plans import Plan, Tap, equation_plan
from eva_optax._probes.probe import Shape
from eva_optax._statistics.equation import example_input, needs_input, split_terms


class Call(NamedTuple):
    """One call of a registered layer: its input, the name of its kernel, and what it computes."""

    x: Any
    kernel: str
    equation: str


@dataclass(frozen=True)
class Registration:
    """A layer class that `register` made known; as a context manager it holds until the end of the block.

    Attributes:
      layer: the class.
      kernel: the name of the kernel, or a function to it.
      bias: the name of the bias, or None.
      equation: what the layer computes: an equation, or a function to it.
      input: which argument of a call is the input: its position, or its name.
    """

    layer: type
    kernel: Telling
    bias: str | None
    equation: Telling
    input: int | str = 0

    def remove(self) -> None:
        """Forgets the class. Models that are tapped already stay as they are."""
        if _REGISTRY.get(self.layer) == self:
            del _REGISTRY[self.layer]

    def __enter__(self) -> "Registration":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def kernel_of(self, layer: Any) -> str | None:
        """The name of the kernel of a layer, or None if only a call tells."""
        return None if depends_on_call(self.kernel) else tell(self.kernel, layer)

    def equation_of(self, layer: Any) -> str | None:
        """The equation of a layer, or None if only a call tells all of its kernel's layout."""
        if depends_on_call(self.equation):
            return None
        equation = check_equation("eva_optax.register", tell(self.equation, layer))
        return None if needs_input(equation) else equation

    def call_of(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """What is told of a call with these arguments."""
        function: Any = self.layer.__call__
        bound = bind_call(function, layer, *args, **kwargs)
        kernel, equation = (tell(telling, *bound.args, **bound.kwargs) for telling in (self.kernel, self.equation))
        return Call(find_argument(bound, self.input), kernel, check_equation("eva_optax.register", equation))

    def plan(
        self, layer: Any, kernel_shape: Shape, x_shape: Shape, *, call: Call, y: Any, path: str | None = None
    ) -> Tap:
        """How a call with the output `y` is tapped.

        Raises:
          ValueError: if the equation does not fit the shapes.
        """
        shape = getattr(y, "shape", None)
        plan = None if shape is None else self._plan(call.equation, call.kernel, kernel_shape, x_shape, shape)
        if not isinstance(plan, Tap):
            at = "" if path is None else f" at {path!r}"
            output = "an output that is no array" if shape is None else f"an output of shape {shape}"
            raise ValueError(
                f"eva_optax.register: the equation {call.equation!r} does not fit the call of "
                f"{type(layer).__name__}{at} with an input of shape {x_shape}, the kernel {call.kernel!r} of shape "
                f"{kernel_shape}, and {output}. Every axis needs a letter of its own, axes with the same letter the "
                f"same size, and merged axes parentheses. Is argument {self.input!r} of the call the input?"
            )
        return plan

    def plan_of_layer(self, layer: Any, path: str) -> Tap | None:
        """How a layer is tapped before there is a call, None if that takes one; axes before its kernel's are stacked.

        Raises:
          ValueError: if the equation does not fit the kernel.
        """
        kernel, equation = self.kernel_of(layer), self.equation_of(layer)
        if kernel is None or equation is None:
            return None
        full = getattr(layer, kernel).shape
        _, axes, _ = split_terms(equation) or ((), (), ())
        own = full if "..." in axes else full[max(len(full) - len(axes), 0) :]
        fits = len(own) >= len(axes) - ("..." in axes)
        plan = self._plan(equation, kernel, own, example_input(equation, own), None) if fits else None
        if not isinstance(plan, Tap):
            raise ValueError(
                f"eva_optax.register: the equation {equation!r} does not fit the kernel {kernel!r} of shape {full} of "
                f"{type(layer).__name__} at {path!r}. Every axis needs a letter of its own."
            )
        return plan

    def _plan(self, equation: str, kernel: str, kernel_shape: Shape, x_shape: Shape, y_shape: Shape | None) -> Plan:
        return equation_plan(equation, kernel_shape, x_shape, kernel, self.bias, y_shape)


Registration.__module__ = "eva_optax"

_REGISTRY: dict[type, Registration] = {}


def register(
    layer: type, *, kernel: Telling, equation: Telling, bias: str | None = None, input: int | str = 0
) -> Registration:
    """Makes a layer class known that contracts its input with a kernel, so that `tap` taps its instances.

    For classes that one cannot edit, Linen or NNX; subclasses that call `super().__call__` are tapped, too. Register
    before the model is tapped. Registering a class again replaces what was registered for it.

    Args:
      layer: a subclass of `flax.linen.Module` or `flax.nnx.Module`, whose `__call__` returns the output.
      kernel: the name of its kernel among its parameters; or a function to it.
      equation: the einsum equation "input,kernel->output" that it computes, with an ellipsis for any number of axes
        ("...i,oi->...o" for a kernel that is stored transposed), each letter an axis, and as in einops parentheses
        around axes that the layer merges ("...(hi),hio->...(ho)"); or a function to it.
      bias: the name of its bias, which has the kernel's output axes in their order; None without one, and ignored for
        a layer that has none.
      input: which argument of the call is the input, by position or by name; the first one if not given.

    A function is given the layer; one that has further arguments, also the call's, as `__call__` lists them, defaults
    included. An NNX model with a layer whose kernel or equation depends on the call is tapped with an example input,
    `eva_optax.tap(model, x)`.

    Returns:
      A `Registration`, whose `remove()` undoes it; `with eva_optax.register(...):` does so at the end of the block.

    Raises:
      TypeError: if `layer` is no class.
      ValueError: if the equation is not of this form, or `__call__` has no such argument; at the first call of a
        layer, if the equation does not fit its shapes.

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
    check_argument(layer, input)
    _REGISTRY[layer] = Registration(layer, kernel, bias, equation, input)
    return _REGISTRY[layer]


def registered_class(layer: type) -> Registration | None:
    """The registration of a class itself."""
    return _REGISTRY.get(layer)


def registered_call(layer: object, function: Callable[..., Any]) -> Registration | None:
    """The registration whose class defines the `__call__` that is `function`, of a layer of that class."""
    function = inspect.unwrap(function)
    for registration in _REGISTRY.values():
        if isinstance(layer, registration.layer) and inspect.unwrap(registration.layer.__call__) is function:
            return registration
    return None


def check_equation(caller: str, equation: Any) -> str:
    """`equation`, if it has the form "input,kernel->output"; ValueError if not."""
    if not isinstance(equation, str) or split_terms(equation) is None:
        raise ValueError(
            f'{caller}: equation must have the form "input,kernel->output", such as "...i,io->...o", or '
            f'"...(hi),hio->...(ho)" for axes that are merged, got {equation!r}.'
        )
    return equation
