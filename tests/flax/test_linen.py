"""Tapping changes nothing but the parameters' probes: transparency, the tapped module's methods, attach and strip."""

import copy
import pickle
import re
from functools import lru_cache
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict, freeze
from flax.training.train_state import TrainState

import eva_optax
from tests.flax.cases import Block, ModelCase, Regularized, Scanned, SetupStyle, transparent
from tests.helpers import assert_close, assert_identical, curved

X = jnp.asarray(np.random.default_rng(1).normal(0.5, 1, (6, 4)), jnp.float32)
MLP = nn.Sequential([Block(), nn.Dense(3)])
KEY = jax.random.key(0)
TRANSPARENT = transparent()


class Run(NamedTuple):
    """What one model gives: initial variables, output, updated collections, gradients of the parameters."""

    variables: Any
    output: jax.Array
    updates: Any
    grads: Any


def differentiate(case: ModelCase, model: Any, variables: Any) -> Run:
    rest = {name: tree for name, tree in variables.items() if name != "params"}

    def loss(params: Any) -> Any:
        output, updates = case.run(model, {"params": params, **rest})
        return curved(output), (output, updates)

    grads, (output, updates) = jax.grad(loss, has_aux=True)(variables["params"])
    return Run(variables, output, updates, grads)


def tap_case(case: ModelCase) -> Any:
    return eva_optax.tap(case.model, embeddings=case.embeddings)


@lru_cache(maxsize=len(TRANSPARENT))
def untapped(case: ModelCase) -> Run:
    return jax.jit(lambda key: differentiate(case, case.model, case.init(case.model, key)))(KEY)


@lru_cache(maxsize=len(TRANSPARENT))
def tapped(case: ModelCase) -> Run:
    model = tap_case(case)
    return jax.jit(lambda key: differentiate(case, model, case.init(model, key)))(KEY)


def program(case: ModelCase, model: Any, variables: Any) -> str:
    """The traced forward pass."""
    return str(jax.make_jaxpr(lambda variables: case.run(model, variables))(variables))


def primitives(case: ModelCase, model: Any, variables: Any) -> list[str]:
    """What `program` consists of, but for where `nn.scan` puts the axes of all that the parameters hold."""
    return re.findall(r"= (?!transpose)([a-z_]\w*)", program(case, model, variables))


every_model = pytest.mark.parametrize("case", TRANSPARENT, ids=str)


@every_model
def test_initial_values_are_those_of_the_untapped_model(case: ModelCase) -> None:
    variables = tapped(case).variables
    assert_identical(eva_optax.strip(variables), untapped(case).variables)
    probes = [leaf for path, leaf in jax.tree.leaves_with_path(variables) if "kronecker" in jax.tree_util.keystr(path)]
    assert probes
    assert not any(np.count_nonzero(leaf) for leaf in probes)


@every_model
def test_outputs_and_updated_collections_are_those_of_the_untapped_model(case: ModelCase) -> None:
    assert_identical(tapped(case).output, untapped(case).output)
    assert_identical(tapped(case).updates, untapped(case).updates)


@every_model
def test_gradients_are_those_of_the_untapped_model(case: ModelCase) -> None:
    # A compiler may round what it fuses with the sums of a tapped layer otherwise: the standardisation of the next one.
    compare = assert_close if case.name == "layers that are skipped" else assert_identical
    compare(eva_optax.strip(tapped(case).grads), untapped(case).grads)


@every_model
def test_the_global_norm_does_not_see_the_vectors(case: ModelCase) -> None:
    grads = tapped(case).grads
    assert any(np.count_nonzero(vector) for pair in eva_optax.vectors(grads).values() for vector in pair)
    with_probes, without = (
        np.linalg.norm([np.linalg.norm(leaf) for leaf in jax.tree.leaves(tree)])
        for tree in (grads, eva_optax.strip(grads))
    )
    np.testing.assert_allclose(with_probes, without, rtol=1e-6)


@pytest.mark.parametrize("compile", [lambda function: function, jax.jit], ids=["eager", "jit"])
def test_outputs_are_identical_without_a_gradient_too(params: Any, compile: Any) -> None:
    def output(model: Any) -> jax.Array:
        return compile(lambda params: model.apply({"params": params}, X))(params)

    assert_identical(output(eva_optax.tap(MLP)), output(MLP))


