"""Kronecker vectors under every circumstance in which a layer may run."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict, freeze
from jax.sharding import PartitionSpec

import eva_optax
from tests.flax.cases import MODELS, Block, Doubling, Experts, ModelCase, Scanned, SetupStyle
from tests.helpers import assert_close, assert_finite, assert_identical, by_path, curved, probes, random_like
from tests.statistics import brute_force


def variables_of(case: ModelCase, model: Any) -> Any:
    variables = jax.eval_shape(lambda: case.init(model, jax.random.key(0)))
    return random_like(variables)


def gradients(case: ModelCase, model: Any, variables: Any) -> Any:
    rest = {name: tree for name, tree in variables.items() if name != "params"}
    return jax.jit(jax.grad(lambda params: curved(case.run(model, {"params": params, **rest})[0])))(variables["params"])


def explicit_vectors(case: ModelCase, variables: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The vectors by definition, by layer path in `plain`."""
    variables = eva_optax.strip(variables)
    x = case.inputs()

    def loss() -> jax.Array:
        y = case.run(case.model, variables)[0] if case.plain is None else case.plain(variables["params"], x)
        return curved(y)

    def stacked(calls: list[brute_force.Call], stacks: Any) -> tuple[np.ndarray, np.ndarray]:
        if not stacks:
            return brute_force.vectors(calls)
        (axis, size), *inner = stacks
        each = len(calls) // size
        parts = [stacked(calls[each * index : each * (index + 1)], inner) for index in range(size)]
        a, b = zip(*parts, strict=True)
        return np.stack(a, axis), np.stack(b, axis)

    return {path: stacked(calls, case.stacks) for path, calls in brute_force.linear_calls(loss).items()}


@pytest.mark.parametrize("case", [case for case in MODELS if case.oracle], ids=str)
def test_vectors_are_those_of_the_layers_run_one_by_one(case: ModelCase) -> None:
    model = eva_optax.tap(case.model)
    variables = variables_of(case, model)
    found = eva_optax.vectors(gradients(case, model, variables))
    wanted = explicit_vectors(case, variables)
    if case.path is not None:
        (name,) = found.keys() - set(case.unused)
        wanted = {name: wanted[case.path]}
    assert found.keys() - set(case.unused) == wanted.keys()
    for name, (a, b) in wanted.items():
        assert_close(found[name].a, a, 2e-6)
        assert_close(found[name].b, b, 1e-5)
    for name in case.unused:
        assert not np.count_nonzero(found[name].a)
        assert not np.count_nonzero(found[name].b)


@pytest.mark.parametrize("name", ["scan and remat", "experts", "cond to block 0"])
def test_matrices_leave_gradients_as_they_are_and_make_a_step_of_kfac(name: str) -> None:
    (case,) = (case for case in MODELS if case.name == name)
    model, tx = eva_optax.tap(case.model, factors="both"), eva_optax.scale_by_kfac()
    variables = variables_of(case, model)
    grads = gradients(case, model, variables)
    plain = gradients(case, case.model, eva_optax.strip(variables))
    assert_identical(eva_optax.strip(grads), plain)
    for layer, (a, b) in eva_optax.factors(grads).items():
        for matrix in (a, b):
            assert matrix is not None, layer
            np.testing.assert_allclose(matrix, matrix.mT, rtol=1e-5, atol=1e-6 * float(jnp.abs(matrix).max()))
    updates, state = jax.jit(lambda grads: tx.update(grads, tx.init(grads)))(grads)
    assert_finite((updates, state))
    assert state.skipped == 0


X = jnp.asarray(np.random.default_rng(1).normal(0.5, 1, (6, 4)), jnp.float32)
MLP = nn.Sequential([Block(), nn.Dense(3)])


def vectors_of(model: Any, params: Any, x: Any = X, **options: Any) -> dict[str, eva_optax.KroneckerVectors]:
    tapped = eva_optax.tap(model)
    return eva_optax.vectors(jax.jit(jax.grad(lambda p: curved(tapped.apply({"params": p}, x, **options))))(params))


def make_params(model: Any, x: Any = X) -> Any:
    return random_like(jax.eval_shape(lambda: eva_optax.tap(model).init(jax.random.key(0), x))["params"])


