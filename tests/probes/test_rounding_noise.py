"""Sums that cancel leave rounding noise: it is not taken for vectors, nor are vectors taken for noise."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import eva_optax
from tests.helpers import assert_close, random_like

KEY = jax.random.key(0)


class Normalized(nn.Module):
    """Layers that are followed by a BatchNorm: the cotangents of each channel sum to zero, and rounding is left."""

    layer: str
    width: int
    depth: int
    dtype: Any
    relu: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kind = nn.Dense if self.layer == "dense" else lambda width, **options: nn.Conv(width, (3, 3), **options)
        dtypes = {"dtype": self.dtype, "param_dtype": jnp.promote_types(self.dtype, jnp.float32)}
        for index in range(self.depth):
            x = kind(self.width, **dtypes, name=f"before_{index}")(x)
            x = nn.BatchNorm(use_running_average=False, **dtypes)(x)
            x = nn.relu(x) if self.relu else x
        x = x if self.layer == "dense" else x.mean((1, 2))
        return nn.Dense(5, **dtypes, name="last")(x)


class Whitened(nn.Module):
    """Layers after a BatchNorm without scale and shift: their inputs sum to zero, and rounding is left."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtypes = {"dtype": self.dtype, "param_dtype": jnp.promote_types(self.dtype, jnp.float32)}
        norm = nn.BatchNorm(use_running_average=False, use_bias=False, use_scale=False, **dtypes)(x)
        dense = nn.Dense(5, use_bias=False, **dtypes, name="dense")(norm)
        pointwise = nn.Conv(5, (1, 1), use_bias=False, **dtypes, name="pointwise")(norm)
        with_bias = nn.Dense(5, **dtypes, name="with_bias")(norm)
        return (dense * pointwise + with_bias).mean((1, 2))


