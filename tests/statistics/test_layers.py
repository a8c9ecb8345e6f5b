"""Kronecker vectors of each kind of layer, against their definition."""

import string
from functools import lru_cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import eva_optax
from tests.helpers import assert_close, random_like
from tests.statistics import brute_force
from tests.statistics.cases import CELLS, LAYERS, CellCase, LayerCase, Unrolled, contraction, convolution

# Where every input, every patch, is the same; and where equal cotangents make the sum over patches factor.
EQUAL_PATCHES = [case for case in LAYERS if case.equal_x is not None]
EXACT = [case for case in LAYERS if case.exact]
CONVOLUTIONS = [case for case in LAYERS if isinstance(case.layer, nn.Conv | nn.ConvLocal)]


@lru_cache(maxsize=len(LAYERS))
def compiled(case: LayerCase) -> tuple[Any, Any, tuple[int, ...]]:
    """Random parameters of the layer, its gradient as a compiled function, and the shape of its output."""
    model = eva_optax.tap(case.layer, embeddings=True)
    x = jnp.asarray(case.inputs(case.x))
    params = random_like(jax.eval_shape(lambda: model.init(jax.random.key(0), x, **case.call))["params"])

    @jax.jit
    def gradient(added: Any, x: Any, weights: Any, bend: Any) -> Any:
        def loss(params: Any, added: Any) -> jax.Array:
            y = model.apply({"params": params}, x, **case.call) + added
            return jnp.sum(weights * (bend * jnp.sin(y) + (1 - bend) * y))

        grads, added = jax.grad(loss, (0, 1))(params, added)
        return grads, added, only_vectors(grads)

    y = jax.eval_shape(lambda: case.layer.apply({"params": params}, x, **case.call))
    return params, gradient, y.shape


def gradients(case: LayerCase, x: np.ndarray, *, equal_cotangents: bool = False) -> tuple[Any, Any, Any]:
    """The gradients of the parameters and of a zero added to the output, one for each entry of b; and the vectors."""
    _, gradient, y = compiled(case)
    shape = case.per_output if equal_cotangents else y
    weights = np.random.default_rng(2).normal(0.3, 1, shape).astype(np.float32)
    added = np.zeros(case.per_output, np.float32)
    return gradient(added, x, np.broadcast_to(weights, y), 0.0 if equal_cotangents else 1.0)


def only_vectors(grads: Any) -> eva_optax.KroneckerVectors:
    (found,) = eva_optax.vectors(grads).values()
    return found


def check_a(case: LayerCase) -> None:
    x = case.inputs(case.x)
    a = gradients(case, x)[2].a
    assert a.dtype == jnp.float32
    assert_close(a, case.mean_input(x))


def check_b(case: LayerCase) -> None:
    grads, added, (_, b) = gradients(case, case.inputs(case.x))
    assert b.dtype == jnp.float32
    assert_close(b, case.lay_out(added, b.shape))
    if "bias" in grads:
        assert_close(b, case.lay_out(grads["bias"].reshape(case.per_output), b.shape))


def check_product(case: LayerCase, x: np.ndarray, *, equal_cotangents: bool = False) -> None:
    grads, _, (a, b) = gradients(case, x, equal_cotangents=equal_cotangents)
    assert_close(np.asarray(a) * b, grads[case.kernel], 1e-5)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_a_is_the_mean_input(case: LayerCase) -> None:
    check_a(case)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_b_is_the_gradient_of_the_bias_or_of_a_zero_added_by_hand(case: LayerCase) -> None:
    check_b(case)


