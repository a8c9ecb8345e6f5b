"""`scale_by_eva_f` and `eva_f` of models that are tapped with a rank, against dense matrices in float64."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

import eva_optax
from tests.dense import LAYOUTS, cast
from tests.helpers import (
    FAMILY,
    assert_close,
    assert_identical,
    assert_probes_are_zero,
    averages,
    first_update,
    random_like,
)

X = np.random.default_rng(0).normal(0.5, 1, (6, 4, 4, 2))
DAMPING = 0.3


class Square(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return jnp.tanh(nn.Dense(5, param_dtype=float, name="dense")(x)), None


class Network(nn.Module):
    """A convolution, a layer of more inputs than there are rows, and two scanned ones."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(nn.Conv(3, (2, 2), padding="VALID", param_dtype=float, name="conv")(x))
        x = jnp.tanh(nn.Dense(5, use_bias=False, param_dtype=float, name="dense")(x.reshape(len(x), -1)))
        scanned = nn.scan(Square, variable_axes={"params": 1}, split_rngs={"params": True}, length=2)
        return scanned(name="layers")(x, None)[0]


def gradient(model: Any, params: Any, x: Any = X) -> Any:
    return jax.grad(lambda params: jnp.sin(3 * model.apply({"params": params}, x)).mean())(params)