def noisy_vectors(model: nn.Module, shape: tuple[int, ...], seeds: int = 3) -> list[dict[str, Any]]:
    """The vectors of a cross entropy with balanced classes on random data, one for each seed."""
    tapped = eva_optax.tap(model)
    dtype = jnp.promote_types(model.dtype, jnp.float32)
    labels = jnp.arange(shape[0]) % 5
    shapes = jax.eval_shape(lambda: tapped.init(KEY, jnp.zeros(shape, dtype)))

    @jax.jit
    def gradient(variables: Any, x: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            logits, _ = tapped.apply({**variables, "params": params}, x, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits.astype(dtype), labels).mean()

        return jax.grad(loss)(variables["params"])

    inputs = [jnp.asarray(np.random.default_rng(seed).normal(0.3, 1, shape), dtype) for seed in range(seeds)]
    return [eva_optax.vectors(gradient(random_like(shapes, seed), x)) for seed, x in enumerate(inputs)]


HALF, SINGLE, DOUBLE = DTYPES = [jnp.bfloat16, jnp.float32, jnp.float64]
BEFORE_BATCH_NORM = [
    ("dense", (4, 6), 8, 1, True, SINGLE),
    ("dense", (32, 20), 6, 3, True, SINGLE),
    ("dense", (32, 20), 6, 3, True, HALF),
    ("dense", (1024, 5), 16, 2, True, SINGLE),
    ("dense", (1024, 5), 16, 2, True, HALF),
    ("dense", (1024, 5), 16, 2, True, DOUBLE),
    ("conv", (4, 5, 5, 3), 8, 1, True, SINGLE),
    ("conv", (4, 5, 5, 3), 8, 1, True, HALF),
    ("conv", (32, 4, 4, 2), 4, 3, True, SINGLE),
    ("conv", (32, 4, 4, 2), 4, 3, True, HALF),
    ("conv", (32, 4, 4, 2), 4, 3, True, DOUBLE),
    # A mean over the image right after it: all cotangents have one sign, and so do their rounding errors.
    ("conv", (8, 16, 16, 3), 16, 1, False, SINGLE),
    ("conv", (8, 16, 16, 3), 16, 1, False, HALF),
    ("conv", (8, 16, 16, 3), 16, 1, False, DOUBLE),
]


def dtype_name(value: Any) -> str | None:
    return getattr(value, "__name__", None)


@pytest.mark.parametrize(("layer", "shape", "width", "depth", "relu", "dtype"), BEFORE_BATCH_NORM, ids=dtype_name)
def test_the_noise_of_a_layer_before_batch_norm_is_exactly_zero(
    layer: str, shape: tuple[int, ...], width: int, depth: int, relu: bool, dtype: Any
) -> None:
    with jax.enable_x64(dtype == jnp.float64):
        for found in noisy_vectors(Normalized(layer, width, depth, dtype, relu), shape):
            assert np.count_nonzero(found["last"].b)
            assert all(np.count_nonzero(a) for a, _ in found.values())
            assert [layer for layer, (_, b) in found.items() if np.count_nonzero(b)] == ["last"]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", [(4, 3, 3, 6), (256, 2, 2, 3)])
def test_the_noise_of_a_layer_after_a_plain_batch_norm_is_exactly_zero(shape: tuple[int, ...], dtype: Any) -> None:
    with jax.enable_x64(dtype == jnp.float64):
        for found in noisy_vectors(Whitened(dtype), shape):
            assert not np.count_nonzero(found["dense"].a)
            assert not np.count_nonzero(found["pointwise"].a)
            assert all(np.count_nonzero(b) for _, b in found.values())


class Attending(nn.Module):
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtypes = {"dtype": self.dtype, "param_dtype": jnp.promote_types(self.dtype, jnp.float32)}
        x = nn.MultiHeadDotProductAttention(2, **dtypes, name="attention")(x)
        return nn.Dense(5, **dtypes, name="last")(x.mean(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_the_noise_of_a_key_projection_is_exactly_zero(dtype: Any) -> None:
    """Softmax does not see what is added to all keys alike."""
    with jax.enable_x64(dtype == jnp.float64):
        for found in noisy_vectors(Attending(dtype), (16, 12, 6)):
            assert not np.count_nonzero(found["attention/key"].b)
            assert all(np.count_nonzero(b) for name, (_, b) in found.items() if name != "attention/key")


class Genuine(nn.Module):
    """Layers whose vectors are small sums of large terms, and mean something."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(16, dtype=self.dtype, use_bias=False, name="centred")(x - 0.3)
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(x)
        x = nn.Dense(16, dtype=self.dtype, name="hidden")(nn.relu(x))
        return nn.Dense(5, dtype=self.dtype, name="logits")(x)


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=dtype_name)
@pytest.mark.parametrize("batch", [1, 10, 4095])
def test_genuine_vectors_are_not_taken_for_noise(batch: int, dtype: Any) -> None:
    for found in noisy_vectors(Genuine(dtype), (batch, 8)):
        for a, b in found.values():
            assert np.all(np.isfinite(a))
            assert np.count_nonzero(a)
            assert np.count_nonzero(b)


@pytest.mark.parametrize(
    ("dtype", "rows", "surplus", "kept"),
    [(SINGLE, 65536, 2, True), (SINGLE, 65536, 0, False), (HALF, 4096, 7, True), (HALF, 16384, 12, False)],
    ids=["float32", "float32, noise", "bfloat16", "bfloat16, taken for noise"],
)
def test_what_a_sum_must_be_to_be_kept(dtype: Any, rows: int, surplus: int, kept: bool) -> None:
    """Signs, of which so many more are positive: the ratio to the root of their squares is 0.008, 0, 0.11 and 0.094."""
    signs = jnp.where(jnp.arange(rows) < (rows + surplus) // 2, 1, -1).astype(dtype)[:, None]
    model = eva_optax.tap(nn.Dense(1, dtype=dtype))
    params = model.init(KEY, jnp.ones((1, 2)))["params"]
    grads = jax.grad(lambda p: (model.apply({"params": p}, jnp.ones((rows, 2), dtype)) * signs).sum())(params)
    assert bool(np.count_nonzero(eva_optax.vectors(grads)[""].b)) == kept


class Synchronised(nn.Module):
    """A layer before, and one after, BatchNorm over all devices: terms cancel only across them."""

    axis: str | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = {"use_running_average": False, "axis_name": self.axis}
        x = nn.BatchNorm(use_scale=False, use_bias=False, **norm, name="norm")(nn.Dense(8, name="before")(x))
        return nn.Dense(3, name="last")(nn.relu(nn.Dense(6, use_bias=False, name="after")(x)))


class SynchronisedNNX(nnx.Module):
    """The same in NNX."""

    def __init__(self, axis: str | None) -> None:
        rngs = nnx.Rngs(0)
        self.before, self.last = nnx.Linear(5, 8, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
        self.after = nnx.Linear(8, 6, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, use_scale=False, use_bias=False, axis_name=axis, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.last(nnx.relu(self.after(self.norm(self.before(x)))))


def synchronised(kind: str, axis: str | None) -> tuple[Any, Any]:
    """A loss of parameters and a batch, and the parameters."""
    if kind == "NNX":
        graphdef, params, rest = nnx.split(eva_optax.tap(SynchronisedNNX(axis)), nnx.Param, ...)

        def nnx_loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
            copied = jax.tree.map(lambda leaf: leaf, rest)  # variables of this trace
            return jnp.mean((nnx.merge(graphdef, params, copied)(x) - y) ** 2)

        return nnx_loss, params
    model = eva_optax.tap(Synchronised(axis))
    variables = eva_optax.tap(Synchronised(None)).init(KEY, jnp.ones((2, 5)))

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((model.apply({**variables, "params": params}, x, mutable=["batch_stats"])[0] - y) ** 2)

    return loss, variables["params"]


@pytest.mark.parametrize(("kind", "how"), [("Linen", "shard_map"), ("Linen", "pmap, summed"), ("NNX", "shard_map")])
def test_terms_that_cancel_across_devices_alone_are_noise_too(kind: str, how: str) -> None:
    rng = np.random.default_rng(0)
    x, y = (jnp.asarray(rng.normal(0.3, 1, (64, size)), jnp.float32) for size in (5, 3))
    (single, params), (loss, _) = synchronised(kind, None), synchronised(kind, "data")

    def gradient(params: Any, x: jax.Array, y: jax.Array) -> Any:
        if how == "shard_map":
            params = jax.tree.map(lambda leaf: jax.lax.pcast(leaf, "data", to="varying"), params)
            return jax.lax.pmean(jax.grad(loss)(params, x, y), "data")
        return jax.lax.psum(jax.grad(lambda params: loss(params, x, y) / 4)(params), "data")

    if how == "shard_map":
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
        specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": P()}
        grads = jax.jit(jax.shard_map(gradient, mesh=mesh, **specs))(params, x, y)
    else:
        parts = (part.reshape(4, 16, -1) for part in (x, y))
        grads = jax.tree.map(lambda leaf: leaf[0], jax.pmap(gradient, "data", in_axes=(None, 0, 0))(params, *parts))
    found = eva_optax.vectors(grads)
    assert {name: (bool(np.count_nonzero(a)), bool(np.count_nonzero(b))) for name, (a, b) in found.items()} == {
        "before": (True, False),
        "after": (False, True),
        "last": (True, True),
    }
    update = jax.jit(lambda grads: eva_optax.scale_by_eva().update(grads, eva_optax.scale_by_eva().init(params))[0])
    alone = jax.jit(jax.grad(single))(params, x, y)
    assert_close(update(grads), update(alone))
    assert_close(found, eva_optax.vectors(alone))


def test_vectors_that_cancel_in_part_are_left_as_they_are() -> None:
    """A hundredth of what random signs would leave is still far above rounding in float32."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(512, 4)).astype(np.float32)
    x += 0.01 * np.sqrt(1 / 512) - x.mean(0, keepdims=True)
    model = eva_optax.tap(nn.Dense(3, use_bias=False))
    params = model.init(KEY, x)["params"]
    grads = jax.grad(lambda p: (model.apply({"params": p}, x) * x[:, :3]).sum())(params)
    a, b = eva_optax.vectors(grads)[""]
    np.testing.assert_allclose(a, x.mean(0, dtype=np.float64)[:, None], rtol=1e-3)
    np.testing.assert_allclose(b, x[:, :3].sum(0, dtype=np.float64)[None], rtol=1e-3)
