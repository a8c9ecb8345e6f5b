"""Layers that reshape around their product, against the definition of their vectors on the split arrays."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import eva_optax
from tests.dense import assert_preconditioned
from tests.flax.nnx_cases import fast_jit
from tests.helpers import assert_close, curved, random_like
from tests.statistics import brute_force

SIZES = {"n": 3, "t": 2, "h": 2, "i": 3, "o": 4, "d": 2}


@dataclass(frozen=True)
class Case:
    """An equation; the same with all letters spelt out, a term's axes apart; and the kernel axes that a bias has."""

    equation: str
    x: str
    kernel: str
    y: str
    bias: str | None = None

    def __str__(self) -> str:
        return self.equation

    @property
    def split(self) -> str:
        return "{},{}->{}".format(*(term.replace(" ", "") for term in (self.x, self.kernel, self.y)))


def merged(term: str) -> tuple[int, ...]:
    return tuple(math.prod(SIZES[c] for c in axis) for axis in term.split())


def split(term: str) -> tuple[int, ...]:
    return tuple(SIZES[c] for c in term.replace(" ", ""))


EVERY = [
    Case("...(h i),h i o->...(h o)", "n t hi", "h i o", "n t ho", "h o"),
    Case("...(hi),hoi->...(ho)", "n t hi", "h o i", "n t ho", "ho"),
    Case("...i,i(h d)->...h d", "n t i", "i hd", "n t h d", "hd"),
    Case("...hd,(hd)o->...o", "n t h d", "hd o", "n t o"),
    Case("...hi,(hi)(od)->...od", "n t h i", "hi od", "n t o d"),
    Case("...(hi),i(ho)->...(ho)", "n t hi", "i ho", "n t ho", "ho"),
    Case("...hti,(ht)io->...hto", "n h t i", "ht i o", "n h t o"),
    Case("(n t)i,io->nto", "nt i", "i o", "n t o", "o"),
]
SIDE_BY_SIDE = EVERY[5]
CASES = {f"layer_{index}": case for index, case in enumerate(EVERY)}


def product(case: Case, x: Any, kernel: Any) -> Any:
    y = jnp.einsum(case.split, x.reshape(split(case.x)), kernel.reshape(split(case.kernel)))
    return y.reshape(merged(case.y))


class Reshaping(nn.Module):
    """What the equation of a case says, by reshaping around an einsum."""

    case: Case

    @nn.compact
    def __call__(self, x: Any) -> Any:
        y = product(self.case, x, self.param("w", nn.initializers.zeros, merged(self.case.kernel)))
        if self.case.bias is None:
            return y
        bias = self.param("b", nn.initializers.zeros, merged(self.case.bias))
        return y + bias.reshape((1, 1, *y.shape[2:]))


class EveryCase(nn.Module):
    """A layer for each case: compiled once, it tests all of them."""

    @nn.compact
    def __call__(self, inputs: Any) -> Any:
        return [Reshaping(case, name=name)(inputs[name]) for name, case in CASES.items()]


class NNXReshaping(nnx.Module):
    """`Reshaping` in NNX."""

    def __init__(self, case: Case):
        self.case = case
        self.w = nnx.Param(jnp.zeros(merged(case.kernel)))
        self.b = None if case.bias is None else nnx.Param(jnp.zeros(merged(case.bias)))

    def __call__(self, x: Any) -> Any:
        return product(self.case, x, self.w[...])


@pytest.fixture(scope="module")
def registered() -> Iterator[None]:
    with (
        eva_optax.register(Reshaping, kernel="w", bias="b", equation=lambda layer: layer.case.equation),
        eva_optax.register(NNXReshaping, kernel="w", bias="b", equation=lambda layer: layer.case.equation),
    ):
        yield