def test_optax_clips_as_if_there_were_no_probes(params: Any) -> None:
    grads = gradient(eva_optax.tap(MLP), params)
    np.testing.assert_allclose(optax.tree.norm(grads), optax.tree.norm(eva_optax.strip(grads)), rtol=1e-6)
    clip = optax.clip_by_global_norm(0.1)
    clipped, _ = clip.update(grads, clip.init(params))
    without, _ = clip.update(eva_optax.strip(grads), clip.init(eva_optax.strip(params)))
    for one, other in zip(jax.tree.leaves(eva_optax.strip(clipped)), jax.tree.leaves(without), strict=True):
        assert_close(one, other)


@every_model
def test_a_tapped_model_on_parameters_without_probes_runs_the_untapped_program(case: ModelCase) -> None:
    variables = untapped(case).variables
    assert program(case, tap_case(case), variables) == program(case, case.model, variables)


@every_model
def test_an_untapped_model_ignores_probes(case: ModelCase) -> None:
    variables = tapped(case).variables
    plain = primitives(case, case.model, untapped(case).variables)
    assert primitives(case, case.model, variables) == plain
    assert primitives(case, tap_case(case), variables) != plain


@every_model
def test_attach_makes_what_a_tapped_init_makes(case: ModelCase) -> None:
    attached = eva_optax.attach(tap_case(case), untapped(case).variables["params"], case.inputs())
    assert_identical(attached, tapped(case).variables["params"])


def gradient(model: Any, params: Any, x: Any = X) -> Any:
    return jax.jit(jax.grad(lambda p: curved(model.apply({"params": p}, x))))(params)


@pytest.fixture(scope="module")
def params() -> Any:
    return jax.jit(eva_optax.tap(MLP).init)(KEY, X)["params"]


@pytest.fixture(scope="module")
def found(params: Any) -> Any:
    return eva_optax.vectors(gradient(eva_optax.tap(MLP), params))


def assert_same_vectors(found: Any, wanted: Any) -> None:
    assert found.keys() == wanted.keys()
    for name, (a, b) in wanted.items():
        assert_close(found[name].a, a)
        assert_close(found[name].b, b, 2e-6)


# The methods of a tapped module.


def test_init_with_output_is_tapped(params: Any) -> None:
    output, variables = eva_optax.tap(MLP).init_with_output(KEY, X)
    assert_identical(variables["params"], params)
    assert_identical(output, MLP.init_with_output(KEY, X)[0])


def test_lazy_init_is_tapped(params: Any) -> None:
    variables = eva_optax.tap(MLP).lazy_init(KEY, jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert_identical(variables["params"], params)


def test_a_jitted_init_is_tapped(params: Any) -> None:
    assert jax.tree.structure(jax.jit(eva_optax.tap(MLP).init)(KEY, X)["params"]) == jax.tree.structure(params)


def test_a_table_of_the_model_counts_real_parameters() -> None:
    assert eva_optax.tap(MLP).tabulate(KEY, X) == MLP.tabulate(KEY, X)


def test_a_bound_module_is_tapped(params: Any, found: Any) -> None:
    grads = jax.grad(lambda p: curved(eva_optax.tap(MLP).bind({"params": p})(X)))(params)
    assert_same_vectors(eva_optax.vectors(grads), found)


def test_unbind_gives_the_tapped_module_back() -> None:
    model = eva_optax.tap(nn.Dense(3), embeddings=True)
    variables = model.init(KEY, X)
    again, given_back = model.bind(variables).unbind()
    assert again == model
    assert_identical(given_back, variables)


@pytest.fixture(scope="module")
def setup_params() -> Any:
    return jax.jit(eva_optax.tap(SetupStyle()).init)(KEY, X)["params"]


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda bound: bound.first(X), "first"),
        (lambda bound: bound.encode(X), "first"),
        (lambda bound: bound.more[0](X), "more_0"),
        (lambda bound: bound.more[-2:][0](X), "more_0"),
        (lambda bound: bound.heads["a"](bound.more[1](X)), "heads_a"),
    ],
    ids=["submodule", "method", "list", "slice", "dict"],
)
def test_submodules_of_a_bound_module_are_tapped(setup_params: Any, call: Any, name: str) -> None:
    model = eva_optax.tap(SetupStyle())
    grads = jax.jit(jax.grad(lambda p: curved(call(model.bind({"params": p})))))(setup_params)
    assert np.count_nonzero(eva_optax.vectors(grads)[name].a)


def test_other_attributes_of_a_bound_module_pass_through(setup_params: Any) -> None:
    bound = eva_optax.tap(SetupStyle()).bind({"params": setup_params})
    assert_identical(bound.variables["params"], setup_params)
    assert bound.name is None
    with pytest.raises(AttributeError, match="missing"):
        _ = bound.missing


