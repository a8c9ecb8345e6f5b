"""`scale_by_kfac` and `kfac`: the numbers of public code, cases that are exact, faults, and Optax's citizens."""

import re
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import eva_optax
from tests.helpers import assert_identical
from tests.transforms.test_foof import ONE, X, assert_equal, first_updates, gradient, gradient_of
from tests.transforms.test_reference import (
    Network,
    assert_close,
    layer_names,
    opened,
    parameters,
    patch_to_flax,
    to_flax,
)


class Two(nn.Module):
    """A layer with a bias and one without, in float64."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(nn.Dense(7, param_dtype=float, name="first")(x))
        return nn.Dense(3, use_bias=False, param_dtype=float, name="second")(x)


def loss_of(model: Any, params: Any, x: Any, y: Any) -> jax.Array:
    output = model.apply({"params": params}, x)
    if jnp.issubdtype(y.dtype, jnp.integer):
        return optax.softmax_cross_entropy_with_integer_labels(output, y).mean()
    return jnp.mean(jnp.square(output - y))


def replay(file: Any, tx: Any, model: Any) -> Any:
    """The gradients, updates and states of each step, from the parameters that the file holds."""
    params = eva_optax.attach(model, parameters(file, 0), file["x"][0].astype(float))

    @jax.jit
    def step(params: Any, state: Any, x: Any, y: Any) -> tuple[Any, Any]:
        grads = jax.grad(partial(loss_of, model))(params, x, y)
        return tx.update(grads, state, params)

    state = tx.init(params)
    for index in range(int(file["num_steps"])):
        held = parameters(file, index)
        params = {key: {**params[key], **held[key]} for key in held}
        x, y = file["x"][index].astype(float), file["y"][index]
        updates, state = step(params, state, x, y if y.dtype == np.int32 else y.astype(float))
        yield index, params, updates, state


def test_kfac_alias_reproduces_training():
    """The authors' units, averages, clip and momentum; without the damping that their code adds again and again."""
    with opened("kfac_mlp_nodrift") as file:
        rates = jnp.asarray(file["lr"])
        tx = eva_optax.kfac(
            lambda step: rates[step],
            float(file["damping"]),
            decay=1 - float(file["factor_decay"]),
            kl_clip=float(file["kl_clip"]),
            batch_size=int(file["batch_size"]),
        )
        model = eva_optax.tap(Network(file), factors="both", sharing="reduce")
        for index, params, updates, (state, *_) in replay(file, tx, model):
            assert_close(state.nu, file["nu"][index])
            assert 0 < eva_optax.diagnostics(state)["layer0/cosine"] < 1
            for key in layer_names(file):
                weight, bias = (params[key][name] + updates[key][name] for name in ("kernel", "bias"))
                assert_close(weight, to_flax(file[f"{key}.weight"][index]))
                assert_close(bias, file[f"{key}.bias"][index])
    with opened("kfac_mlp") as drifting:
        # Their first step is ours, and the drift is the whole difference: in the second it is there.
        for index, params, updates, _ in replay(drifting, tx, model):
            error = params["layer0"]["kernel"] + updates["layer0"]["kernel"] - to_flax(drifting["layer0.weight"][index])
            assert (np.abs(error).max() < 1e-12) == (index == 0)


SHARING = {"expand": "exp", "reduce": "red"}
SPLITS = {"eigen": "exact", "pi": "pi"}