@pytest.mark.parametrize("case", EQUAL_PATCHES, ids=str)
def test_equal_inputs_give_a_gradient_of_a_times_b(case: LayerCase) -> None:
    check_product(case, np.broadcast_to(case.inputs(case.equal_x), case.x))


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_equal_cotangents_give_a_gradient_of_a_times_b(case: LayerCase) -> None:
    check_product(case, case.inputs(case.x), equal_cotangents=True)


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_the_oracle_extracts_the_patches_that_the_layer_reads(case: LayerCase) -> None:
    x = case.inputs(case.x)
    params = jax.tree.map(np.asarray, compiled(case)[0])
    found = brute_force.patches(x, case.layer)
    rank = len(brute_force.geometry(case.layer).window)
    if isinstance(case.layer, nn.ConvLocal):
        y = np.einsum("n...i,...io->n...o", brute_force.local_patches(found, rank), params["kernel"])
    else:
        per_feature = brute_force.group_channels(found, case.layer.feature_group_count, case.layer.features)
        y = np.sum(per_feature * params["kernel"], tuple(range(-rank - 2, -1)))
    actual = case.layer.apply({"params": params}, x)
    assert_close(actual, (y + params.get("bias", 0)).reshape(actual.shape), 1e-5)


@given(st.data())
def test_dense_of_any_shape(data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(1, 4), max_size=3))
    inputs, outputs = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    letters = string.ascii_lowercase[: len(positions)]
    layer = nn.Dense(outputs, use_bias=data.draw(st.booleans()))
    case = contraction("Dense", layer, f"{letters}y,yz->{letters}z", (*positions, inputs), (inputs, outputs))
    check_a(case)
    check_b(case)
    check_product(case, case.inputs(case.x), equal_cotangents=True)


@given(st.data())
def test_einsum_of_any_equation(data: st.DataObject) -> None:
    sizes = {letter: data.draw(st.integers(1, 4), label=letter) for letter in "nthgijkopsu"}
    # Axes by where they occur: positions, batch axes, inputs, outputs, summed in the input alone, in the kernel alone.
    n, h, i, o, s, u = (
        data.draw(st.sampled_from(choices))
        for choices in (["", "n", "nt"], ["", "h"], ["i", "ij"], ["o", "op"], "s ", "u ")
    )
    x, kernel, y = (
        "".join(data.draw(st.permutations("".join(parts).replace(" ", ""))))
        for parts in ((n, h, i, s), (h, i, o, u), (n, h, o))
    )
    shapes = [tuple(sizes[letter] for letter in term) for term in (x, kernel)]
    equation = f"{x},{kernel}->{y}"
    layer = nn.Einsum(shapes[1], equation, use_bias=data.draw(st.booleans()))
    case = contraction("Einsum", layer, equation, *shapes)
    check_a(case)
    check_b(case)
    check_product(case, case.inputs(case.x), equal_cotangents=True)


@given(st.data())
def test_convolution_of_any_geometry(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 2), label="rank")

    def per_axis(low: int, high: int, label: str) -> tuple[int, ...]:
        return tuple(data.draw(st.lists(st.integers(low, high), min_size=rank, max_size=rank), label=label))

    pair = st.tuples(st.integers(-1, 3), st.integers(-1, 3))
    padding = data.draw(st.sampled_from(["SAME", "VALID", "CIRCULAR", "REFLECT", pair, pair]), label="padding")
    if not isinstance(padding, str):
        padding = tuple(data.draw(padding) for _ in range(rank))
    groups, channels, per_group = (data.draw(st.integers(1, 2)) for _ in range(3))
    options = {
        "strides": per_axis(1, 3, "strides"),
        "padding": padding,
        "kernel_dilation": per_axis(1, 2, "kernel dilation"),
        "input_dilation": (1,) * rank if isinstance(padding, str) else per_axis(1, 2, "input dilation"),
        "feature_group_count": groups,
        "use_bias": data.draw(st.booleans()),
    }
    window, sizes = per_axis(1, 4, "window"), per_axis(2, 7, "sizes")
    case = convolution("any", (2, *sizes, groups * channels), window, groups * per_group, **options)
    assume(brute_force.patches(case.inputs(case.x), case.layer).size > 0)
    check_a(case)
    check_b(case)
    check_product(case, case.inputs(case.x), equal_cotangents=True)


def cell_gradients(case: CellCase, x: np.ndarray, carry: Any = None) -> tuple[Any, Any]:
    model = eva_optax.tap(nn.RNN(case.cell), factors="both")
    params = random_like(jax.eval_shape(lambda: model.init(jax.random.key(0), x, initial_carry=carry))["params"])

    def loss(params: Any) -> jax.Array:
        return jnp.sum(jnp.sin(3 * model.apply({"params": params}, x, initial_carry=carry)))

    return params, jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize("case", CELLS, ids=str)