def test_other_attributes_pass_through() -> None:
    model = eva_optax.tap(nn.Dense(3, use_bias=False))
    assert (model.features, model.use_bias) == (3, False)
    assert model.clone(features=2) == eva_optax.tap(nn.Dense(2, use_bias=False))
    with pytest.raises(AttributeError, match="missing"):
        _ = model.missing


def test_equal_modules_are_equal_when_tapped() -> None:
    one, other = eva_optax.tap(nn.Dense(3)), eva_optax.tap(nn.Dense(3))
    assert one == other
    assert hash(one) == hash(other)
    assert one != eva_optax.tap(nn.Dense(4))
    assert one != eva_optax.tap(nn.Dense(3), embeddings=True)
    assert one != nn.Dense(3)


def test_a_tapped_module_is_a_static_argument_that_compiles_once() -> None:
    traces = []

    def output(model: Any, params: Any) -> jax.Array:
        traces.append(1)
        return model.apply({"params": params}, X)

    compiled = jax.jit(output, static_argnums=0)
    params = eva_optax.tap(nn.Dense(3)).init(KEY, X)["params"]
    compiled(eva_optax.tap(nn.Dense(3)), params)
    compiled(eva_optax.tap(nn.Dense(3)), params)
    assert len(traces) == 1


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_tapped_alike(duplicate: Any) -> None:
    model = eva_optax.tap(Block(), embeddings=True)
    again = duplicate(model)
    assert again == model
    assert "kronecker" in again.init(KEY, X)["params"]["linear"]


def test_tapping_twice_is_tapping_once() -> None:
    model = eva_optax.tap(eva_optax.tap(MLP))
    assert model == eva_optax.tap(MLP)
    assert eva_optax.tap(eva_optax.tap(MLP, embeddings=True)) == eva_optax.tap(MLP, embeddings=True)
    assert eva_optax.tap(eva_optax.tap(MLP), embeddings=True) == eva_optax.tap(MLP, embeddings=True)


def test_a_train_state_needs_no_change(found: Any) -> None:
    model = eva_optax.tap(MLP)
    tx = optax.chain(eva_optax.scale_by_eva(), optax.sgd(0.1, momentum=0.9))
    state = TrainState.create(apply_fn=model.apply, params=model.init(KEY, X)["params"], tx=tx)

    @jax.jit
    def step(state: TrainState) -> tuple[TrainState, Any, Any]:
        loss, grads = jax.value_and_grad(lambda p: curved(state.apply_fn({"params": p}, X)))(state.params)
        return state.apply_gradients(grads=grads), loss, grads

    state, first, grads = step(state)
    assert_same_vectors(eva_optax.vectors(grads), found)
    state, second, _ = step(state)
    assert np.isfinite(second)
    assert second != first
    assert int(state.step) == 2


def test_mutable_collections_and_captured_intermediates_pass_through() -> None:
    x = X[:, None, :, None]
    model = Regularized()
    variables = model.init({"params": KEY, "dropout": KEY}, x)
    options: dict[str, Any] = {"rngs": {"dropout": KEY}, "mutable": ["batch_stats"], "capture_intermediates": True}
    attached = {**variables, "params": eva_optax.attach(model, variables["params"], x, train=False)}
    assert_identical(eva_optax.tap(model).apply(attached, x, **options), model.apply(variables, x, **options))


# The context manager.


def test_the_context_manager_taps_init_and_apply(params: Any, found: Any) -> None:
    with eva_optax.tapping():
        assert_identical(MLP.init(KEY, X)["params"], params)
        grads = gradient(MLP, params)
    assert_same_vectors(eva_optax.vectors(grads), found)


def test_the_context_manager_taps_inside_a_jitted_function(params: Any, found: Any) -> None:
    @jax.jit
    def inside(params: Any) -> Any:
        with eva_optax.tapping():
            return gradient(MLP, params)

    assert_same_vectors(eva_optax.vectors(inside(params)), found)


def test_a_tapped_model_is_tapped_inside_a_jitted_function(params: Any, found: Any) -> None:
    grads = jax.jit(lambda p: gradient(eva_optax.tap(MLP), p))(params)
    assert_same_vectors(eva_optax.vectors(grads), found)


def test_a_tapped_model_inside_the_context_is_tapped_once(params: Any, found: Any) -> None:
    with eva_optax.tapping():
        grads = gradient(eva_optax.tap(MLP), params)
    assert_same_vectors(eva_optax.vectors(grads), found)


