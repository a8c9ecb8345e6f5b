"""Random trees of modules from all layers that are tapped: training them keeps every promise at once."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import eva_optax
from tests.dense import assert_preconditioned
from tests.helpers import assert_close, assert_finite, assert_identical, assert_probes_are_zero

FEATURES = 4

# A tree is a list of nodes; each keeps (batch, time or height, ..., FEATURES) in rank, so that any order of them fits.
LEAVES = {
    "dense": lambda x: nn.Dense(FEATURES)(x),
    "dense without bias": lambda x: nn.Dense(FEATURES, use_bias=False)(x),
    "dense general": lambda x: nn.DenseGeneral((x.shape[-2], FEATURES), axis=(-2, -1))(x),
    "dense general with batch axis": lambda x: nn.DenseGeneral(FEATURES, batch_dims=(0,))(x),
    "einsum": lambda x: nn.Einsum((FEATURES, FEATURES), "...i,io->...o")(x),
    "attention": lambda x: nn.MultiHeadDotProductAttention(2)(x),
    "convolution": lambda x: nn.Conv(FEATURES, window(x, 3))(x),
    "strided convolution": lambda x: nn.Conv(FEATURES, window(x, 2), strides=2, padding="VALID")(x),
    "dilated convolution": lambda x: nn.Conv(FEATURES, window(x, 2), kernel_dilation=2, padding="CIRCULAR")(x),
    "grouped convolution": lambda x: nn.Conv(FEATURES, window(x, 3), feature_group_count=2)(x),
    "depthwise convolution": lambda x: nn.Conv(FEATURES, window(x, 2), feature_group_count=FEATURES)(x),
    "local convolution": lambda x: nn.ConvLocal(FEATURES, window(x, 2), padding="SAME")(x),
    "transposed convolution": lambda x: nn.ConvTranspose(FEATURES, window(x, 3))(x),
    "lstm": lambda x: recurrent(nn.LSTMCell, x),
    "optimized lstm": lambda x: recurrent(nn.OptimizedLSTMCell, x),
    "gru": lambda x: recurrent(nn.GRUCell, x),
    "layer norm": lambda x: nn.LayerNorm()(x),
    "group norm": lambda x: nn.GroupNorm(2)(x),
    "tanh": nn.tanh,
    "gelu": nn.gelu,
    "dropout": lambda x: nn.Dropout(0.5, deterministic=True)(x),
}
BRANCHES = ("sequence", "residual", "remat", "shared", "scanned")


def window(x, size: int) -> tuple[int, ...]:
    return (size,) * (x.ndim - 2)


def recurrent(cell: Any, x):
    rows = x.reshape(x.shape[0], -1, FEATURES)
    return nn.RNN(cell(FEATURES))(rows).reshape(x.shape)


class Node(nn.Module):
    """A leaf by name, or a branch (name, children)."""

    tree: Any

    @nn.compact
    def __call__(self, x):
        if isinstance(self.tree, str):
            return LEAVES[self.tree](x)
        kind, children = self.tree
        if kind == "remat":
            return nn.remat(Node)(("sequence", children))(x)
        if kind == "scanned":
            stack = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            return stack(tuple(child for child in children if child in STACKABLE) or ("dense",))(x, None)[0]
        if kind == "shared":
            inner = Node(("sequence", tuple(child for child in children if child in STACKABLE) or ("dense",)))
            return inner(nn.tanh(inner(x)))
        y = x
        for child in children:
            y = Node(child)(y)
        return x + y if kind == "residual" and y.shape == x.shape else y


class Step(nn.Module):
    """One step of a scan over layers."""

    tree: Any

    @nn.compact
    def __call__(self, x, _):
        return Node(("residual", self.tree))(x), None


STACKABLE = tuple(name for name in LEAVES if "strided" not in name)  # what keeps the shape


class Network(nn.Module):
    """Tokens or numbers in, a tree, and a head."""

    tree: Any
    tokens: bool

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="head")(Node(self.tree)(nn.Embed(5, FEATURES)(x) if self.tokens else x))


leaves = st.sampled_from(sorted(LEAVES))
trees = st.recursive(
    leaves,
    lambda nodes: st.tuples(st.sampled_from(BRANCHES), st.lists(nodes, min_size=1, max_size=3).map(tuple)),
    max_leaves=4,
)


def check(tree, rank: int, tokens: bool, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (2, *(4,) * rank)
    x = rng.integers(0, 5, shape) if tokens else rng.normal(size=(*shape, FEATURES)).astype(np.float32)
    plain = Network(tree, tokens)
    model = eva_optax.tap(plain, embeddings=True)
    key, tx = jax.random.key(seed), eva_optax.scale_by_eva(0.1)

    def loss(params, model):
        out = model.apply({"params": params}, x)
        return jnp.mean((out - jnp.sin(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)) ** 2)

    @partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # it runs once: compile it fast
    def run(key):
        params = model.init(key, x)["params"]
        value, grads = jax.value_and_grad(loss)(params, model)
        updates, state = tx.update(grads, tx.init(params), params)
        bare = plain.init(key, x)["params"]
        return params, value, grads, updates, state, bare, *jax.value_and_grad(loss)(bare, plain)

    params, value, grads, updates, state, bare, plain_value, plain_grads = run(key)
    assert_finite((params, value, grads, updates, state))
    assert_identical(eva_optax.strip(params), bare)
    assert_probes_are_zero(params)
    np.testing.assert_allclose(value, plain_value, rtol=1e-6)
    assert_close(eva_optax.strip(grads), plain_grads, 1e-5, floor=1e-3)
    assert state.skipped == 0
    assert "head" in eva_optax.vectors(grads)
    assert_preconditioned(grads, updates, damping=0.1)


@pytest.mark.slow
@settings(max_examples=4, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # shrinking compiles hundreds of models
@given(tree=trees, rank=st.integers(1, 2), tokens=st.booleans(), seed=st.integers(0, 2**16))
def test_random_module_trees_keep_every_promise(tree, rank, tokens, seed):
    check(tree, rank, tokens, seed)


def test_a_tree_of_every_layer_keeps_every_promise():
    check(("residual", tuple(LEAVES)), 2, True, 0)


@pytest.mark.slow
def test_a_tree_of_every_branch_keeps_every_promise():
    inner = ("convolution", "optimized lstm")
    check(("sequence", tuple((kind, inner) for kind in BRANCHES)), 1, False, 1)
