"""What happens to bad input: each fault by itself, and that it stays where it arose."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eva_optax
from tests.dense import gradients
from tests.helpers import assert_close, assert_finite, assert_identical, averages, first_update

BAD = [np.nan, np.inf, -np.inf]
PROBE = "kernel,bias"


def layer(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    shapes = ((5, 4), (4,), (5, 1), (1, 4))
    kernel, bias, a, b = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return gradients(kernel, bias, a, b, (1,))["layer"]


def tree(seed: int = 0) -> dict:
    return {"sound": layer(seed), "faulty": layer(seed + 100)}


def vectors(grads: dict, layer: str) -> dict:
    return eva_optax.vectors(grads)[layer]._asdict()


@cache
def eva(**options):
    """Compiled once for all tests that take these options."""
    tx = eva_optax.scale_by_eva(**options)
    return optax.GradientTransformation(jax.jit(tx.init), jax.jit(tx.update))


def run(grads: dict, before: dict | None = None, **options):
    """One step from a state that has seen `before`; returns updates, state, and the state before."""
    tx = eva(**options)
    state = tx.init(grads)
    if before is not None:
        _, state = tx.update(before, state)
    updates, after = tx.update(grads, state)
    return updates, after, state


@pytest.mark.parametrize("before", [None, tree(7)], ids=["first step", "later step"])
@pytest.mark.parametrize("vector", ["a", "b", "n"])
@pytest.mark.parametrize("value", [*BAD, 1e10], ids=str)  # in the unit of storage; the square of the last overflows
def test_vectors_that_are_not_finite_hold_the_average_and_pass_the_gradient_on(value, vector, before):
    grads, clean = tree(), tree()
    leaf = grads["faulty"]["kronecker"][PROBE][vector]
    grads["faulty"]["kronecker"][PROBE][vector] = leaf.at[0].set(value)
    options = {"step_rule": "kl_clip", "learning_rate": 10.0}
    updates, state, old = run(grads, before, **options)
    for name in ("kernel", "bias"):
        assert_identical(updates["faulty"][name], clean["faulty"][name])
    assert_identical(averages(state, "faulty"), averages(old, "faulty"))
    assert state.skipped == 1
    # The sound layer goes its way as if it were alone.
    alone, lone_state, _ = run({"sound": clean["sound"]}, before and {"sound": before["sound"]}, **options)
    np.testing.assert_allclose(updates["sound"]["kernel"], alone["sound"]["kernel"], rtol=1e-6)
    np.testing.assert_allclose(state.nu, lone_state.nu, rtol=1e-6)
    assert 0 < state.nu < 1


def test_skipped_adds_up_over_steps():
    grads = tree()
    grads["faulty"]["kronecker"][PROBE]["a"] *= np.nan
    tx = eva()
    state = tx.init(grads)
    for step in range(3):
        assert state.skipped == step
        _, state = tx.update(grads, state)


@pytest.mark.parametrize("before", [None, tree(7)], ids=["first step", "later step"])
@pytest.mark.parametrize("name", ["kernel", "bias"])
@pytest.mark.parametrize("value", BAD)
def test_a_gradient_that_is_not_finite_is_passed_through_and_not_averaged(value, name, before):
    grads = tree()
    grads["faulty"][name] = grads["faulty"][name].at[0].set(value)
    updates, state, old = run(grads, before, relative=False)
    for part in ("kernel", "bias"):
        assert_identical(updates["faulty"][part], grads["faulty"][part])
    assert_identical(averages(state, "faulty"), averages(old, "faulty"))
    assert state.skipped == 0
    assert np.isfinite(state.nu)
    assert np.all(np.isfinite(updates["sound"]["kernel"]))


def test_apply_if_finite_sees_a_gradient_that_is_not_finite():
    grads = tree()
    grads["faulty"]["kernel"] *= np.nan
    tx = optax.apply_if_finite(eva_optax.scale_by_eva(), max_consecutive_errors=3)
    updates, state = first_update(tx, grads)
    assert state.total_notfinite == 1
    assert not any(np.count_nonzero(leaf) for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("step_rule", ["none", "kl_clip", "kl_norm", "grad_norm"])
@pytest.mark.parametrize("zeroed", ["gradient", "vectors", "both"])
def test_zeros_give_finite_updates(zeroed, step_rule, relative):
    grads = tree()
    for part in grads.values():
        if zeroed != "vectors":
            part |= {name: jnp.zeros_like(part[name]) for name in ("kernel", "bias")}
        if zeroed != "gradient":
            part["kronecker"][PROBE] |= {name: jnp.zeros_like(part["kronecker"][PROBE][name]) for name in "ab"}
    updates, state, _ = run(grads, step_rule=step_rule, relative=relative)
    assert_finite((updates, state))
    if zeroed != "vectors":
        assert not any(np.count_nonzero(leaf) for leaf in jax.tree.leaves(updates))


def test_zero_vectors_leave_the_gradient_as_it_is():
    """Also what the rounding-noise guard amounts to: a layer whose cotangents cancel is not preconditioned."""
    grads = tree()
    grads["faulty"]["kronecker"][PROBE]["b"] *= 0
    updates, _, _ = run(grads)
    assert_identical(updates["faulty"]["kernel"], grads["faulty"]["kernel"])


@pytest.mark.parametrize("before", [None, tree(7)], ids=["first step", "later step"])
def test_an_unused_layer_holds_its_average(before):
    grads = tree()
    grads["faulty"] = jax.tree.map(jnp.zeros_like, grads["faulty"])
    updates, state, old = run(grads, before, relative=False)
    assert_identical(averages(state, "faulty"), averages(old, "faulty"))
    assert not any(np.count_nonzero(leaf) for leaf in jax.tree.leaves(updates["faulty"]))
    assert state.skipped == 0
    # Its first use later is taken as it is.
    if before is None:
        tx = eva(relative=False)
        _, used = tx.update(tree(3), state)
        direct, _ = first_update(tx, tree(3))
        again, _ = tx.update(tree(3), state)
        assert_close(averages(used, "faulty"), vectors(tree(3), "faulty"))
        np.testing.assert_allclose(again["faulty"]["kernel"], direct["faulty"]["kernel"], rtol=1e-6)


def test_one_bad_layer_of_a_stack_leaves_the_others():
    rng = np.random.default_rng(0)
    shapes = ((3, 5, 4), (3, 4), (3, 5, 1), (3, 1, 4))
    kernel, bias, a, b = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    clean = gradients(kernel, bias, a, b, (3, 1))
    a[1, 0] = np.nan
    grads = gradients(kernel, bias, a, b, (3, 1))
    updates, state, _ = run(grads)
    wanted, clean_state, _ = run(clean)
    for index in (0, 2):
        np.testing.assert_allclose(updates["layer"]["kernel"][index], wanted["layer"]["kernel"][index], rtol=1e-6)
    assert_identical(updates["layer"]["kernel"][1], kernel[1])
    assert_identical(updates["layer"]["bias"][1], bias[1])
    assert state.skipped == 1
    for name, running in averages(state).items():
        assert_identical(running[::2], averages(clean_state)[name][::2])
        assert not np.count_nonzero(running[1])


def test_values_of_probes_do_not_matter():
    params, grads = tree(), tree(1)
    nan = jax.tree.map(lambda leaf: leaf * np.nan, params)
    tx = eva()
    assert_identical(tx.update(grads, tx.init(params), params), tx.update(grads, tx.init(nan), nan))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"damping": 0}, "damping must be greater than 0, got 0"),
        ({"damping": -1.0}, "damping must be greater than 0, got -1.0"),
        ({"damping": float("nan")}, "damping must be greater than 0, got nan"),
        ({"decay": 1}, "decay must lie in .0, 1., got 1"),
        ({"decay": -0.1}, "decay must lie in .0, 1., got -0.1"),
        ({"kl_clip": 0.0}, "kl_clip must be greater than 0, got 0.0"),
        ({"step_rule": "klclip"}, "step_rule must be one of .*, got 'klclip'"),
    ],
)
def test_options_out_of_range_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        eva_optax.scale_by_eva(**options)


def test_traced_options_are_not_checked_and_do_not_recompile():
    grads, traces = tree(), []

    @jax.jit
    def step(damping, decay):
        traces.append(None)
        tx = eva_optax.scale_by_eva(damping, decay=decay)
        return first_update(tx, grads)[0]

    small, large = step(0.1, 0.5), step(10.0, 0.5)
    assert len(traces) == 1
    assert np.count_nonzero(small["sound"]["kernel"] != large["sound"]["kernel"])


def test_parameters_without_probes_are_refused_with_advice():
    with pytest.raises(ValueError, match=r"eva_optax\.tap\(model\).*eva_optax\.attach"):
        eva_optax.scale_by_eva().init({"dense": {"kernel": jnp.ones((2, 3))}})


def test_gradients_without_probes_are_refused():
    tx = eva_optax.scale_by_eva()
    with pytest.raises(ValueError, match=r"updates hold no tapped layer"):
        tx.update(eva_optax.strip(tree()), tx.init(tree()))


def test_vectors_that_do_not_fit_the_kernel_are_named_with_shapes():
    grads = tree()
    grads["faulty"]["kernel"] = jnp.ones((6, 4))
    with pytest.raises(ValueError, match=r"'faulty' does not fit.*\(6, 4\).*a \(5, 1\).*b \(1, 4\)"):
        eva_optax.scale_by_eva().init(grads)
    tx = eva_optax.scale_by_eva()
    state = tx.init(tree())
    with pytest.raises(ValueError, match="'faulty' does not fit"):
        jax.eval_shape(tx.update, grads, state)


def test_a_bias_that_does_not_fit_is_named():
    grads = tree()
    grads["faulty"]["bias"] = jnp.ones((5,))
    with pytest.raises(ValueError, match=r"'faulty' does not fit.*bias \(5,\)"):
        eva_optax.scale_by_eva().init(grads)


def test_a_state_of_other_shapes_is_refused():
    tx = eva_optax.scale_by_eva()
    other = gradients(np.ones((6, 4)), np.ones(4), np.ones((6, 1)), np.ones((1, 4)), (1,))
    with pytest.raises(ValueError, match=r"'layer.*\(6, 1\).*\(5, 1\)"):
        tx.update({"layer": layer(0)}, tx.init(other))


def test_a_mask_that_cuts_through_a_probe_is_refused():
    tx = optax.masked(eva_optax.scale_by_eva(), lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params))
    with pytest.raises(ValueError, match=r"'(sound|faulty)' lacks \[.*mask"):
        tx.init(tree())


def test_masks_may_leave_out_kernels_biases_or_whole_layers():
    grads = tree()

    def freeze(*path):
        def keep(keys, _):
            names = tuple(key.key for key in keys)
            return names[: len(path)] != path

        return optax.masked(eva_optax.scale_by_eva(), jax.tree_util.tree_map_with_path(keep, grads))

    for path in (("faulty",), ("faulty", "kernel"), ("faulty", "bias")):
        tx = freeze(*path)
        updates, _ = first_update(tx, grads)
        masked_out = updates["faulty"].get(path[-1], updates["faulty"]["kernel"])
        original = grads["faulty"].get(path[-1], grads["faulty"]["kernel"])
        assert_identical(masked_out, original)
        wanted, _, _ = run(grads)
        np.testing.assert_allclose(updates["sound"]["kernel"], wanted["sound"]["kernel"], rtol=1e-6)
