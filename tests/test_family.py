"""Eva-f and Eva-s against dense solves, and the ready-made optimizers against what they are made of."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eva_optax
from tests.dense import each_layer, gradients
from tests.test_eva import LAYOUTS, LayoutCase, draw, two_layers
from tests.test_reference import assert_close, opened

RULES = ["none", "kl_clip", "kl_norm", "grad_norm", "layer_grad_norm"]


def solve_eva_f(rows: np.ndarray, matrix: np.ndarray, damping: float, relative: bool) -> np.ndarray:
    """(aaᵀ + γI)⁻¹ G, times γ if it is relative to ‖a‖²."""
    gamma = damping * rows @ rows if relative else damping
    solved = np.linalg.solve(np.outer(rows, rows) + gamma * np.eye(rows.size), matrix)
    return gamma * solved if relative else solved


def beside_kernel(case: LayoutCase, bias: np.ndarray) -> np.ndarray:
    """A bias with its axes where the kernel has them."""
    shape = [case.kernel[axis] if axis in case.bias_axes else 1 for axis in range(len(case.kernel))]
    return bias.transpose(np.argsort(case.bias_axes)).reshape(shape)


def expected_eva_f(case: LayoutCase, kernel, bias, a, damping: float, relative: bool):
    """Solves each independent layer of the case by itself; the bias's update lies beside the kernel."""
    kernel_update = np.full_like(kernel, np.nan)
    bias_update = None if bias is None else np.full_like(beside_kernel(case, bias), np.nan)
    for at, at_a, at_b in each_layer(case.kernel, case.a, case.b):
        part, row = kernel[at], a[at_a]
        inputs = [axis for axis, size in enumerate(case.b) if size == 1]
        order = inputs + [axis for axis in range(part.ndim) if axis not in inputs]
        shape = part.transpose(order).shape
        matrix = part.transpose(order).reshape(row.size, -1)
        homogeneous = row.transpose(order).ravel()
        if bias is not None:
            at_bias = tuple(index if case.b[axis] > 1 else slice(None) for axis, index in enumerate(at_b))
            last = beside_kernel(case, bias)[at_bias]
            matrix = np.concatenate([matrix, last.reshape(1, -1)])
            homogeneous = np.append(homogeneous, 1.0)
        solved = solve_eva_f(homogeneous, matrix, damping, relative)
        kernel_update[at] = solved[: row.size].reshape(shape).transpose(np.argsort(order))
        if bias is not None:
            bias_update[at_bias] = solved[-1].reshape(last.shape)
    return kernel_update, bias_update


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_eva_f_equals_dense_solve(case: LayoutCase):
    kernel, bias, a, b = draw(case)
    with jax.enable_x64(True):
        grads = gradients(kernel, bias, a, b, case.counter)
        for relative in (True, False):
            tx = eva_optax.scale_by_eva_f(0.3, relative=relative)
            updates, state = tx.update(grads, tx.init(grads))
            wanted, wanted_bias = expected_eva_f(case, kernel, bias, a, 0.3, relative)
            np.testing.assert_allclose(updates["layer"]["kernel"], wanted, rtol=0, atol=1e-10)
            if bias is not None:
                got = beside_kernel(case, np.asarray(updates["layer"]["bias"]))
                np.testing.assert_allclose(got, wanted_bias, rtol=0, atol=1e-10)
            assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates["layer"]["kronecker"]))
            assert state.skipped == 0


def test_eva_f_keeps_its_own_average():
    with jax.enable_x64(True):
        tx = eva_optax.scale_by_eva_f(0.1, decay=0.3)
        state, mean = tx.init(gradients(*draw(LAYOUTS[0]), (1,))), None
        for seed in range(3):
            kernel, bias, a, b = draw(LAYOUTS[0], seed)
            mean = a if mean is None else 0.3 * mean + 0.7 * a
            updates, state = jax.jit(tx.update)(gradients(kernel, bias, a, b, (1,)), state)
            wanted, _ = expected_eva_f(LAYOUTS[0], kernel, bias, mean, 0.1, True)
            np.testing.assert_allclose(updates["layer"]["kernel"], wanted, rtol=0, atol=1e-10)


