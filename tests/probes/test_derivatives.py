"""The tap under every derivative: it must be there, and right, wherever JAX differentiates, maps or moves a model."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export
from jax.experimental import jet
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import eva_optax
from tests.helpers import assert_close, random_like

SHAPE = (8, 5, 2)
X = jnp.asarray(np.random.default_rng(1).normal(0.5, 1, SHAPE), jnp.float32)
TOLERANCE = 2e-5  # of two programs that round in their own ways, through second derivatives

Model = Callable[[Any, jax.Array], jax.Array]


class Step(nn.Module):
    """One of the scanned layers."""

    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(4, name="linear")(x)), None


class Network(nn.Module):
    """A convolution, an einsum, scanned layers and a dense layer; smooth, and one number for each example."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Conv(3, (2,), padding="VALID", name="first")(x))
        x = jnp.tanh(nn.Einsum((3, 2, 2), "...i,ihd->...hd", name="einsum")(x))
        scan = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = scan(name="stack")(x.mean(1).reshape(-1, 4), None)
        return jnp.tanh(nn.Dense(2, name="last")(x)).sum(-1)


class NNXNetwork(nnx.Module):
    """`Network` in NNX."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Conv(2, 3, (2,), padding="VALID", rngs=rngs)
        self.einsum = nnx.Einsum("...i,ihd->...hd", (3, 2, 2), (2, 2), rngs=rngs)
        self.stack = nnx.split_rngs(splits=2)(nnx.vmap(lambda rngs: nnx.Linear(4, 4, rngs=rngs)))(rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.einsum(jnp.tanh(self.first(x))))
        # `nnx.scan` refuses, tapped or not, to run inside of a derivative.
        graphdef, stack = nnx.split(self.stack)

        def step(x, layer):
            return jnp.tanh(nnx.merge(graphdef, layer)(x)), None

        x, _ = jax.lax.scan(step, x.mean(1).reshape(-1, 4), stack)
        return jnp.tanh(self.last(x)).sum(-1)


class Perceptron(nn.Module):
    """Dense layers alone: `jet` has no rule for a scan."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(3, name="first")(x.reshape(len(x), -1)))
        return jnp.tanh(nn.Dense(2, name="last")(x)).sum(-1)


@dataclass(frozen=True, eq=False)
class Pair:
    """A model tapped and untapped, as functions of parameters and input, with parameters for both."""

    tapped: Model
    plain: Model
    params: Any
    bare: Any


def linen_pair(module: nn.Module) -> Pair:
    model = eva_optax.tap(module)
    params = random_like(jax.eval_shape(model.init, jax.random.key(0), X)["params"])
    tapped, plain = (lambda params, x, m=m: m.apply({"params": params}, x) for m in (model, module))
    return Pair(tapped, plain, params, eva_optax.strip(params))


def nnx_pair() -> Pair:
    untapped = NNXNetwork(nnx.Rngs(0))
    model = eva_optax.tap(nnx.clone(untapped))
    (graphdef, params), (bare_graphdef, _) = nnx.split(model), nnx.split(untapped)
    params = random_like(params)
    tapped, plain = (lambda params, x, g=g: nnx.merge(g, params)(x) for g in (graphdef, bare_graphdef))
    return Pair(tapped, plain, params, eva_optax.strip(params))


@cache
def pair(kind: str) -> Pair:
    return {"Linen": lambda: linen_pair(Network()), "NNX": nnx_pair}[kind]()


# Each makes a loss out of a model: what it computes is linear, or smooth, in derivatives of the model's output.


