"""`scale_by_foof` and its kin: the numbers of public code, what a tap may hold, and steps without factors."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eva_optax
from tests.dense import UNIT, gradients
from tests.helpers import assert_identical, first_update
from tests.transforms.test_reference import FOLDER, Network, assert_close, layer_names, opened, parameters, to_flax

X = np.random.default_rng(0).normal(0.5, 1, (12, 5))


ONE = nn.Dense(3, param_dtype=float)


def gradient(model: Any, params: Any, x: np.ndarray = X) -> Any:
    return jax.grad(lambda params: jnp.sin(model.apply({"params": params}, x)).sum(-1).mean())(params)


def gradient_of(x: np.ndarray = X, module: nn.Module = ONE, **options: Any) -> Any:
    """Of the same network, tapped in one way or another."""
    model = eva_optax.tap(module, **options)
    return jax.jit(lambda: gradient(model, model.init(jax.random.key(0), x)["params"], x))()


def first_updates(*pairs: tuple[Any, Any]) -> list[tuple[Any, Any]]:
    """Updates and state of the first step of some transformations, each on gradients of its own, in one program."""
    steps = [lambda grads, tx=tx: tx.update(grads, tx.init(grads)) for tx, _ in pairs]
    return jax.jit(lambda all_grads: [step(grads) for step, grads in zip(steps, all_grads, strict=True)])(
        [grads for _, grads in pairs]
    )


def assert_equal(got: Any, want: Any, tolerance: float = 1e-10) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max()), got, want)


def test_foof_alias_reproduces_training():
    """Updates, momentum and the identity that the average starts with: the parameters after every step."""
    with opened("foof_mlp") as file:
        names = ("damping", "factor_decay", "momentum")
        damping, decay, momentum = (float(file[name]) for name in names)
        model = eva_optax.tap(Network(file), factors="input")
        tx = eva_optax.foof(float(file["lr"][0]), damping, decay=decay, momentum=momentum)
        params = eva_optax.attach(model, parameters(file, 0), file["x"][0].astype(float))
        state = tx.init(params)

        @jax.jit
        def step(params: Any, state: Any, x: Any, y: Any) -> tuple[Any, Any]:
            def loss(params: Any) -> jax.Array:
                return optax.softmax_cross_entropy_with_integer_labels(model.apply({"params": params}, x), y).mean()

            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        for index in range(int(file["num_steps"])):
            params, state = step(params, state, file["x"][index].astype(float), file["y"][index])
            for key in layer_names(file):
                assert_close(params[key]["kernel"], to_flax(file[f"{key}.weight"][index]))
                assert_close(params[key]["bias"], file[f"{key}.bias"][index])


def test_relative_damping_is_that_of_newton_muon(x64):
    """Their K as A: what goes into their momentum, up to a number."""
    with np.load(FOLDER / "newtonmuon.npz") as file:
        size = file["p1.K"].shape[-1]

        @jax.jit
        def precondition(grads: Any, damping: jax.Array) -> Any:
            tx = eva_optax.scale_by_foof(damping, decay=0.0)
            return tx.update(grads, tx.init(grads))[0]

        for step in np.flatnonzero(np.cumsum(file["refresh"])):  # before that they have no inverse
            kernel, moment = file["p1.grad"][step].T, file["p1.K"][step]
            grads = gradients(kernel, None, np.zeros((size, 1)), np.zeros((1, len(kernel[0]))), (1, 1))
            grads["layer"]["kronecker"]["kernel"]["A"] = jnp.asarray(moment * UNIT)
            unit = np.trace(moment) / size
            damping = float(file["ridge_mult"]) + float(file["ridge_eps"]) / unit
            update = precondition(grads, damping)["layer"]["kernel"]
            assert_close(update / (unit * (1 + damping)), file["p1.pre"][step].T)


def test_a_factor_of_rank_one_is_eva_f(x64):
    """All inputs are equal: FOOF is the one-sided inverse, and relative to another unit it is so too."""
    damping, grads = 0.3, gradient_of(np.tile(X[:1], (4, 1)), factors="input")
    size = 6  # of (x, 1)
    absolute = [of(damping, relative=False) for of in (eva_optax.scale_by_foof, eva_optax.scale_by_eva_f)]
    relative = [eva_optax.scale_by_foof(damping), eva_optax.scale_by_eva_f(damping / size)]
    (foof, eva_f, *updates), _ = zip(*first_updates(*((tx, grads) for tx in (*absolute, *relative))), strict=True)
    assert_equal(eva_optax.strip(foof), eva_optax.strip(eva_f))
    scaled = jax.tree.map(lambda leaf: leaf * (1 + damping) / damping, eva_optax.strip(updates[1]))
    assert_equal(eva_optax.strip(updates[0]), scaled)


def test_a_sketch_of_all_directions_is_the_whole_factor(x64):
    """FOOF and whitening alike; sketches are held against dense matrices elsewhere."""
    whole, sketched = gradient_of(factors="input"), gradient_of(rank=5)
    foof, root = eva_optax.scale_by_foof(), eva_optax.conjugate(optax.identity())
    pairs = [(tx, grads) for tx in (foof, root) for grads in (whole, sketched)]
    (by_matrix, state), (by_sketch, other), *roots = first_updates(*pairs)
    assert_equal(eva_optax.strip(by_matrix), eva_optax.strip(by_sketch), 1e-7)
    assert_equal(*(eva_optax.strip(updates) for updates, _ in roots), 1e-7)
    assert state.skipped == other.skipped == 0
    assert eva_optax.diagnostics(roots[0][1])["explained"] == 1


def test_vectors_stand_in_for_what_is_not_there(x64):
    """`max_dim` leaves a layer of more inputs its mean, and so does a tap without factors: Eva-f."""
    plain, large = gradient_of(), gradient_of(factors="input", max_dim=4)
    assert jax.tree.structure(plain) != jax.tree.structure(gradient_of(factors="input", max_dim=5))
    foof = eva_optax.scale_by_foof()
    updates = first_updates((eva_optax.scale_by_eva_f(), plain), (foof, plain), (foof, large))
    of_vectors, of_plain, of_large = (eva_optax.strip(update) for update, _ in updates)
    assert_equal(of_plain, of_vectors)
    assert_equal(of_large, of_vectors)


def test_steps_without_factors_go_on_with_averages_and_inverses(x64):
    """Beside the weighted averages, and what their factor makes of a gradient."""
    model = eva_optax.tap(ONE, factors="input")
    params = model.init(jax.random.key(0), X)["params"]
    tx = eva_optax.scale_by_foof(0.1, relative=False, decay=0.5, every=2)

    @jax.jit
    def step(params: Any, state: Any, x: Any, formed: Any) -> tuple[Any, ...]:
        with eva_optax.tapping(factors=formed):
            grads = gradient(model, params, x)
        return grads, *tx.update(grads, state)

    state, batches = tx.init(params), [X[:4], X[4:8], X[8:], X[:4]]
    for index, (x, formed) in enumerate(zip(batches, (True, False, True, False), strict=True)):
        before = state
        grads, updates, state = step(params, state, x, formed)
        if not formed:
            assert_identical(state.vectors, before.vectors)
        assert int(state.inverses[""].age[0, 0]) == (1 if index == 3 else 0)
    moments = [x.T @ x / len(x) for x in (X[:4], X[8:])]
    wanted = (0.5 * moments[0] + moments[1]) / 1.5
    held = state.vectors["kronecker"]["kernel,bias"]
    assert_equal(held["A"], wanted)
    mean = (0.5 * X[:4].mean(0) + X[8:].mean(0)) / 1.5
    assert_equal(held["a"][:, 0], mean)
    full = np.block([[wanted, mean[:, None]], [mean[None], np.ones((1, 1))]]) + 0.1 * np.eye(6)
    rows = np.concatenate([grads["kernel"], grads["bias"][None]])
    update = np.linalg.solve(full, rows)
    assert_equal(eva_optax.strip(updates), {"kernel": update[:-1], "bias": update[-1]})
    assert state.skipped == 0
    assert step._cache_size() == 1


def test_a_factor_that_is_no_second_moment_is_not_used(x64):
    """Cholesky's method finds no factor; eigenvalues are finite, and their residual tells."""
    grads = gradient_of(factors="input")
    negative = {**grads, "kronecker": {"kernel,bias": {**grads["kronecker"]["kernel,bias"]}}}
    negative["kronecker"]["kernel,bias"]["A"] = -grads["kronecker"]["kernel,bias"]["A"]
    made = (
        eva_optax.scale_by_foof(relative=False),
        eva_optax.scale_by_foof(relative=False, power=-0.5),
        eva_optax.conjugate(optax.identity(), relative=False),
    )
    for updates, state in first_updates(*((tx, negative) for tx in made)):
        assert_equal(eva_optax.strip(updates), eva_optax.strip(grads))
        assert state.skipped == (0 if isinstance(state, eva_optax.ConjugateState) else 1)


