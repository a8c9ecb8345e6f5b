"""Where fusion has to stop, on backends whose compilers do not find out by themselves. Values stay what they are."""

from collections.abc import Callable
from typing import Any

import jax


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