def dense_foof(inputs: np.ndarray, matrix: np.ndarray, damping: float) -> np.ndarray:
    """V = G (A + γI)⁻¹ with A the mean of x xᵀ over all inputs; G is (outputs, inputs)."""
    return matrix @ np.linalg.inv(inputs.T @ inputs / len(inputs) + damping * np.eye(inputs.shape[1]))


def test_eva_f_is_foof_where_all_inputs_of_a_batch_are_equal():
    """The dense FOOF is first held against the authors' numbers, then Eva-f against it."""
    with opened("foof_mlp") as file:
        damping, keep = float(file["damping"]), float(file["factor_decay"])
        x = file["x"][0].astype(float)
        homogeneous = np.concatenate([x, np.ones((len(x), 1))], 1)
        gradient = np.concatenate([file["layer0.grad_weight"][0], file["layer0.grad_bias"][0][:, None]], 1)
        # Its first average is (f I + (1 − f) A) / (1 − f): more damping, in effect.
        wanted = dense_foof(homogeneous, gradient, damping + keep / (1 - keep))
        assert_close(wanted[:, :-1], file["layer0.pre_weight"][0])
        assert_close(wanted[:, -1], file["layer0.pre_bias"][0])

        equal = np.tile(x[:1], (len(x), 1))
        model = eva_optax.tap(nn.Dense(4, param_dtype=float))
        params = model.init(jax.random.key(0), equal)["params"]
        grads = jax.grad(lambda params: jnp.sum(jnp.sin(model.apply({"params": params}, equal))))(params)
        tx = eva_optax.scale_by_eva_f(damping, relative=False)
        updates, _ = tx.update(grads, tx.init(params))
        matrix = np.concatenate([grads["kernel"].T, grads["bias"][:, None]], 1)
        homogeneous = np.concatenate([equal, np.ones((len(x), 1))], 1)
        wanted = dense_foof(homogeneous, matrix, damping)
        assert_close(updates["kernel"], wanted[:, :-1].T)
        assert_close(updates["bias"], wanted[:, -1])


def solve_eva_s(gradient: np.ndarray, means: list[np.ndarray], damping: float, relative: bool) -> np.ndarray:
    """γ (vec(V) vec(V)ᵀ + γI)⁻¹ vec(G), with V the outer product of the means."""
    direction = means[0]
    for mean in means[1:]:
        direction = np.multiply.outer(direction, mean)
    gamma = damping * np.sum(direction**2) if relative else damping
    curvature = np.outer(direction, direction) + gamma * np.eye(direction.size)
    return gamma * np.linalg.solve(curvature, gradient.ravel()).reshape(gradient.shape)


@settings(max_examples=10, deadline=None)
@given(
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=4),
    relative=st.booleans(),
    damping=st.floats(1e-2, 10),
    decay=st.floats(0, 0.9),
    seed=st.integers(0, 2**16),
)
def test_eva_s_equals_dense_solve_for_any_shape(shape, relative, damping, decay, seed):
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        options = {"damping": damping, "relative": relative, "decay": decay}
        both = [eva_optax.scale_by_eva_s(**options, step_rule="none"), eva_optax.scale_by_eva_s(**options)]
        states, means = [tx.init({"kernel": jnp.zeros(shape)}) for tx in both], None

        @jax.jit
        def update(gradient, states):
            steps = [tx.update({"kernel": gradient}, state) for tx, state in zip(both, states, strict=True)]
            return [updates["kernel"] for updates, _ in steps], [state for _, state in steps]

        for _ in range(2):
            gradient = rng.normal(0.5, 1, shape)
            new = [gradient.mean(tuple(o for o in range(len(shape)) if o != axis)) for axis in range(len(shape))]
            means = new if means is None else [decay * m + (1 - decay) * v for m, v in zip(means, new, strict=True)]
            (plain, rescaled), states = update(gradient, states)
            wanted = solve_eva_s(gradient, means, damping, relative)
            np.testing.assert_allclose(plain, wanted, rtol=0, atol=1e-9)
            # Then as long as the gradient. Damping is 0.01 at least, so that something of it is always left.
            wanted *= np.linalg.norm(gradient) / np.linalg.norm(wanted)
            np.testing.assert_allclose(rescaled, wanted, rtol=0, atol=1e-9)