@pytest.fixture(scope="module")
def inputs() -> dict[str, Any]:
    rng = np.random.default_rng(1)
    return {name: rng.normal(0.5, 1, merged(case.x)).astype(np.float32) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def gradients(registered: None, inputs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """The parameters, their gradients, and those of a zero added to each layer's split output."""
    model = eva_optax.tap(EveryCase())
    params = random_like(jax.eval_shape(lambda: model.init(jax.random.key(0), inputs))["params"])
    zeros = {
        name: np.zeros([SIZES[c] if c in case.kernel else 1 for c in case.y.replace(" ", "")], np.float32)
        for name, case in CASES.items()
    }

    def loss(params: Any, added: Any) -> Any:
        outputs = zip(CASES.items(), model.apply({"params": params}, inputs), strict=True)
        return sum(curved(y.reshape(split(case.y)) + added[name]) for (name, case), y in outputs)

    return params, *fast_jit(jax.grad(loss, (0, 1)))(params, zeros)


@pytest.mark.parametrize("name", CASES, ids=[str(case) for case in EVERY])
def test_the_vectors_are_those_of_the_split_product(name: str, gradients: Any, inputs: dict[str, Any]) -> None:
    case, (_, grads, added) = CASES[name], gradients
    kernel = split(case.kernel)
    a, b = (np.broadcast_to(vector, merged(case.kernel)) for vector in eva_optax.vectors(grads)[name])
    mean = brute_force.contraction_mean(case.split, inputs[name].reshape(split(case.x)), kernel)
    assert_close(a, np.broadcast_to(mean, kernel).reshape(a.shape))
    sizes = [SIZES[c] if c in case.y else 1 for c in case.kernel.replace(" ", "")]
    assert_close(b, np.broadcast_to(np.reshape(added[name], sizes), kernel).reshape(b.shape))


def test_their_layout_is_that_of_the_stored_kernel(gradients: Any) -> None:
    params, grads, _ = gradients
    tx = eva_optax.scale_by_eva(damping=0.1)
    updates, _ = fast_jit(lambda grads: tx.update(grads, tx.init(params)))(grads)
    assert set(assert_preconditioned(grads, updates, 0.1)) == set(CASES)


@pytest.mark.parametrize("name", CASES, ids=[str(case) for case in EVERY])
def test_nnx_finds_the_same_probes_without_a_call(name: str, gradients: Any, inputs: dict[str, Any]) -> None:
    example = [inputs[name]] if CASES[name] is SIDE_BY_SIDE else []
    ((probe_name, probe),) = eva_optax.tap(NNXReshaping(CASES[name]), *example).kronecker.items()
    want = gradients[0][name]["kronecker"][probe_name]
    assert {leaf: variable.shape for leaf, variable in probe.items()} == {leaf: v.shape for leaf, v in want.items()}


def test_groups_side_by_side_in_one_axis_of_the_kernel_take_an_example_in_nnx(registered: None) -> None:
    with pytest.raises(ValueError, match=r"depends on the call.*eva_optax\.tap\(model, x\)"):
        eva_optax.tap(NNXReshaping(SIDE_BY_SIDE))


class Wrong(nnx.Module):
    """Calls `tap_einsum` as it is told."""

    def __init__(self, shape: tuple[int, ...]):
        self.w = nnx.Param(jnp.zeros(shape))

    def __call__(self, equation: str, x: Any, y: Any) -> Any:
        return eva_optax.tap_einsum(self, "w", equation, x, y)


@pytest.mark.parametrize(
    ("equation", "x", "kernel", "y", "message"),
    [
        ("n(hi),hio->n(ho)", (5, 7), (2, 3, 4), (5, 8), "does not fit an input of shape"),
        ("n(hi),hio->n(ho)", (5, 6), (2, 3, 4), (5, 9), r"output of shape \(5, 9\)"),
        ("ni,(io)->no", (5, 3), (12,), (5, 4), "does not fit"),  # inputs and outputs in one axis
        ("nhi,i(oh)->nho", (5, 2, 3), (3, 8), (5, 2, 4), "does not fit"),  # groups are not side by side
        ("n(hi),(hi)o->no", (5, 6), (6, 4), (5, 4), "does not fit"),  # nothing tells h and i apart
        ("n(hi,hio->n(ho)", (5, 6), (2, 3, 4), (5, 8), "must have the form"),
        ("n((hi)),hio->n(ho)", (5, 6), (2, 3, 4), (5, 8), "must have the form"),
        ("...n...(hi),hio->n(ho)", (5, 6), (2, 3, 4), (5, 8), "must have the form"),
    ],
)
def test_equations_without_a_layout_are_refused(equation: str, x: Any, kernel: Any, y: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Wrong(kernel)(equation, jnp.zeros(x), jnp.zeros(y))
