"""What `register` may be told of a class: any argument as the input, and what only a call knows; Linen and NNX."""

import functools
import operator
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import eva_optax
from tests.flax.nnx_cases import fast_jit, jit
from tests.helpers import curved

X = jnp.asarray(np.random.default_rng(0).normal(0.3, 1, (5, 3)), jnp.float32)


def logged(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return call


class Einsum(nn.Module):
    """The equation is an argument of the call, before the input, and the kernel's name an attribute."""

    shape: tuple[int, ...]
    weight_name: str = "w"

    @nn.compact
    @logged
    def __call__(self, eqn: str, x: Any, *, train: bool = True) -> Any:
        return jnp.einsum(eqn, x, self.param(self.weight_name, nn.initializers.normal(), self.shape))


class NNXEinsum(nnx.Module):
    """`Einsum` in NNX."""

    def __init__(self, shape: tuple[int, ...], weight_name: str = "w"):
        self.weight_name = weight_name
        setattr(self, weight_name, nnx.Param(jnp.ones(shape) / 3))

    @logged
    def __call__(self, eqn: str, x: Any, *, train: bool = True) -> Any:
        return jnp.einsum(eqn, x, getattr(self, self.weight_name)[...])


class Heads(nn.Module):
    """One call by position, one by name."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        y = Einsum((3, 2, 4), name="one")("bi,iho->bho", x)
        return Einsum((2, 4, 3), "v", name="two")(x=y, eqn="bho,hoi->bi", train=False)


class NNXHeads(nnx.Module):
    """`Heads` in NNX."""

    def __init__(self) -> None:
        self.one, self.two = NNXEinsum((3, 2, 4)), NNXEinsum((2, 4, 3), "v")

    def __call__(self, x: Any) -> Any:
        return self.two(x=self.one("bi,iho->bho", x), eqn="bho,hoi->bi", train=False)


def told(layer: Any, eqn: str, x: Any, *, train: bool) -> str:
    assert isinstance(train, bool)  # a default is told, too
    return eqn


def register(cls: type, which: int | str) -> eva_optax.Registration:
    return eva_optax.register(cls, kernel=operator.attrgetter("weight_name"), equation=told, input=which)


def check(vectors: Any, hidden: Any) -> None:
    assert set(vectors) == {"one", "two"}
    np.testing.assert_allclose(vectors["one"].a[:, 0, 0], X.mean(0), rtol=1e-5)
    np.testing.assert_allclose(vectors["two"].a[..., 0], hidden.mean(0), rtol=1e-5)


@pytest.mark.parametrize("which", [1, "x"])
def test_a_linen_call_tells_its_equation_and_its_input(which: int | str) -> None:
    model = eva_optax.tap(Heads())
    with register(Einsum, which):
        params = model.init(jax.random.key(0), X)["params"]
        assert eva_optax.coverage(model, X).share == 1
        grads = fast_jit(jax.grad(lambda p: curved(model.apply({"params": p}, X))))(params)
    check(eva_optax.vectors(grads), jnp.einsum("bi,iho->bho", X, params["one"]["w"]))


def test_an_nnx_call_tells_it_to_an_example() -> None:
    with register(NNXEinsum, "x"):
        with pytest.raises(ValueError, match=r"depends on the call: tap with an example input, eva_optax\.tap"):
            eva_optax.tap(NNXHeads())
        untapped = eva_optax.coverage(NNXHeads()).untapped
        assert "depends on the call" in untapped["one/w"]
        assert "depends on the call" in untapped["two/v"]
        model = eva_optax.tap(NNXHeads(), X)
        assert eva_optax.coverage(model).share == eva_optax.coverage(NNXHeads(), X).share == 1
        classes = [type(model.one), type(model.two)]
        assert eva_optax.tap(model, X) is eva_optax.tap(model) is model
        assert [type(model.one), type(model.two)] == classes
        assert "recorder" not in str(vars(model.one))
    hidden = jnp.einsum("bi,iho->bho", X, model.one.w[...])
    check(eva_optax.vectors(jit(nnx.grad(lambda m: curved(m(X))))(model)), hidden)


class NNXStack(nnx.Module):
    """Stacked layers whose equation is told by the call."""

    def __init__(self) -> None:
        self.layers = nnx.vmap(lambda _: NNXEinsum((3, 3)))(jnp.zeros(2))

    def __call__(self, x: Any) -> Any:
        step = lambda x, layer: jnp.tanh(layer("bi,io->bo", x))  # noqa: E731
        return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def test_stacked_layers_are_told_by_an_example_too() -> None:
    with register(NNXEinsum, 1):
        model = eva_optax.tap(NNXStack(), X)
        assert {name: v.shape for name, v in model.layers.kronecker["w"].items()} == {
            "a": (2, 3, 1),
            "b": (2, 1, 3),
            "n": (2, 1, 4),
        }
        vectors = eva_optax.vectors(jit(nnx.grad(lambda m: curved(m(X))))(model))
    np.testing.assert_allclose(vectors["layers"].a[0, :, 0], X.mean(0), rtol=1e-5)


class Flagged(nn.Module):
    """A call has more arguments than the input, and the equation needs none of them."""

    @nn.compact
    def __call__(self, inputs: Any, train: bool, *, deterministic: bool = True) -> Any:
        return inputs @ self.param("kernel", nn.initializers.ones, (inputs.shape[-1], 4))


class NNXFlagged(nnx.Module):
    """`Flagged` in NNX, with an array that is no parameter in the place of a bias."""

    def __init__(self) -> None:
        self.kernel = nnx.Param(jnp.ones((3, 4)))
        self.bias = nnx.data(jnp.zeros(4))

    def __call__(self, inputs: Any, train: bool, *, out_sharding: Any = None) -> Any:
        return inputs @ self.kernel[...] + self.bias.reshape(1, 4)


def test_further_arguments_do_not_matter() -> None:
    def equation(layer: Any, style: str = "...i,io->...o") -> str:  # a default is the function's own
        return style

    with eva_optax.register(Flagged, kernel="kernel", equation=equation):
        params = eva_optax.tap(Flagged()).init(jax.random.key(0), X, True)["params"]
        assert eva_optax.tap(Flagged()).apply({"params": params}, train=False, inputs=X, deterministic=False).shape
        assert eva_optax.coverage(Flagged(), inputs=X, train=True).share == 1
    with eva_optax.register(NNXFlagged, kernel="kernel", bias="bias", equation="...i,io->...o"):
        model = eva_optax.tap(NNXFlagged())
        assert set(model.kronecker) == {"kernel"}
        grads = jit(nnx.grad(lambda m: curved(m(train=True, inputs=X, out_sharding=None))))(model)
    np.testing.assert_allclose(eva_optax.vectors(grads)[""].a[:, 0], X.mean(0), rtol=1e-5)


@pytest.mark.parametrize("which", [3, -1, "eqns"])
def test_an_argument_that_there_is_not_is_refused(which: int | str) -> None:
    with pytest.raises(ValueError, match=rf"input={which!r}, but Einsum.__call__ has the arguments \['eqn', 'x', 'tra"):
        eva_optax.register(Einsum, kernel="w", equation="bi,io->bo", input=which)


class Pair(nn.Module):
    """Returns something beside the output."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return x @ self.param("kernel", nn.initializers.ones, (3, 4)), None


SHAPES = r"an input of shape \(5, 3\), the kernel '\w+' of shape \(3, 4\), and an output of shape \(5, 4\)"


@pytest.mark.parametrize(
    "equation", ["...i,oi->...o", "...i,io->...", "...i,io->...oo", "bti,io->bto", "...i,...io->o"]
)
def test_a_wrong_equation_is_refused_at_the_first_call(equation: str) -> None:
    model = nn.Sequential([Flagged(), jnp.tanh])
    with eva_optax.register(Flagged, kernel="kernel", equation=equation) as registration:
        with pytest.raises(ValueError, match=SHAPES) as refusal:
            eva_optax.tap(model).init(jax.random.key(0), X, True)
        for words in ("'layers_0'", "Flagged", "eva_optax.register: ", "input"):
            refusal.match(words)
        assert repr(registration.equation) in str(refusal.value)
    with (
        eva_optax.register(NNXFlagged, kernel="kernel", equation=equation),
        pytest.raises(ValueError, match=rf"{SHAPES}|kernel 'kernel' of shape \(3, 4\) of NNXFlagged at '0'"),
    ):
        eva_optax.tap(nnx.List([NNXFlagged()]))[0](X, True)


def test_a_wrong_input_and_an_output_of_several_are_refused() -> None:
    with register(Einsum, 0), pytest.raises(ValueError, match=r"at 'one'.*shape \(\).*Is argument 0 of the call"):
        eva_optax.tap(Heads()).init(jax.random.key(0), X)
    with register(NNXEinsum, 0), pytest.raises(ValueError, match=r"NNXEinsum at 'one'.*Is argument 0 of the call"):
        eva_optax.tap(NNXHeads(), X)
    with (
        eva_optax.register(Pair, kernel="kernel", equation="...i,io->...o"),
        pytest.raises(ValueError, match="an output that is no array"),
    ):
        eva_optax.tap(Pair()).init(jax.random.key(0), X)