def test_eva_s_passes_vectors_and_broken_gradients_on():
    params = {"matrix": jnp.ones((2, 3)), "bias": jnp.ones(3), "scale": jnp.ones(()), "empty": jnp.ones((0, 3))}
    tx = eva_optax.scale_by_eva_s()
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), params)
    updates, state = tx.update(grads, tx.init(params))
    assert not np.allclose(updates["matrix"], grads["matrix"])
    np.testing.assert_allclose(np.linalg.norm(updates["matrix"]), np.linalg.norm(grads["matrix"]), rtol=1e-6)
    for name in ("bias", "scale", "empty"):
        np.testing.assert_array_equal(updates[name], grads[name])
    broken = grads | {"matrix": grads["matrix"].at[0, 0].set(jnp.nan)}
    updates, after = jax.jit(tx.update)(broken, state)
    np.testing.assert_array_equal(updates["matrix"], broken["matrix"])
    jax.tree.map(np.testing.assert_array_equal, after.vectors, state.vectors)
    assert after.skipped == 1
    assert np.all(np.isfinite(jax.tree.leaves(after.figures)))


def test_eva_s_needs_no_tap_and_leaves_probes_alone():
    grads = two_layers(0)
    tx = eva_optax.scale_by_eva_s()
    updates, _ = tx.update(grads, tx.init(grads))
    plain = eva_optax.strip(grads)
    wanted, _ = tx.update(plain, tx.init(plain))
    jax.tree.map(np.testing.assert_array_equal, eva_optax.strip(updates), wanted)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates["dense"]["kronecker"]))


def test_eva_s_survives_gradients_whose_means_multiply_to_nothing():
    """In float32 ‖V‖² of this kernel is zero; its direction is as well known as ever."""
    gradient = np.random.default_rng(0).normal(0.5, 1, (3, 3, 4, 5)).astype(np.float32)
    tx = eva_optax.scale_by_eva_s(step_rule="none")
    one, _ = tx.update({"kernel": jnp.asarray(gradient)}, tx.init({"kernel": gradient}))
    tiny, _ = tx.update({"kernel": jnp.asarray(gradient * 2.0**-40)}, tx.init({"kernel": gradient}))
    np.testing.assert_allclose(tiny["kernel"] * 2.0**40, one["kernel"], rtol=1e-5)
    assert not np.allclose(one["kernel"], gradient)


@pytest.mark.parametrize("member", [eva_optax.scale_by_eva, eva_optax.scale_by_eva_f, eva_optax.scale_by_eva_s])
@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
def test_all_members_have_all_step_rules(member, relative):
    """Each rule is one factor on what "none" returns: its formula over all preconditioned parameters."""
    rate, clip, damping = 0.5, 1e-3, 0.2
    with jax.enable_x64(True):
        grads = two_layers(0)
        plain = member(damping, relative=relative, step_rule="none")
        p, _ = plain.update(grads, plain.init(grads))
        # Eva-s leaves biases to themselves, and has no outer 1/γ.
        own = member is not eva_optax.scale_by_eva_s
        names = ("kernel", "bias") if own else ("kernel",)
        parts = [[(p[layer][name], grads[layer][name]) for name in names] for layer in ("dense", "conv")]
        unscaled = damping if own and not relative else 1.0
        products = np.array([[[np.sum(p * g), np.sum(g * g), np.sum(p * p)] for p, g in layer] for layer in parts])
        pg, gg, pp = products.sum((0, 1))
        _, layer_gg, layer_pp = products.sum(1).T
        wanted = {
            "none": [1, 1],
            "kl_clip": [min(1.0, np.sqrt(clip / (rate**2 * pg)))] * 2,
            "kl_norm": [unscaled / np.sqrt(unscaled * pg)] * 2,
            "grad_norm": [np.sqrt(gg / pp)] * 2,
            "layer_grad_norm": np.sqrt(layer_gg / layer_pp),
        }
        for rule in RULES:
            tx = member(damping, relative=relative, step_rule=rule, kl_clip=clip, learning_rate=rate)
            updates, state = tx.update(grads, tx.init(grads))
            for layer, factor in zip(("dense", "conv"), wanted[rule], strict=True):
                np.testing.assert_allclose(updates[layer]["kernel"], factor * p[layer]["kernel"], rtol=1e-7)
            if rule != "layer_grad_norm":
                nu = wanted[rule][0] / (unscaled if rule == "kl_norm" else 1)
                np.testing.assert_allclose(state.nu, nu, rtol=1e-9)


