"""What `diagnostics` reports, against the gradients themselves, and the plot of it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import eva_optax
from tests.dense import LAYOUTS, draw, gradients, solve_eva
from tests.flax.nnx_cases import jit
from tests.helpers import first_update

RNG = np.random.default_rng(0)
CASES = {case.name: case for case in LAYOUTS}


def tree(seed: int = 0) -> dict:
    """A dense layer, three stacked ones, and a parameter that is not tapped."""
    dense, stacked = (
        gradients(*draw(CASES[name], seed), CASES[name].counter)["layer"] for name in ("dense", "stacked at 0")
    )
    return {"dense": dense, "block": {"stacked": stacked}, "scale": jnp.ones(3)}


def homogeneous(a: np.ndarray) -> np.ndarray:
    return np.append(a.ravel(), 1.0)


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y))


def layers(seed: int = 0):
    """[kernel; bias], a and b of each single layer, by the name under which it is reported."""
    kernel, bias, a, b = draw(CASES["dense"], seed)
    yield "dense", np.vstack([kernel, bias]), a, b
    kernel, bias, a, b = draw(CASES["stacked at 0"], seed)
    for index in range(3):
        yield f"block/stacked[{index}]", np.vstack([kernel[index], bias[index]]), a[index], b[index]


def test_figures_of_eva_are_those_of_the_gradient():
    with jax.enable_x64(True):
        tx = optax.chain(eva_optax.scale_by_eva(0.03, step_rule="kl_norm"), optax.sgd(0.1))
        _, state = jax.jit(tx.update)(tree(), tx.init(tree()))
        found = jax.jit(eva_optax.diagnostics)(state)
        wanted, product = {"skipped": 0, "untapped": 0}, 0.0
        for name, matrix, a, b in layers():
            update, _ = solve_eva(matrix, None, homogeneous(a)[:, None], b, 0.03, relative=True)
            product += np.sum(update * matrix)
            wanted[f"{name}/norm_a"], wanted[f"{name}/norm_b"] = np.linalg.norm(a), np.linalg.norm(b)
            wanted[f"{name}/cosine"] = cosine(matrix, np.outer(homogeneous(a), b))
        wanted["nu"] = 1 / np.sqrt(product)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name].shape == ()
            np.testing.assert_allclose(found[name], value, rtol=1e-12, err_msg=name)
        assert min(value for name, value in found.items() if "cosine" in name) < 0


@pytest.mark.parametrize("tx", [eva_optax.scale_by_eva_f(), eva_optax.eva_adamw(0.1)], ids=["eva_f", "eva_adamw"])
def test_figures_of_one_sided_members_are_the_share_along_the_mean_input(tx):
    with jax.enable_x64(True):
        _, state = jax.jit(tx.update)(tree(), tx.init(tree()), tree())
        found = eva_optax.diagnostics(state)
        for name, matrix, a, _ in layers():
            row = homogeneous(a) / np.linalg.norm(homogeneous(a))
            np.testing.assert_allclose(found[f"{name}/norm_a"], np.linalg.norm(a), rtol=1e-12)
            np.testing.assert_allclose(found[f"{name}/cosine"], cosine(matrix, np.outer(row, row @ matrix)), rtol=1e-12)
            assert f"{name}/norm_b" not in found


def test_figures_of_eva_s_are_those_of_its_means():
    with jax.enable_x64(True):
        gradient = RNG.normal(0.3, 1, (3, 4))
        tx = eva_optax.scale_by_eva_s()
        grads = {"layer": {"kernel": jnp.asarray(gradient), "bias": jnp.ones(4)}}
        _, state = first_update(tx, grads)
        direction = np.outer(gradient.mean(1), gradient.mean(0))
        found = eva_optax.diagnostics(state)
        assert set(found) == {"nu", "skipped", "untapped", "layer/kernel/norm", "layer/kernel/cosine"}
        np.testing.assert_allclose(found["layer/kernel/norm"], np.linalg.norm(direction), rtol=1e-12)
        np.testing.assert_allclose(found["layer/kernel/cosine"], cosine(gradient, direction), rtol=1e-12)


def test_groups_are_averaged_and_broken_layers_keep_their_last_figures():
    case = CASES["grouped convolution"]
    kernel, bias, a, b = draw(case)
    grads = gradients(kernel, bias, a, b, case.counter)
    tx = eva_optax.scale_by_eva()
    update = jax.jit(tx.update)
    _, state = update(grads, tx.init(grads))
    found = eva_optax.diagnostics(state)
    parts = []
    for group in range(3):
        own = slice(2 * group, 2 * group + 2)
        matrix = np.vstack([kernel[..., own].reshape(-1, 2), bias[own]])
        parts.append(cosine(matrix, np.outer(homogeneous(a[..., group]), b[..., own])))
    np.testing.assert_allclose(found["layer/cosine"], np.mean(parts), rtol=1e-5)
    np.testing.assert_allclose(found["layer/norm_a"], np.linalg.norm(a), rtol=1e-6)

    kernel, bias, a, b = draw(case, 1)
    _, after = update(gradients(kernel, bias, a * np.nan, b, case.counter), state)
    after = eva_optax.diagnostics(after)
    assert after.pop("skipped") == 1
    assert after == {name: value for name, value in found.items() if name != "skipped"}


def test_states_are_found_inside_wrappers_and_one_another():
    grads = tree()
    outer = eva_optax.conjugate(optax.chain(eva_optax.scale_by_eva_s(), optax.scale_by_adam()))
    found = eva_optax.diagnostics(optax.MultiSteps(optax.chain(optax.clip(1.0), outer), 2).init(grads))
    assert {name.partition("/")[0] for name in found} == {"0", "1"}
    assert {"0/dense/cosine", "1/nu", "1/dense/kernel/cosine", "1/block/stacked/kernel/norm"} <= found.keys()
    with pytest.raises(ValueError, match=r"no ScaleByEvaState, .* in the state of type tuple"):
        eva_optax.diagnostics(optax.adam(0.1).init(grads))


def test_works_with_an_optimizer_of_nnx():
    model = eva_optax.tap(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    optimizer = nnx.Optimizer(model, optax.chain(eva_optax.scale_by_eva(), optax.sgd(0.1)), wrt=nnx.Param)
    x = jnp.ones((4, 3))
    optimizer.update(model, jit(nnx.grad(lambda model: jnp.sum(model(x))))(model))
    found = eva_optax.diagnostics(optimizer)
    np.testing.assert_allclose(found["norm_a"], np.sqrt(3), rtol=1e-6)
    np.testing.assert_allclose(found["cosine"], 1, rtol=1e-6)
    assert all(type(value) is type(x) and value.shape == () for value in found.values())
    assert found.keys() == eva_optax.diagnostics(optimizer.opt_state).keys()


def test_the_plot_has_a_panel_for_each_quantity_and_a_line_for_each_layer():
    model, x = eva_optax.tap(nn.Sequential([nn.Dense(3), nn.Dense(2)])), jnp.ones((4, 3))
    params = model.init(jax.random.key(0), x)["params"]
    tx = eva_optax.scale_by_eva()
    state, update = tx.init(params), jax.jit(tx.update)
    gradient, history = jax.jit(jax.grad(lambda params: model.apply({"params": params}, x).sum())), []
    for _ in range(3):
        _, state = update(gradient(params), state)
        history.append(jax.device_get(eva_optax.diagnostics(state)))
    figure = eva_optax.plot_diagnostics(history, steps=[0, 5, 10])
    lines = {axis.get_title(): axis.get_lines() for axis in figure.axes}
    assert len(lines) == 6
    for title, drawn in lines.items():
        assert len(drawn) == (2 if "‖" in title or "cosine" in title else 1)
        for line in drawn:
            np.testing.assert_array_equal(line.get_xdata(), [0, 5, 10])
            np.testing.assert_allclose(line.get_ydata(), [entry[line.get_label()] for entry in history])
    with pytest.raises(ValueError, match="history is empty"):
        eva_optax.plot_diagnostics([])
    with pytest.raises(ValueError, match="got 2 steps for a history of 3"):
        eva_optax.plot_diagnostics(history, steps=[0, 1])
