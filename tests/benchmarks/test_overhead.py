"""The counts of what is added to a step, on functions whose counts are known."""

import jax
import jax.numpy as jnp
import optax
import pytest

import eva_optax
from benchmarks.common.models import MLP
from benchmarks.common.training import gradient_of
from benchmarks.cost.cases import bottlenecks, gpt, mlp, squared_error
from benchmarks.cost.overhead import count_equations, overhead, tapped_layers


def test_equations_are_counted_in_every_jaxpr():
    x = jnp.ones(3)
    assert count_equations(lambda x: jnp.sin(x) * 2, x) == 2
    assert count_equations(jax.jit(lambda x: jnp.sin(x) * 2), x) == 3  # and the call
    assert count_equations(lambda x: jax.lax.fori_loop(0, 9, lambda i, x: jnp.sin(x), x), x) == 3  # scan, i + 1, sin
    assert count_equations(lambda x: jax.lax.cond(x[0] > 0, jnp.sin, jnp.cos, x), x) >= 3


@pytest.mark.parametrize(
    ("make", "equations"), [(lambda: optax.sgd(0.1, momentum=0.9), 6), (lambda: optax.adamw(1e-3), 34)]
)
def test_a_dense_layer_takes_as_many_equations_as_the_page_says(make, equations):
    def count(layers):
        params = jax.eval_shape(MLP(8, layers).init, jax.random.key(0), jnp.ones((2, 8)))["params"]
        tx = make()
        return count_equations(tx.update, params, jax.eval_shape(tx.init, params), params)

    assert count(3) - count(2) == equations


def test_a_gradient_takes_as_many_equations_as_the_page_says():
    def count(layers):
        model = MLP(8, layers, jnp.tanh)
        params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((2, 8)))["params"]
        return count_equations(gradient_of(model, squared_error), params, {}, jnp.ones((2, 8)), jnp.ones((2, 8)))

    assert count(4) - count(3) == 14


@pytest.mark.parametrize(
    ("case", "layers"),
    [
        (mlp(8, 64), (3, 3)),
        (gpt(1, 32, 32, 2, 2, 128), (12, 12)),
        (gpt(1, 32, 32, 2, 2, 128, True), (6, 12)),
        (bottlenecks(1, 8, 1, 8), (4, 4)),
    ],
    ids=["mlp", "gpt", "scanned gpt", "bottlenecks"],
)
def test_layers_that_are_tapped_are_counted(case, layers):
    variables = jax.eval_shape(eva_optax.tap(case.model).init, jax.random.key(0), case.inputs)
    assert tapped_layers(variables["params"]) == layers


def test_an_optimizer_that_adds_nothing_adds_nothing(monkeypatch):
    monkeypatch.setattr("benchmarks.cost.overhead.ADDED_TO", {"adamw": "adamw"})
    monkeypatch.setattr("benchmarks.cost.overhead.tapped_layers", lambda params: (1, 1))
    found = overhead(mlp(8, 64), "adamw", None, repetitions=1)
    assert [found[name] for name in ("gradient", "update", "step", "arrays", "entry", "kernels")] == [0] * 6
    assert all(0.1 < found[stage] < 10 for stage in ("trace", "lower", "compile"))