def layers(params: Any, updates: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By name the rows that each single layer reads, with the bias's 1, and [kernel; bias] of a tree."""
    conv, dense, stacked = (jax.tree.map(np.asarray, params[name]) for name in ("conv", "dense", "layers"))
    windows = np.lib.stride_tricks.sliding_window_view(X, (2, 2), (1, 2))  # (batch, 3, 3, channel, 2, 2)
    rows = {"conv": np.moveaxis(windows, 3, -1).reshape(54, 8)}
    rows["dense"] = np.tanh(rows["conv"] @ conv["kernel"].reshape(8, 3) + conv["bias"]).reshape(6, 27)
    rows["layers[0]"] = np.tanh(rows["dense"] @ dense["kernel"])
    of_first = stacked["dense"]["kernel"][:, 0], stacked["dense"]["bias"][:, 0]
    rows["layers[1]"] = np.tanh(rows["layers[0]"] @ of_first[0] + of_first[1])
    trees = {"conv": updates["conv"]}
    for index in (0, 1):
        trees[f"layers[{index}]"] = {key: part[:, index] for key, part in updates["layers"]["dense"].items()}
    found = {"dense": (rows.pop("dense"), np.asarray(updates["dense"]["kernel"]))}
    for name, row in rows.items():
        kernel, bias = (np.asarray(trees[name][key]) for key in ("kernel", "bias"))
        matrix = np.concatenate([kernel.reshape(row.shape[1], -1), bias[None]])
        found[name] = np.concatenate([row, np.ones((len(row), 1))], 1), matrix
    return found


def nystrom(moment: np.ndarray, omega: np.ndarray) -> np.ndarray:
    """Nyström's approximation, and what it leaves of the trace shared out over the other directions."""
    sketch = moment @ omega
    values, vectors = np.linalg.eigh(sketch @ np.linalg.solve(omega.T @ sketch, sketch.T))
    left = len(moment) - omega.shape[1]
    rest = (np.trace(moment) - values.sum()) / left
    return vectors * np.maximum(values, rest) @ vectors.T


def solve(moment: np.ndarray, unit: float, matrix: np.ndarray, relative: bool) -> np.ndarray:
    """(A + γI)⁻¹ G, or (Ā + δI)⁻¹ G · (1 + δ)."""
    shift, floor = (DAMPING * unit, (1 + DAMPING) * unit) if relative else (DAMPING, 1)
    return floor * np.linalg.solve(moment + shift * np.eye(len(moment)), matrix)


def test_every_kind_of_layer_is_solved_with_its_dense_matrix(x64):
    """Of rank 3 Nyström's; of rank 8 all of A, for the layer of 27 inputs too, since 6 rows have no more directions.

    There it is FOOF.
    """
    params = random_like(jax.eval_shape(Network().init, jax.random.key(0), X)["params"])
    models = {3: eva_optax.tap(Network(), rank=3), 8: eva_optax.tap(Network(), rank=8)}
    whole = eva_optax.tap(Network(), factors="input")
    kinds = (3, False), (8, True)

    @jax.jit
    def run(params: Any) -> Any:
        made = {rank: gradient(model, eva_optax.attach(model, params, X)) for rank, model in models.items()}
        found = {}
        for rank, relative in kinds:
            tx = eva_optax.scale_by_eva_f(DAMPING, relative=relative)
            found[rank, relative] = tx.update(made[rank], tx.init(made[rank]))
        grads, foof = gradient(whole, eva_optax.attach(whole, params, X)), eva_optax.scale_by_foof(DAMPING)
        return made, found, foof.update(grads, foof.init(grads))[0]

    made, found, foof = run(params)
    for (rank, relative), (updates, state) in found.items():
        grads = made[rank]
        assert isinstance(state, eva_optax.ScaleByKfacState)
        assert state.skipped == 0
        assert_probes_are_zero(updates)
        given, got = (layers(params, eva_optax.strip(tree)) for tree in (grads, updates))
        for name, (rows, matrix) in given.items():
            moment, size = rows.T @ rows / len(rows), rows.shape[1] - (name != "dense")
            unit = np.trace(moment) / len(moment)
            if rank == 3:
                omega = eva_optax.sketches(grads)[name.partition("[")[0].replace("layers", "layers/dense")].directions
                omega = np.asarray(omega).reshape(size, 3)
                if name != "dense":
                    omega = np.block([[omega, np.zeros((size, 1))], [np.zeros((1, 3)), np.ones((1, 1))]])
                moment = nystrom(moment, omega)
            wanted = solve(moment, unit, matrix, relative)
            assert_close(got[name][1], wanted, 1e-9 if rank == 3 else 1e-5, floor=np.abs(matrix).max())
            assert np.linalg.norm(wanted - matrix) > 0.1 * np.linalg.norm(matrix)
    assert_close(eva_optax.strip(found[8, True][0]), eva_optax.strip(foof), 1e-5, floor=0.0)


DENSE = nn.Dense(3, use_bias=False, param_dtype=float)
ROWS = X.reshape(24, 8)[:, :7]


def tapped(**options: Any) -> tuple[Any, Any]:
    """Parameters and gradients of the layer, tapped in one way or another."""
    model = eva_optax.tap(DENSE, **options)
    params = eva_optax.attach(model, {"kernel": jnp.asarray(X.ravel()[:21].reshape(7, 3))}, ROWS)
    return params, jax.jit(lambda: gradient(model, params, ROWS))()


def test_units_cancel_and_the_root_taken_twice_is_the_inverse(x64):
    """Of the loss, of the inputs, and of gradients that several batches share."""
    model, (params, _) = eva_optax.tap(DENSE, rank=3), tapped(rank=3)
    relative, absolute = eva_optax.scale_by_eva_f(), eva_optax.scale_by_eva_f(relative=False)
    whitened = eva_optax.conjugate(optax.identity())

    @jax.jit
    def run(params: Any) -> Any:
        grads = gradient(model, params, ROWS)
        halves = [gradient(model, params, part) for part in (ROWS[:12], ROWS[12:])]
        summed = jax.tree.map(lambda *parts: 4 * sum(parts), *halves)
        larger = gradient(model, jax.tree.map(lambda w: w / 100, params), 100 * ROWS)
        given = ((relative, tree) for tree in (grads, summed, larger))
        pairs = (*given, (absolute, grads), (absolute, summed), (whitened, grads))
        return [tx.update(tree, tx.init(tree))[0]["kernel"] for tx, tree in pairs]

    by_one, by_sum, by_larger, *by_absolute, twice = run(params)
    assert_close(by_sum, 8 * by_one, 1e-10)
    assert_close(by_larger, 100 * by_one, 1e-10)
    assert_close(by_absolute[1], 8 * by_absolute[0], 1e-10)
    assert_close(twice, by_one, 1e-10)


def test_what_is_kept_is_renewed_in_time_and_only_by_what_is_finite(x64):
    """One program for all steps; a layer without a sketch beside it keeps an average of its own."""
    model, (params, _) = eva_optax.tap(DENSE, rank=3), tapped(rank=3)
    tx = eva_optax.scale_by_eva_f(decay=0.25, sketch_decay=0.5, every=3)
    update = jax.jit(tx.update)
    vector_only = next(case for case in LAYOUTS if case.name == "dense")
    compiled = jax.jit(lambda x: gradient(model, params, x))

    def tree(step: int, sign: float = 1.0) -> Any:
        grads = compiled((1 + step) * ROWS)
        probe = grads["kronecker"]["kernel"]
        probe["y"] = np.asarray(probe["y"]) * sign
        return {"sketched": grads, "plain": cast(vector_only, float, step)}

    state, kept, ages = tx.init(tree(0)), [], []
    for step in range(6):
        _, state = update(tree(step), state)
        kept.append(state)
        ages.append(int(state.inverses["sketched"].age[0, 0]))
    assert ages == [0, 0, 0, 0, 1, 2]
    weights = 0.5 ** np.arange(5.0, -1, -1)
    scales = weights / weights.sum() @ np.arange(1.0, 7) ** 2
    held = state.vectors["sketched"]["kronecker"]["kernel"]
    np.testing.assert_allclose(held["s"].squeeze(), scales * np.mean(np.sum(ROWS**2, 1)), rtol=1e-10)
    means = [eva_optax.vectors(tree(step))["plain"].a for step in range(6)]
    wanted = means[0]
    for mean in means[1:]:
        wanted = 0.25 * wanted + 0.75 * mean
    assert_close(averages(state, "plain")["a"], np.asarray(wanted), 1e-10)

    # Finite, but no second moment: the directions stay, and it is counted; not finite: the averages stay too.
    negative, after = update(tree(6, -1e6), state)
    assert after.skipped == 1
    assert_identical(after.inverses["sketched"].inputs, state.inverses["sketched"].inputs)
    assert np.all(np.isfinite(negative["sketched"]["kernel"]))
    broken, after = update(tree(6, np.nan), state)
    assert after.skipped == 1
    assert_identical(after.vectors["sketched"], state.vectors["sketched"])
    assert np.all(np.isfinite(broken["sketched"]["kernel"]))
    assert update._cache_size() == 1


def test_a_state_goes_through_a_checkpoint_and_fits_no_other_tap(x64):
    params, grads = tapped(rank=3)
    tx = eva_optax.eva_f(0.1, every=2)
    update = jax.jit(tx.update)
    _, state = update(grads, tx.init(params), params)
    restored = serialization.from_bytes(jax.eval_shape(tx.init, params), serialization.to_bytes(state))
    assert_identical(update(grads, jax.tree.map(jnp.asarray, restored), params), update(grads, state, params))
    plain, others = tapped()
    with pytest.raises(ValueError, match=r"eva_f: state must be a ScaleByKfacState .* got a ScaleByEvaState"):
        tx.update(grads, tx.init(plain), params)
    with pytest.raises(ValueError, match=r"eva_f: state must be a ScaleByEvaState .* got a ScaleByKfacState"):
        tx.update(others, state, plain)


def test_the_alias_makes_steps_of_one_length_and_keeps_no_momentum_of_sketches(x64):
    params, grads = tapped(rank=3)
    updates, state = first_update(eva_optax.eva_f(0.1, DAMPING, weight_decay=0.01), grads, params)
    inverse, _ = first_update(eva_optax.scale_by_eva_f(DAMPING, relative=False), grads)
    length = np.sqrt(DAMPING * np.sum(inverse["kernel"] * grads["kernel"]))
    wanted = DAMPING * inverse["kernel"] / length + 0.01 * params["kernel"]
    assert_close(updates["kernel"], -0.1 * wanted, 1e-10)
    assert (7, 3) in {leaf.shape for leaf in jax.tree.leaves(state[0])}
    assert [leaf.shape for leaf in jax.tree.leaves(state[1:])] == [(7, 3)]  # the kernel, which has 3 outputs
    found = eva_optax.diagnostics(state)
    whitened = eva_optax.diagnostics(first_update(eva_optax.conjugate(optax.identity()), grads)[1])
    assert found.keys() - whitened.keys() == {"nu", "cosine"}
    np.testing.assert_allclose(found["explained"], whitened["explained"], rtol=1e-10)
    np.testing.assert_allclose(found["nu"], 1 / length, rtol=1e-10)


def test_no_matrix_of_a_layers_size_is_made():
    model = eva_optax.tap(nn.Dense(3), rank=4)
    tx, x = eva_optax.scale_by_eva_f(), jnp.ones((8, 61))
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    program = str(jax.make_jaxpr(lambda grads: tx.update(grads, tx.init(grads)))(params))
    assert "[1,61,4]" in program
    assert not any(f"{size},{other}]" in program for size in (61, 62) for other in (61, 62))


@pytest.mark.parametrize("name", ["scale_by_eva_f", "eva_f", "conjugate", "eva_adamw", "eva_muon"])
def test_options_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name}: sketch_decay must lie in \[0, 1\), got 1"):
        FAMILY[name](sketch_decay=1.0)
    with pytest.raises(ValueError, match=f"{name}: every must be greater than 0, got 0"):
        FAMILY[name](every=0)
