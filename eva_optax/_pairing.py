"""Finds the tapped layers of a tree by key path: which kernel, bias and probe belong together.

A probe lives at `<layer>/kronecker/<kernel>` or `<layer>/kronecker/<kernel>,<bias>`: the last name says which
parameters of the layer the probe speaks for. Paths are compared as tuples of names, so that dicts, FrozenDicts, states
and boxes with partition names (whose inner value adds a trailing ".value") all look alike.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer

from eva_optax._layout import Layout
from eva_optax._tap import PROBE_LEAVES, UNIT, accumulator, is_probe_gradient, shard_like

KRONECKER = "kronecker"
Path = tuple[str, ...]


def probe_name(kernel: str, bias: str | None) -> str:
    """The name under which the probe of these parameters stands in the layer's "kronecker" dict."""
    return kernel if bias is None else f"{kernel},{bias}"


def probe_axis_names(
    leaf: str, shape: Sequence[int], kernel_shape: Sequence[int], names: Sequence[Any]
) -> tuple[Any, ...]:
    """The partition names of a probe's leaf: those of the kernel's axes that it shares; counters are replicated."""
    if leaf not in ("a", "b"):
        return (None,) * len(shape)
    padded = (*names, *(None,) * (len(shape) - len(names)))
    sizes = zip(padded, shape, kernel_shape, strict=True)
    return tuple(name if size == full > 1 else None for name, size, full in sizes)


def path_names(path: Sequence[Hashable]) -> Path:
    """A JAX key path as a tuple of names, without the box around a leaf."""
    names = tuple(_key_name(key) for key in path)
    return names[:-1] if names and isinstance(path[-1], jax.tree_util.GetAttrKey) and names[-1] == "value" else names


def _key_name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def is_probe(path: Path) -> bool:
    """Whether the leaf at `path` belongs to a probe."""
    return KRONECKER in path


