"""`coverage(..., verify=True)` finds layers that compute something else than their equation says."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import eva_optax

X = jnp.asarray(np.random.default_rng(0).normal(0.3, 1, (5, 3)), jnp.float32)


class Square(nn.Module):
    """A square kernel of zeros, used in one of several ways; the shapes are those of `...i,io->...o` always."""

    way: str

    @nn.compact
    def __call__(self, x: Any) -> Any:
        w = self.param("w", nn.initializers.zeros, (x.shape[-1], x.shape[-1]))
        match self.way:
            case "as said":
                return x @ w
            case "scaled":
                return 0.1 * (x @ w)
            case "with a bias":
                return x @ w + self.param("b", nn.initializers.ones, w.shape[-1:]).reshape(1, -1)
            case "transposed":
                return x @ w.T
            case "activated":
                return nn.relu(x @ w)
            case "residual":
                return x + x @ w
            case "normalized":
                return x @ (w / jnp.linalg.norm(w, axis=0, keepdims=True))


class Stack(nn.Module):
    """Such layers in a scan, rematerialised."""

    way: str

    @nn.compact
    def __call__(self, x: Any) -> Any:
        scan = nn.scan(
            lambda layer, x, _: (layer(x), None), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        return scan(nn.remat(Square)(self.way, name="square"), x, None)[0]


def errors(model: Any, *args: Any) -> dict[str, float]:
    return eva_optax.coverage(model, *args, verify=True).mismatched


@pytest.fixture(autouse=True)
def registered() -> Any:
    with (
        eva_optax.register(Square, kernel="w", bias="b", equation="...i,io->...o"),
        eva_optax.register(NNXSquare, kernel="w", equation="...i,io->...o"),
    ):
        yield


@pytest.mark.parametrize("way", ["as said", "scaled", "with a bias"])
def test_layers_that_are_as_said(way: str) -> None:
    report = eva_optax.coverage(Square(way), X, verify=True)
    assert next(row.error for row in report.rows if row.path == "w") < 1e-5
    assert not report.mismatched
    assert "off" not in str(report)


@pytest.mark.parametrize("way", ["transposed", "activated", "residual", "normalized"])
def test_layers_that_are_not(way: str) -> None:
    model = nn.Sequential([nn.Dense(3), Square(way)])
    assert not eva_optax.coverage(model, X).mismatched
    report = eva_optax.coverage(model, X, verify=True)
    ((path, error),) = report.mismatched.items()
    assert path == "layers_1/w"
    assert 0.05 < error <= 1
    assert f"not the equation's: {error:.0%} off" in " ".join(str(report).split())
    assert report.share == 1


def test_a_scan_and_a_shape_for_an_input() -> None:
    assert not errors(Stack("as said"), jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert set(errors(Stack("transposed"), jax.ShapeDtypeStruct(X.shape, X.dtype))) == {"square/w"}


def test_layers_of_flax_are_as_said_and_a_bias_that_stays_untapped_is_not_compared() -> None:
    layers = [nn.Dense(3), nn.DenseGeneral((2, 4)), nn.Einsum((2, 4, 5, 6), "nha,haoi->nio"), nn.Conv(2, (3,))]
    report = eva_optax.coverage(nn.Sequential(layers), X, verify=True)
    assert [row.path for row in report.rows if row.error is not None] == [f"layers_{i}/kernel" for i in range(2)]
    assert not report.mismatched
    assert report.untapped.keys() == {"layers_2/bias"}
    assert eva_optax.coverage(nn.Sequential([jnp.tanh]), X, verify=True).rows == ()


JittedSquare = nn.jit(Square)


class Compiled(nn.Module):
    """Such a layer under `nn.jit`, which keeps what it traced."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return JittedSquare("transposed", name="square")(x)


def test_what_jit_keeps_of_other_runs_is_not_taken_for_this_one() -> None:
    model, key = eva_optax.tap(Compiled()), jax.random.key(0, impl="unsafe_rbg")
    variables = model.init(key, X)

    def plain() -> str:
        run = jax.make_jaxpr(lambda key: model.apply(variables, X, rngs={"params": key}, mutable=True))
        return str(run(key))

    assert "callback" not in plain()
    assert set(errors(model, X)) == {"square/w"}
    assert "callback" not in plain()


class NNXSquare(nnx.Module):
    """`Square` in NNX."""

    def __init__(self, transposed: bool):
        self.transposed, self.w = transposed, nnx.Param(jnp.zeros((3, 3)))

    def __call__(self, x: Any) -> Any:
        return x @ (self.w[...].T if self.transposed else self.w[...])


class Raw(nnx.Module):
    """A raw matrix whose tap has another equation than its product."""

    def __init__(self) -> None:
        self.w, self.v = nnx.Param(jnp.zeros((3, 3))), nnx.Param(jnp.zeros((3, 3)))
        self.squares = nnx.List([NNXSquare(False), NNXSquare(True)])

    def __call__(self, x: Any) -> Any:
        x = self.squares[1](self.squares[0](x))
        x = eva_optax.tap_einsum(self, "w", "bi,io->bo", x, x @ self.w[...])
        return eva_optax.tap_einsum(self, "v", "bi,oi->bo", x, x @ self.v[...])


class LinenRaw(nn.Module):
    """`Raw` in Linen, without layers inside."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        w, v = (self.param(name, nn.initializers.zeros, (3, 3)) for name in ("w", "v"))
        x = eva_optax.tap_einsum(self, "w", "bi,io->bo", x, x @ w)
        return eva_optax.tap_einsum(self, "v", "bi,oi->bo", x, x @ v)


def test_raw_matrices_and_nnx_whose_model_stays_as_it_is() -> None:
    assert set(errors(LinenRaw(), X)) == {"v"}
    for model in (Raw(), eva_optax.tap(Raw(), X)):
        before = str(nnx.state(model)), [type(module) for _, module in nnx.iter_graph(model)]
        assert set(errors(model, X)) == {"v", "squares/1/w"}
        assert (str(nnx.state(model)), [type(module) for _, module in nnx.iter_graph(model)]) == before


def test_an_nnx_model_is_not_run_without_its_arguments() -> None:
    with pytest.raises(ValueError, match=r"verify=True runs NNXSquare\. Give .*coverage\(model, x, verify=True\)"):
        eva_optax.coverage(NNXSquare(False), verify=True)