@pytest.mark.parametrize(
    ("name", "sharing", "split"),
    [
        ("kfax_mlp_ce", "expand", "pi"),
        ("kfax_seq_mse", "expand", "eigen"),
        ("kfax_seq_mse", "reduce", "pi"),
        ("kfax_cnn_mse", "expand", "pi"),
        ("kfax_cnn_mse", "reduce", "eigen"),
    ],
)
def test_factors_and_updates_are_those_of_curvlinops(name, sharing, split):
    """Their empirical B is ours times the terms of a sample, and for squared errors times the outputs."""
    with opened(name) as file:
        scale = float(file["loss_terms"] * (file["out_features"] if file["loss_kind"] else 1))
        x, y, short = file["x"][0].astype(float), file["y"][0], SHARING[sharing]
        y = y if y.dtype == np.int32 else y.astype(float)
        model = eva_optax.tap(Network(file), factors="both", sharing=sharing)
        params = eva_optax.attach(model, parameters(file, 0), x)
        tx = eva_optax.scale_by_kfac(float(file["damping"]) / scale, relative=False, split=split)

        @jax.jit
        def step(params: Any) -> tuple[Any, Any]:
            grads = jax.grad(partial(loss_of, model))(params, x, y)
            return grads, tx.update(grads, tx.init(params))[0]

        grads, updates = step(params)
        factors = eva_optax.factors(grads)
        for layer in layer_names(file):
            weight, bias = file[f"{layer}.weight_init"], bool(file[f"{layer}.has_bias"])
            # Theirs run over (channel, row, column), and with a bias over a 1 behind.
            order = patch_to_flax(np.arange(weight[0].size), weight).ravel()
            assert_close(factors[layer].A, file[f"{layer}.A_{short}"][0][np.ix_(order, order)])
            assert_close(factors[layer].B, file[f"{layer}.B_{short}_emp"][0] / scale)
            wanted = scale * file[f"{layer}.V_{short}_emp_{SPLITS[split]}"][0]
            kernel = wanted[:, :-1] if bias else wanted
            assert_close(updates[layer]["kernel"], to_flax(kernel.reshape(weight.shape)))
            if bias:
                assert_close(updates[layer]["bias"], wanted[:, -1])


def test_running_averages_are_those_of_kfac_jax():
    """Theirs are of the mean loss's cotangents: B is 1/N of ours."""
    with opened("kfacjax_mlp_emp") as file:
        size = int(file["batch_size"])
        damping = float(file["damping"]) * size
        tx = eva_optax.scale_by_kfac(damping, relative=False, split="eigen", decay=float(file["curvature_ema"]))
        model = eva_optax.tap(Network(file), factors="both")
        for index, _, updates, state in replay(file, tx, model):
            for layer in layer_names(file):
                wanted = file[f"{layer}.V_exact"][index].T / size
                assert_close(updates[layer]["kernel"], wanted[:-1])
                assert_close(updates[layer]["bias"], wanted[-1])
                held = state.vectors[layer]["kronecker"]["kernel,bias"]
                assert_close(held["B"], size * file[f"{layer}.B"][index])


def test_a_fisher_matrix_of_all_labels_is_that_of_kfac_jax():
    """Probes of a second gradient: each label once for each sample, weighted by the root of its probability."""
    with opened("kfacjax_mlp_ggn_ce") as file:
        model = eva_optax.tap(Network(file), factors="both")
        tx = eva_optax.scale_by_kfac(float(file["damping"]), relative=False, decay=float(file["curvature_ema"]))

        def of_all_labels(params: Any, x: Any) -> jax.Array:
            every = jax.nn.log_softmax(model.apply({"params": params}, jnp.repeat(x, file["out_features"], 0)))
            every = every.reshape(len(x), -1, every.shape[-1])  # samples, their labels, logarithms of probabilities
            chosen = jnp.diagonal(every, axis1=1, axis2=2)
            weights = jnp.sqrt(chosen.shape[1] * jnp.exp(jax.lax.stop_gradient(chosen)))
            return -jnp.mean(weights * chosen)

        @jax.jit
        def step(params: Any, state: Any, x: Any, y: Any) -> Any:
            grads = jax.grad(partial(loss_of, model))(params, x, y)
            grads = eva_optax.merge_factors(grads, jax.grad(of_all_labels)(params, x))
            return tx.update(grads, state)

        params = eva_optax.attach(model, parameters(file, 0), file["x"][0].astype(float))
        state = tx.init(params)
        for index in range(int(file["num_steps"])):
            held = parameters(file, index)
            params = {key: {**params[key], **held[key]} for key in held}
            updates, state = step(params, state, file["x"][index].astype(float), file["y"][index])
            for layer in layer_names(file):
                wanted = file[f"{layer}.V_pi"][index].T
                assert_close(updates[layer]["kernel"], wanted[:-1])
                assert_close(updates[layer]["bias"], wanted[-1])
                assert_close(state.vectors[layer]["kronecker"]["kernel,bias"]["B"], file[f"{layer}.B"][index])


