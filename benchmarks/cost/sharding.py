"""Where the arrays of a step lie on a mesh, in each layout."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import eva_optax

Path = tuple[str, ...]
COLUMNS, ROWS = ("query", "key", "value", "up"), ("out", "down")  # layers split by their outputs, and by their inputs


def parameter_specs(params: Any, mesh: Mesh | None, layout: str) -> Callable[[Path, Any], P]:
    """From the path and the shape of a leaf to its place: of parameters, of probes, and of state that is kept for them.

    A probe lies as its kernel does, along the axes that both have.
    """
    shapes = {path: leaf.shape for path, leaf in flat(params).items()}
    specs = {path: _spec(path, shapes[path], mesh, layout) for path in flat(eva_optax.strip(params))}
    for path in shapes.keys() - specs.keys():
        specs[path] = P()
        if path[-1] in ("a", "b"):  # (*layer, "kronecker", kernel, leaf)
            kernel = (*path[:-3], path[-2].split(",")[0])
            sizes = zip(specs[kernel], shapes[path], shapes[kernel], strict=False)
            specs[path] = P(*(name if size == full else None for name, size, full in sizes))

    def choose(path: Path, leaf: Any) -> P:
        for start in range(len(path)):  # what a state holds for a parameter lies as the parameter does
            if shapes.get(path[start:]) == leaf.shape:
                return specs[path[start:]]
        return P()

    return choose


def _spec(path: Path, shape: tuple[int, ...], mesh: Mesh | None, layout: str) -> P:
    """Where a parameter of the model lies.

    FSDP splits the largest axis that the mesh divides. Tensor parallelism splits column layers along their first output
    axis and row layers along their first input axis, by the name of the layer, and embeddings along the vocabulary.
    """
    if mesh is None or layout in ("single", "data"):
        return P()
    names, axis, along = [name.split("_")[0] for name in path], None, "model"
    if layout == "fsdp":
        along = "data"
        if math.prod(shape) >= 2**10:
            divided = [size if size % mesh.shape[along] == 0 else 0 for size in shape]
            axis = divided.index(max(divided))
    elif path[-1] == "embedding":
        axis = 0
    elif any(name in COLUMNS for name in names):  # attention has heads before features
        axis = len(shape) - (2 if any(name in ("query", "key", "value") for name in names) else 1)
    elif any(name in ROWS for name in names) and names[-1] == "kernel":
        axis = int("blocks" in path)  # stacked
    if axis is None or shape[axis] % mesh.shape[along]:
        return P()
    return P(*(along if index == axis else None for index in range(len(shape))))


def place(tree: Any, choose: Callable[[Path, Any], P], mesh: Mesh | None) -> Any:
    """`tree` as shapes, with shardings if there is a mesh."""

    def one(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = None if mesh is None else NamedSharding(mesh, choose(_names(path), leaf))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(one, tree)


def flat(tree: Any) -> dict[Path, Any]:
    """The leaves by path."""
    return {_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _names(path: Any) -> Path:
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
