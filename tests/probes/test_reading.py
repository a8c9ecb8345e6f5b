"""What `vectors`, `sketches` and `factors` make of gradients that something changed."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eva_optax
from tests.helpers import assert_close, curved, random_like

X = jnp.asarray(np.random.default_rng(0).normal(0.5, 1, (6, 4)), jnp.float32)


class Twice(nn.Module):
    """A layer that is called twice."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = nn.Dense(4)
        return layer(jnp.sin(layer(x)))


def gradient(**options: Any) -> Any:
    model = eva_optax.tap(Twice(), **options)
    params = random_like(jax.eval_shape(lambda: model.init(jax.random.key(0), X))["params"])
    return jax.jit(jax.grad(lambda params: curved(model.apply({"params": params}, X))))(params)


# What reads them, what the tap is asked for, and the power of a common factor that each part has.
READERS = [
    (eva_optax.vectors, {}, {"a": 0, "b": 1}),
    (eva_optax.sketches, {"rank": 2}, {"moment": 0, "directions": 0, "trace": 0}),
    (eva_optax.factors, {"factors": "both"}, {"A": 0, "B": 2}),
]
readers = pytest.mark.parametrize(("read", "options", "powers"), READERS, ids=["vectors", "sketches", "factors"])


@readers
def test_a_common_factor_scales_sums_and_no_means(read: Any, options: Any, powers: Any) -> None:
    grads = gradient(**options)
    given, scaled = (read(tree)["Dense_0"] for tree in (grads, jax.tree.map(lambda leaf: 0.25 * leaf, grads)))
    for name, power in powers.items():
        assert np.count_nonzero(getattr(given, name))
        assert_close(getattr(scaled, name), 0.25**power * np.asarray(getattr(given, name)))


def test_calls_are_averaged() -> None:
    """A is the mean of those of both calls."""
    model = eva_optax.tap(Twice(), factors="input")
    layer = random_like(jax.eval_shape(lambda: model.init(jax.random.key(0), X))["params"])["Dense_0"]
    second = np.sin(np.asarray(X) @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"]))
    wanted = np.mean([rows.T @ rows / len(rows) for rows in (np.asarray(X), second)], 0)
    assert_close(eva_optax.factors(gradient(factors="input"))["Dense_0"].A, wanted, 1e-5)


@readers
def test_what_is_no_gradient_is_refused_where_values_are_known(read: Any, options: Any, powers: Any) -> None:
    signs = jax.tree.map(jnp.sign, gradient(**options))
    with pytest.raises(ValueError, match=r"layer 'Dense_0' .* is not the gradient of a probe.*Put Eva first"):
        read(signs)
    found = jax.jit(read)(signs)["Dense_0"]
    assert all(np.isnan(getattr(found, name)).all() for name in powers if name != "directions")
