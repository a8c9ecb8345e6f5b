"""The whitening by a sketch, against dense matrices in float64."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eva_optax
from eva_optax._curvature.curvature import Damping
from eva_optax._curvature.nystrom import whiten
from tests.helpers import assert_close, programs_of_a_gpu, random_like

SIZE, DELTA = 9, 0.1


def moments(bias: bool, rank: int = SIZE, rows: int = 40) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A and a of some rows, of which no more than `rank` directions are not zero, and the moment of (x, 1) or x."""
    rng = np.random.default_rng(0)
    x = (0.5 + rng.normal(size=(rows, rank)) * 2.0 ** -np.arange(rank)) @ rng.normal(size=(rank, SIZE))
    full = np.concatenate([x, np.ones((rows, 1))], 1) if bias else x
    return x.T @ x / rows, x.mean(0), full.T @ full / rows


def function(values: np.ndarray, unit: float, relative: bool) -> np.ndarray:
    return ((values / unit + DELTA) / (1 + DELTA)) ** -0.5 if relative else (1 + values / DELTA) ** -0.5


def dense_root(matrix: np.ndarray, relative: bool) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return vectors * function(np.maximum(values, 0), np.trace(matrix) / len(matrix), relative) @ vectors.T


def root(
    a_matrix: np.ndarray, a: np.ndarray, omega: np.ndarray | None, bias: bool, relative: bool = True
) -> np.ndarray:
    """R as a matrix, from the library's vectors."""
    with jax.enable_x64(True):
        sketch = None if omega is None else jnp.asarray(a_matrix @ omega)
        given = None if omega is None else jnp.asarray(omega)
        trace = jnp.trace(a_matrix)
        damped = Damping(DELTA, relative, keep_scale=True).shift_and_floor((trace + bias) / (len(a) + bias))
        basis = whiten(sketch, given, jnp.asarray(a), trace, *damped, has_bias=bias)
    v = np.asarray(basis.kernel) if basis.bias is None else np.concatenate([basis.kernel, basis.bias])
    return float(basis.scale[0, 0]) * (np.eye(len(v)) - v @ v.T)


def orthonormal(rank: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(1).normal(size=(SIZE, rank)))[0]


@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_sketch_of_all_directions_is_the_full_factor(bias, relative):
    matrix, a, full = moments(bias)
    np.testing.assert_allclose(
        root(matrix, a, orthonormal(SIZE), bias, relative), dense_root(full, relative), atol=1e-8
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_moment_of_no_higher_rank_is_exact(bias):
    matrix, a, full = moments(bias, rank=3)
    # ε‖Y‖ is added for the Cholesky factor to exist.
    np.testing.assert_allclose(root(matrix, a, orthonormal(4), bias), dense_root(full, True), atol=1e-5)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_of_a_sketch_it_is_nystroms_approximation_and_what_is_left_of_the_trace(bias):
    matrix, a, full = moments(bias)
    omega = orthonormal(3)
    seen = np.block([[omega, np.zeros((SIZE, 1))], [np.zeros((1, 3)), np.ones((1, 1))]]) if bias else omega
    sketch = full @ seen
    values, vectors = np.linalg.eigh(sketch @ np.linalg.solve(seen.T @ sketch, sketch.T))
    rest = (np.trace(full) - values.sum()) / (len(full) - seen.shape[1])
    values = np.maximum(values, rest)
    wanted = vectors * function(values, np.trace(full) / len(full), True) @ vectors.T
    assert (values > 1.01 * rest).sum() >= 3
    np.testing.assert_allclose(root(matrix, a, omega, bias), wanted, atol=1e-9)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_of_one_vector_the_rest_of_the_mean_square_is_the_damping_of_the_others(bias):
    matrix, a, full = moments(bias)
    u = np.append(a, 1.0) if bias else a
    rest = (np.trace(full) - u @ u) / (len(full) - 1)
    approximation = np.outer(u, u) + rest * (np.eye(len(u)) - np.outer(u, u) / (u @ u))
    approximation *= np.trace(full) / np.trace(approximation)
    np.testing.assert_allclose(root(matrix, a, None, bias), dense_root(approximation, True), atol=1e-12)


def test_isotropic_inputs_leave_the_gradient_as_it_is():
    np.testing.assert_allclose(root(np.eye(SIZE), np.zeros(SIZE), orthonormal(4), False), np.eye(SIZE), atol=1e-7)


def test_in_float32_a_steep_spectrum_is_whitened_as_in_float64():
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(200, 200)))[0]
    matrix = basis * 10.0 ** -np.linspace(0, 8, 200) @ basis.T
    omega = np.linalg.qr(rng.normal(size=(200, 16)))[0]
    damped = Damping(DELTA, True).shift_and_floor(jnp.trace(matrix) / 200)
    given = matrix @ omega, omega, np.zeros(200), np.trace(matrix), *damped
    found = whiten(*(jnp.asarray(part, jnp.float32) for part in given), has_bias=False)
    v = np.asarray(found.kernel, float)
    got = float(found.scale[0, 0]) * (np.eye(200) - v @ v.T)
    exact = matrix @ omega
    values, vectors = np.linalg.eigh(exact @ np.linalg.solve(omega.T @ exact, exact.T))
    rest = (np.trace(matrix) - values.sum()) / (200 - 16)
    wanted = vectors * function(np.maximum(values, rest), np.trace(matrix) / 200, True) @ vectors.T
    np.testing.assert_allclose(got, wanted, atol=2e-4)


