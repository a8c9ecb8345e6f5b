"""Dense float64 oracle of the preconditioning: the curvature written out as a matrix, and solved."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import eva_optax
from tests.helpers import assert_close, by_path

UNIT = 2.0**-40  # what a probe's gradient is stored in


def solve_eva(
    kernel: np.ndarray, bias: np.ndarray | None, a: np.ndarray, b: np.ndarray, damping: float, relative: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """(vec(ab) vec(ab)ᵀ + γI)⁻¹ vec(G) of one layer, with the bias as the last row of G and 1 as the last entry of a.

    `kernel`, `a` and `b` broadcast. With `relative`, γ is damping · ‖(a, 1)‖² ‖b‖², and the update is times γ.
    """
    direction = (a * b).ravel()
    gradient = kernel.ravel()
    if bias is not None:
        direction = np.concatenate([direction, b.ravel()])
        gradient = np.concatenate([gradient, bias.ravel()])
    gamma = damping
    if relative:
        gamma = damping * (np.sum(a**2) + (bias is not None)) * np.sum(b**2)
    curvature = np.outer(direction, direction) + gamma * np.eye(direction.size)
    update = np.linalg.solve(curvature, gradient) * (gamma if relative else 1.0)
    kernel_update = update[: kernel.size].reshape(kernel.shape)
    return kernel_update, None if bias is None else update[kernel.size :].reshape(bias.shape)


def each_layer(
    kernel_shape: tuple[int, ...], a_shape: tuple[int, ...], b_shape: tuple[int, ...]
) -> Iterator[tuple[tuple, tuple, tuple]]:
    """Indices into kernel, a and b of one independent layer after the other.

    An axis that is full in both vectors counts layers; one where a has a divisor of b's size counts groups.
    """
    choices = []
    for size, i, o in zip(kernel_shape, a_shape, b_shape, strict=True):
        whole = slice(None)
        if i == 1 or o == 1:
            choices.append([(whole, whole, whole)])
        else:
            width = size // i
            spans = [slice(g * width, (g + 1) * width) for g in range(i)]
            choices.append([(span, slice(g, g + 1), span) for g, span in enumerate(spans)])
    for picks in itertools.product(*choices):
        kernel, a, b = zip(*picks, strict=True)
        yield kernel, a, b


class Layer(NamedTuple):
    """One tapped layer of a gradient tree: where kernel and bias stand, and its vectors.

    `a` is as the tap leaves it: one entry a group, which `eva_optax.vectors` repeats for each output of the group.
    """

    kernel: tuple[str, ...]
    bias: tuple[str, ...] | None
    a: np.ndarray
    b: np.ndarray


def tapped_layers(grads: Any) -> dict[str, Layer]:
    """The tapped layers of a gradient tree by name, found through the names of their probes."""
    leaves, vectors = by_path(grads), eva_optax.vectors(grads)
    places = {path[:-1]: leaf.shape for path, leaf in leaves.items() if path[-1] == "a" and path[-3] == "kronecker"}
    modules = Counter(place[:-2] for place in places)
    layers = {}
    for place, shape in places.items():
        module, (kernel, _, bias) = place[:-2], place[-1].partition(",")
        name = "/".join(module if modules[module] == 1 else (*module, kernel))
        a, b = (np.asarray(vector, np.float64) for vector in vectors[name])
        a = a[tuple(slice(None, None, full // size) for full, size in zip(a.shape, shape, strict=True))]
        layers[name] = Layer((*module, kernel), (*module, bias) if bias else None, a, b)
    assert layers.keys() == vectors.keys()
    return layers


def assert_preconditioned(grads: Any, updates: Any, damping: float, tolerance: float = 1e-5) -> list[str]:
    """Every tapped layer's update is a dense solve with its own vectors, and all others are plain gradients.

    Also, b is the gradient of the bias. Returns the names of the layers whose update is another than their gradient.
    """
    given, got, changed, solved = by_path(grads), by_path(updates), [], set()
    for name, (kernel, bias, a, b) in tapped_layers(grads).items():
        solved |= {kernel, bias}
        # Stacks come first and outputs last, in kernel, bias and b alike.
        beside = None if bias is None else (given[bias].reshape(b.shape), got[bias].reshape(b.shape))
        for at, at_a, at_b in each_layer(given[kernel].shape, a.shape, b.shape):
            part = given[kernel][at].astype(float)
            part_bias = None if beside is None else beside[0][at_b].astype(float)
            if part_bias is not None and np.count_nonzero(b[at_b]):
                assert_close(b[at_b], part_bias, tolerance, floor=max(1e-3, np.abs(part).max()))
            size = np.sum(b[at_b] ** 2) * (np.sum(a[at_a] ** 2) + (bias is not None))
            if 0 < size < 1e-30:  # below what squares in float32 hold
                continue
            want, want_bias = (
                (part, part_bias) if size == 0 else solve_eva(part, part_bias, a[at_a], b[at_b], damping, True)
            )
            largest = max(1e-3, np.abs(part).max(initial=0), 0 if part_bias is None else np.abs(part_bias).max())
            assert_close(got[kernel][at], want, tolerance, floor=largest)
            if want_bias is not None:
                assert_close(beside[1][at_b], want_bias, tolerance, floor=largest)
            if np.linalg.norm(want - part) > 1e-2 * np.linalg.norm(part):
                changed.append(name)
    for path in given.keys() - solved:
        np.testing.assert_array_equal(got[path], 0 * given[path] if "kronecker" in path else given[path])
    return changed


def canonical(value: Any) -> np.ndarray:
    """In the dtype that JAX would give it; by jnp.asarray it is compiled for each shape."""
    value = np.asarray(value)
    return value.astype(jax.dtypes.canonicalize_dtype(value.dtype))


def probe(a: Any, b: Any, counter: tuple[int, ...], calls: float = 1.0) -> dict[str, Any]:
    """The cotangent of a probe after `calls` calls whose mean input is `a` and whose cotangents sum to `b`.

    `counter` has the axes of the bias, or of the kernel without one, all 1 but for stacks; the last 1 becomes
    the numbers.
    """
    a, b = canonical(a), canonical(b)
    own = max(axis for axis, size in enumerate(counter) if size == 1)
    numbers = np.array([calls * UNIT, calls * 2.0**-28, 0, 0], a.dtype)
    numbers = numbers.reshape([4 if axis == own else 1 for axis in range(len(counter))])
    n = np.broadcast_to(numbers, [4 if axis == own else size for axis, size in enumerate(counter)])
    scales = a.dtype.type(calls * UNIT), b.dtype.type(UNIT)
    return jax.device_put({"a": a * scales[0], "b": b * scales[1], "n": n})


def gradients(kernel: Any, bias: Any | None, a: Any, b: Any, counter: tuple[int, ...]) -> dict[str, Any]:
    """The gradient tree of one layer called "layer"."""
    layer = {"kernel": jax.device_put(canonical(kernel))}
    if bias is None:
        return {"layer": layer | {"kronecker": {"kernel": probe(a, b, counter)}}}
    return {
        "layer": layer | {"bias": jax.device_put(canonical(bias)), "kronecker": {"kernel,bias": probe(a, b, counter)}}
    }


@dataclass(frozen=True)
class LayoutCase:
    """A kernel, its vectors, and which kernel axes the bias and the stacked layers have."""

    name: str
    kernel: tuple[int, ...]
    a: tuple[int, ...]
    b: tuple[int, ...]
    bias_axes: tuple[int, ...] | None
    stacks: tuple[int, ...] = ()

    @property
    def bias(self) -> tuple[int, ...] | None:
        return None if self.bias_axes is None else tuple(self.kernel[axis] for axis in self.bias_axes)

    @property
    def counter(self) -> tuple[int, ...]:
        axes = range(len(self.kernel)) if self.bias_axes is None else self.bias_axes
        return tuple(self.kernel[axis] if axis in self.stacks else 1 for axis in axes)


LAYOUTS = [
    LayoutCase("dense", (5, 4), (5, 1), (1, 4), (1,)),
    LayoutCase("dense without bias", (5, 4), (5, 1), (1, 4), None),
    LayoutCase("one input", (1, 4), (1, 1), (1, 4), (1,)),
    LayoutCase("one output", (5, 1), (5, 1), (1, 1), (1,)),
    LayoutCase("dense general", (2, 3, 4, 2), (2, 3, 1, 1), (1, 1, 4, 2), (2, 3)),
    LayoutCase("batch axis", (3, 5, 4), (3, 5, 1), (3, 1, 4), (0, 2)),
    LayoutCase("convolution", (3, 2, 2, 4), (3, 2, 2, 1), (1, 1, 1, 4), (3,)),
    LayoutCase("grouped convolution", (3, 2, 2, 6), (3, 2, 2, 3), (1, 1, 1, 6), (3,)),
    LayoutCase("depthwise convolution", (3, 2, 1, 4), (3, 2, 1, 4), (1, 1, 1, 4), (3,)),
    LayoutCase("local convolution", (2, 3, 4, 5), (2, 3, 4, 1), (2, 3, 1, 5), (0, 1, 3)),
    LayoutCase("transposed kernel", (3, 2, 4, 5), (3, 2, 1, 5), (1, 1, 4, 1), (2,)),
    LayoutCase("embedding", (7, 3), (7, 1), (1, 3), None),
    LayoutCase("stacked at 0", (3, 5, 4), (3, 5, 1), (3, 1, 4), (0, 2), (0,)),
    LayoutCase("stacked at 1", (5, 3, 4), (5, 3, 1), (1, 3, 4), (2, 1), (1,)),
    LayoutCase("stacked at 1, as many as outputs", (5, 3, 3), (5, 3, 1), (1, 3, 3), (2, 1), (1,)),
    LayoutCase("stacked at -2, as many as outputs", (5, 3, 3), (5, 3, 1), (1, 3, 3), (1, 2), (1,)),
    LayoutCase("stacked at -1", (5, 4, 3), (5, 1, 3), (1, 4, 3), (1, 2), (2,)),
    LayoutCase("stacked without bias", (3, 5, 4), (3, 5, 1), (3, 1, 4), None, (0,)),
    LayoutCase("stacked once", (1, 5, 4), (1, 5, 1), (1, 1, 4), (0, 2), (0,)),
    LayoutCase("stacked twice", (2, 3, 5, 4), (2, 3, 5, 1), (2, 3, 1, 4), (0, 1, 3), (0, 1)),
    LayoutCase("stacked batch axis", (3, 3, 5, 4), (3, 3, 5, 1), (3, 3, 1, 4), (0, 1, 3), (0,)),
    LayoutCase("stacked behind a batch axis", (3, 3, 5, 4), (3, 3, 5, 1), (3, 3, 1, 4), (0, 1, 3), (1,)),
    LayoutCase("stacked grouped convolution", (3, 2, 2, 2, 6), (3, 2, 2, 2, 3), (1, 2, 1, 1, 6), (4, 1), (1,)),
    LayoutCase("grouped convolution stacked at -1", (3, 2, 6, 2), (3, 2, 3, 2), (1, 1, 6, 2), (2, 3), (3,)),
]


def draw(case: LayoutCase, seed: int = 0) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    kernel, a, b = (rng.normal(size=shape) for shape in (case.kernel, case.a, case.b))
    return kernel, None if case.bias is None else rng.normal(size=case.bias), a, b


def expected(case: LayoutCase, kernel, bias, a, b, damping: float, relative: bool):
    """Solves each independent layer of the case by itself."""
    kernel_update = np.full_like(kernel, np.nan)
    bias_update = None if bias is None else np.full_like(bias, np.nan)
    for at, at_a, at_b in each_layer(case.kernel, case.a, case.b):
        at_bias = None if bias is None else tuple(at[axis] for axis in case.bias_axes)
        part = None if bias is None else bias[at_bias]
        kernel_update[at], solved_bias = solve_eva(kernel[at], part, a[at_a], b[at_b], damping, relative)
        if bias is not None:
            bias_update[at_bias] = solved_bias
    return kernel_update, bias_update


def cast(case: LayoutCase, dtype: Any, seed: int = 0) -> dict[str, Any]:
    """The drawn gradients of one layout, as of a layer by itself."""
    parts = (None if part is None else part.astype(dtype) for part in draw(case, seed))
    return gradients(*parts, case.counter)["layer"]


def every_layout(dtype: Any = np.float64) -> dict[str, Any]:
    """The gradients of a model that has one layer of each layout: compiled once, it tests all of them."""
    return {case.name: cast(case, dtype) for case in LAYOUTS}


def dense_case(seed: int, scale: float = 1.0) -> dict:
    kernel, bias, a, b = draw(LAYOUTS[0], seed)
    return gradients(scale * kernel, scale * bias, a, scale * b, (1,))


def two_layers(seed: int) -> dict:
    """A tapped dense layer, a tapped convolution, and a parameter that is not tapped."""
    conv = next(case for case in LAYOUTS if case.name == "convolution")
    kernel, bias, a, b = draw(conv, seed + 1)
    return {
        "dense": dense_case(seed)["layer"],
        "conv": gradients(kernel, bias, a, b, conv.counter)["layer"],
        "scale": jnp.arange(3.0),
    }
