"""`conjugate` of models that are tapped with a rank: averages, renewal, faults, and the rest of the family beside."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import export

import eva_optax
from tests.helpers import FAMILY, assert_close, assert_identical, first_update

X = np.random.default_rng(0).normal(0.5, 1, (12, 5)).astype(np.float32)
NETWORK = nn.Sequential([nn.Dense(6), nn.tanh, nn.Dense(3, use_bias=False)])
LAYERS = ("layers_0", "layers_2")


def gradient(model, params, x=X):
    return jax.grad(lambda params: jnp.sin(model.apply({"params": params}, x)).mean())(params)


@pytest.fixture(scope="module", params=[0, 3], ids=["rank 0", "rank 3"])
def tapped(request):
    model = eva_optax.tap(NETWORK, rank=request.param)
    return model, model.init(jax.random.key(0), X)["params"]


def test_moments_are_averaged_with_weights_that_fall_with_their_age(tapped):
    model, params = tapped
    tx = eva_optax.conjugate(optax.identity(), sketch_decay=0.5)
    state, update = tx.init(params), jax.jit(tx.update)
    batches = [X[:4], X[4:8], X[8:]]
    for batch in batches:
        _, state = update(gradient(model, params, batch), state)
    weights = np.array([0.25, 0.5, 1.0]) / 1.75
    traces = [np.mean(np.sum(batch**2, -1)) for batch in batches]
    held = state.vectors["layers_0"]["kronecker"]["kernel,bias"]
    np.testing.assert_allclose(held["s"][0, 0], weights @ traces, rtol=1e-5)
    np.testing.assert_allclose(held["a"][:, 0], weights @ [batch.mean(0) for batch in batches], rtol=1e-5)
    assert eva_optax.diagnostics(state)["layers_0/trace"] == held["s"][0, 0]
    assert 0 < eva_optax.diagnostics(state)["layers_2/explained"] <= 1.00001


def test_directions_are_renewed_in_the_first_steps_and_then_every_so_many(tapped):
    model, params = tapped
    tx = eva_optax.conjugate(optax.identity(), every=3)
    state, update, changed = tx.init(params), jax.jit(tx.update), []
    for step in range(9):
        before = state.bases
        _, state = update(gradient(model, params, X * (1 + step)), state)
        changed.append(
            [bool(np.count_nonzero(before[name].inputs.kernel != state.bases[name].inputs.kernel)) for name in LAYERS]
        )
    assert [all(each) for each in changed] == [True, True, True, True, False, False, True, False, False]
    assert [any(each) for each in changed] == [all(each) for each in changed]
    assert update._cache_size() == 1


def test_broken_statistics_hold_averages_and_directions(tapped):
    model, params = tapped
    tx = eva_optax.conjugate(optax.identity(), every=1)
    update = jax.jit(tx.update)
    grads = gradient(model, params)
    _, state = update(grads, tx.init(params))
    probe = grads["layers_0"]["kronecker"]["kernel,bias"]
    broken = {
        **grads,
        "layers_0": {**grads["layers_0"], "kronecker": {"kernel,bias": {**probe, "s": probe["s"] * jnp.nan}}},
    }
    updates, after = update(broken, state)
    assert after.skipped == 1
    assert_identical(after.bases["layers_0"].inputs, state.bases["layers_0"].inputs)
    assert_identical(after.vectors["layers_0"], state.vectors["layers_0"])
    clean, _ = update(grads, state)
    assert_close(updates["layers_0"]["kernel"], clean["layers_0"]["kernel"], 1e-5)


def test_what_is_no_second_moment_leaves_the_directions_as_they_were():
    """Finite, but negative: its Cholesky factor is not finite."""
    model = eva_optax.tap(NETWORK, rank=3)
    params = model.init(jax.random.key(0), X)["params"]
    tx = eva_optax.conjugate(optax.identity(), every=1, sketch_decay=0.0)
    update, grads = jax.jit(tx.update), gradient(model, params)
    _, state = update(grads, tx.init(params))
    probe = grads["layers_0"]["kronecker"]["kernel,bias"]
    negative = {**grads, "layers_0": {**grads["layers_0"], "kronecker": {"kernel,bias": {**probe, "y": -probe["y"]}}}}
    updates, after = update(negative, state)
    assert_identical(after.bases["layers_0"].inputs, state.bases["layers_0"].inputs)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(updates))


def test_inputs_that_cancel_have_no_mean_but_a_second_moment():
    """Behind BatchNorm a layer without a bias has rounding noise for a mean; its inputs are whitened all the same."""
    model = eva_optax.tap(nn.Sequential([nn.BatchNorm(use_running_average=False), nn.Dense(3, use_bias=False)]), rank=3)
    x = np.random.default_rng(0).normal(3, 1, (64, 5)).astype(np.float32)
    params = model.init(jax.random.key(0), x)["params"]

    def loss(params):
        return jnp.sin(model.apply({"params": params}, x, mutable=["batch_stats"])[0]).mean()

    tx = eva_optax.conjugate(optax.identity())
    _, state = first_update(tx, jax.grad(loss)(params))
    held = state.vectors["layers_1"]["kronecker"]["kernel"]
    assert not np.count_nonzero(held["a"])
    np.testing.assert_allclose(held["s"].ravel(), 5, rtol=1e-3)  # five features of variance one
    assert np.count_nonzero(state.bases["layers_1"].inputs.kernel)


def test_a_layer_that_is_not_used_keeps_the_identity():
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x, both=True):
            y, z = nn.Dense(3, name="used")(x), nn.Dense(3, name="spare")(x)
            return y + z if both else y

    model = eva_optax.tap(Two(), rank=3)
    params = model.init(jax.random.key(0), X)["params"]
    grads = jax.grad(lambda params: model.apply({"params": params}, X, both=False).mean())(params)
    _, state = first_update(eva_optax.conjugate(optax.identity()), grads)
    assert not np.count_nonzero(state.bases["spare"].inputs.kernel)
    assert state.bases["spare"].inputs.scale == 1
    assert np.count_nonzero(state.bases["used"].inputs.kernel)


def test_nnx_and_scanned_layers_whiten_as_linen_layers_do():
    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            body = nn.scan(Square, variable_axes={"params": 1}, split_rngs={"params": True}, length=2)
            return body(name="layers")(x, None)[0]

    class Square(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jnp.tanh(nn.Dense(5, name="dense")(x)), None

    tx = eva_optax.conjugate(optax.identity())
    model = eva_optax.tap(Scanned(), rank=3)
    params = model.init(jax.random.key(0), X)["params"]
    updates, _ = first_update(tx, gradient(model, params))
    stacked = params["layers"]["dense"]

    single = eva_optax.tap(nn.Sequential([nn.Dense(5), nn.tanh, nn.Dense(5), nn.tanh]), rank=3)
    layers = {f"layers_{2 * i}": {"kernel": stacked["kernel"][:, i], "bias": stacked["bias"][:, i]} for i in (0, 1)}
    wanted, _ = first_update(tx, gradient(single, eva_optax.attach(single, layers, X)))
    for index in (0, 1):
        assert_close(updates["layers"]["dense"]["kernel"][:, index], wanted[f"layers_{2 * index}"]["kernel"], 1e-5)

    def linear(index):
        layer = nnx.Linear(5, 5, rngs=nnx.Rngs(0))
        layer.kernel[...], layer.bias[...] = layers[f"layers_{2 * index}"].values()
        return layer

    network = eva_optax.tap(nnx.Sequential(linear(0), nnx.tanh, linear(1), nnx.tanh), rank=3)
    optimizer = nnx.Optimizer(network, optax.chain(tx, optax.scale(-1.0)), wrt=nnx.Param)

    @nnx.jit
    def step(network, optimizer):
        grads = nnx.grad(lambda network: jnp.sin(network(X)).mean())(network)
        optimizer.update(network, grads)

    step(network, optimizer)
    assert_close(network.layers[0].kernel[...], layers["layers_0"]["kernel"] - wanted["layers_0"]["kernel"], 1e-5)
    step(network, optimizer)  # the state goes through NNX
    assert np.all(np.isfinite(network.layers[0].kernel[...]))


@pytest.mark.parametrize("name", ["scale_by_eva", "scale_by_eva_s", "center", "eva"])
def test_the_rest_of_the_family_does_not_see_sketches(name, tapped):
    model, params = tapped
    plain = eva_optax.tap(NETWORK)
    tx = FAMILY[name]()
    grads = gradient(model, params)
    without = eva_optax.attach(plain, eva_optax.strip(params), X)
    got, wanted = (
        jax.jit(tx.update)(tree, tx.init(start), start)[0]
        for tree, start in ((grads, params), (gradient(plain, without), without))
    )
    assert_close(eva_optax.strip(got), eva_optax.strip(wanted), 1e-5)


@pytest.mark.parametrize("rank", [-1, 2.0, "16", True])
def test_a_rank_that_is_no_number_of_vectors_is_refused(rank):
    with pytest.raises(ValueError, match="tap: rank must be an integer, the number of vectors"):
        eva_optax.tap(NETWORK, rank=rank)
    with pytest.raises(ValueError, match="sketches: no sketches in the tree"):
        eva_optax.sketches({"kernel": jnp.ones((2, 3))})


def test_a_tpu_is_told_that_matrices_lie_as_parameters_do():
    """Its compiler would transpose parameters and momentum there and back; other backends are left alone."""
    model = eva_optax.tap(nn.Dense(8), rank=3)
    params, tx = model.init(jax.random.key(0), X)["params"], eva_optax.eva_adamw(1e-3)

    def step(params):
        return tx.update(gradient(model, params), tx.init(params), params)[0]

    for function, tree in ((step, params), (jax.vmap(step), jax.tree.map(lambda leaf: leaf[None], params))):
        traced = jax.jit(function).trace(tree)
        programs = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("tpu", "cpu", "cuda")}
        counts = {name: program.count("LayoutConstraint") for name, program in programs.items()}
        assert counts == {"tpu": 2, "cpu": 0, "cuda": 0}
    heads = eva_optax.tap(nn.DenseGeneral((2, 3)), rank=3)  # whose order in memory is the compiler's own
    alone = heads.init(jax.random.key(0), X)["params"]
    lowered = jax.jit(lambda params: tx.update(gradient(heads, params), tx.init(params), params)[0]).trace(alone)
    assert "LayoutConstraint" not in lowered.lower(lowering_platforms=("tpu",)).as_text()
    with pytest.raises(ValueError, match="LayoutConstraint"):
        export.export(jax.jit(step), platforms=["tpu"])(params)
    allowed = [export.DisabledSafetyCheck.custom_call("LayoutConstraint")]
    exported = export.export(jax.jit(step), platforms=["cpu", "tpu"], disabled_checks=allowed)(params)
    assert_close(exported.call(params), jax.jit(step)(params))