class Layers(nn.Module):
    """Layers with batch axes, groups, several input axes, one output a channel, with and without bias."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.sin(nn.Conv(4, (2, 2), feature_group_count=2, padding="VALID")(x))
        y = jnp.sin(nn.Conv(4, (2, 1), feature_group_count=4)(y))
        y = jnp.sin(nn.DenseGeneral((2, 3), axis=(-2, -1), use_bias=False)(y))
        y = nn.Einsum((3, 6, 2), "nhi,hio->nho")(y.reshape(len(x), 3, 6))
        return nn.Dense(3)(y.reshape(len(x), -1))


def matrices(name: str, kernel: np.ndarray, bias: np.ndarray | None) -> list[np.ndarray]:
    """[kernel; bias] of each layer that a kernel holds: its inputs by its outputs."""
    kernel = np.asarray(kernel, float)
    if name in ("Conv_0", "Conv_1"):
        groups = {"Conv_0": 2, "Conv_1": 4}[name]
        parts = np.split(kernel, groups, -1)
        biases = np.split(np.asarray(bias, float), groups)
    elif name == "Einsum_0":
        parts = list(kernel)
        biases = list(np.asarray(bias, float).reshape(len(parts), -1))
    else:
        parts, biases = [kernel], [None if bias is None else np.asarray(bias, float)]
    outputs = 2 if name == "DenseGeneral_0" else 1
    flat = [part.reshape(-1, int(np.prod(part.shape[part.ndim - outputs :]))) for part in parts]
    return [part if row is None else np.concatenate([part, row[None]]) for part, row in zip(flat, biases, strict=True)]


def test_conjugate_whitens_the_inputs_of_every_kind_of_layer():
    """Around nothing, with a sketch of all directions, the update is R² G with the dense R of each layer's rows."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(0.5, 1, (6, 4, 4, 4)), jnp.float32)
    model = eva_optax.tap(Layers(), rank=100)
    params = random_like(jax.eval_shape(lambda: model.init(jax.random.key(0), x))["params"])
    tx = eva_optax.conjugate(optax.identity(), DELTA)

    @jax.jit
    def run(params: dict) -> tuple:
        grads = jax.grad(lambda params: jnp.cos(model.apply({"params": params}, x)).mean())(params)
        return grads, tx.update(grads, tx.init(params), params)[0]

    grads, updates = run(params)
    with programs_of_a_gpu():
        assert_close(jax.jit(lambda grads: tx.update(grads, tx.init(params), params)[0])(grads), updates, 1e-4)
    vectors, sketches = eva_optax.vectors(grads), eva_optax.sketches(grads)
    for name, sketch in sketches.items():
        bias = "bias" in grads[name]
        given, got = (matrices(name, tree[name]["kernel"], tree[name].get("bias")) for tree in (grads, updates))
        count, size = len(given), len(given[0]) - bias
        omega = np.asarray(sketch.directions, float).reshape(size, size)
        a = np.asarray(vectors[name].a, float)
        means = a[..., ::2] if name == "Conv_0" else a.reshape(count, -1).T if name == "Einsum_0" else a
        means = means.reshape(size, count)
        for index, (gradient, update) in enumerate(zip(given, got, strict=True)):
            moment = np.asarray(sketch.moment, float).reshape(count, size, size)[index] @ omega.T
            row = np.append(means[:, index], 1.0)
            full = np.block([[moment, row[:-1, None]], [row[None]]]) if bias else moment
            r = dense_root((full + full.T) / 2, True)
            assert_close(update, r @ r @ gradient, 1e-3, floor=np.abs(gradient).max())
            assert np.linalg.norm(update - gradient) > 0.1 * np.linalg.norm(gradient)
    assert jax.tree.map(jnp.shape, eva_optax.strip(updates)) == jax.tree.map(jnp.shape, eva_optax.strip(grads))