@pytest.mark.parametrize("member", [eva_optax.scale_by_eva, eva_optax.scale_by_eva_f, eva_optax.scale_by_eva_s])
def test_a_gradient_that_the_curvature_takes_out_keeps_its_direction(member):
    """All inputs equal: what is left of the gradient is rounding error, which must not get the gradient's length."""
    kernel = np.outer([1.0, 2.0, 3.0], [0.1, -0.3, 0.7, 0.2]).astype(np.float32)
    grads = gradients(kernel, None, np.array([[1.0], [2.0], [3.0]]), np.array([[0.1, -0.3, 0.7, 0.2]]), (1, 1))
    grads = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads)
    tx = member(1e-7, step_rule="layer_grad_norm")
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(updates["layer"]["kernel"], kernel, rtol=1e-6)


def momentum_by_hand(steps: list[np.ndarray], rate: float, momentum: float, nesterov: bool) -> list[np.ndarray]:
    trace, updates = np.zeros_like(steps[0]), []
    for step in steps:
        trace = step + momentum * trace
        updates.append(-rate * (step + momentum * trace if nesterov else trace))
    return updates


@pytest.mark.parametrize("alias", ["eva_f", "eva_s"])
def test_published_optimizers_are_their_preconditioner_with_momentum_and_decay(alias):
    with jax.enable_x64(True):
        params = two_layers(5)
        preconditioner, optimizer = {
            "eva_f": (
                eva_optax.scale_by_eva_f(0.03, relative=False, step_rule="kl_norm"),
                eva_optax.eva_f(0.1, weight_decay=0.01),
            ),
            "eva_s": (eva_optax.scale_by_eva_s(), eva_optax.eva_s(0.1, weight_decay=0.01)),
        }[alias]
        own, state, steps, got = preconditioner.init(params), optimizer.init(params), [], []
        for seed in range(3):
            p, own = preconditioner.update(two_layers(seed), own)
            steps.append(np.asarray(p["dense"]["kernel"] + 0.01 * params["dense"]["kernel"]))
            updates, state = optimizer.update(two_layers(seed), state, params)
            got.append(updates["dense"]["kernel"])
        for mine, wanted in zip(got, momentum_by_hand(steps, 0.1, 0.9, nesterov=alias == "eva_s"), strict=True):
            np.testing.assert_allclose(mine, wanted, rtol=0, atol=1e-12)


class Block(nn.Module):
    """One of the scanned layers, with two heads."""

    @nn.compact
    def __call__(self, carry, _):
        hidden = nn.DenseGeneral((2, 2), name="split")(nn.LayerNorm(name="norm")(carry))
        return carry + nn.DenseGeneral(3, axis=(-2, -1), name="merge")(nn.tanh(hidden)), None


class Stacked(nn.Module):
    """A convolution, an embedding, scanned layers with two heads, and a LayerNorm: every rank that Muon meets."""

    @nn.compact
    def __call__(self, images, tokens):
        x = nn.Conv(3, (2, 2))(images).mean((1, 2)) + nn.Embed(5, 3)(tokens)
        blocks = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = blocks()(x, None)
        return nn.Dense(2, name="head")(x)


STACKED = eva_optax.tap(Stacked(), embeddings=True)


@pytest.fixture(scope="module")
def stacked():
    rng = np.random.default_rng(0)
    images, tokens = rng.normal(1, 1, (6, 4, 4, 2)).astype(np.float32), rng.integers(5, size=6)
    params = STACKED.init(jax.random.key(0), images, tokens)["params"]
    gradient = jax.jit(jax.grad(lambda params: jnp.mean(STACKED.apply({"params": params}, images, tokens) ** 2)))
    # What is compared is compared in float64: orthogonalization makes rounding errors larger.
    with jax.enable_x64(True):
        yield jax.tree.map(lambda leaf: np.asarray(leaf, float), (params, gradient(params)))