def test_kfac_is_foof_with_an_isotropic_output_factor_and_eva_with_one_row(x64):
    whole, one = gradient_of(factors="both"), gradient_of(X[:1], factors="both")
    isotropic = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 1e-12 * jnp.eye(len(leaf)) if path[-1].key == "B" else leaf, whole
    )
    kfac, eigen, eva = (
        eva_optax.scale_by_kfac(0.3),
        eva_optax.scale_by_kfac(0.3, relative=False, split="eigen"),
        eva_optax.scale_by_eva(0.3, relative=False),
    )
    pairs = (kfac, isotropic), (eva_optax.scale_by_foof(0.3), whole), (eigen, one), (eva, one)
    updates = [eva_optax.strip(update) for update, _ in first_updates(*pairs)]
    assert_equal(updates[0], updates[1])
    assert_equal(updates[2], updates[3])


def test_deep_linear_networks_are_solved_exactly(x64):
    """Squared error: the block of the Gauss-Newton matrix is A ⊗ B, with B from the derivatives of each output."""

    class Linear(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = nn.Dense(4, param_dtype=float, name="first")(x)
            return nn.Dense(3, param_dtype=float, name="second")(x)

    model, y = eva_optax.tap(Linear(), factors="both"), np.cos(np.arange(36.0)).reshape(12, 3)
    params = model.init(jax.random.key(0), X)["params"]
    tx, gamma = eva_optax.scale_by_kfac(0.05, relative=False, split="eigen"), 0.05

    def output(kernel: jax.Array, bias: jax.Array) -> jax.Array:
        return model.apply({"params": {**params, "first": {**params["first"], "kernel": kernel, "bias": bias}}}, X)

    @jax.jit
    def step(params: Any) -> Any:
        def loss(params: Any) -> jax.Array:
            return jnp.sum(jnp.square(model.apply({"params": params}, X) - y), 1).mean() / 2

        def along(params: Any, direction: jax.Array) -> jax.Array:
            return jnp.sum(model.apply({"params": params}, X) * direction[None], 1).mean()

        each = jax.vmap(jax.grad(along), (None, 0))(params, jnp.eye(3))
        # Of three gradients the probes add up to calls that B is multiplied by.
        sampled = jax.tree.map(lambda leaf: jnp.sum(leaf, 0), each)
        return eva_optax.merge_factors(jax.grad(loss)(params), sampled)

    grads = step(params)
    updates, _ = jax.jit(lambda grads: tx.update(grads, tx.init(grads)))(grads)
    jacobians = jax.jacobian(output, (0, 1))(params["first"]["kernel"], params["first"]["bias"])
    rows = np.concatenate([np.asarray(part).reshape(12 * 3, -1) for part in jacobians], 1)
    curvature = 3 * rows.T @ rows / 12 + gamma * np.eye(rows.shape[1])
    given = np.concatenate([np.ravel(grads["first"][name]) for name in ("kernel", "bias")])
    got = np.concatenate([np.ravel(updates["first"][name]) for name in ("kernel", "bias")])
    assert_equal(got, np.linalg.solve(curvature, given))


def broken(grads: Any, layer: str, change: Any) -> Any:
    """Gradients of which some leaves of one layer, by their names, are something else."""

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        return change.get(path[-1].key, lambda leaf: leaf)(leaf) if path[0].key == layer else leaf

    return jax.tree_util.tree_map_with_path(one, grads)


def test_faults_of_one_layer_leave_its_inverse_and_all_other_layers():
    """Not a number, no second moment, no cotangents, a layer that is not used, and a gradient that is not finite."""
    tx = eva_optax.scale_by_kfac(every=1, decay=0.0, step_rule="kl_clip")
    with jax.enable_x64(True):
        grads = gradient_of(module=Two(), factors="both")
    grads = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float32), grads)
    update = jax.jit(tx.update)
    wanted, state = update(grads, tx.init(grads))
    assert state.skipped == 0

    def zero(leaf: jax.Array) -> jax.Array:
        return 0 * leaf

    unused = dict.fromkeys(("A", "B", "a", "b", "n", "kernel", "bias"), zero)
    cases: dict[str, tuple[dict, int]] = {
        "not a number": ({"A": lambda leaf: leaf * jnp.nan}, 1),
        "negative": ({"B": lambda leaf: -leaf}, 1),
        "no cotangents": ({"B": zero}, 0),
        "off": ({"A": zero, "B": zero}, 0),
        "unused": (unused, 0),
    }
    for name, (change, skipped) in cases.items():
        updates, after = update(broken(grads, "first", change), state)
        assert after.skipped == skipped, name
        assert_identical(after.inverses["first"].inputs, state.inverses["first"].inputs)
        assert_identical(after.inverses["first"].outputs, state.inverses["first"].outputs)
        assert after.inverses["second"].age == 0
        if name == "unused":
            assert not np.count_nonzero(updates["first"]["kernel"])
        else:
            assert_equal(updates, wanted, 1e-6)
    updates, after = update(broken(grads, "first", {"kernel": lambda leaf: leaf.at[0, 0].set(jnp.inf)}), state)
    assert after.skipped == 0
    assert_identical(after.vectors["first"], state.vectors["first"])
    np.testing.assert_array_equal(updates["first"]["kernel"], grads["first"]["kernel"].at[0, 0].set(jnp.inf))
    assert np.isfinite(updates["second"]["kernel"]).all()
    assert update._cache_size() == 1
    with pytest.raises(ValueError, match=r"check: layers were skipped 1 times, .* could not be inverted"):
        eva_optax.check(update(broken(grads, "first", cases["negative"][0]), state)[1])


