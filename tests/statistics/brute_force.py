"""Oracles: the Kronecker vectors by their definition, in plain NumPy and without the library."""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]
Padding = str | tuple[tuple[int, int], ...]


def contraction_mean(equation: str, x: np.ndarray, kernel_shape: Shape) -> np.ndarray:
    """a of y = einsum(equation, x, kernel), every letter spelt out: one sample for each position, then their mean."""
    (letters, kernel), y = (equation.split("->")[0].split(","), equation.split("->")[1])
    positions = [c for c in letters if c in y and c not in kernel]
    kept = [c for c in kernel if c in letters]
    sizes = dict(zip(letters, x.shape, strict=True))
    samples = []
    for index in np.ndindex(*(sizes[c] for c in positions)):
        at = dict(zip(positions, index, strict=True))
        sample = x[tuple(at.get(c, slice(None)) for c in letters)]
        rest = [c for c in letters if c not in at]
        sample = sample.sum(axis=tuple(i for i, c in enumerate(rest) if c not in kernel))
        samples.append(sample.transpose([[c for c in rest if c in kernel].index(c) for c in kept]))
    mean = np.mean(samples, axis=0).reshape([sizes.get(c, 1) for c in kernel])
    repeats = [size if c not in letters and c not in y else 1 for c, size in zip(kernel, kernel_shape, strict=True)]
    return np.tile(mean, repeats)


class Geometry(NamedTuple):
    """How a convolution moves over its input, axis by axis."""

    window: Shape
    strides: Shape
    padding: Padding
    input_dilation: Shape
    kernel_dilation: Shape


def geometry(layer: nn.Conv | nn.ConvLocal) -> Geometry:
    """The geometry of a convolution, as the documentation of its attributes has it."""

    def per_axis(value: Any) -> Shape:
        return (value or 1,) * rank if value is None or isinstance(value, int) else tuple(value)

    window = (layer.kernel_size,) if isinstance(layer.kernel_size, int) else tuple(layer.kernel_size)
    rank, padding = len(window), layer.padding
    if not isinstance(padding, str):
        sides = (padding,) * rank if isinstance(padding, int) else padding
        padding = tuple((side, side) if isinstance(side, int) else tuple(side) for side in sides)
    return Geometry(
        window, per_axis(layer.strides), padding, per_axis(layer.input_dilation), per_axis(layer.kernel_dilation)
    )


