"""What backends' compilers do not find out by themselves: where fusion has to stop, and how a matrix has to lie.

Values stay what they are.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint


def on_gpu(function: Callable[..., Any], otherwise: Callable[..., Any], *arguments: Any) -> Any:
    """`function` of the arguments where the program is compiled for a GPU, else `otherwise` of them."""
    return jax.lax.platform_dependent(*arguments, cuda=function, rocm=function, default=otherwise)


def materialize(arrays: Any) -> Any:
    """Small arrays that a large one meets, computed once.

    XLA's CPU backend would compute them again for every entry that they meet. Its GPU backend would make one kernel
    of a running vector and of what the state keeps of it, which waits for a sum over the gradient, and read the
    gradient again for the sums that wait for the vector.
    """
    return jax.lax.optimization_barrier(arrays)


def apart_on_gpu(arrays: Any) -> Any:
    """The factors of a product that is to stay one of its own.

    XLA's GPU backend makes one product of several that have a factor in common, such as the directions of sketches in
    equal layers: it keeps the other factors until the last one is there, and copies them side by side.
    """
    return on_gpu(materialize, lambda arrays: arrays, arrays)


def as_parameters_lie(matrix: Array) -> Array:
    """A matrix that is added to parameters, row by row in a TPU's memory, as they are.

    Its compiler would have the product come out in columns, and transpose parameters and momentum for it, there and
    back. Arrays of more axes are left to it: it keeps some kernels, such as those of heads, in another order itself.
    """
    if matrix.ndim != 2:
        return matrix
    return jax.lax.platform_dependent(matrix, tpu=_in_rows, default=lambda matrix: matrix)


def _in_rows(matrix: Array) -> Array:
    return with_layout_constraint(matrix, Layout((0, 1)))