def test_the_context_manager_takes_embeddings() -> None:
    model, ids = nn.Embed(3, 2), jnp.array([0, 1])
    with eva_optax.tapping(embeddings=True):
        assert "kronecker" in model.init(KEY, ids)["params"]
    with eva_optax.tapping():
        assert "kronecker" not in model.init(KEY, ids)["params"]


class Fails(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        nn.Dense(2)(x)
        raise RuntimeError("as meant")


def test_an_exception_leaves_nothing_tapped() -> None:
    with pytest.raises(RuntimeError, match="as meant"):
        eva_optax.tap(Fails()).init(KEY, X)
    assert "kronecker" not in nn.Dense(2).init(KEY, X)["params"]
    with pytest.raises(RuntimeError, match="as meant"), eva_optax.tapping():
        raise RuntimeError("as meant")
    assert "kronecker" not in nn.Dense(2).init(KEY, X)["params"]


def test_a_failed_bound_call_leaves_nothing_tapped() -> None:
    bound = eva_optax.tap(Fails()).bind({"params": {"Dense_0": nn.Dense(2).init(KEY, X)["params"]}})
    with pytest.raises(RuntimeError, match="as meant"):
        bound(X)
    assert "kronecker" not in nn.Dense(2).init(KEY, X)["params"]


@pytest.mark.parametrize(
    ("model", "shape"),
    [(MLP, (6, 4)), (Scanned(remat=True), (6, 4)), (nn.RNN(nn.OptimizedLSTMCell(2)), (2, 3, 4))],
    ids=["plain", "scan and remat", "recurrent"],
)
def test_no_tracer_leaks(model: nn.Module, shape: tuple[int, ...]) -> None:
    tapped = eva_optax.tap(model)
    x = X.ravel()[: np.prod(shape)].reshape(shape)
    with jax.checking_leaks():
        params = jax.jit(tapped.init)(KEY, x)["params"]
        jax.jit(lambda p: gradient(tapped, p, x))(params)


# What cannot be tapped.


@pytest.mark.parametrize("model", [nn.Dense, lambda x: x, "Dense", {"params": 1}, None])
def test_only_a_module_can_be_tapped(model: Any) -> None:
    with pytest.raises(TypeError, match=r"flax\.linen\.Module"):
        eva_optax.tap(model)


@pytest.mark.parametrize("method", ["init", "init_with_output", "lazy_init"])
def test_a_model_without_any_layer_to_tap_fails_at_init(method: str) -> None:
    with pytest.raises(ValueError, match="no layer that can be tapped"):
        getattr(eva_optax.tap(nn.LayerNorm()), method)(KEY, X)


def test_a_model_without_parameters_is_left_alone() -> None:
    model = eva_optax.tap(nn.Sequential([jnp.tanh]))
    assert model.init(KEY, X) == {}
    assert_identical(model.apply({}, X), jnp.tanh(X))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4)])
def test_an_empty_batch_fails_when_the_gradient_is_traced(params: Any, shape: tuple[int, ...]) -> None:
    model, x = eva_optax.tap(MLP), jnp.zeros(shape)
    assert model.apply({"params": params}, x).shape == (*shape[:-1], 3)
    with pytest.raises(ValueError, match="empty batch"):
        jax.eval_shape(lambda p: gradient(model, p, x), params)


def test_a_convolution_without_output_fails_when_the_gradient_is_traced() -> None:
    model = eva_optax.tap(nn.Conv(2, (3,), padding="VALID"))
    params = model.init(KEY, jnp.zeros((2, 3, 1)))["params"]
    with pytest.raises(ValueError, match="eva_optax"):
        jax.eval_shape(lambda p: gradient(model, p, jnp.zeros((2, 2, 1))), params)


def test_gradients_of_inputs_pass_through(params: Any) -> None:
    def wanted(model: Any) -> jax.Array:
        return jax.grad(lambda x: curved(model.apply({"params": params}, x)))(X)

    assert_identical(wanted(eva_optax.tap(MLP)), wanted(MLP))


@pytest.mark.parametrize("tree", [{}, {"kernel": jnp.ones((2, 2))}, {"a": {"kernel": jnp.ones((2, 2))}}])
def test_a_tree_without_probes_has_no_vectors(tree: Any) -> None:
    with pytest.raises(ValueError, match=r"no probes.*eva_optax\.tap"):
        eva_optax.vectors(tree)


def test_stripped_gradients_have_no_vectors(params: Any) -> None:
    with pytest.raises(ValueError, match="no probes"):
        eva_optax.vectors(eva_optax.strip(gradient(eva_optax.tap(MLP), params)))


