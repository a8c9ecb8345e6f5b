"""Line searches behind Eva: along its direction, as if there were no probes."""

from functools import cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eva_optax
from tests.helpers import assert_close

PLAIN = nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(3)])
MODEL = eva_optax.tap(PLAIN)
X, Y = (np.random.default_rng(seed).normal(size=(8, 5 - seed)).astype(np.float32) for seed in (0, 2))
SEARCHES = {
    "zoom": lambda: optax.scale_by_zoom_linesearch(4),
    "backtracking": lambda: optax.scale_by_backtracking_linesearch(4),
}


def loss_of(model):
    return lambda params: jnp.mean((model.apply({"params": params}, X) - Y) ** 2)


@cache
def start():
    params = MODEL.init(jax.random.key(0), X)["params"]
    return params, *jax.jit(jax.value_and_grad(loss_of(MODEL)))(params)


def search(tx, model, grads, params):
    """The first update of a chain with a line search."""

    def update(grads, params):
        extra = {"value": loss_of(model)(params), "grad": grads, "value_fn": loss_of(model)}
        return tx.update(grads, tx.init(params), params, **extra)[0]

    return jax.jit(update)(grads, params)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_line_search_behind_eva_goes_along_its_direction(name):
    params, value, grads = start()
    eva = optax.chain(eva_optax.scale_by_eva(), optax.scale(-3.0))
    found = search(optax.chain(eva, SEARCHES[name]()), MODEL, grads, params)
    direction, _ = jax.jit(eva.update)(grads, eva.init(params), params)
    told = optax.stateless(lambda updates, params: eva_optax.strip(direction))
    wanted = search(optax.chain(told, SEARCHES[name]()), PLAIN, eva_optax.strip(grads), eva_optax.strip(params))
    assert_close(eva_optax.strip(found), wanted, 1e-5)
    assert loss_of(MODEL)(optax.apply_updates(params, found)) < value


def test_lbfgs_behind_eva_lowers_the_loss():
    params, value, grads = start()
    tx = optax.chain(eva_optax.scale_by_eva(), optax.lbfgs(memory_size=2, linesearch=SEARCHES["backtracking"]()))
    assert loss_of(MODEL)(optax.apply_updates(params, search(tx, MODEL, grads, params))) < value


def test_a_line_search_in_other_coordinates_is_refused():
    params, _, grads = start()
    tx = eva_optax.conjugate(optax.chain(optax.sgd(1.0), SEARCHES["backtracking"]()))
    with pytest.raises(ValueError, match=r"eva_optax\.conjugate: a line search inside.*Put it behind"):
        search(tx, MODEL, grads, params)
    behind = optax.chain(eva_optax.conjugate(optax.scale_by_lbfgs()), optax.scale(-1.0), SEARCHES["backtracking"]())
    assert np.count_nonzero(search(behind, MODEL, grads, params)["layers_0"]["kernel"])
