"""Powers of Kronecker factors against dense matrices, for every kind of layer, and what cannot be inverted."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eva_optax
from eva_optax._curvature.inverses import Moment, eigenbases, powers
from tests.helpers import assert_close, random_like, stacks_of

DAMPING = 0.02


def moments_of_rows(count: int, size: int, seed: int, bias: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """A of some rows, (count, size, size), and with a bias their mean, (count, size)."""
    x = np.random.default_rng(seed).normal(0.5, 1, (count, 20, size))
    return np.einsum("kni,knj->kij", x, x) / 20, x.mean(1) if bias else None


def whole(matrix: np.ndarray, mean: np.ndarray | None) -> np.ndarray:
    """The second moment of (x, 1), or of x."""
    return matrix if mean is None else np.block([[matrix, mean[:, None]], [mean[None], np.ones((1, 1))]])


def dense_power(matrix: np.ndarray, power: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return vectors * values**power @ vectors.T


@pytest.mark.parametrize("power", [-1.0, -0.5])
def test_powers_with_and_without_bias_are_dense_powers(power, x64):
    """Of one size in one stack; the homogeneous coordinate of an inverse by a Schur complement."""
    given = [moments_of_rows(2, 4, 0, True), moments_of_rows(3, 4, 1, False), moments_of_rows(1, 5, 2, True)]
    numbers = [(np.linspace(0.1, 0.3, len(matrix)), np.linspace(1, 3, len(matrix))) for matrix, _ in given]
    moments = [
        Moment(*(None if part is None else jnp.asarray(part) for part in (*pair, *damped)))
        for pair, damped in zip(given, numbers, strict=True)
    ]
    made = jax.jit(lambda: powers(moments, power))()
    for (matrices, means), (shift, floor), (factor, health) in zip(given, numbers, made, strict=True):
        for k, matrix in enumerate(matrices):
            mean, got = None if means is None else means[k], factor.kernel[k]
            damped = whole(matrix, mean) + shift[k] * np.eye(len(matrix) + (mean is not None))
            got = got if mean is None else np.block([[got, factor.bias[k]], [factor.bias[k].T, factor.corner[k]]])
            np.testing.assert_allclose(got, dense_power(damped / floor[k], power), atol=1e-12)
            schur = damped if mean is None else damped[:-1, :-1] - np.outer(mean, mean) / damped[-1, -1]
            values = np.linalg.eigvalsh(damped)
            condition = np.linalg.cond(schur, 1) if power == -1 else (values[-1] / values[0]) ** -power
            np.testing.assert_allclose(health.condition[k], condition, rtol=1e-9)
            assert health.residual[k] < 1e-13
    # Without a Schur complement (x, 1) has one entry more. For CPUs also one by one.
    choleskys, eighs = (stacks_of(name, powers, moments, power) for name in ("cholesky", "eigh"))
    assert choleskys == (["1,4,4", "1,5,5", "5,4,4"] if power == -1 else [])
    assert eighs == ([] if power == -1 else ["1,4,4", "1,5,5", "1,6,6", "2,5,5", "3,4,4"])


def test_eigenvectors_diagonalize_the_moment_of_the_homogeneous_input(x64):
    matrix, mean = moments_of_rows(1, 4, 0, True)
    ((basis, residual),) = eigenbases([(jnp.asarray(matrix), jnp.asarray(mean))])
    vectors = np.concatenate([basis.kernel[0], basis.bias[0]])
    np.testing.assert_allclose(vectors * basis.values[0] @ vectors.T, whole(matrix[0], mean[0]), atol=1e-13)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(5), atol=1e-13)
    assert residual[0, 0, 0] < 1e-13


def test_what_cannot_be_inverted_is_told_by_its_residual():
    """Not a number, zero, rank one, negative, and a condition of 1e8 that float32 does not resolve."""
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    ones, steep = np.ones((6, 6)), rotation * np.logspace(0, -8, 6) @ rotation.T
    matrices = jnp.asarray([ones * np.nan, 0 * ones, ones, -np.eye(6), steep, np.eye(6)], jnp.float32)

    def trusted(shift: float, power: float) -> list[bool]:
        moment = Moment(matrices, None, jnp.full(6, shift, jnp.float32), jnp.ones(6))
        ((_, health),) = powers([moment], power)
        return (health.residual.ravel() < 0.1).tolist()

    assert trusted(0.0, -1.0) == [False, False, False, False, False, True]
    assert trusted(0.1, -1.0) == [False, True, True, False, True, True]
    assert trusted(0.1, -0.5) == [False, True, True, False, True, True]


class Layers(nn.Module):
    """Layers with batch axes, groups, several input and output axes, with and without bias, and an embedding."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.sin(nn.Conv(4, (2, 2), feature_group_count=2, padding="VALID", param_dtype=float)(x))
        y = jnp.sin(nn.Conv(4, (2, 1), feature_group_count=4, param_dtype=float)(y))
        y = jnp.sin(nn.DenseGeneral((2, 3), axis=(-2, -1), use_bias=False, param_dtype=float)(y))
        y = nn.Einsum((3, 6, 2), "nhi,hio->nho", param_dtype=float)(y.reshape(len(x), 3, 6))
        y = y.reshape(len(x), -1) + nn.Embed(5, 6, param_dtype=float)(jnp.arange(len(x)) % 5)
        return nn.Dense(3, param_dtype=float)(y)


