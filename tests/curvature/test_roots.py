"""Powers of matrices, in stacks, shared out over devices, and renewed every few steps."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from eva_optax._curvature.amortized import in_stacks, renew
from eva_optax._curvature.roots import Power, power
from tests.helpers import stacks_of


def moments(*batch: int, size: int, rows: int, seed: int = 0) -> np.ndarray:
    """Second moments of so many rows."""
    factors = np.random.default_rng(seed).normal(size=(*batch, rows, size))
    return factors.swapaxes(-1, -2) @ factors


def dense_power(matrix: np.ndarray, exponent: float, shift: float) -> np.ndarray:
    """Of (A + shift I), in NumPy."""
    values, vectors = np.linalg.eigh(matrix + shift * np.eye(len(matrix)))
    return np.einsum("ij,j,kj->ik", vectors, values**exponent, vectors)


def test_powers_equal_dense_ones_and_their_own_definition(x64):
    """Also of rank one. With a p-th root R of the inverse, Rᵖ (A + εI) is the identity."""
    stack = np.concatenate([moments(2, size=5, rows=9), moments(1, size=5, rows=1)])
    exponents = np.array([-1 / 4, -1 / 2, -1 / 8])
    for relative in (True, False):
        made = jax.jit(power, static_argnums=3)(stack, jnp.asarray(exponents), 1e-3, relative)
        for matrix, exponent, got, condition in zip(stack, exponents, *made, strict=True):
            values = np.linalg.eigvalsh(matrix)
            shift = 1e-3 * (values[-1] if relative else 1)
            np.testing.assert_allclose(got, dense_power(matrix, exponent, shift), rtol=1e-10, atol=1e-12)
            inverse = np.linalg.matrix_power(np.asarray(got), round(-1 / exponent))
            np.testing.assert_allclose(inverse @ (matrix + shift * np.eye(5)), np.eye(5), atol=1e-9)
            np.testing.assert_allclose(condition, (values[-1] + shift) / (values[0] + shift), rtol=1e-9)


def test_relative_damping_knows_no_scale_and_zeros_have_no_power():
    stack = np.stack([moments(size=4, rows=9), np.zeros((4, 4))]).astype(np.float32)
    exponent = jnp.full(2, -0.25)
    one, tiny = (power(jnp.asarray(stack * scale), exponent, 1e-6, True) for scale in (1, 2.0**-60))
    np.testing.assert_allclose(tiny.matrix[0] * 2.0**-15, one.matrix[0], rtol=1e-5, atol=1e-5)
    assert not np.isfinite(one.matrix[1]).any()


def test_what_rounding_leaves_of_zero_is_not_blown_up():
    """A condition of 1e8 and an ε of 1e-12: single precision knows nothing of the small eigenvalue."""
    matrix = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    matrix = (matrix * np.logspace(0, -8, 6)) @ matrix.T
    made = power(jnp.asarray(matrix[None], jnp.float32), jnp.array([-0.5]), 1e-12, False)
    assert np.linalg.norm(made.matrix[0], 2) <= 1.01 * np.finfo(np.float32).eps ** -0.5
    assert made.condition[0, 0, 0] <= 1.01 / np.finfo(np.float32).eps
    below = jnp.asarray(matrix[None] - 5e-7 * np.eye(6), jnp.float32)
    assert np.linalg.norm(power(below, jnp.array([-0.5]), 1e-6, True).matrix[0], 2) <= 1.01e3


def exponents_of(matrices: list[np.ndarray]) -> list[np.ndarray]:
    return [np.linspace(-0.5, -0.25, int(np.prod(m.shape[:-2]))).reshape(m.shape[:-2]) for m in matrices]


def in_float64(matrices: list[np.ndarray]) -> list[Power]:
    return in_stacks(
        lambda stack, e: power(stack, e, 1e-3, False), [jnp.asarray(m) for m in matrices], exponents_of(matrices)
    )


def test_stacks_hold_all_of_one_size_and_give_each_its_own(x64):
    matrices = [moments(size=3, rows=5), moments(2, 2, size=4, rows=6), moments(3, size=3, rows=4, seed=1)]
    # In one, and for CPUs one by one.
    assert stacks_of("eigh", in_float64, matrices) == ["1,3,3", "1,4,4", "4,3,3", "4,4,4"]
    for matrix, exponent, made in zip(matrices, exponents_of(matrices), jax.jit(in_float64)(matrices), strict=True):
        assert made.matrix.shape == matrix.shape
        assert made.condition.shape == (*matrix.shape[:-2], 1, 1)
        for place in np.ndindex(matrix.shape[:-2]):
            np.testing.assert_allclose(made.matrix[place], dense_power(matrix[place], exponent[place], 1e-3), rtol=1e-9)


def test_devices_share_stacks_out(x64):
    """Eleven matrices on eight devices: two for each, also where shardings are part of the types."""
    matrices = [moments(7, size=3, rows=5), moments(2, 2, size=3, rows=6, seed=1), moments(size=4, rows=9)]
    wanted = jax.jit(in_float64)(matrices)
    for kind in (AxisType.Auto, AxisType.Explicit):
        with jax.set_mesh(jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)):
            jax.tree.map(np.testing.assert_allclose, jax.jit(in_float64)(matrices), wanted)
            assert stacks_of("eigh", in_float64, matrices) == ["1,3,3", "1,4,4", "2,3,3"]


def test_stacks_are_no_stacks_for_lapack(x64):
    """Whose kernels would wait for one another."""
    compiled = jax.jit(in_float64).lower([moments(3, size=3, rows=5), moments(2, size=4, rows=5)]).compile()
    stacks = re.findall(r"f64\[([\d,]+)\]\S*,[^=]*custom-call\(.*syevd", compiled.as_text())
    assert sorted(stacks) == ["1,3,3", "1,4,4"]


def test_renewal_keeps_old_parts_of_broken_layers_and_all_in_other_steps():
    old = [(jnp.ones((2, 3, 3)), jnp.ones((2, 1, 1))), (jnp.ones((2, 2)),)]
    new = [(jnp.full((2, 3, 3), 2.0), jnp.array([2.0, jnp.nan]).reshape(2, 1, 1)), (jnp.full((2, 2), 2.0),)]
    kept, made = jax.jit(lambda due: renew(due, lambda: new, old))(True)
    np.testing.assert_array_equal(kept[0][0][:, 0, 0], [2, 1])
    np.testing.assert_array_equal(kept[0][1].ravel(), [2, 1])
    np.testing.assert_array_equal(kept[1][0], new[1][0])
    np.testing.assert_array_equal(made[0], [True, False])
    assert made[1]
    kept, made = jax.jit(lambda due: renew(due, lambda: new, old))(False)
    jax.tree.map(np.testing.assert_array_equal, kept, old)
    assert not any(part.any() for part in made)