def test_statistics_of_a_recurrent_cell_run_over_batch_and_time(case: CellCase) -> None:
    x = case.inputs()
    params, grads = cell_gradients(case, x)
    loop = Unrolled(case.plain)
    real = eva_optax.strip(params)
    calls = brute_force.linear_calls(lambda: jnp.sum(jnp.sin(3 * loop.apply({"params": real}, x))))
    found, factors = jax.jit(eva_optax.vectors)(grads), jax.jit(eva_optax.factors)(grads)
    assert found.keys() == factors.keys() == calls.keys()
    for path, layer_calls in calls.items():
        assert len(layer_calls) == x.shape[1]
        a, b = brute_force.vectors(layer_calls)
        assert_close(found[path].a, a)
        assert_close(found[path].b, b, 3e-6)
        for mine, theirs in zip(factors[path], brute_force.moments(layer_calls), strict=True):
            assert_close(mine, theirs, 1e-5)


@pytest.mark.parametrize("case", CELLS, ids=str)
def test_every_parameter_of_a_recurrent_cell_is_tapped(case: CellCase) -> None:
    assert eva_optax.coverage(nn.RNN(case.cell), case.inputs()).share == 1


@pytest.mark.parametrize("case", CELLS, ids=str)
def test_equal_inputs_and_states_of_a_cell_give_gradients_of_a_times_b(case: CellCase) -> None:
    x = np.broadcast_to(case.inputs()[:1, :1, *(slice(1),) * case.maps], (3, 1, *case.x[2:]))
    carry = case.cell.initialize_carry(jax.random.key(0), x[:, 0].shape)
    rng = np.random.default_rng(3)
    carry = jax.tree.map(lambda leaf: jnp.broadcast_to(rng.normal(size=leaf.shape[-1:]), leaf.shape), carry)
    carry = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), carry)
    _, grads = cell_gradients(case, x, carry)
    for path, (a, b) in eva_optax.vectors(grads).items():
        kernel = grads
        for name in path.split("/"):
            kernel = kernel[name]
        assert_close(a * b, kernel["kernel"], 1e-5)


ATTENTION = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, out_features=3, deterministic=True)


def attention_gradients(query: Any, memory: Any, use_bias: bool) -> tuple[Any, Any]:
    model = eva_optax.tap(ATTENTION.clone(use_bias=use_bias))
    params = random_like(jax.eval_shape(lambda: model.init(jax.random.key(0), query, memory))["params"])
    loss = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(3 * model.apply({"params": params}, query, memory)))))
    return params, loss(params)


@pytest.mark.parametrize("use_bias", [True, False])
def test_vectors_of_attention_projections(use_bias: bool) -> None:
    rng = np.random.default_rng(0)
    query, memory = (rng.normal(0.5, 1, shape).astype(np.float32) for shape in ((3, 4, 5), (3, 6, 2)))
    params, grads = attention_gradients(query, memory, use_bias)
    plain, real = ATTENTION.clone(use_bias=use_bias), eva_optax.strip(params)
    calls = brute_force.linear_calls(lambda: jnp.sum(jnp.sin(3 * plain.apply({"params": real}, query, memory))))
    found = eva_optax.vectors(grads)
    assert found.keys() == calls.keys() == {"query", "key", "value", "out"}
    for path in calls:
        a, b = brute_force.vectors(calls[path])
        assert_close(found[path].a, a)
        if path != "key":  # its b is zero in every row that softmax sums over, and noise is left
            assert_close(found[path].b, b, 3e-6)
        else:
            np.testing.assert_allclose(found[path].b, b, atol=1e-5)


def test_equal_inputs_of_attention_give_gradients_of_a_times_b() -> None:
    x = np.broadcast_to(np.random.default_rng(0).normal(size=5).astype(np.float32), (3, 4, 5))
    _, grads = attention_gradients(x, x, use_bias=True)
    for path, (a, b) in eva_optax.vectors(grads).items():
        np.testing.assert_allclose(a * b, grads[path]["kernel"], atol=1e-5)
    assert np.abs(grads["value"]["kernel"]).max() > 0.1


