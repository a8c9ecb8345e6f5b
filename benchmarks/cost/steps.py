"""Training steps that can be lowered without an array: their functions, arguments and optimizers."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import eva_optax
from benchmarks.common.models import Kernels
from benchmarks.common.results import Key
from benchmarks.common.training import step_of, untapped
from benchmarks.cost.cases import UPDATES, Case, make_case
from benchmarks.cost.sharding import parameter_specs, place
from benchmarks.cost.targets import mesh_of


@dataclass(frozen=True)
class Optimizer:
    """How an optimizer is made, and what its model is tapped with.

    Attributes:
      period: in how many steps it does everything once. Those above 1 renew bases, roots or inverses in one of them.
    """

    make: Callable[[], optax.GradientTransformation]
    tap: Callable[[Any], Any] = eva_optax.tap
    period: int = 1


PERIOD = 10
momentum = partial(optax.sgd, 0.1, momentum=0.9)


def before_momentum(scale_by: Callable[..., optax.GradientTransformation]) -> optax.GradientTransformation:
    hidden = optax.masked(momentum(), eva_optax.not_probes)  # a momentum of a matrix would be as large as the matrix
    return optax.chain(scale_by(every=PERIOD), hidden)


def tapped(**collected: Any) -> Callable[[Any], Any]:
    return partial(eva_optax.tap, **collected)


OPTIMIZERS = {
    "sgd": Optimizer(momentum, untapped),
    "adamw": Optimizer(lambda: optax.adamw(1e-3), untapped),
    "muon": Optimizer(lambda: optax.contrib.muon(1e-3), untapped),
    "eva+sgd": Optimizer(lambda: optax.chain(eva_optax.scale_by_eva(), momentum())),
    "eva_f+sgd": Optimizer(lambda: optax.chain(eva_optax.scale_by_eva_f(), momentum())),
    "eva": Optimizer(lambda: eva_optax.eva(0.1)),
    "eva_adamw": Optimizer(lambda: eva_optax.eva_adamw(1e-3)),
    "eva_adamw@16": Optimizer(lambda: eva_optax.eva_adamw(1e-3), tapped(rank=16), PERIOD),
    "foof+sgd/10": Optimizer(lambda: before_momentum(eva_optax.scale_by_foof), tapped(factors="input"), PERIOD),
    "kfac+sgd/10": Optimizer(lambda: before_momentum(eva_optax.scale_by_kfac), tapped(factors="both"), PERIOD),
    "foof_adamw": Optimizer(lambda: eva_optax.foof_adamw(1e-3), tapped(factors="input"), PERIOD),
    "shampoo/10": Optimizer(lambda: eva_optax.shampoo(1e-3, every=PERIOD), untapped, PERIOD),
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

    def trace(self) -> Any:
        """What `jax.jit` traces, ready to be lowered."""
        outputs = None
        if jax.tree.leaves(self.arguments)[0].sharding is not None:
            outputs = tuple(jax.tree.map(lambda leaf: leaf.sharding, part) for part in self.arguments[: self.donated])
        jitted = jax.jit(self.function, donate_argnums=tuple(range(self.donated)), out_shardings=outputs)
        return jitted.trace(*self.arguments)


def make_step(key: Key, target: str) -> Step:
    """The step that a row of the results is about."""
    device, case, layout, _, optimizer = key
    mesh = mesh_of(device, layout, target)
    if case in UPDATES:
        return update_alone(UPDATES[case], OPTIMIZERS[optimizer], mesh)
    chips = mesh.shape["data"] if mesh else 1
    return training_step(make_case(case, target == "cpu", chips), OPTIMIZERS[optimizer], mesh, layout)


def training_step(case: Case, optimizer: Optimizer, mesh: Mesh | None = None, layout: str = "single") -> Step:
    """The whole step: forward, backward, update; it takes and returns parameters, state and buffers."""
    model, tx = optimizer.tap(case.model), optimizer.make()

    def start(x: Any) -> tuple[Any, Any, Any]:
        variables = dict(model.init(jax.random.key(0), x))
        params = variables.pop("params")
        return params, tx.init(params), variables

    def make() -> tuple[Any, ...]:
        x, y = (_random(shape, case.classes, seed) for seed, shape in enumerate((case.inputs, case.targets)))
        return (*jax.jit(start)(x), x, y)

    trees = jax.eval_shape(start, case.inputs)
    rows = P("data") if layout != "single" else P()
    data = place((case.inputs, case.targets), lambda path, leaf: rows, mesh)
    step = step_of(model, case.loss, tx)
    return Step(step, (*place(trees, parameter_specs(trees[0], mesh, layout), mesh), *data), 3, make)


def update_alone(kernels: Kernels, optimizer: Optimizer, mesh: Mesh | None = None) -> Step:
    """The update without forward and backward pass: gradients come from memory."""
    params = jax.eval_shape(optimizer.tap(kernels).init, jax.random.key(0))["params"]
    tx = optimizer.make()

    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def make() -> tuple[Any, ...]:
        arrays, grads = (jax.tree.map(lambda leaf, seed=seed: _random(leaf, 1, seed), params) for seed in (0, 1))
        return arrays, tx.init(arrays), grads

    arguments = (params, jax.eval_shape(tx.init, params), params)
    return Step(update, place(arguments, lambda path, leaf: P(), mesh), 2, make)


def _random(shape: jax.ShapeDtypeStruct, classes: int, seed: int) -> jax.Array:
    key = jax.random.key(seed)
    if jnp.issubdtype(shape.dtype, jnp.integer):
        return jax.random.randint(key, shape.shape, 0, classes, shape.dtype)
    return jax.random.normal(key, shape.shape, shape.dtype)
