"""What a tap collects is what was asked for: the mean input alone, or both vectors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import eva_optax
from tests.helpers import assert_close, first_update

X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
NETWORK = nn.Sequential([nn.Dense(5), nn.tanh, nn.Dense(3, use_bias=False)])


def gradients(model, params):
    return jax.jit(jax.grad(lambda p: jnp.sum(model.apply({"params": p}, X) ** 2)))(params)


def test_the_mean_input_alone_gives_the_same_updates():
    both, alone = eva_optax.tap(NETWORK), eva_optax.tap(NETWORK, statistics=("a",))
    params, lean = (jax.jit(model.init)(jax.random.key(0), X)["params"] for model in (both, alone))
    assert set(lean["layers_0"]["kronecker"]["kernel,bias"]) == {"a", "n"}
    grads, full = gradients(alone, lean), gradients(both, params)
    found, wanted = eva_optax.vectors(grads), eva_optax.vectors(full)
    assert all(vectors.b is None for vectors in found.values())
    assert_close({name: v.a for name, v in found.items()}, {name: v.a for name, v in wanted.items()})
    for tx in (eva_optax.scale_by_eva_f(), eva_optax.eva_adamw(1e-2), eva_optax.center(optax.adam(1e-2))):
        (got, _), (want, _) = first_update(tx, grads, lean), first_update(tx, full, params)
        assert_close(eva_optax.strip(got), eva_optax.strip(want))


def test_eva_asks_for_the_statistic_that_it_lacks():
    params = eva_optax.tap(NETWORK, statistics=("a",)).init(jax.random.key(0), X)["params"]
    with pytest.raises(ValueError, match=r"scale_by_eva: needs .*'layers_0' has no \['b'\].*statistics=\('a', 'b'\)"):
        eva_optax.scale_by_eva().init(params)


@pytest.mark.parametrize("statistics", [("b",), ("a", "c"), "ab", ()])
def test_statistics_that_there_are_not_are_refused(statistics):
    with pytest.raises(ValueError, match="statistics must be"):
        eva_optax.tap(NETWORK, statistics=statistics)


def test_layers_with_batch_axes_of_their_own_keep_both():
    layer = nn.Einsum((2, 4, 3), "...hi,hio->...ho", use_bias=False)
    params = eva_optax.tap(layer, statistics=("a",)).init(jax.random.key(0), jnp.ones((5, 2, 4)))["params"]
    assert set(params["kronecker"]["kernel"]) == {"a", "b", "n"}


def test_scanned_layers_and_nnx_collect_the_mean_input_alone():
    scanned = nn.scan(
        lambda layer, x, _: (jnp.tanh(layer(x)), None),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
    )

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            return scanned(nn.Dense(4, name="dense"), x, None)[0]

    updates = []
    for statistics in (("a",), ("a", "b")):
        model = eva_optax.tap(Stack(), statistics=statistics)
        params = model.init(jax.random.key(0), X)["params"]
        tx = eva_optax.scale_by_eva_f()
        updates.append(eva_optax.strip(tx.update(gradients(model, params), tx.init(params))[0]))
    assert_close(*updates)
    layer = eva_optax.tap(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), statistics=("a",))
    assert set(layer.kronecker["kernel,bias"]) == {"a", "n"}