def test_an_embedding_is_tapped_only_on_request() -> None:
    ids = jnp.array([0, 2, 2])
    model = nn.Sequential([nn.Embed(3, 2), nn.Dense(2)])
    off = eva_optax.tap(model).init(jax.random.key(0), ids)["params"]
    on = eva_optax.tap(model, embeddings=True).init(jax.random.key(0), ids)["params"]
    assert "kronecker" not in off["layers_0"]
    assert "kronecker" in on["layers_0"]
    assert "kronecker" in off["layers_1"]


class TiedOutput(nn.Module):
    """An embedding that also serves as the output projection."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        embed = nn.Embed(5, 3)
        return embed.attend(nn.Dense(3)(embed(ids)))


def test_attend_of_a_tied_embedding_is_not_tapped() -> None:
    ids = jnp.array([[0, 2, 2], [4, 2, 0]])
    model = eva_optax.tap(TiedOutput(), embeddings=True)
    params = model.init(jax.random.key(0), ids)["params"]
    grads = jax.grad(lambda p: jnp.sum(jnp.sin(model.apply({"params": p}, ids))))(params)
    lookup = params["Embed_0"]["embedding"]

    def from_rows(rows: jax.Array) -> jax.Array:
        dense = params["Dense_0"]
        return jnp.sum(jnp.sin((rows @ dense["kernel"] + dense["bias"].reshape(1, 1, -1)) @ lookup.T))

    a, b = eva_optax.vectors(grads)["Embed_0"]
    assert_close(a, brute_force.token_frequencies(np.asarray(ids), 5)[:, None])
    assert_close(b, jax.grad(from_rows)(lookup[ids]).sum((0, 1))[None])


def test_a_permuted_bias_stays_untapped_beside_its_tapped_kernel() -> None:
    layer, x = nn.Einsum((5, 2, 3), "nti,ioh->ntho"), jnp.ones((3, 4, 5))
    params = eva_optax.tap(layer).init(jax.random.key(0), x)["params"]
    assert list(params["kronecker"]) == ["kernel"]
    assert eva_optax.coverage(layer, x).untapped == {"bias": "bias axes are ordered unlike the kernel's"}


@pytest.mark.parametrize("equation", ["nii,io->no", "ni,iio->no"])
def test_an_einsum_that_takes_a_diagonal_is_not_tapped(equation: str) -> None:
    x = jnp.ones((2,) + (5,) * (len(equation.split(",")[0]) - 1))
    layer = nn.Einsum((5,) * (len(equation.split(",")[1].split("->")[0]) - 1) + (3,), equation, use_bias=False)
    assert eva_optax.coverage(layer, x).untapped == {"kernel": "einsum equation takes a diagonal"}


@pytest.mark.parametrize(
    ("equation", "kernel"),
    [("...i,...io->...o", (1, 5, 3)), ("nti,tio->nto", (1, 5, 3)), ("nti,...io->nt...o", (2, 5, 3))],
    ids=["broadcast ellipsis", "broadcast letter", "ellipsis of the kernel alone"],
)
def test_an_einsum_that_broadcasts_is_not_tapped_and_works(equation: str, kernel: tuple[int, ...]) -> None:
    layer, x = nn.Einsum(kernel, equation, use_bias=False), jnp.ones((6, 4, 5))
    model = nn.Sequential([nn.Dense(5), layer])
    assert list(eva_optax.coverage(model, x).untapped) == ["layers_1/kernel"]
    tapped = eva_optax.tap(model)
    params = tapped.init(jax.random.key(0), x)["params"]
    jax.eval_shape(jax.grad(lambda params: tapped.apply({"params": params}, x).sum()), params)


def test_negative_token_ids_count_from_the_end() -> None:
    ids = jnp.array([-1, 0, -1, 2])
    model = eva_optax.tap(nn.Embed(4, 2), embeddings=True)
    params = model.init(jax.random.key(0), ids)["params"]
    grads = jax.grad(lambda params: model.apply({"params": params}, ids).sum())(params)
    assert_close(only_vectors(grads).a, np.array([[0.25], [0], [0.25], [0.5]], np.float32))