def patches(x: np.ndarray, layer: nn.Conv | nn.ConvLocal) -> np.ndarray:
    """Every patch that a convolution reads: (batch, *output positions, *window, channels)."""
    window, strides, padding, input_dilation, kernel_dilation = geometry(layer)
    rank = len(window)
    x = x.reshape(-1, *x.shape[-rank - 1 :])
    spans = [(size - 1) * dilation + 1 for size, dilation in zip(window, kernel_dilation, strict=True)]
    if padding in ("CIRCULAR", "REFLECT"):
        around = [((span - 1) // 2, span // 2) for span in spans]
        x = np.pad(x, [(0, 0), *around, (0, 0)], mode="wrap" if padding == "CIRCULAR" else "reflect")
    elif padding == "CAUSAL":
        x = np.pad(x, [(0, 0), *((span - 1, 0) for span in spans), (0, 0)])
    spaced = np.zeros(
        (len(x), *((n - 1) * d + 1 for n, d in zip(x.shape[1:-1], input_dilation, strict=True)), x.shape[-1])
    )
    spaced[(slice(None), *(slice(None, None, d) for d in input_dilation))] = x
    if isinstance(padding, str):
        known = padding.upper() if padding.upper() in ("SAME", "SAME_LOWER") else "VALID"
        padding = jax.lax.padtype_to_pads(spaced.shape[1:-1], spans, strides, known)
    padded = np.pad(spaced, [(0, 0), *((max(low, 0), max(high, 0)) for low, high in padding), (0, 0)])
    crop = (
        slice(max(-low, 0), size - max(-high, 0)) for (low, high), size in zip(padding, padded.shape[1:-1], strict=True)
    )
    padded = padded[(slice(None), *crop)]
    places = zip(padded.shape[1:-1], spans, strides, strict=True)
    outputs = [max((size - span) // stride + 1, 0) for size, span, stride in places]
    found = np.zeros((len(x), *outputs, *window, x.shape[-1]))
    for position in np.ndindex(*outputs):
        starts = [p * stride for p, stride in zip(position, strides, strict=True)]
        reads = (slice(s, s + span, d) for s, span, d in zip(starts, spans, kernel_dilation, strict=True))
        found[(slice(None), *position)] = padded[(slice(None), *reads)]
    return found


def mean_patch(found: np.ndarray, rank: int) -> np.ndarray:
    """The mean of `patches` over batch and output positions: (*window, channels)."""
    return found.mean(axis=tuple(range(rank + 1)))


def group_channels(patch: np.ndarray, groups: int, features: int) -> np.ndarray:
    """A patch (*window, channels) as each output channel of a grouped convolution reads it."""
    channels = patch.shape[-1] // groups
    starts = [feature // (features // groups) * channels for feature in range(features)]
    return np.stack([patch[..., start : start + channels] for start in starts], -1)


def local_patches(found: np.ndarray, rank: int) -> np.ndarray:
    """`patches` as a `ConvLocal` lays them out: (batch, *output positions, channels * window)."""
    channels_first = np.moveaxis(found, -1, rank + 1)
    return channels_first.reshape(*found.shape[: rank + 1], -1)


def met_mean(layer: nn.ConvTranspose, x: np.ndarray) -> np.ndarray:
    """The mean input over the positions that each kernel offset meets, (*window, channels).

    The layer itself is asked: with a kernel that is 1 at one offset and 0 elsewhere, the gradient of the summed output
    counts how often the offset meets each input position.
    """
    window = layer.kernel_size if isinstance(layer.kernel_size, tuple) else (layer.kernel_size,)
    image = x.reshape(-1, *x.shape[-len(window) - 1 :]).mean(0)
    single = layer.clone(features=1, use_bias=False)
    kernels = jnp.eye(math.prod(window)).reshape(-1, *window, 1, 1)

    def total(spatial: jax.Array, kernel: jax.Array) -> jax.Array:
        return single.apply({"params": {"kernel": kernel}}, spatial[None, ..., None]).sum()

    count = jax.jit(jax.vmap(jax.grad(total), (None, 0)))
    counts = np.asarray(count(jnp.zeros(image.shape[:-1]), kernels)).reshape(len(kernels), -1)
    sums = counts @ image.reshape(-1, image.shape[-1])
    return (sums / np.maximum(counts.sum(1, keepdims=True), 1)).reshape(*window, -1)


def token_frequencies(ids: np.ndarray, vocabulary: int) -> np.ndarray:
    """How often each token occurs, as a share."""
    return np.array([np.mean(ids == token) for token in range(vocabulary)])


class Call(NamedTuple):
    """One call of a linear layer: its input and the cotangent of its output."""

    layer: nn.Module
    x: np.ndarray
    dy: np.ndarray


def linear_calls(loss: Callable[[], jax.Array]) -> dict[str, list[Call]]:
    """Every call of Dense, DenseGeneral and Conv within `loss`, by module path, in order.

    A zero is added to each output, and the loss differentiated for it. `loss` must run every layer as plain Python.
    """
    layers: dict[str, list[nn.Module]] = defaultdict(list)

    def run(added: dict[str, list[Any]]) -> tuple[jax.Array, tuple[Any, Any]]:
        inputs, outputs = defaultdict(list), defaultdict(list)
        layers.clear()

        def record(next_fun: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            y, module = next_fun(*args, **kwargs), context.module
            if context.method_name != "__call__" or not isinstance(module, nn.Dense | nn.DenseGeneral | nn.Conv):
                return y
            path = "/".join(module.path)
            if added:
                y = y + added[path][len(outputs[path])]
            layers[path].append(module)
            inputs[path].append(args[0])
            outputs[path].append(y)
            return y

        with nn.intercept_methods(record):
            value = loss()
        return value, (dict(inputs), dict(outputs))

    _, (_, outputs) = jax.eval_shape(lambda: run({}))
    zeros = jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), outputs)
    cotangents, (inputs, _) = jax.jit(jax.grad(run, has_aux=True))(zeros)
    return {
        path: [Call(*call) for call in zip(layers[path], inputs[path], cotangents[path], strict=True)]
        for path in inputs
    }


def vectors(calls: list[Call]) -> tuple[np.ndarray, np.ndarray]:
    """a and b of a layer that is called several times with one kernel: the mean input and the summed cotangent."""
    means, sums = [], []
    for layer, x, dy in calls:
        if isinstance(layer, nn.Conv):
            mean = mean_patch(patches(np.asarray(x), layer), len(geometry(layer).window))
            features, groups = 1, layer.feature_group_count
            mean = mean[..., None] if groups == 1 else group_channels(mean, groups, layer.features)
        else:
            axis, out = getattr(layer, "axis", -1), layer.features
            inputs, features = (len(many) if isinstance(many, tuple) else 1 for many in (axis, out))
            mean = np.mean(x, tuple(range(x.ndim - inputs)))
            mean = mean.reshape(*mean.shape, *(1,) * features)
        total = np.sum(dy, tuple(range(dy.ndim - features)))
        means.append(mean)
        sums.append(total.reshape(*(1,) * (mean.ndim - features), *total.shape))
    return np.mean(means, 0), np.sum(sums, 0)


def moments(calls: list[Call]) -> tuple[np.ndarray, np.ndarray]:
    """A and B, in float64, of a layer that is called several times; convolutions without groups."""
    inputs, outputs = [], []
    for layer, x, dy in calls:
        read = patches(np.asarray(x), layer).reshape(dy.size // dy.shape[-1], -1) if isinstance(layer, nn.Conv) else x
        rows, written = (np.asarray(array, np.float64).reshape(-1, array.shape[-1]) for array in (read, dy))
        inputs.append(rows.T @ rows / len(rows))
        outputs.append(len(calls) * len(dy) * written.T @ written)
    return np.mean(inputs, 0), np.sum(outputs, 0)