def test_inverses_are_renewed_now_and_then_under_scan_vmap_and_donation(x64):
    model = eva_optax.tap(Two(), factors="both")
    tx = optax.chain(eva_optax.scale_by_kfac(every=3), optax.scale(-0.1))
    members = jax.vmap(lambda key: model.init(key, X)["params"])(jax.random.split(jax.random.key(0), 2))

    def step(carry: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        updates, state = tx.update(gradient(model, params, x), state, params)
        return (optax.apply_updates(params, updates), state), state[0].inverses["first"].age[0, 0]

    batches = jnp.asarray(np.random.default_rng(1).normal(0.5, 1, (8, 6, 5)))
    scanned, ages = jax.jit(jax.vmap(lambda params: jax.lax.scan(step, (params, tx.init(params)), batches)))(members)
    assert ages.tolist() == [[0, 0, 0, 0, 1, 2, 0, 1]] * 2
    params = jax.tree.map(lambda leaf: leaf[1], members)
    carry, compiled = (params, jax.jit(tx.init)(params)), jax.jit(step, donate_argnums=0)
    for batch in batches:
        carry, _ = compiled(carry, batch)
    assert compiled._cache_size() == 1
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), jax.tree.map(lambda leaf: leaf[1], scanned), carry
    )
    report = eva_optax.diagnostics(carry[1])
    assert report["first/age"] == 1
    assert report["second/condition"] > 1
    assert report["first/residual"] < 1e-12
    # A checkpoint has all of it, bit for bit.
    restored = serialization.from_bytes(jax.tree.map(jnp.zeros_like, carry), serialization.to_bytes(carry))
    assert_identical(compiled(restored, batches[0])[0], compiled(carry, batches[0])[0])


