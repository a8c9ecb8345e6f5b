"""Finds the tapped layers of a tree by key path: which kernel, bias and probe belong together."""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from eva_optax._probes.layout import Layout
from eva_optax._probes.linear_map import statistic_of
from eva_optax._probes.placement import shard_like
from eva_optax._probes.probe import COUNTER, KRONECKER, Path, Shape, accumulator, is_probe, path_names
from eva_optax._probes.statistics import STATISTICS


class Tree(NamedTuple):
    """A tree taken apart: its leaves, their paths, and what puts them together again."""

    leaves: list[Any]
    paths: tuple[Path, ...]
    structure: Any

    @property
    def layers(self) -> tuple["Layer", ...]:
        """The tapped layers, in their order; found once for the same paths and shapes."""
        return find_layers(self.paths, tuple(tuple(jnp.shape(leaf)) for leaf in self.leaves))

    def items(self) -> Iterable[tuple[Path, Any]]:
        """Paths and leaves."""
        return zip(self.paths, self.leaves, strict=True)

    def rebuild(self, leaves: Iterable[Any]) -> Any:
        """The tree with other leaves."""
        return self.structure.unflatten(leaves)


def take_apart(tree: Any) -> Tree:
    """Flattens `tree`."""
    found, structure = jax.tree_util.tree_flatten_with_path(tree)
    return Tree([leaf for _, leaf in found], tuple(path_names(path) for path, _ in found), structure)


def is_probe_leaf(path: Path) -> bool:
    """Whether `path` has the form of a leaf of a probe; what else stands below their name is somebody else's."""
    return path[-3:-2] == (KRONECKER,) and (statistic_of(path[-1]) in STATISTICS or path[-1] == COUNTER)


def has_probes(tree: Any) -> bool:
    """Whether there are probes in a tree."""
    return any(map(is_probe_leaf, take_apart(tree).paths))


def how_to_tap(tree: Any) -> str:
    """Advice for whoever has a tree without probes; as NNX users write it where anything of NNX is in the tree."""

    def of_nnx(node: Any) -> bool:
        return any(cls.__module__.startswith("flax.nnx") for cls in type(node).__mro__)

    if any(map(of_nnx, jax.tree.leaves(tree, is_leaf=of_nnx))):
        return (
            "Tap the model before its optimizer is made: model = eva_optax.tap(model), then nnx.Optimizer(model, tx, "
            "wrt=nnx.Param). Its values stay, and those of a checkpoint may come before or after."
        )
    return (
        "Tap the model before its parameters are made: model = eva_optax.tap(model), then model.init(key, x). "
        "For parameters that exist already: params = eva_optax.attach(model, params, x)."
    )


class Layer(NamedTuple):
    """Where the parts of one tapped layer stand among the leaves of a tree, and how they are laid out.

    Attributes:
      name: for messages and logs.
      path: of the kernel.
      kernel: the place of the kernel among the leaves.
      bias: the place of the bias; None without one.
      probe: the places of the probe's leaves, by name.
      layout: how they lie against each other.
      shapes: of the probe's leaves, by name.
    """

    name: str
    path: Path
    kernel: int
    bias: int | None
    probe: dict[str, int]
    layout: Layout
    shapes: dict[str, Shape]

    def gradient(self, leaves: Sequence[Any]) -> tuple[Array, Array | None]:
        """Kernel and bias of the layer among `leaves`, along the kernel's axes, groups split, at least float32."""
        kernel = jnp.asarray(leaves[self.kernel])
        kernel = self.layout.split_groups(kernel.astype(accumulator(kernel.dtype)))
        if self.bias is None:
            return kernel, None
        bias = self.layout.bias_to_kernel_axes(jnp.asarray(leaves[self.bias]).astype(kernel.dtype))
        return kernel, self.layout.split_groups(bias)

    def place(self, kernel: Array, bias: Array | None, leaves: list[Any]) -> None:
        """Undoes `gradient`: replaces kernel and bias, with the dtypes and shardings that `leaves` has."""
        self._put(self.kernel, self.layout.merge_groups(kernel, self.layout.kernel), leaves)
        if self.bias is not None and bias is not None:
            merged = self.layout.merge_groups(bias, self.layout.b)
            self._put(self.bias, self.layout.kernel_axes_to_bias(merged), leaves)

    def _put(self, place: int, value: Array, leaves: list[Any]) -> None:
        leaves[place] = shard_like(value.astype(leaves[place].dtype), leaves[place])


def layer_names(probes: Iterable[Path]) -> dict[Path, str]:
    """The names of layers by the paths of their probes: the module's, or the kernel's where a module has several."""
    probes = list(probes)
    modules = Counter(probe[:-2] for probe in probes)

    def name(probe: Path) -> str:
        module, kernel = probe[:-2], probe[-1].partition(",")[0]
        return "/".join(module if modules[module] == 1 else (*module, kernel))

    return {probe: name(probe) for probe in probes}


@lru_cache(maxsize=256)
def find_layers(paths: tuple[Path, ...], shapes: tuple[Shape, ...]) -> tuple[Layer, ...]:
    """The tapped layers among leaves of these paths and shapes; one whose kernel is missing (masked) is left out.

    Raises:
      ValueError: if a probe is incomplete, or of shapes that do not fit its kernel.
    """
    places = {path: place for place, path in enumerate(paths)}
    probes: dict[Path, dict[str, int]] = {}
    for path, place in places.items():
        if is_probe(path):
            probes.setdefault(path[:-1], {})[statistic_of(path[-1])] = place
    names = layer_names(probes)
    layers = []
    for prefix, probe in probes.items():
        module, (kernel_name, _, bias_name) = prefix[:-2], prefix[-1].partition(",")
        path, bias_path, name = (*module, kernel_name), (*module, bias_name), names[prefix]
        if path not in places:
            continue
        missing = [leaf for leaf in ("a", COUNTER) if leaf not in probe]
        if missing:
            raise ValueError(
                f"eva_optax: the probe of layer {name!r} lacks {missing} (it has {sorted(probe)}). A mask must keep or "
                f"drop all that stands below {KRONECKER!r} together: decide by the layer's path, not by a leaf's rank. "
                "The probes of a version that stored them otherwise: eva_optax.strip, then eva_optax.attach."
            )
        bias = places.get(bias_path) if bias_name else None
        layout = Layout.fit(
            name,
            kernel=shapes[places[path]],
            bias=None if bias is None else shapes[bias],
            a=shapes[probe["a"]],
            b=shapes[probe["b"]] if "b" in probe else None,
            counter=shapes[probe[COUNTER]],
        )
        held = {leaf: shapes[place] for leaf, place in probe.items()}
        layers.append(Layer(name, path, places[path], bias, probe, layout, held))
    return tuple(layers)
