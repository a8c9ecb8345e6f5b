"""The ready-made optimizers against what they are made of, and what all members check."""

import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eva_optax
from tests.dense import dense_case, two_layers
from tests.helpers import FAMILY, WITHOUT_TAP


def test_eva_alias_decouples_weight_decay_on_request():
    grads = dense_case(0)
    params = jax.tree.map(jnp.ones_like, grads)
    zero = jax.tree.map(jnp.zeros_like, grads)
    for decoupled, steps in ((False, [1.0, 1.9]), (True, [1.0, 1.0])):
        tx = eva_optax.eva(0.1, weight_decay=0.01, decoupled=decoupled)
        state, update = tx.init(params), jax.jit(tx.update)
        for step in steps:  # no gradient: what moves is the decay, through the momentum or past it
            updates, state = update(zero, state, params)
            np.testing.assert_allclose(updates["layer"]["kernel"], -0.1 * 0.01 * step, rtol=1e-6)


def momentum_by_hand(steps: list[np.ndarray], rate: float, momentum: float, nesterov: bool) -> list[np.ndarray]:
    trace, updates = np.zeros_like(steps[0]), []
    for step in steps:
        trace = step + momentum * trace
        updates.append(-rate * (step + momentum * trace if nesterov else trace))
    return updates


@pytest.mark.parametrize("alias", ["eva_f", "eva_s"])
def test_published_optimizers_are_their_preconditioner_with_momentum_and_decay(alias):
    with jax.enable_x64(True):
        params = two_layers(5)
        preconditioner, optimizer = {
            "eva_f": (
                eva_optax.scale_by_eva_f(0.03, relative=False, step_rule="kl_norm"),
                eva_optax.eva_f(0.1, weight_decay=0.01),
            ),
            "eva_s": (eva_optax.scale_by_eva_s(), eva_optax.eva_s(0.1, weight_decay=0.01)),
        }[alias]
        own, state, steps, got = preconditioner.init(params), optimizer.init(params), [], []
        precondition, optimize = jax.jit(preconditioner.update), jax.jit(optimizer.update)
        for seed in range(3):
            p, own = precondition(two_layers(seed), own)
            steps.append(np.asarray(p["dense"]["kernel"] + 0.01 * params["dense"]["kernel"]))
            updates, state = optimize(two_layers(seed), state, params)
            got.append(updates["dense"]["kernel"])
        for mine, wanted in zip(got, momentum_by_hand(steps, 0.1, 0.9, nesterov=alias == "eva_s"), strict=True):
            np.testing.assert_allclose(mine, wanted, rtol=0, atol=1e-12)


class Block(nn.Module):
    """One of the scanned layers, with two heads."""

    @nn.compact
    def __call__(self, carry, _):
        hidden = nn.DenseGeneral((2, 2), name="split")(nn.LayerNorm(name="norm")(carry))
        return carry + nn.DenseGeneral(3, axis=(-2, -1), name="merge")(nn.tanh(hidden)), None


class Stacked(nn.Module):
    """A convolution, an embedding, scanned layers with two heads, and a LayerNorm: every rank that Muon meets."""

    @nn.compact
    def __call__(self, images, tokens):
        x = nn.Conv(3, (2, 2))(images).mean((1, 2)) + nn.Embed(5, 3)(tokens)
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = blocks()(x, None)
        return nn.Dense(2, name="head")(x)


STACKED = eva_optax.tap(Stacked(), embeddings=True)


@pytest.fixture(scope="module")
def stacked():
    rng = np.random.default_rng(0)
    images, tokens = rng.normal(1, 1, (6, 4, 4, 2)).astype(np.float32), rng.integers(5, size=6)
    params = STACKED.init(jax.random.key(0), images, tokens)["params"]
    gradient = jax.jit(jax.grad(lambda params: jnp.mean(STACKED.apply({"params": params}, images, tokens) ** 2)))
    # What is compared is compared in float64: orthogonalization makes rounding errors larger.
    with jax.enable_x64(True):
        yield jax.tree.map(lambda leaf: np.asarray(leaf, float), (params, gradient(params)))