# Parameters that exist already.


def boxed_model() -> nn.Module:
    kernel = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    bias = nn.with_partitioning(nn.initializers.zeros, ("out",))
    return nn.Sequential([nn.Dense(4, kernel_init=kernel, bias_init=bias), nn.Dense(3)])


def test_attach_to_boxed_parameters_makes_boxed_probes() -> None:
    model = boxed_model()
    attached = eva_optax.attach(model, model.init(KEY, X)["params"], X)
    assert_identical(attached, eva_optax.tap(model).init(KEY, X)["params"])
    assert attached["layers_0"]["kronecker"]["kernel,bias"]["a"].names == ("in", None)


def test_attach_to_parameters_that_lost_their_boxes_makes_unboxed_probes() -> None:
    model = boxed_model()
    attached = eva_optax.attach(model, nn.unbox(model.init(KEY, X)["params"]), X)
    assert_identical(attached, nn.unbox(eva_optax.tap(model).init(KEY, X)["params"]))


def test_attach_keeps_a_frozen_dict() -> None:
    attached = eva_optax.attach(MLP, freeze(MLP.init(KEY, X)["params"]), X)
    assert isinstance(attached, FrozenDict)
    assert_identical(attached, freeze(eva_optax.tap(MLP).init(KEY, X)["params"]))


def test_attach_renews_probes_and_keeps_the_parameters(params: Any) -> None:
    spoilt = jax.tree.map(lambda leaf: leaf + 1, params)
    attached = eva_optax.attach(MLP, spoilt, X)
    assert_identical(eva_optax.strip(attached), eva_optax.strip(spoilt))
    probes = [layer["kronecker"] for layer in (attached["layers_0"]["linear"], attached["layers_1"])]
    assert not any(np.count_nonzero(leaf) for leaf in jax.tree.leaves(probes))


class OnlyTraced(nn.Module):
    """A model that refuses to compute anything."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        assert isinstance(x, jax.core.Tracer)
        return nn.Dense(3)(x) if train else x


@pytest.mark.parametrize(
    "x", [X, np.asarray(X), jax.ShapeDtypeStruct(X.shape, X.dtype)], ids=lambda x: type(x).__name__
)
def test_attach_looks_at_shapes_only(x: Any) -> None:
    attached = eva_optax.attach(OnlyTraced(), {"Dense_0": nn.Dense(3).init(KEY, X)["params"]}, x, train=True)
    assert "kronecker" in attached["Dense_0"]


@pytest.mark.parametrize(
    "wrong",
    [
        lambda params: {},
        lambda params: {"params": params},
        lambda params: {"layers_1": params["layers_1"]},
        lambda params: {**params, "more": {"kernel": jnp.ones(2)}},
        lambda params: jax.tree.map(lambda leaf: leaf[..., None], params),
    ],
    ids=["empty", "variables", "missing layer", "additional layer", "other shapes"],
)
def test_attach_refuses_the_parameters_of_another_model(wrong: Any) -> None:
    params = MLP.init(KEY, X)["params"]
    with pytest.raises(ValueError, match="params do not fit Sequential"):
        eva_optax.attach(MLP, wrong(params), X)


def test_attach_refuses_a_model_without_any_layer_to_tap() -> None:
    with pytest.raises(ValueError, match="no layer that can be tapped"):
        eva_optax.attach(nn.LayerNorm(), nn.LayerNorm().init(KEY, X)["params"], X)


def test_attach_refuses_what_is_no_module() -> None:
    with pytest.raises(TypeError, match=r"flax\.linen\.Module"):
        eva_optax.attach(lambda x: x, {}, X)


def test_strip_removes_probes_everywhere(params: Any) -> None:
    plain = MLP.init(KEY, X)["params"]
    grads = gradient(eva_optax.tap(MLP), params)
    assert jax.tree.structure(eva_optax.strip(grads)) == jax.tree.structure(plain)
    adam = optax.adam(1e-3)
    assert_identical(eva_optax.strip(adam.init(params)), adam.init(plain))
    assert_identical(eva_optax.strip((params, [params, 1.5], {"params": params})[1][0]), plain)
    nested = eva_optax.strip((params, [params], {"params": freeze(params)}))
    assert_identical(nested, (plain, [plain], {"params": freeze(plain)}))


def test_strip_leaves_other_leaves_as_they_are(params: Any) -> None:
    stripped = eva_optax.strip(params)
    assert stripped["layers_1"]["kernel"] is params["layers_1"]["kernel"]
    assert eva_optax.strip(None) is None