def layer_matrices(name: str, layer: dict) -> list[np.ndarray]:
    """[kernel; bias] of each layer that a kernel holds: its inputs by its outputs."""
    kernel, bias = np.asarray(layer.get("kernel", layer.get("embedding"))), layer.get("bias")
    if name in ("Conv_0", "Conv_1"):
        groups = {"Conv_0": 2, "Conv_1": 4}[name]
        parts, biases = np.split(kernel, groups, -1), np.split(np.asarray(bias), groups)
    elif name == "Einsum_0":
        parts, biases = list(kernel), list(np.asarray(bias).reshape(len(kernel), -1))
    else:
        parts, biases = [kernel], [bias]
    outputs = 2 if name == "DenseGeneral_0" else 1
    flat = [part.reshape(-1, int(np.prod(part.shape[part.ndim - outputs :]))) for part in parts]
    return [part if row is None else np.concatenate([part, row[None]]) for part, row in zip(flat, biases, strict=True)]


def solve(a: np.ndarray, b: np.ndarray, gradient: np.ndarray, kind: str, relative: bool) -> np.ndarray:
    """The update written out; in Kronecker's product for "eigen"."""
    unit_a, unit_b = (np.trace(matrix) / len(matrix) for matrix in (a, b))
    if relative:
        a, b = a / unit_a, b / unit_b
    if kind == "eigen":
        curvature = np.kron(a, b) + DAMPING * np.eye(gradient.size)
        return (1 + DAMPING if relative else 1) * np.linalg.solve(curvature, gradient.ravel()).reshape(gradient.shape)
    pi = np.sqrt(unit_a / unit_b)
    shift_a, shift_b = (DAMPING, DAMPING) if relative else DAMPING**0.5 * np.array([pi, 1 / pi])
    update = np.linalg.solve(a + shift_a * np.eye(len(a)), gradient)
    return np.linalg.solve(b + shift_b * np.eye(len(b)), update.T).T * ((1 + DAMPING) ** 2 if relative else 1)


def test_every_kind_of_layer_is_solved_as_its_dense_curvature(x64):
    x = jnp.asarray(np.random.default_rng(0).normal(0.5, 1, (6, 4, 4, 4)))
    model = eva_optax.tap(Layers(), factors="both", embeddings=True)
    params = random_like(jax.eval_shape(lambda: model.init(jax.random.key(0), x))["params"])
    made = {
        (kind, relative): eva_optax.scale_by_kfac(DAMPING, relative=relative, split=kind)
        for kind, relative in (("pi", False), ("eigen", True))
    }

    @jax.jit
    def run(params: dict) -> tuple:
        grads = jax.grad(lambda params: jnp.cos(model.apply({"params": params}, x)).mean())(params)
        return grads, {key: tx.update(grads, tx.init(params))[0] for key, tx in made.items()}

    grads, updates = run(params)
    vectors, factors = eva_optax.vectors(grads), eva_optax.factors(grads)
    assert len(factors) == 6
    for name, (a, b) in factors.items():
        given = layer_matrices(name, grads[name])
        count, bias = len(given), "bias" in grads[name]
        size, means = len(given[0]) - bias, np.asarray(vectors[name].a)
        means = means[..., ::2] if name == "Conv_0" else means.reshape(count, -1).T if name == "Einsum_0" else means
        means = means.reshape(size, count)
        a = np.diag(a)[None] if name == "Embed_0" else np.asarray(a).reshape(count, size, size)
        b = np.asarray(b).reshape(count, *given[0].shape[1:] * 2)
        for (kind, relative), tree in updates.items():
            # An embedding's A is diagonal: "pi" is all that its layer is split by.
            split = "pi" if (name, kind) == ("Embed_0", "eigen") else kind
            for index, update in enumerate(layer_matrices(name, tree[name])):
                full = whole(a[index], means[:, index] if bias else None)
                wanted = solve(full, b[index], given[index], split, relative)
                assert_close(update, wanted, 1e-9, floor=0.0)
    for tree in updates.values():
        assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, grads)