def test_citizens_of_optax_and_half_precision(x64):
    """Micro-batches are one batch; a schedule of the damping; a map of the state; bfloat16 with float32 averages."""
    model = eva_optax.tap(ONE, factors="both")
    params = model.init(jax.random.key(0), X)["params"]
    whole = jax.jit(partial(gradient, model))(params)
    low = {**whole, "kernel": whole["kernel"].astype(jnp.bfloat16)}
    rounded = {**low, "kernel": low["kernel"].astype(float)}
    kfac = eva_optax.scale_by_kfac(0.1, relative=False)

    @jax.jit
    def run() -> tuple[Any, ...]:
        multi = optax.MultiSteps(kfac, 2)
        state = multi.init(params)
        for part in (X[:6], X[6:]):
            updates, state = multi.update(gradient(model, params, part), state)
        scheduled = optax.inject_hyperparams(eva_optax.scale_by_kfac)(damping=lambda count: 0.1, relative=False)
        alone, injected = (tx.update(whole, tx.init(params))[0] for tx in (kfac, scheduled))
        return updates, alone, injected, [kfac.update(grads, kfac.init(low)) for grads in (low, rounded)]

    updates, alone, injected, ((of_low, state), (of_rounded, _)) = run()
    assert_equal(eva_optax.strip(updates), eva_optax.strip(alone), 1e-6)  # Optax averages in float32
    assert_equal(eva_optax.strip(injected), eva_optax.strip(alone), 1e-9)
    doubled = optax.tree.map_params(kfac, lambda leaf: 2 * leaf, state)
    assert_equal(doubled.vectors, jax.tree.map(lambda leaf: 2 * leaf, state.vectors))
    assert_identical(doubled.inverses, state.inverses)
    assert of_low["kernel"].dtype == jnp.bfloat16
    assert state.inverses[""].inputs.kernel.dtype == jnp.float32
    assert_equal(of_low["kernel"].astype(float), of_rounded["kernel"], 2.0**-8)


@pytest.mark.parametrize(("kind", "split"), [(AxisType.Auto, "pi"), (AxisType.Explicit, "eigen")])
def test_eight_devices_equal_one_and_share_the_inverses(kind, split):
    """Kernels split along inputs or outputs; each device factors its share, and updates stay where kernels are."""
    rng = np.random.default_rng(0)
    shapes = {"up": (8, 16), "down": (16, 8), "out": (8, 8)}
    specs = {"up": P(None, "model"), "down": P("model", None), "out": P("data", None)}
    grads = {}
    for name, (inputs, outputs) in shapes.items():
        rows, cotangents = rng.normal(0.5, 1, (40, inputs)), rng.normal(0.5, 1, (40, outputs))
        probe = {"A": rows.T @ rows / 40, "B": cotangents.T @ cotangents, "a": rows.mean(0)[:, None]}
        numbers = np.array([2.0**-40, 2.0**-28, 0, 0])
        probe = {key: (value * 2.0**-40).astype(np.float32) for key, value in probe.items()} | {"n": numbers}
        layer = {"kernel": rng.normal(size=(inputs, outputs)), "bias": rng.normal(size=outputs)}
        grads[name] = layer | {"kronecker": {"kernel,bias": probe}}
    grads = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), grads)

    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)

    def spec(path: Any, leaf: jax.Array) -> NamedSharding:
        inputs, outputs = specs[path[0].key]
        of = {"kernel": P(inputs, outputs), "bias": P(outputs), "A": P(inputs, None), "B": P(None, outputs)}
        return NamedSharding(mesh, of.get(path[-1].key, P()))

    tx = eva_optax.scale_by_kfac(split=split)
    wanted, _ = jax.jit(lambda grads: tx.update(grads, tx.init(grads)))(grads)
    with jax.set_mesh(mesh):
        placed = jax.device_put(grads, jax.tree_util.tree_map_with_path(spec, grads))
        compiled = jax.jit(tx.update).lower(placed, jax.jit(tx.init)(placed)).compile()
        got, _ = compiled(placed, jax.jit(tx.init)(placed))
    assert_equal(jax.device_get(got), wanted, 1e-5)
    for name, layer in got.items():
        assert layer["kernel"].sharding.is_equivalent_to(placed[name]["kernel"].sharding, 2)
    # Four matrices of eight, or two of sixteen: one for each device.
    kernel, sizes = {
        "pi": ("potrf", {"1,8,8", "1,16,16"}),
        "eigen": ("syevd", {"1,8,8", "1,16,16", "1,9,9", "1,17,17"}),
    }[split]
    assert set(re.findall(rf"f32\[([\d,]+)\]\S*,[^=]*custom-call\(.*{kernel}", compiled.as_text())) == sizes