def test_no_probe_of_a_matrix_has_a_momentum():
    """Of four optimizers, and of a chain with the mask: beside averages and inverses nothing is as a probe is."""
    model = eva_optax.tap(nn.Dense(7), factors="both", sharing="reduce")
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((2, 5)))["params"]
    masked = optax.masked(optax.adamw(0.1), eva_optax.not_probes)
    optimizers = [eva_optax.kfac(0.1), eva_optax.foof(0.1), eva_optax.foof_adamw(0.1), eva_optax.foof_muon(0.1)]
    for tx in (*optimizers, optax.chain(eva_optax.scale_by_foof(), masked)):
        first, *others = jax.eval_shape(tx.init, params)
        shapes = {leaf.shape for leaf in jax.tree.leaves([others, getattr(first, "inner", ())])}
        assert (5, 7) in shapes
        assert not {(5, 5), (7, 7), (5, 1)} & shapes


def test_foof_muon_is_muon_behind_foof(x64):
    grads = gradient_of(factors="input")
    params = jax.tree.map(jnp.zeros_like, grads)
    pair = (eva_optax.foof_muon(0.1, damping=0.3), eva_optax.scale_by_foof(0.3))
    got, foof = jax.jit(lambda: [tx.update(grads, tx.init(params), params)[0] for tx in pair])()
    muon = optax.contrib.muon(0.1)
    alone = {"kernel": foof["kernel"]}
    wanted, _ = first_update(muon, alone, jax.tree.map(jnp.zeros_like, alone))
    assert_equal(got["kernel"], wanted["kernel"])
    assert not any(np.count_nonzero(leaf) for leaf in jax.tree.leaves(got["kronecker"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"power": 0.5}, "power must be less than 0, got 0.5"), ({"every": 0}, "every must be greater than 0")],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=f"scale_by_foof: {message}"):
        eva_optax.scale_by_foof(**options)