def follow(tx, params, grads, steps: int = 2):
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return eva_optax.strip(params)


def muon_axes(params):
    """Written by hand: input axes, output axes; what is left are stacks."""
    numbers = optax.contrib.MuonDimensionNumbers
    axes = {"Conv_0": ((0, 1, 2), (3,)), "split": ((1,), (2, 3)), "merge": ((1, 2), (3,)), "head": ((0,), (1,))}

    def choose(path, leaf):
        return numbers(*axes[path[-2].key]) if path[-1].key == "kernel" else None

    return jax.tree_util.tree_map_with_path(choose, params)


def test_a_large_damping_leaves_adamw_and_muon(stacked):
    params, grads = stacked
    rate = optax.linear_schedule(0.1, 0.01, 2)
    bare = eva_optax.strip(params)

    def matrices(tree):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)

    pairs = [
        (
            eva_optax.eva_adamw(rate, weight_decay=0.1, damping=1e12, mask=matrices),
            optax.adamw(rate, b2=0.95, weight_decay=0.1, mask=matrices),
        ),
        (
            eva_optax.eva_muon(rate, damping=1e12),
            optax.contrib.muon(rate, adam_b2=0.95, muon_weight_dimension_numbers=muon_axes(bare)),
        ),
    ]
    for mine, theirs in pairs:
        got, wanted = follow(mine, params, grads), follow(theirs, bare, eva_optax.strip(grads))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9), got, wanted)


MEMBERS = {
    "scale_by_eva_f": eva_optax.scale_by_eva_f,
    "scale_by_eva_s": eva_optax.scale_by_eva_s,
    "eva_f": eva_optax.eva_f,
    "eva_s": eva_optax.eva_s,
    "eva_adamw": eva_optax.eva_adamw,
    "eva_muon": eva_optax.eva_muon,
}


@pytest.mark.parametrize("name", MEMBERS)
def test_works_under_masked_partition_and_injected_hyperparameters(name, stacked):
    params, grads = stacked
    arguments = {} if name.startswith("scale_by") else {"learning_rate": 0.1}
    build = MEMBERS[name]
    chosen = {key: key in ("head", "Conv_0") for key in params}
    part, part_grads = ({key: tree[key] for key in tree if chosen[key]} for tree in (params, grads))
    alone = build(damping=0.2, **arguments)
    wanted, _ = alone.update(part_grads, alone.init(part), part)
    whole, _ = alone.update(grads, alone.init(params), params)
    labels = {key: "tapped" if chosen[key] else "rest" for key in params}
    for tx, expected in (
        (optax.masked(alone, chosen), wanted),
        (optax.multi_transform({"tapped": alone, "rest": optax.sgd(1.0)}, labels), wanted),
        (optax.inject_hyperparams(build)(damping=0.2, **arguments), whole),
    ):
        updates, _ = tx.update(grads, tx.init(params), params)
        for key in part:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9), updates[key], expected[key])


def test_options_and_trees_are_checked():
    for name, build in MEMBERS.items():
        arguments = {} if name.startswith("scale_by") else {"learning_rate": 0.1}
        with pytest.raises(ValueError, match="damping must be greater than 0, got -1"):
            build(damping=-1, **arguments)
        with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\), got 1"):
            build(decay=1, **arguments)
        if "eva_s" not in name:
            with pytest.raises(ValueError, match="the parameters hold no probes"):
                build(**arguments).init({"kernel": jnp.ones((2, 3))})
    for build in (eva_optax.scale_by_eva_f, eva_optax.scale_by_eva_s):
        with pytest.raises(ValueError, match=rf"{build.__name__}: step_rule must be one of .*got 'clip'"):
            build(step_rule="clip")
        with pytest.raises(ValueError, match=rf"{build.__name__}: state must be a ScaleByEvaState"):
            build().update({"kernel": jnp.ones((2, 3))}, optax.EmptyState())
