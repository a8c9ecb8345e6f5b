"""Trains with nothing but the installed package, in Linen and in NNX: `.ci/package` runs it away from the sources."""

from importlib import metadata, resources
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import eva_optax

STEPS = 20

assert Path(eva_optax.__file__).parts[-3] == "site-packages", eva_optax.__file__
assert metadata.version("eva-optax") == eva_optax.__version__
assert resources.files("eva_optax").joinpath("py.typed").is_file()
for name in eva_optax.__all__:
    getattr(eva_optax, name)

x = jax.random.normal(jax.random.key(0), (64, 8)) + 1.0
y = jnp.sin(x @ jax.random.normal(jax.random.key(1), (8, 2)))


def linen(rank: int | None) -> list[float]:
    model = eva_optax.tap(nn.Sequential([nn.Dense(16), nn.tanh, nn.Dense(2)]), rank=rank)
    params = model.init(jax.random.key(2), x)["params"]
    tx = eva_optax.eva_adamw(1e-2)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((model.apply({"params": p}, x) - y) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    state, losses = tx.init(params), []
    for _ in range(STEPS):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    eva_optax.check(state)
    return losses


def in_nnx() -> list[float]:
    rngs = nnx.Rngs(0)
    model = eva_optax.tap(nnx.Sequential(nnx.Linear(8, 16, rngs=rngs), nnx.tanh, nnx.Linear(16, 2, rngs=rngs)))
    optimizer = nnx.Optimizer(model, optax.chain(eva_optax.scale_by_eva(), optax.sgd(0.1, momentum=0.9)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(STEPS)]
    eva_optax.check(optimizer)
    return losses


for name, losses in {"linen, one vector": linen(None), "linen, rank 4": linen(4), "nnx": in_nnx()}.items():
    assert losses[-1] < 0.9 * losses[0], (name, losses)
    print(f"{name}: loss {losses[0]:.3f} to {losses[-1]:.3f}")
print(*(f"{name} {metadata.version(name)}" for name in ("eva-optax", "jax", "flax", "optax")))
