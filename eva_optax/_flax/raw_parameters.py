"""Taps for matrices that are raw parameters of a module, called where the module uses them."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from eva_optax._flax.registry import check_equation
from eva_optax._flax.verify import compare, is_verifying
from eva_optax._probes.linear_map import KernelShapes
from eva_optax._probes.probe import KRONECKER, Path, Probe
from eva_optax._probes.tap import tap
from eva_optax._statistics.equation import parse_equation
from eva_optax._statistics.ragged_dot import parse_ragged_dot, tap_ragged

RECORDER = "eva_optax_recorder"


class RecordedCall(NamedTuple):
    """One call of `tap_einsum` or its like in an NNX module that has no probe for it yet."""

    vectors: KernelShapes
    kernel: str
    bias: str | None
    batch: tuple[int, ...]


@dataclass(eq=False)
class Recorder:
    """Stands in a module as a static attribute while it is traced, through every transformation; notes its calls.

    Attributes:
      path: of the module.
      calls: what it called.
    """

    path: Path
    calls: list[RecordedCall] = field(default_factory=list)


def tap_einsum(module: Any, kernel: str, equation: str, x: Array, y: Array, *, bias: str | None = None) -> Array:
    r"""Taps a matrix that is a raw parameter of a module, where the module uses it.

    For a module that computes :math:`y = \mathrm{einsum}(\mathrm{equation}, x, W)` itself, with `jnp.einsum`, `jnp.dot`
    or otherwise. Letters of the kernel that are in `x` and `y` are batch axes (heads, experts), in `x` alone input
    axes, in `y` alone output axes; the letters of `x` and `y` that the kernel lacks are batch and positions.

    Args:
      module: the Linen or NNX module that owns the parameters, usually `self`.
      kernel: the name of the kernel in it.
      equation: "input,kernel->output", with an ellipsis for any number of leading axes, and parentheses around axes
        that the module merges, as for `register`.
      x: the input.
      y: the output, before or after the bias is added.
      bias: the name of a bias that is added to the output, in the module, if there is one. It has the kernel's output
        axes in their order.

    Returns:
      `y`: use it in its place. In a module that is not tapped nothing else happens. An NNX model whose modules call
      this is tapped with an example input, `eva_optax.tap(model, x)`; a Linen model makes its probes in `init`.

    Raises:
      TypeError: if `module` is no Flax module.
      ValueError: if the equation does not fit, or the module has no such parameter.

    Source: as `tap`.

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp
      >>> class Heads(nn.Module):
      ...   @nn.compact
      ...   def __call__(self, x):
      ...     w = self.param("w", nn.initializers.ones, (x.shape[-1], 2, 5))
      ...     y = jnp.einsum("btd,dhk->bthk", x, w)
      ...     return eva_optax.tap_einsum(self, "w", "btd,dhk->bthk", x, y)
      >>> params = eva_optax.tap(Heads()).init(jax.random.key(0), jnp.ones((2, 4, 3)))["params"]
      >>> params["kronecker"]["w"]["b"].shape
      (1, 2, 5)
    """
    check_equation("eva_optax.tap_einsum", equation)
    x, y = jnp.asarray(x), jnp.asarray(y)
    weight = parameter(module, "tap_einsum", "kernel", kernel)
    offset = None if bias is None else parameter(module, "tap_einsum", "bias", bias)
    shape = tuple(weight.shape)
    rule = parse_equation(equation, x.shape, shape, y.shape)
    if rule is None:
        raise ValueError(
            f"eva_optax.tap_einsum: equation {equation!r} does not fit an input of shape {x.shape}, the kernel "
            f"{kernel!r} of shape {shape} and an output of shape {y.shape}, in {type(module).__name__} at "
            f"{'/'.join(_path(module))!r}. Every axis needs a letter of its own, and "
            "axes with the same letter the same size."
        )
    if is_verifying():
        compare((*_path(module), kernel), rule, weight, offset, x, y)
    probe = find_probe(module, rule, kernel, bias)
    return y if probe is None else tap(rule, bias is not None, probe, x, y)


def tap_ragged_dot(
    module: Any,
    kernel: str,
    x: Array,
    y: Array,
    group_sizes: Array,
    *,
    bias: str | None = None,
    equation: str = "ni,eio->no",
) -> Array:
    r"""Taps :math:`y = \mathrm{ragged\_dot}(x, W, \mathrm{group\_sizes})`, as `jax.lax.ragged_dot` computes it.

    Each group of rows is an expert of its own: a is the mean of the group's rows, b the sum of their cotangents. An
    expert without rows was not used in this step: its vectors are zero, its running averages are held.

    Args:
      module: the Linen or NNX module that owns the parameters, usually `self`.
      kernel: the name of the kernel in it, of shape (experts, inputs, outputs), or as the equation says.
      x: the input, (rows, inputs), sorted by expert.
      y: the output, (rows, outputs), before or after the bias is added.
      group_sizes: the number of rows of each expert, integers, (experts,). Rows beyond their sum belong to none.
      bias: the name of a bias of shape (experts, outputs) that is added in the module, if there is one.
      equation: "input,kernel->output" as for `tap_einsum`, with n for the rows and e for the experts, both first: for a
        kernel that is stored in another way than `ragged_dot` gets it ("ni,ehoi->n(ho)").

    Returns:
      `y`, as for `tap_einsum`.

    Raises:
      TypeError: if `module` is no Flax module.
      ValueError: if shapes do not fit, or the module has no such parameter.

    Source: as `tap`.

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp
      >>> class Experts(nn.Module):
      ...   @nn.compact
      ...   def __call__(self, x, group_sizes):
      ...     w = self.param("w", nn.initializers.ones, (2, x.shape[-1], 5))
      ...     y = jax.lax.ragged_dot(x, w, group_sizes)
      ...     return eva_optax.tap_ragged_dot(self, "w", x, y, group_sizes)
      >>> model, x, sizes = eva_optax.tap(Experts()), jnp.ones((4, 3)), jnp.array([1, 3])
      >>> params = model.init(jax.random.key(0), x, sizes)["params"]
      >>> grads = jax.grad(lambda p: model.apply({"params": p}, x, sizes).sum())(params)
      >>> eva_optax.vectors(grads)[""].b[:, 0, 0]
      Array([1., 3.], dtype=float32)
    """
    check_equation("eva_optax.tap_ragged_dot", equation)
    x, y, group_sizes = jnp.asarray(x), jnp.asarray(y), jnp.asarray(group_sizes)
    shape = parameter_shape(module, "tap_ragged_dot", "kernel", kernel)
    if bias is not None:
        parameter_shape(module, "tap_ragged_dot", "bias", bias)
    rule = parse_ragged_dot(equation, x.shape, shape, y.shape, group_sizes.shape)
    if rule is None:
        raise ValueError(
            f"eva_optax.tap_ragged_dot: an input of shape {x.shape}, the kernel {kernel!r} of shape {shape}, "
            f"group_sizes of shape {group_sizes.shape}, an output of shape {y.shape} and the equation {equation!r} do "
            f"not fit, in {type(module).__name__} at {'/'.join(_path(module))!r}. Shapes must be (rows, inputs), "
            "(experts, inputs, outputs), (experts,) and (rows, outputs), unless the equation says otherwise."
        )
    probe = find_probe(module, rule, kernel, bias, batch=shape[:1])
    return y if probe is None else tap_ragged(rule, bias is not None, probe, x, y, group_sizes)


def parameter_shape(module: Any, caller: str, argument: str, name: str) -> tuple[int, ...]:
    """The shape of a parameter that the module owns."""
    return tuple(parameter(module, caller, argument, name).shape)


def parameter(module: Any, caller: str, argument: str, name: str) -> Array:
    """A parameter that the module owns."""
    import flax.linen as nn
    from flax import nnx

    value: Any = None
    if isinstance(module, nn.Module):
        value = nn.meta.unbox(module.get_variable("params", name))
    elif isinstance(module, nnx.Module):
        value = getattr(module, name, None)
    else:
        raise TypeError(
            f"eva_optax.{caller}: module must be a flax.linen.Module or a flax.nnx.Module, got {type(module)}. "
            "Give the module that owns the parameter, usually self."
        )
    if value is None:
        raise ValueError(
            f"eva_optax.{caller}: {argument}={name!r}, but {type(module).__name__} has no parameter of this name."
        )
    return value if isinstance(module, nn.Module) else value[...]


def _path(module: Any) -> Path:
    """The path of a module, in NNX while it has a recorder."""
    return vars(module)[RECORDER].path if RECORDER in vars(module) else getattr(module, "path", ())


def find_probe(
    module: Any, vectors: KernelShapes, kernel: str, bias: str | None, batch: tuple[int, ...] = ()
) -> Probe | None:
    """The probe beside these parameters of a tapped module; None without one."""
    import flax.linen as nn

    if isinstance(module, nn.Module):
        from eva_optax._flax.linen import layer_probe

        # Set on the scopes of tapped modules, see `Interceptor`.
        tapped = module.scope is not None and KRONECKER in module.scope.flags
        return layer_probe(module, vectors, kernel, bias, batch) if tapped else None
    from eva_optax._flax.nnx_layers import module_probe

    return module_probe(module, vectors, kernel, bias, batch)