def test_what_does_not_fit_the_tap_is_refused():
    def tapped(**options: Any) -> Any:
        return jax.eval_shape(eva_optax.tap(nn.Dense(3), **options).init, jax.random.key(0), jnp.ones((2, 5)))["params"]

    expanded = tapped(factors="both")
    with pytest.raises(ValueError, match=r"kfac: sharing='reduce', but layer '' is tapped with sharing='expand'"):
        eva_optax.kfac(0.1).init(expanded)
    eva_optax.kfac(0.1, sharing="expand").init(expanded)
    for params in (tapped(factors="input"), tapped()):
        with pytest.raises(ValueError, match=r'scale_by_kfac: .* none. Tap the model with .*factors="both"'):
            eva_optax.scale_by_kfac().init(params)
    with pytest.raises(ValueError, match=r"split must be one of \('pi', 'eigen'\), got 'exact'"):
        eva_optax.scale_by_kfac(split="exact")  # pyright: ignore[reportArgumentType]


class Kinds(nn.Module):
    """Layers with windows, groups, several output axes and batch axes, in float64."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kept: Any = {"param_dtype": float}
        x = jnp.tanh(nn.Conv(4, (2, 2), name="window", **kept)(x))
        x = jnp.tanh(nn.Conv(4, (2, 1), feature_group_count=2, use_bias=False, name="groups", **kept)(x))
        x = jnp.tanh(nn.DenseGeneral((2, 3), name="heads", **kept)(x))
        return nn.vmap(nn.Dense, {"params": 0}, {"params": True}, -2, -2)(2, name="many", **kept)(x)


def gradients_of_kinds(count: int) -> list[Any]:
    x = np.random.default_rng(0).normal(0.5, 1, (6, 4, 4, 2))
    model = eva_optax.tap(Kinds(), factors="both")

    @jax.jit
    def gradient_at(key: jax.Array) -> Any:
        params = model.init(key, x)["params"]
        return jax.grad(lambda params: jnp.sin(model.apply({"params": params}, x)).sum((1, 2, 3, 4)).mean())(params)

    return [gradient_at(jax.random.key(seed)) for seed in range(count)]


@pytest.mark.parametrize(("relative", "scale"), [(True, 1.0), (False, 0.2)])
def test_conjugate_around_nothing_is_kfac_where_both_moments_are_known(x64, relative, scale):
    """Both sides twice to the power −1/2; averages, renewal and damping are the same."""
    damping, every, grads = 0.2, 3, gradients_of_kinds(7)
    both = (
        optax.chain(
            eva_optax.scale_by_kfac(damping, relative=relative, every=every, step_rule="none"), optax.scale(scale)
        ),
        eva_optax.conjugate(optax.identity(), damping, relative=relative, every=every),
    )
    states = [tx.init(grads[0]) for tx in both]
    updates = [jax.jit(tx.update) for tx in both]
    for each in grads:
        (want, one), (got, other) = (update(each, state) for update, state in zip(updates, states, strict=True))
        states = [one, other]
        assert_equal(eva_optax.strip(got), eva_optax.strip(want), 1e-9)


def test_conjugate_gives_its_inner_transformation_gradients_that_are_whitened_on_both_sides(x64):
    (grads,), damping = gradients_of_kinds(1), 0.2
    signs = optax.stateless(lambda updates, _: jax.tree.map(jnp.sign, updates))
    tx = eva_optax.conjugate(signs, damping)
    got = jax.jit(lambda grads: tx.update(grads, tx.init(grads))[0])(grads)
    factors, mean = eva_optax.factors(grads)["heads"], np.ravel(eva_optax.vectors(grads)["heads"].a)

    def root(moment: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(moment * len(moment) / np.trace(moment))
        return vectors * ((values + damping) / (1 + damping)) ** -0.5 @ vectors.T

    def matrix(layer: Any) -> np.ndarray:
        return np.concatenate([np.reshape(layer["kernel"], (len(mean), -1)), np.reshape(layer["bias"], (1, -1))])

    r = root(np.block([[np.asarray(factors.A), mean[:, None]], [mean, 1]]))
    s = root(np.asarray(factors.B).reshape(6, 6))
    assert_equal(matrix(got["heads"]), r @ np.sign(r @ matrix(grads["heads"]) @ s) @ s, 1e-9)
