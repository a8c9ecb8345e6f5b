"""Training steps that can be lowered without an array: their optimizers, arguments and shardings."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from models import Case

import eva_optax

Layout = Literal["single", "data", "fsdp", "tensor"]
KRONECKER = "kronecker"


@dataclass(frozen=True)
class Optimizer:
    """How an optimizer is made, and whether it needs a tapped model."""

    make: Callable[[], optax.GradientTransformation]
    tapped: bool = False


def momentum() -> optax.GradientTransformation:
    return optax.sgd(0.1, momentum=0.9)


OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": Optimizer(momentum),
    "adamw": Optimizer(lambda: optax.adamw(1e-3)),
    "muon": Optimizer(lambda: optax.contrib.muon(1e-3)),
    "eva+sgd": Optimizer(lambda: optax.chain(eva_optax.scale_by_eva(), momentum()), tapped=True),
    "eva_f+sgd": Optimizer(lambda: optax.chain(eva_optax.scale_by_eva_f(), momentum()), tapped=True),
    "eva": Optimizer(lambda: eva_optax.eva(0.1), tapped=True),
    "eva_adamw": Optimizer(lambda: eva_optax.eva_adamw(1e-3), tapped=True),
}


@dataclass(frozen=True)
class Step:
    """A function to compile, with the shapes of its arguments and a way to make arrays for them.

    Attributes:
      function: takes `arguments`, returns new values for the first `donated` of them.
      arguments: trees of `jax.ShapeDtypeStruct`, with shardings where there is a mesh.
      donated: how many leading arguments are updated in place.
      make: makes arrays for all arguments, on the default device.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: int
    make: Callable[[], tuple[Any, ...]]

    def lower(self) -> Any:
        outputs = None
        if self.arguments and jax.tree.leaves(self.arguments)[0].sharding is not None:
            outputs = tuple(jax.tree.map(lambda leaf: leaf.sharding, part) for part in self.arguments[: self.donated])
        jitted = jax.jit(self.function, donate_argnums=tuple(range(self.donated)), out_shardings=outputs)
        return jitted.lower(*self.arguments)


def training_step(case: Case, optimizer: Optimizer, mesh: Mesh | None = None, layout: Layout = "single") -> Step:
    """The whole step: forward, backward, update."""
    model = eva_optax.tap(case.model) if optimizer.tapped else case.model
    tx = optimizer.make()
    variables = jax.eval_shape(model.init, jax.random.key(0), case.inputs)
    params, buffers = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    state = jax.eval_shape(tx.init, params)

    def step(params: Any, state: Any, buffers: Any, x: Any, y: Any) -> Any:
        def loss(params: Any) -> Any:
            outputs, changed = model.apply({"params": params, **buffers}, x, mutable=list(buffers))
            return case.loss(outputs, y), changed

        grads, changed = jax.grad(loss, has_aux=True)(params)
        updates, new_state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), new_state, changed

    rows = P("data") if layout != "single" else P()
    data = place((case.inputs, case.targets), lambda path, leaf: rows, mesh)
    kernels = {path: leaf for path, leaf in _flat(params).items() if KRONECKER not in path}
    specs = {path: spec(case, path, leaf.shape, mesh, layout) for path, leaf in kernels.items()}
    specs |= {
        path: _probe_spec(path, leaf, kernels, specs) for path, leaf in _flat(params).items() if path not in specs
    }
    shapes = {path: leaf.shape for path, leaf in _flat(params).items()}

    def like_parameter(path: tuple[str, ...], leaf: Any) -> P:
        """What a state holds for a parameter lies as the parameter does."""
        for start in range(len(path)):
            if shapes.get(path[start:]) == leaf.shape:
                return specs[path[start:]]
        return P()

    def make() -> tuple[Any, ...]:
        x, y = (_random(shape, case.classes, seed) for seed, shape in enumerate((case.inputs, case.targets)))
        variables = jax.jit(model.init)(jax.random.key(0), x)
        params = variables["params"]
        return params, jax.jit(tx.init)(params), {k: v for k, v in variables.items() if k != "params"}, x, y

    trees = (place(tree, like_parameter, mesh) for tree in (params, state, buffers))
    return Step(step, (*trees, *data), donated=3, make=make)