def leaves_by_path(tree: Any) -> dict[Path, Any]:
    """The leaves of `tree` by their path."""
    return {path_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def replace_leaves(tree: Any, leaves: dict[Path, Any]) -> Any:
    """`tree` with the leaves that `leaves` names."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: leaves.get(path_names(path), leaf), tree)


class TappedLayer(NamedTuple):
    """Where the parts of one tapped layer stand, and how they are laid out."""

    name: str
    kernel: Path
    bias: Path | None
    probe: dict[str, Path]
    layout: Layout

    def gradient(self, leaves: dict[Path, Array]) -> tuple[Array, Array | None]:
        """Kernel and bias of the layer among `leaves`, in the layout's view, at least float32."""
        kernel = jnp.asarray(leaves[self.kernel])
        kernel = self.layout.view(kernel.astype(accumulator(kernel.dtype)))
        if self.bias is None:
            return kernel, None
        bias = self.layout.spread_bias(jnp.asarray(leaves[self.bias]).astype(kernel.dtype))
        return kernel, self.layout.view(bias)

    def place(self, kernel: Array, bias: Array | None, leaves: dict[Path, Array]) -> dict[Path, Array]:
        """Undoes `gradient`: kernel and bias by path, with the shapes, dtypes and shardings that `leaves` has."""
        placed = {self.kernel: self.layout.unview(kernel, self.layout.kernel)}
        if self.bias is not None and bias is not None:
            placed[self.bias] = self.layout.gather_bias(self.layout.unview(bias, self.layout.b))
        return {path: shard_like(value.astype(leaves[path].dtype), leaves[path]) for path, value in placed.items()}


def layer_names(probes: Iterable[Path]) -> dict[Path, str]:
    """The names of layers by the paths of their probes: the module's, or the kernel's where a module has several."""
    probes = list(probes)
    modules = Counter(probe[:-2] for probe in probes)

    def name(probe: Path) -> str:
        module, kernel = probe[:-2], probe[-1].partition(",")[0]
        return "/".join(module if modules[module] == 1 else (*module, kernel))

    return {probe: name(probe) for probe in probes}


def find_layers(leaves: dict[Path, Any]) -> list[TappedLayer]:
    """The tapped layers among `leaves`, in their order; one whose kernel is missing (masked) is left out.

    Raises:
      ValueError: if a probe is incomplete, or of shapes that do not fit its kernel.
    """
    probes: dict[Path, dict[str, Path]] = {}
    for path in leaves:
        if is_probe(path):
            probes.setdefault(path[:-1], {})[path[-1]] = path
    names = layer_names(probes)
    layers = []
    for prefix, probe in probes.items():
        module, (kernel_name, _, bias_name) = prefix[:-2], prefix[-1].partition(",")
        kernel, bias = (*module, kernel_name), (*module, bias_name)
        name = names[prefix]
        if kernel not in leaves:
            continue
        missing = [leaf for leaf in PROBE_LEAVES if leaf not in probe]
        if missing:
            raise ValueError(
                f"eva_optax: the probe of layer {name!r} lacks {missing} (it has {sorted(probe)}). A mask must keep or "
                f"drop all that stands below {KRONECKER!r} together: decide by the layer's path, not by a leaf's rank."
            )
        bias = bias if bias_name and bias in leaves else None
        shapes = {leaf: tuple(jnp.shape(leaves[path])) for leaf, path in probe.items()}
        layout = Layout.fit(
            name,
            kernel=tuple(jnp.shape(leaves[kernel])),
            bias=None if bias is None else tuple(jnp.shape(leaves[bias])),
            a=shapes["a"],
            b=shapes["b"],
            counter=shapes["n"],
        )
        layers.append(TappedLayer(name, kernel, bias, probe, layout))
    return layers


class KroneckerVectors(NamedTuple):
    """The Kronecker vectors of one layer, in the kernel's rank: `a * b` broadcasts to the kernel.

    Attributes:
      a: the mean input; the kernel's shape with its output axes set to 1.
      b: the summed output cotangent; the kernel's shape with its input axes set to 1.
    """

    a: Array
    b: Array


def true_vectors(layer: TappedLayer, leaf: Callable[[Path], Array]) -> tuple[KroneckerVectors, Array]:
    """The vectors of this step with counting and unit undone, and whether the layer was used (the counter's shape).

    Both are NaN where the leaves are no gradients of a probe, because something changed them entry by entry.

    Raises:
      ValueError: in that case, if the values are known (not under `jit`).
    """
    a, b, n, unit = (jnp.asarray(leaf(layer.probe[name])) for name in PROBE_LEAVES)
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    a, b, n, unit = (value.astype(dtype) for value in (a, b, n, unit))
    used = n != 0
    count = jnp.where(used, n, 1)
    ratio = count / jnp.where(unit == 0, 1, unit)
    foreign = used & ~is_probe_gradient(ratio)
    _refuse_foreign(layer.name, foreign & jnp.isfinite(ratio), ratio)
    per_unit = jnp.where(used, jnp.where(foreign, jnp.nan, ratio), 0)
    count = jnp.where(foreign, jnp.nan, count)
    spread = layer.layout.spread_counter
    return KroneckerVectors(a / spread(count), b * spread(per_unit)), used


def _refuse_foreign(name: str, foreign: Array, ratio: Array) -> None:
    if isinstance(foreign, Tracer) or not foreign.is_fully_addressable or not bool(foreign.any()):
        return
    raise ValueError(
        f"eva_optax: what layer {name!r} has below {KRONECKER!r} is not the gradient of a probe: its counters have the "
        f"ratio {float(ratio[foreign][0]):.7g}, a gradient has {1 / UNIT:.7g}. Something before Eva changes gradients "
        "entry by entry (Adam, sign, noise). Put Eva first: optax.chain(eva_optax.scale_by_eva(), optax.adam(1e-3)). "
        "Before it only linear operations make sense: averages, clip_by_global_norm, weight decay."
    )


def vectors(grads: Any) -> dict[str, KroneckerVectors]:
    """The Kronecker vectors in a tree of gradients, by layer path.

    .. math::  a = \\frac{1}{N P} \\sum_{n,p} x_{np}, \\qquad b = \\sum_{n,p} \\partial L / \\partial y_{np}

    Args:
      grads: gradients of a tapped model's parameters, as `jax.grad` returns them, at any nesting depth.

    Returns:
      A dict from layer path ("Block_0/Dense_1") to `KroneckerVectors`, float32 (float64 beside float64 parameters), in
      the kernel's rank. `a` is divided by the number of calls of the layer. A layer that the loss did not use has
      zeros. For a grouped convolution `a` is repeated, so that `a * b` broadcasts to the kernel here too.

    Raises:
      ValueError: if `grads` holds no probes, a probe does not fit its kernel, or what it holds is no longer a gradient
        (known only outside of `jit`).

    Source: Zhang, Shi and Li, "Eva: Practical Second-order Optimization with Kronecker-vectorized Approximation", ICLR
    2023 (the Kronecker vectors; b here is a sum, so that it equals the bias gradient).

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = eva_optax.tap(nn.Dense(2)), jnp.ones((4, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> grads = jax.grad(lambda p: model.apply({"params": p}, x).sum())(params)
      >>> eva_optax.vectors(grads)[""].b
      Array([[4., 4.]], dtype=float32)
    """
    leaves = leaves_by_path(grads)
    layers = find_layers(leaves)
    if not layers:
        raise ValueError(
            "eva_optax.vectors: no probes in the tree. Give it the gradients of a tapped model's parameters: "
            "model = eva_optax.tap(model), then model.init or eva_optax.attach."
        )
    found = {}
    for layer in layers:
        (a, b), _ = true_vectors(layer, leaves.__getitem__)
        found[layer.name] = KroneckerVectors(layer.layout.repeat_groups(a), b)
    return found
