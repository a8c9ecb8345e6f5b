"""Random trees of modules from all layers that are tapped: training them keeps every promise at once."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import eva_optax
from eva_optax._pairing import find_layers, is_probe, leaves_by_path, true_vectors
from tests.dense import each_layer, solve_eva

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


def assert_close(got, want, against=0.0, tolerance=1e-5):
    scale = max(1e-3, *(float(np.max(np.abs(part), initial=0)) for part in (want, against)))
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * scale)


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
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((params, value, grads, updates, state)))
    jax.tree.map(np.testing.assert_array_equal, eva_optax.strip(params), bare)
    np.testing.assert_allclose(value, plain_value, rtol=1e-6)
    jax.tree.map(assert_close, eva_optax.strip(grads), plain_grads)
    assert state.skipped == 0
    got, by_path = leaves_by_path(updates), leaves_by_path(grads)
    assert not any(
        np.any(leaf) for tree in (leaves_by_path(params), got) for path, leaf in tree.items() if is_probe(path)
    )
    layers = find_layers(by_path)
    assert ("head", "kernel") in [layer.kernel for layer in layers]
    tapped = set()
    for layer in layers:
        tapped |= {layer.kernel, layer.bias}
        check_layer(layer, by_path, got)
    for path in by_path.keys() - tapped:
        if not is_probe(path):
            np.testing.assert_array_equal(got[path], by_path[path])


def check_layer(layer, grads, updates) -> None:
    """The update of kernel and bias against dense solves; the bias gradient against b."""
    layout = layer.layout
    (a, b), used = (jax.tree.map(np.asarray, part) for part in true_vectors(layer, grads.__getitem__))
    assert np.all(used)
    spread = (
        {}
        if layer.bias is None
        else {"g": layout.spread_bias(grads[layer.bias]), "u": layout.spread_bias(updates[layer.bias])}
    )
    spread = {name: np.asarray(value, np.float64) for name, value in spread.items()}
    kernel, update = (np.asarray(tree[layer.kernel], np.float64) for tree in (grads, updates))
    for at, at_a, at_b in each_layer(layout.kernel, layout.a, layout.b):
        solo = [np.asarray(part, np.float64) for part in (a[at_a], b[at_b])]
        bias = spread["g"][at_b] if spread else None
        direction = np.sum(solo[1] ** 2) * (np.sum(solo[0] ** 2) + (bias is not None))
        if bias is not None and np.any(solo[1]):
            assert_close(solo[1], bias)
        if direction < 1e-30:  # nothing to precondition by: noise that was dropped, or below what float32 squares hold
            continue
        wanted, wanted_bias = solve_eva(kernel[at], bias, *solo, damping=0.1, relative=True)
        assert_close(update[at], wanted, kernel[at])
        if bias is not None:
            assert_close(spread["u"][at_b], wanted_bias, bias)


@settings(phases=[Phase.explicit, Phase.reuse, Phase.generate])  # shrinking compiles hundreds of models
@given(tree=trees, rank=st.integers(1, 2), tokens=st.booleans(), seed=st.integers(0, 2**16))
def test_random_module_trees_keep_every_promise(tree, rank, tokens, seed):
    check(tree, rank, tokens, seed)


def test_a_tree_of_every_layer_keeps_every_promise():
    check(("residual", tuple(LEAVES)), 2, True, 0)


def test_a_tree_of_every_branch_keeps_every_promise():
    inner = ("dense", "convolution", "optimized lstm", "tanh")
    check(("sequence", tuple((kind, inner) for kind in BRANCHES)), 1, False, 1)
