"""A tap for convolution kernels that are raw parameters of a module, called where the module uses them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from eva_optax._flax.raw_parameters import find_probe, parameter_shape
from eva_optax._probes.tap import tap
from eva_optax._statistics.convolution import Convolution, PermutedConvolution


def tap_conv(
    module: Any,
    kernel: str,
    x: Array,
    y: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: tuple[str, str, str] | jax.lax.ConvDimensionNumbers | None = None,
    feature_group_count: int = 1,
    *,
    bias: str | None = None,
) -> Array:
    r"""Taps a convolution kernel that is a raw parameter of a module, where the module uses it.

    For a module that computes :math:`y = \mathrm{conv\_general\_dilated}(x, W, \ldots)` itself, with
    `jax.lax.conv_general_dilated` or otherwise; what tells how the kernel moves is given as there. a is the exact mean
    patch, b the cotangent summed over batch and positions.

    A depthwise convolution that is written as shifts and products has a kernel without an input axis. Its letter "I"
    is left out: `dimension_numbers=("NWC", "WO", "NWC")`, with as many groups as channels.

    Args:
      module: the Linen or NNX module that owns the parameters, usually `self`.
      kernel: the name of the kernel in it.
      x: the input, with one batch axis.
      y: the output, before or after the bias is added.
      window_strides: the stride along each spatial axis.
      padding: "SAME", "SAME_LOWER", "VALID", or a (low, high) pair for each spatial axis.
      lhs_dilation: the dilation of the input along each spatial axis; None for 1.
      rhs_dilation: the dilation of the kernel along each spatial axis; None for 1.
      dimension_numbers: the axes of input, kernel and output, such as ("NHWC", "HWIO", "NHWC"), in any order; None as
        in `jax.lax`, where channels come before space.
      feature_group_count: the number of groups.
      bias: the name of a bias that is added to the output, (output channels,), if there is one in the module.

    Returns:
      `y`, as for `tap_einsum`.

    Raises:
      TypeError: if `module` is no Flax module.
      ValueError: if such a convolution of `x` has not the shape of `y`, or the module has no such parameter.

    Source: as `tap`.

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp
      >>> class Subsampling(nn.Module):
      ...   @nn.compact
      ...   def __call__(self, x):
      ...     w = self.param("w", nn.initializers.ones, (3, 3, x.shape[-1], 5))
      ...     how = dict(window_strides=(2, 2), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
      ...     return eva_optax.tap_conv(self, "w", x, jax.lax.conv_general_dilated(x, w, **how), **how)
      >>> params = eva_optax.tap(Subsampling()).init(jax.random.key(0), jnp.ones((2, 8, 8, 4)))["params"]
      >>> params["kronecker"]["w"]["a"].shape
      (3, 3, 4, 1)
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    shape = parameter_shape(module, "tap_conv", "kernel", kernel)
    if bias is not None:
        parameter_shape(module, "tap_conv", "bias", bias)
    full, dimensions = shape, dimension_numbers
    if isinstance(dimensions, tuple) and not isinstance(dimensions, jax.lax.ConvDimensionNumbers):
        of_input, of_kernel, of_output = dimensions
        if "I" not in of_kernel:
            full, dimensions = (*shape, 1), (of_input, f"{of_kernel}I", of_output)
    try:
        padding = padding.upper() if isinstance(padding, str) else tuple((int(low), int(high)) for low, high in padding)
        want = jax.eval_shape(
            lambda x, kernel: jax.lax.conv_general_dilated(
                x, kernel, window_strides, padding, lhs_dilation, rhs_dilation, dimensions, feature_group_count
            ),
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct(full, x.dtype),
        )
        if want.shape != y.shape:
            raise ValueError(f"the output would have shape {want.shape}")
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"eva_optax.tap_conv: an input of shape {x.shape}, the kernel {kernel!r} of shape {shape} and an output of "
            f"shape {y.shape} do not fit dimension_numbers={dimension_numbers}, window_strides={window_strides}, "
            f"padding={padding}, lhs_dilation={lhs_dilation}, rhs_dilation={rhs_dilation}, feature_group_count="
            f"{feature_group_count}: {error}. Give what jax.lax.conv_general_dilated is given."
        ) from error
    numbers = jax.lax.conv_dimension_numbers(x.shape, full, dimensions)
    ones = (1,) * (x.ndim - 2)
    channels_last = Convolution(
        tuple(full[axis] for axis in (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])),
        tuple(window_strides),
        padding,
        tuple(lhs_dilation or ones),
        tuple(rhs_dilation or ones),
        feature_group_count,
    )
    linear_map = PermutedConvolution(shape, channels_last, numbers)
    probe = find_probe(module, linear_map, kernel, bias)
    return y if probe is None else tap(linear_map, bias is not None, probe, x, y)