def assert_same_vectors(found: Any, wanted: Any, tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name, (a, b) in wanted.items():
        assert_close(found[name].a, a, tolerance)
        assert_close(found[name].b, b, tolerance)


def test_vmap_over_examples_gives_the_vectors_of_the_batch() -> None:
    params, model = make_params(MLP), eva_optax.tap(MLP)

    def loss(params: Any) -> jax.Array:
        return curved(jax.vmap(lambda x: model.apply({"params": params}, x))(X))

    assert_same_vectors(eva_optax.vectors(jax.jit(jax.grad(loss))(params)), vectors_of(MLP, params), 2e-6)


def test_vmap_over_parameters_gives_the_vectors_of_each_model() -> None:
    model = eva_optax.tap(MLP)
    each = [make_params(MLP), jax.tree.map(jnp.sin, make_params(MLP))]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    grads = jax.jit(jax.vmap(jax.grad(lambda p: curved(model.apply({"params": p}, X)))))(stacked)
    for index, params in enumerate(each):
        found = eva_optax.vectors(jax.tree.map(lambda leaf, index=index: leaf[index], grads))
        assert_same_vectors(found, vectors_of(MLP, params), 2e-6)


def test_averaged_gradients_of_half_batches_hold_the_vectors_of_the_batch() -> None:
    params, model = make_params(MLP), eva_optax.tap(MLP)
    gradient = jax.jit(jax.grad(lambda p, x: jnp.mean(jnp.sin(3 * model.apply({"params": p}, x)))))
    halves = jax.tree.map(lambda *leaves: sum(leaves) / 2, *(gradient(params, half) for half in jnp.split(X, 2)))
    wanted = eva_optax.vectors(gradient(params, X))
    assert_same_vectors(eva_optax.vectors(halves), wanted, 2e-6)


@pytest.mark.parametrize("scale", [-3.0, 2.0**-12, 2.0**15])
def test_a_scaled_loss_leaves_a_as_it_is_and_scales_b(scale: float) -> None:
    params = make_params(MLP)
    grads = jax.jit(jax.grad(lambda p: scale * curved(eva_optax.tap(MLP).apply({"params": p}, X))))(params)
    found = eva_optax.vectors(grads)
    for name, (a, b) in vectors_of(MLP, params).items():
        assert_close(found[name].a, a)
        assert_close(found[name].b / scale, b, 2e-6)


def test_an_untapped_trace_in_the_cache_of_nn_jit_is_not_used_again() -> None:
    compiled = nn.jit(Block)  # made once: its cache outlives the calls below

    class Cached(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return compiled(name="block")(x)

    untapped = Cached().init(jax.random.key(0), X)
    Cached().apply(untapped, X)
    params = eva_optax.tap(Cached()).init(jax.random.key(0), X)["params"]
    assert "kronecker" in params["block"]["linear"]
    Cached().apply({"params": params}, X)
    jax.grad(lambda p: curved(Cached().apply({"params": p}, X)))(params)
    found = vectors_of(Cached(), params)["block/linear"]
    assert_close(found.a, np.mean(X, 0)[:, None])
    # And the tapped trace serves no untapped call.
    untapped = Cached().init(jax.random.key(0), X)["params"]
    assert "kronecker" not in untapped["block"]["linear"]
    grads = jax.grad(lambda p: curved(Cached().apply({"params": p}, X)))(params)
    assert not any(map(np.any, probes(grads)))


@pytest.mark.parametrize("method", ["encode", SetupStyle.encode, lambda module, x: module.encode(x)])
def test_a_method_by_name_or_function_is_tapped(method: Any) -> None:
    params = make_params(SetupStyle())
    found = vectors_of(SetupStyle(), params, method=method)
    assert_close(found["first"].a, np.mean(X, 0)[:, None])
    assert np.count_nonzero(found["first"].b)
    assert not np.count_nonzero(found["heads_a"].a)


def test_a_layer_called_by_keyword_is_tapped() -> None:
    class ByKeyword(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Einsum((4, 2))(inputs=nn.Dense(4)(inputs=x), einsum_str="ni,io->no")

    found = vectors_of(ByKeyword(), make_params(ByKeyword()))
    assert found.keys() == {"Dense_0", "Einsum_0"}
    assert_close(found["Dense_0"].a, np.mean(X, 0)[:, None])


def test_a_subclass_that_calls_super_is_tapped_where_super_is_called() -> None:
    model = Doubling(3)
    params = make_params(model)
    found = vectors_of(model, params)[""]
    assert_close(found.a, 2 * np.mean(X, 0)[:, None])
    bias = jax.jit(jax.grad(lambda p: curved(model.apply({"params": p}, X))))(params)["bias"]
    assert_close(found.b, bias[None])


def test_a_layer_that_the_loss_does_not_use_has_zero_vectors() -> None:
    params = make_params(SetupStyle())
    model = eva_optax.tap(SetupStyle())
    found = eva_optax.vectors(
        jax.jit(jax.grad(lambda p: curved(model.apply({"params": p}, X, method="encode"))))(params)
    )
    assert np.count_nonzero(found["first"].a)
    assert not any(np.count_nonzero(vector) for name, pair in found.items() if name != "first" for vector in pair)


def assert_sums_of_the_same_terms(model: Any, params: Any, x: jax.Array) -> dict[str, eva_optax.KroneckerVectors]:
    """b is the gradient of the bias, which sums the same terms in half precision; returns the vectors.

    Vectors of a computation in float32 would be no measure: its cotangents are others, by more than rounding of sums.
    """
    tapped = eva_optax.tap(model)
    grads = jax.jit(jax.grad(lambda p: curved(tapped.apply({"params": p}, x).astype(jnp.float32))))(params)
    found, biases = eva_optax.vectors(grads), by_path(eva_optax.strip(grads))
    for name, vectors in found.items():
        bias = biases[(*filter(None, name.split("/")), "bias")]
        # Each of the five or six additions in bfloat16 rounds by up to 2⁻⁹.
        assert_close(vectors.b.ravel(), bias.astype(np.float32), 2e-2)
    return found


@pytest.mark.parametrize("layer", ["dense", "grouped"])
def test_vectors_of_bfloat16_computation_are_float32(layer: str) -> None:
    x = X.reshape(2, 3, 4)
    plain = nn.Dense(4) if layer == "dense" else nn.Conv(4, (2,), feature_group_count=2)
    params = make_params(plain, x)
    found = assert_sums_of_the_same_terms(plain.clone(dtype=jnp.bfloat16), params, x)
    assert {vector.dtype for vector in found[""]} == {jnp.dtype(jnp.float32)}
    assert_close(found[""].a, vectors_of(plain, params, x)[""].a, 1e-2)


def test_probes_of_bfloat16_parameters_are_float32() -> None:
    model = nn.Sequential(
        [nn.Dense(4, param_dtype=jnp.bfloat16), nn.Dense(3, param_dtype=jnp.bfloat16, use_bias=False)]
    )
    params = make_params(model)
    kernels = [params[layer]["kernel"].dtype for layer in params]
    assert kernels == [jnp.bfloat16] * 2
    probes = [params[layer]["kronecker"] for layer in params]
    assert {leaf.dtype for leaf in jax.tree.leaves(probes)} == {jnp.dtype(jnp.float32)}
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    found = vectors_of(model, params)
    assert all(vector.dtype == jnp.float32 for pair in found.values() for vector in pair)
    assert_same_vectors(found, vectors_of(model, wide), 3e-2)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 8e-2), (jnp.float16, 5e-3)])