def update_alone(
    shapes: dict[str, tuple[int, ...]], optimizer: Optimizer, stacked: int = 0, mesh: Mesh | None = None
) -> Step:
    """The update of Dense kernels without biases, `stacked` of each in one array: gradients come from memory."""
    params: dict[str, Any] = {}
    for name, (rows, columns) in shapes.items():
        lead = (stacked,) if stacked else ()
        params[name] = {"kernel": jax.ShapeDtypeStruct((*lead, rows, columns), jnp.float32)}
        if optimizer.tapped:
            ones = (*lead, 1, 1)
            leaves = {"a": (*lead, rows, 1), "b": (*lead, 1, columns), "n": ones, "unit": ones}
            probe = {leaf: jax.ShapeDtypeStruct(shape, jnp.float32) for leaf, shape in leaves.items()}
            params[name][KRONECKER] = {"kernel": probe}
    tx = optimizer.make()

    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def make() -> tuple[Any, ...]:
        arrays, grads = (jax.tree.map(lambda leaf, seed=seed: _random(leaf, 1, seed), params) for seed in (0, 1))
        return arrays, tx.init(arrays), grads

    arguments = (params, jax.eval_shape(tx.init, params), params)
    return Step(update, place(arguments, lambda path, leaf: P(), mesh), donated=2, make=make)


def spec(case: Case, path: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh | None, layout: Layout) -> P:
    """Where a parameter lies.

    FSDP splits the largest axis that the mesh divides. Tensor parallelism splits column layers along their first output
    axis and row layers along their first input axis, by the name of the layer, and embeddings along the vocabulary.
    """
    if mesh is None or layout in ("single", "data"):
        return P()
    if layout == "fsdp":
        sizes = [size if size % mesh.shape["data"] == 0 else 0 for size in shape]
        if not shape or max(sizes) == 0 or math.prod(shape) < 2**10:
            return P()
        return _at(sizes.index(max(sizes)), len(shape), "data")
    names = [name.split("_")[0] for name in path]
    stacked = int("blocks" in path)
    axis = None
    if path[-1] == "embedding":
        axis = 0
    elif any(name in case.columns for name in names):  # attention has heads before features
        axis = len(shape) - (2 if any(name in ("query", "key", "value") for name in names) else 1)
    elif any(name in case.rows for name in names) and names[-1] == "kernel":
        axis = stacked
    return P() if axis is None or shape[axis] % mesh.shape["model"] else _at(axis, len(shape), "model")


def place(tree: Any, choose: Callable[[tuple[str, ...], Any], P], mesh: Mesh | None) -> Any:
    """`tree` as shapes, with shardings if there is a mesh."""

    def one(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = None if mesh is None else NamedSharding(mesh, choose(_names(path), leaf))
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(one, tree)


def _random(shape: jax.ShapeDtypeStruct, classes: int, seed: int) -> jax.Array:
    key = jax.random.key(seed)
    if jnp.issubdtype(shape.dtype, jnp.integer):
        return jax.random.randint(key, shape.shape, 0, classes, shape.dtype)
    return jax.random.normal(key, shape.shape, shape.dtype)


def _at(axis: int, rank: int, name: str) -> P:
    return P(*(name if index == axis else None for index in range(rank)))


def _probe_spec(path: tuple[str, ...], leaf: Any, kernels: dict[tuple[str, ...], Any], specs: Any) -> P:
    """A probe lies as its kernel does, along the axes that both have."""
    kernel = (*path[: path.index(KRONECKER)], path[-2].split(",")[0])
    if path[-1] not in ("a", "b"):
        return P()
    sizes = zip(specs[kernel], leaf.shape, kernels[kernel].shape, strict=False)
    return P(*(name if size == full else None for name, size, full in sizes))


def _names(path: Any) -> tuple[str, ...]:
    return tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _flat(tree: Any) -> dict[tuple[str, ...], Any]:
    return {_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
