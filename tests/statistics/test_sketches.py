"""Sketches of the inputs' second moments, against moments of rows that JAX's own Jacobian finds."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eva_optax
from tests.dense import each_layer
from tests.helpers import assert_close, random_like
from tests.statistics.cases import LAYERS, LayerCase

# One of each way in which rows are found; the shapes of all are those that the vectors are tested with.
KINDS = (
    "Dense over a batch",
    "Dense without bias",
    "Dense without batch axis",
    "Dense with one feature",
    "DenseGeneral with two features",
    "DenseGeneral with a batch dimension and two axes",
    "Einsum nhi,hio->hno",
    "Einsum nti,io->no",
    "Einsum nti,ijo->nto",
    "Einsum nti,oi->nto",
    "Conv 1D causal",
    "Conv 1D reflect and dilated",
    "Conv 2D everything",
    "Conv 2D groups",
    "Conv 2D depthwise",
    "Conv 2D with two batch axes",
    "ConvLocal 2D pairs and dilation",
    "ConvTranspose 2D pairs",
    "ConvTranspose 2D flipped",
    "Embed over batch and time",
)
CASES = [case for case in LAYERS if case.name in KINDS]


def cosines(size: int, rank: int) -> np.ndarray:
    """Ω by its formula, the signs by theirs."""
    i, k = np.arange(size)[:, None], np.arange(rank)[None]
    scale = np.where(k == 0, 1, np.sqrt(2)) / np.sqrt(size)
    mixed = i.astype(np.uint64) * 0x9E3779B9 % 2**32
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor) % 2**32
    return np.where(mixed >= 2**31, -1, 1) * scale * np.cos(np.pi * (i + 0.5) * k / size)


def second_moments(case: LayerCase, params: dict, x: np.ndarray, a: tuple, b: tuple) -> tuple[list[np.ndarray], int]:
    """Σ xxᵀ of each layer that the kernel holds, with x how an output depends on its column; and how many rows."""
    kernel = params[case.kernel]

    def output(kernel: jax.Array) -> jax.Array:
        return case.layer.apply({"params": {**params, case.kernel: kernel}}, jnp.asarray(x), **case.call).ravel()

    jacobian = np.asarray(jax.jit(jax.jacobian(output))(kernel), np.float64)
    moments = []
    for at, _, _ in each_layer(kernel.shape, a, b):
        # The column of one output.
        column = (
            span if o == 1 else slice(span.start or 0, (span.start or 0) + 1) for span, o in zip(at, b, strict=True)
        )
        rows = jacobian[(slice(None), *column)].reshape(len(jacobian), -1)
        moments.append(rows.T @ rows)
    if isinstance(case.layer, nn.ConvTranspose):  # counted by the positions of its input
        return moments, math.prod(case.x[:-1])
    return moments, len(jacobian) // math.prod(case.per_output)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_sketch_is_the_second_moment_along_fixed_directions(case):
    rank, x = 3, case.inputs(case.x)
    model = eva_optax.tap(case.layer, embeddings=True, rank=rank)
    params = random_like(jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.asarray(x), **case.call))["params"])
    gradient = jax.jit(jax.grad(lambda params: jnp.sin(model.apply({"params": params}, x, **case.call)).sum()))
    grads = gradient(params)
    (found,) = eva_optax.sketches(grads).values()
    (probe,) = grads["kronecker"].values()
    moments, rows = second_moments(case, eva_optax.strip(params), x, probe["a"].shape, probe["b"].shape)
    size = len(moments[0])
    rank = min(rank, size)
    omega = cosines(size, rank)
    np.testing.assert_allclose(found.directions.reshape(size, rank), omega, rtol=0, atol=1e-6)
    got = np.reshape(found.moment, (len(moments), size, rank))
    for mine, trace, moment in zip(got, np.ravel(found.trace), moments, strict=True):
        assert_close(mine, moment @ omega / rows, 1e-5)
        np.testing.assert_allclose(trace, np.trace(moment) / rows, rtol=1e-5)


def test_a_convolution_with_other_axes_collects_the_sketch_of_the_same_patches():
    """Channels first, kernels (output, input, *window), groups: the moment of one with channels last."""
    x = np.random.default_rng(0).normal(0.5, 1, (3, 5, 6, 4)).astype(np.float32)

    class Raw(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("w", nn.initializers.normal(), (6, 2, 3, 2))
            call = {"window_strides": (2, 1), "padding": "SAME", "feature_group_count": 2}
            call["dimension_numbers"] = ("NCHW", "OIHW", "NCHW")
            y = jax.lax.conv_general_dilated(x, kernel, **call)
            return eva_optax.tap_conv(self, "w", x, y, **call)

    found = {}
    for name, layer, value in (
        ("last", nn.Conv(6, (3, 2), strides=(2, 1), feature_group_count=2, use_bias=False), x),
        ("first", Raw(), x.transpose(0, 3, 1, 2)),
    ):
        found[name] = found_in(layer, value, rank=3)
    # There the input axis comes before the window's.
    assert found["first"].moment.shape == (2, 2, 3, 2, 3)
    assert_close(found["first"].trace, found["last"].trace, 1e-6)
    # The directions are numbered as this kernel's inputs come, and so is the whole moment (`tests/flax` holds that).
    model = eva_optax.tap(Raw(), factors="input")
    params = model.init(jax.random.key(0), value)["params"]
    grads = jax.jit(jax.grad(lambda params: model.apply({"params": params}, value).sum()))(params)
    sketch, directions = (np.reshape(part, (-1, 12, 3)) for part in found["first"][:2])
    assert_close(sketch, eva_optax.factors(grads)[""].A @ directions, 1e-5)


def found_in(module: nn.Module, *inputs: np.ndarray, **options: int) -> eva_optax.Sketch:
    """The sketch in the gradient of a module with one tapped kernel."""
    model = eva_optax.tap(module, **options)
    params = model.init(jax.random.key(0), *inputs)["params"]
    grads = jax.jit(jax.grad(lambda params: jnp.sin(model.apply({"params": params}, *inputs)).sum()))(params)
    (found,) = eva_optax.sketches(grads).values()
    return found


@pytest.mark.parametrize(
    ("equation", "x", "kernel", "batch"),
    [("...(h i),h i o->...(h o)", (3, 4, 6), (2, 3, 5), 2), ("...i,i(h d)->...h d", (3, 4, 6), (6, 10), 1)],
)
def test_grouped_equations_collect_the_sketch_of_the_split_product(equation, x, kernel, batch):
    class Raw(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.normal(), kernel)
            split = x.reshape(*x.shape[:-1], batch, -1)
            y = jnp.einsum("nthi,hio->ntho", split, w.reshape(batch, -1, kernel[-1]))
            y = y.reshape(*x.shape[:-1], -1) if batch > 1 else y.reshape(*x.shape[:-1], 2, 5)
            return eva_optax.tap_einsum(self, "w", equation, x, y)

    value = np.random.default_rng(0).normal(0.5, 1, x).astype(np.float32)
    found = found_in(Raw(), value, rank=2)
    rows = value.reshape(-1, batch, x[-1] // batch)
    moments = np.einsum("rhi,rhj->hij", rows, rows) / len(rows)
    omega = cosines(rows.shape[-1], 2)
    assert_close(found.moment.reshape(batch, -1, 2), moments @ omega, 1e-5)
    assert_close(found.trace.ravel(), np.einsum("hii->h", moments), 1e-5)


def test_each_expert_collects_the_sketch_of_its_rows():
    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x, sizes):
            w = self.param("w", nn.initializers.normal(), (3, 6, 5))
            return eva_optax.tap_ragged_dot(self, "w", x, jax.lax.ragged_dot(x, w, sizes), sizes)

    value = np.random.default_rng(0).normal(0.5, 1, (9, 6)).astype(np.float32)
    found = found_in(Experts(), value, np.array([5, 0, 4]), rank=2)
    parts = [value[:5], value[:0], value[5:]]
    moments = [part.T @ part / max(len(part), 1) for part in parts]
    assert_close(found.moment, np.stack(moments) @ cosines(6, 2), 1e-5)
    assert_close(found.trace.ravel(), np.stack([np.trace(moment) for moment in moments]), 1e-5)


def test_of_large_batches_some_rows_are_looked_at():
    """Of 4096 rows every eighth, of 64 images of 64 positions every eighth."""
    x = np.random.default_rng(0).normal(0.5, 1, (32, 128, 3)).astype(np.float32)
    some = x[:, ::8].reshape(-1, 3)
    assert_close(found_in(nn.Dense(4), x, rank=3).trace.ravel(), np.mean(np.sum(some**2, -1))[None], 1e-5)
    images = x.reshape(64, 8, 8, 3)
    assert_close(
        found_in(nn.Conv(4, (1, 1)), images, rank=3).trace.ravel(), np.mean(np.sum(images[::8] ** 2, -1))[None], 1e-5
    )
    fewer = found_in(nn.Dense(4), x, rank=3, factor_rows=64)
    assert_close(fewer.trace.ravel(), np.mean(np.sum(x[:, ::64] ** 2, -1))[None], 1e-5)
    assert_close(fewer.moment, np.einsum("nti,ntj->ij", x[:, ::64], x[:, ::64]) / 64 @ fewer.directions, 1e-5)


def test_a_step_may_go_without_a_sketch():
    model, x = eva_optax.tap(nn.Dense(4), rank=2), np.ones((3, 5), np.float32)
    params = model.init(jax.random.key(0), x)["params"]

    @jax.jit
    def gradient(params, flag):
        with eva_optax.tapping(factors=flag):
            return jax.grad(lambda params: model.apply({"params": params}, x).sum())(params)

    traces = [float(eva_optax.sketches(gradient(params, flag))[""].trace) for flag in (True, False)]
    assert traces == [5, 0]


def test_products_with_the_directions_stay_apart_on_a_gpu():
    """Its compiler would make one product of those of equal layers, and copy all their inputs for it."""
    model = eva_optax.tap(nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(8)]), rank=4)
    x = jnp.ones((16, 8))
    params = model.init(jax.random.key(0), x)["params"]
    traced = jax.jit(jax.grad(lambda params: model.apply({"params": params}, x).mean())).trace(params)
    barriers = {
        name: traced.lower(lowering_platforms=(name,)).as_text().count("optimization_barrier")
        for name in ("cuda", "cpu")
    }
    assert barriers == {"cuda": 2, "cpu": 0}