def test_a_loss_that_casts_all_parameters_to_half_precision_keeps_the_vectors(dtype: Any, tolerance: float) -> None:
    params, model = make_params(MLP), eva_optax.tap(MLP)

    def loss(params: Any) -> jax.Array:
        half = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        return curved(model.apply({"params": half}, X.astype(dtype)).astype(jnp.float32))

    found = eva_optax.vectors(jax.jit(jax.grad(loss))(params))
    assert_same_vectors(found, vectors_of(MLP, params), tolerance)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gradients_of_half_precision_parameters_give_float32_vectors(dtype: Any) -> None:
    params = make_params(MLP)
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    found = assert_sums_of_the_same_terms(MLP, half, X.astype(dtype))
    assert all(vector.dtype == jnp.float32 for pair in found.values() for vector in pair)
    for name, wanted in vectors_of(MLP, params).items():
        assert_close(found[name].a, wanted.a, 1e-2)


@pytest.mark.usefixtures("x64")
def test_vectors_beside_float64_parameters_are_float64() -> None:
    model = nn.Sequential([nn.Conv(2, (2,), param_dtype=jnp.float64), jnp.sin, nn.Dense(3, param_dtype=jnp.float64)])
    x = jnp.asarray(np.random.default_rng(0).normal(0.5, 1, (2, 3, 4)))
    params = make_params(model, x)
    found = vectors_of(model, params, x)
    calls = brute_force.linear_calls(lambda: curved(model.apply({"params": eva_optax.strip(params)}, x)))
    for name, (a, b) in found.items():
        assert a.dtype == b.dtype == jnp.float64
        wanted = brute_force.vectors(calls[name])
        assert_close(a, wanted[0], 1e-14)
        assert_close(b, wanted[1], 1e-13)


def boxed(*names: str | None) -> dict[str, Any]:
    """Initializers of a layer whose kernel has these partition names."""
    kernel = nn.with_partitioning(nn.initializers.lecun_normal(), names)
    return {"kernel_init": kernel, "bias_init": nn.with_partitioning(nn.initializers.zeros, names[-1:])}