def follow(tx, params, grads, steps: int = 2):
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return eva_optax.strip(params)


def muon_axes(params):
    """Written by hand: input axes, output axes; what is left are stacks."""
    numbers = optax.contrib.MuonDimensionNumbers
    axes = {"Conv_0": ((0, 1, 2), (3,)), "split": ((1,), (2, 3)), "merge": ((1, 2), (3,)), "head": ((0,), (1,))}

    def choose(path, leaf):
        return numbers(*axes[path[-2].key]) if path[-1].key == "kernel" else None

    return jax.tree_util.tree_map_with_path(choose, params)


def test_a_large_damping_leaves_adamw_and_muon(stacked):
    params, grads = stacked
    rate = optax.linear_schedule(0.1, 0.01, 2)
    bare = eva_optax.strip(params)

    def matrices(tree):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)

    pairs = [
        (
            eva_optax.eva_adamw(rate, weight_decay=0.1, damping=1e12, mask=matrices),
            optax.adamw(rate, weight_decay=0.1, mask=matrices),
        ),
        (
            eva_optax.eva_muon(rate, damping=1e12),
            optax.contrib.muon(rate, muon_weight_dimension_numbers=muon_axes(bare)),
        ),
    ]
    for mine, theirs in pairs:
        got, wanted = follow(mine, params, grads), follow(theirs, bare, eva_optax.strip(grads))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9), got, wanted)


@pytest.mark.parametrize(
    ("alias", "of_optax", "shared", "different"),
    [
        (eva_optax.eva_adamw, optax.adamw, 9, {}),
        (eva_optax.eva_muon, optax.contrib.muon, 12, {}),
        (eva_optax.foof_adamw, optax.adamw, 9, {}),
        (eva_optax.foof_muon, optax.contrib.muon, 12, {}),
        # Published with momentum; with weight decay as an argument of the optimizer itself.
        *((alias, optax.sgd, 2, {"momentum": 0.9}) for alias in (eva_optax.eva, eva_optax.eva_f, eva_optax.eva_s)),
        *((alias, optax.add_decayed_weights, 1, {}) for alias in (eva_optax.eva, eva_optax.eva_f, eva_optax.eva_s)),
    ],
)
def test_arguments_shared_with_optax_keep_its_defaults(alias, of_optax, shared, different):
    mine, theirs = inspect.signature(alias).parameters, inspect.signature(of_optax).parameters
    names = [name for name in mine if name in theirs]
    assert len(names) == shared
    assert {name: mine[name].default for name in names if mine[name].default != theirs[name].default} == different
    if of_optax is optax.adamw:  # a drop-in: its positional arguments are Optax's, in order
        assert [(n, mine[n].kind) for n in list(mine)[: len(theirs)]] == [(n, theirs[n].kind) for n in theirs]


@pytest.mark.parametrize("name", FAMILY)
def test_options_and_trees_are_checked(name):
    build = FAMILY[name]
    if name != "center":  # which has no damping
        with pytest.raises(ValueError, match="damping must be greater than 0, got -1"):
            build(damping=-1)
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\), got 1"):
        build(decay=1)
    if name not in WITHOUT_TAP:
        with pytest.raises(ValueError, match="the parameters hold no probes"):
            build().init({"kernel": jnp.ones((2, 3))})
    if name in ("scale_by_eva_f", "scale_by_eva_s"):
        with pytest.raises(ValueError, match=rf"{name}: step_rule must be one of .*got 'clip'"):
            build(step_rule="clip")
        with pytest.raises(ValueError, match=rf"{name}: state must be a ScaleByEvaState"):
            build().update({"kernel": jnp.ones((2, 3))}, optax.EmptyState())