def plain(model: Model, params: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(model(params, x) ** 2)


def single(model: Model, params: Any) -> Callable[[jax.Array], jax.Array]:
    """The model as a function of one example."""
    return lambda example: model(params, example[None])[0]


def forces(model: Model, params: Any, x: jax.Array) -> jax.Array:
    inner = jax.vmap(jax.grad(single(model, params)))(x)
    return jnp.mean(inner**2) + plain(model, params, x)


def forward_mode(model: Model, params: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(jax.jvp(lambda x: model(params, x), (x,), (jnp.ones_like(x),))[1] ** 2)


def laplacian(hessian: Callable[..., Any], model: Model, params: Any, x: jax.Array) -> jax.Array:
    size = x[0].size

    def trace(example: jax.Array) -> jax.Array:
        return jnp.trace(hessian(single(model, params))(example).reshape(size, size))

    return jnp.mean(jax.vmap(trace)(x) ** 2)


def twice_forward(model: Model, params: Any, x: jax.Array) -> jax.Array:
    def derivative(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
        return lambda x: jax.jvp(function, (x,), (jnp.ones_like(x),))[1]

    return jnp.mean(derivative(derivative(lambda x: model(params, x)))(x) ** 2)


def linearized(model: Model, params: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(jax.linearize(lambda x: model(params, x), x)[1](jnp.ones_like(x)) ** 2)


def rematerialized(model: Model, params: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(jax.checkpoint(model)(params, x) ** 2)


def mapped(model: Model, params: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(jax.vmap(single(model, params))(x) ** 2)


def one_by_one(model: Model, params: Any, x: jax.Array) -> jax.Array:
    return jnp.mean(jax.lax.map(single(model, params), x) ** 2)


def branch(model: Model, params: Any, x: jax.Array) -> jax.Array:
    y = jax.lax.cond(jnp.isfinite(x[0, 0, 0]), lambda: model(params, x), lambda: 2 * model(params, x))
    return jnp.mean(y**2)


LOSSES = {
    "plain": plain,
    "forces": forces,
    "jvp": forward_mode,
    "Laplacian, forward over reverse": partial(laplacian, jax.hessian),
    "Laplacian, reverse over reverse": partial(laplacian, lambda f: jax.jacrev(jax.grad(f))),
    "jvp of jvp": twice_forward,
    "linearize": linearized,
    "remat": rematerialized,
    "vmap": mapped,
    "lax.map": one_by_one,
    "cond": branch,
}


def leaf(tree: Any, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return np.asarray(tree[...])


def mean_patch() -> np.ndarray:
    """The mean input of the convolution, in its kernel's layout."""
    x = np.asarray(X)
    return np.stack([x[:, offset : offset + 4].mean((0, 1)) for offset in range(2)])[..., None]


@cache
def plain_inputs(kind: str) -> dict[str, np.ndarray]:
    """The mean inputs of all layers as they run: what a derivative adds to a model moves none of them."""
    made = pair(kind)
    grads = jax.jit(jax.grad(lambda params: plain(made.tapped, params, X)))(made.params)
    inputs = {name: np.asarray(a) for name, (a, _) in eva_optax.vectors(grads).items()}
    np.testing.assert_allclose(inputs["first"], mean_patch(), rtol=1e-5)
    assert len(inputs) == 4
    return inputs


def check(kind: str, grads: Any, bare: Any) -> None:
    """Gradients of parameters are those of the untapped model, b is that of the bias, and a the mean input."""
    assert_close(jax.tree.leaves(eva_optax.strip(grads)), jax.tree.leaves(bare), TOLERANCE)
    found = eva_optax.vectors(grads)
    wanted = plain_inputs(kind)
    assert found.keys() == wanted.keys()
    for name, (a, b) in found.items():
        bias = leaf(grads, f"{name}/bias")
        assert np.count_nonzero(bias)
        assert_close(np.asarray(b).reshape(bias.shape), bias, TOLERANCE, floor=1e-3)
        assert_close(np.asarray(a), wanted[name], TOLERANCE)  # zero, if the tap was not there


both_kinds = pytest.mark.parametrize("kind", ["Linen", "NNX"])


@both_kinds
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_a_derivative_inside_the_loss_is_tapped(loss: Callable[..., jax.Array], kind: str) -> None:
    made = pair(kind)

    @jax.jit
    def both(params: Any, bare: Any) -> Any:
        return jax.grad(partial(loss, made.tapped))(params, X), jax.grad(partial(loss, made.plain))(bare, X)

    check(kind, *both(made.params, made.bare))


@both_kinds
def test_a_derivative_is_that_of_the_untapped_model(kind: str) -> None:
    """Nothing is differentiated for the parameters here: what a user who evaluates the model sees."""
    made, ones = pair(kind), jnp.ones_like(X)

    @jax.jit
    def both(params: Any, bare: Any) -> Any:
        models = (partial(made.tapped, params), partial(made.plain, bare))
        return [
            (jax.jvp(model, (X,), (ones,)), jax.vjp(model, X)[1](ones[:, 0, 0]), jax.hessian(model)(X[:1]))
            for model in models
        ]

    assert_close(*both(made.params, made.bare))


@both_kinds
def test_second_derivatives_over_parameters_are_those_of_the_untapped_model(kind: str) -> None:
    """A product with the Hessian, a curvature, and a derivative in the direction itself; probes take part in each."""
    made = pair(kind)
    direction = random_like(made.params, seed=1)

    def derivatives(model: Model, params: Any, direction: Any) -> tuple[Any, jax.Array, jax.Array]:
        def along(function: Callable[[Any], Any], length: Any = 1.0) -> Callable[[Any], Any]:
            scaled = jax.tree.map(lambda leaf: length * leaf, direction)
            return lambda params: jax.jvp(function, (params,), (scaled,))[1]

        loss = partial(plain, model, x=X)
        in_length = jax.jvp(lambda length: along(loss, length)(params), (2.0,), (1.0,))[1]
        return along(jax.grad(loss))(params), along(along(loss))(params), in_length

    product, *rest = jax.jit(partial(derivatives, made.tapped))(made.params, direction)
    wanted = jax.jit(partial(derivatives, made.plain))(made.bare, eva_optax.strip(direction))
    got = (eva_optax.strip(product), *rest)
    assert_close(jax.tree.leaves(got), jax.tree.leaves(wanted), TOLERANCE)


# Many devices.


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))


@cache
def single_device(kind: str, loss: Callable[..., jax.Array]) -> Any:
    made = pair(kind)
    return jax.jit(jax.grad(partial(loss, made.plain)))(made.bare, X)


@both_kinds
@pytest.mark.parametrize("reduce", ["gradients", "gradients, unchecked", "loss"])
def test_shard_map(reduce: str, kind: str, mesh: jax.sharding.Mesh) -> None:
    made = pair(kind)

    def gradient(params: Any, x: jax.Array) -> Any:
        if reduce == "loss":
            return jax.grad(lambda params: jax.lax.pmean(forces(made.tapped, params, x), "data"))(params)
        if reduce == "gradients":
            params = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, "data", to="varying"), params)
        return jax.lax.pmean(jax.grad(partial(forces, made.tapped))(params, x), "data")

    specs = {"in_specs": (P(), P("data")), "out_specs": P(), "check_vma": "unchecked" not in reduce}
    grads = jax.jit(jax.shard_map(gradient, mesh=mesh, **specs))(made.params, X)
    check(kind, grads, single_device(kind, forces))


@both_kinds
@pytest.mark.parametrize("kind_of_axis", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_jit(kind_of_axis: AxisType, kind: str) -> None:
    made, mesh = pair(kind), jax.make_mesh((4,), ("data",), axis_types=(kind_of_axis,))
    with jax.set_mesh(mesh):
        params = jax.device_put(made.params, NamedSharding(mesh, P()))
        x = jax.device_put(X, NamedSharding(mesh, P("data")))
        grads = jax.device_get(jax.jit(jax.grad(partial(forward_mode, made.tapped)))(params, x))
    check(kind, grads, single_device(kind, forward_mode))


# Elsewhere.


@both_kinds
def test_export_with_a_symbolic_batch(kind: str) -> None:
    made = pair(kind)
    x = jax.ShapeDtypeStruct(export.symbolic_shape("batch, 5, 2"), jnp.float32)
    leaves, structure = jax.tree.flatten(made.params)  # an exported program knows no NNX state

    def gradient(leaves: list[jax.Array], x: jax.Array) -> list[jax.Array]:
        params = jax.tree.unflatten(structure, leaves)
        return jax.tree.leaves(jax.grad(partial(plain, made.tapped))(params, x))

    exported = export.export(jax.jit(gradient))(leaves, x)
    grads = jax.tree.unflatten(structure, exported.call(leaves, X))
    check(kind, grads, single_device(kind, plain))


def test_taylor_mode_is_right_or_refused_in_so_many_words() -> None:
    perceptron = linen_pair(Perceptron())

    def loss(model: Model, params: Any) -> jax.Array:
        series = (jnp.ones_like(X), jnp.zeros_like(X))
        _, (_, second) = jet.jet(lambda x: model(params, x), (X,), (series,))
        return jnp.mean(second**2)

    wanted = jax.jit(jax.grad(partial(loss, perceptron.plain)))(perceptron.bare)
    try:
        grads = jax.jit(jax.grad(partial(loss, perceptron.tapped)))(perceptron.params)
    except NotImplementedError as error:
        assert "eva" in str(error)  # noqa: PT017
        return
    assert_close(eva_optax.strip(grads), wanted, TOLERANCE)
    found = eva_optax.vectors(grads)
    assert_close(np.asarray(found["first"].a), np.asarray(X).reshape(8, -1).mean(0)[:, None], TOLERANCE)
    for name in ("first", "last"):
        assert_close(found[name].b[0], wanted[name]["bias"], TOLERANCE, floor=1e-3)