class PartitionedModel(nn.Module):
    logical: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.with_logical_partitioning if self.logical else nn.with_partitioning
        kernel = init(nn.initializers.lecun_normal(), ("in", "out"))
        x = nn.Dense(4, kernel_init=kernel, bias_init=init(nn.initializers.zeros, ("out",)), name="dense")(x)
        kernel = init(nn.initializers.lecun_normal(), (None, "in", "out"))
        x = nn.Conv(4, (2,), kernel_init=kernel, feature_group_count=2, name="grouped")(x)
        kernel = init(nn.initializers.lecun_normal(), ("in", "out"))
        return nn.Dense(1, kernel_init=kernel, name="one feature")(x)


def names_of(probe: Any) -> dict[str, Any]:
    """The names of a and b; all else is replicated."""
    assert not any(any(probe[leaf].names) for leaf in probe if leaf not in ("a", "b"))
    return {leaf: probe[leaf].names for leaf in ("a", "b")}


@pytest.mark.parametrize("logical", [False, True])
def test_probes_copy_the_partition_names_of_their_kernel(logical: bool) -> None:
    params = eva_optax.tap(PartitionedModel(logical)).init(jax.random.key(0), X[None])["params"]
    dense, grouped, one = (params[name]["kronecker"] for name in ("dense", "grouped", "one feature"))
    assert type(dense["kernel,bias"]["a"]) is type(params["dense"]["kernel"])
    assert names_of(dense["kernel,bias"]) == {"a": ("in", None), "b": (None, "out")}
    # The groups do not divide as the output channels do.
    assert names_of(grouped["kernel,bias"]) == {"a": (None, "in", None), "b": (None, None, "out")}
    assert names_of(one["kernel,bias"]) == {"a": ("in", None), "b": (None, None)}


@pytest.mark.parametrize("axis", [0, 1])
def test_probes_get_the_partition_name_of_a_scan(axis: int) -> None:
    class Layers(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            scan = nn.scan(
                lambda layer, x, _: (layer(x), None),
                variable_axes={"params": axis},
                split_rngs={"params": True},
                length=3,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            return scan(nn.Dense(4, **boxed("in", "out"), name="dense"), x, None)[0]

    model = eva_optax.tap(Layers())
    variables = model.init(jax.random.key(0), X)
    probe = variables["params"]["dense"]["kronecker"]["kernel,bias"]
    wanted = {"a": ["in", None], "b": [None, "out"], "n": [None]}
    specs = nn.get_partition_spec(variables)["params"]["dense"]["kronecker"]["kernel,bias"]
    for leaf, names in wanted.items():
        names.insert(axis, "layers")
        assert probe[leaf].names == tuple(names)
        assert specs[leaf] == PartitionSpec(*names)
    grads = jax.jit(jax.grad(lambda p: curved(model.apply({"params": p}, X))))(variables["params"])
    found = eva_optax.vectors(grads)
    assert_same_vectors(found, vectors_of(Layers(), nn.unbox(variables["params"])), 1e-6)
    bias = np.moveaxis(nn.unbox(grads)["dense"]["bias"], axis, 0)
    assert_close(np.moveaxis(found["dense"].b, axis, 0).squeeze(1), bias)


@pytest.mark.parametrize("logical", [False, True])
def test_gradients_through_boxes_give_the_same_vectors(logical: bool) -> None:
    model = PartitionedModel(logical)
    params = eva_optax.tap(model).init(jax.random.key(0), X[None])["params"]
    assert_same_vectors(vectors_of(model, params, X[None]), vectors_of(model, nn.unbox(params), X[None]), 1e-6)


def test_a_frozen_dict_of_parameters_gives_the_same_vectors() -> None:
    params, model = make_params(MLP), eva_optax.tap(MLP)
    grads = jax.jit(jax.grad(lambda p: curved(model.apply({"params": p}, X))))(freeze(params))
    assert isinstance(grads, FrozenDict)
    assert_same_vectors(eva_optax.vectors(grads), vectors_of(MLP, params), 1e-6)


def test_vectors_of_variables_are_found_at_any_depth() -> None:
    params, model = make_params(MLP), eva_optax.tap(MLP)
    grads = jax.grad(lambda tree: curved(model.apply(tree["model"], X)))({"model": {"params": params}})
    assert {name.removeprefix("model/params/") for name in eva_optax.vectors(grads)} == vectors_of(MLP, params).keys()


def test_a_single_layer_has_an_empty_path() -> None:
    assert vectors_of(nn.Dense(2), make_params(nn.Dense(2))).keys() == {""}


@pytest.mark.parametrize("model", [Scanned(), Experts(split_inputs=False)], ids=["scan", "vmap"])
def test_stacked_layers_have_batch_axes(model: nn.Module) -> None:
    (found,) = vectors_of(model, make_params(model)).values()
    assert (found.a.shape, found.b.shape) == ((3, 4, 1), (3, 1, 4))
