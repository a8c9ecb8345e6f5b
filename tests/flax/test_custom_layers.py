"""Matrices that are raw parameters, layer classes of somebody else's, and mixtures of experts; Linen and NNX."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import eva_optax
from tests.flax.nnx_cases import fast_jit, jit, pure
from tests.helpers import averages


def squares(y):
    return jnp.sum(jnp.sin(y))


def linen_gradients(model, params, *args):
    return fast_jit(jax.grad(lambda p: squares(model.apply({"params": p}, *args))))(params)


def draw(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(0.3, 1, shape), jnp.float32)


class LinenAttention(nn.Module):
    """Two raw matrices with their einsums, one of them with a bias."""

    tapped: bool = True

    @nn.compact
    def __call__(self, x):
        w = self.param("w", lambda key: draw((3, 2, 4)))
        out = self.param("out", lambda key: draw((2, 4, 3), 1))
        bias = self.param("bias", lambda key: draw((3,), 2))
        y = jnp.einsum("btd,dhk->bthk", x, w)
        if self.tapped:
            y = eva_optax.tap_einsum(self, "w", "btd,dhk->bthk", x, y)
        z = jnp.einsum("bthk,hkd->btd", y, out)
        if self.tapped:
            z = eva_optax.tap_einsum(self, "out", "...hk,hkd->...d", y, z, bias="bias")
        return z + jnp.broadcast_to(bias, z.shape)


class Attention(nnx.Module):
    """`LinenAttention` in NNX."""

    def __init__(self):
        self.w, self.out, self.bias = (nnx.Param(draw(s, i)) for i, s in enumerate([(3, 2, 4), (2, 4, 3), (3,)]))

    def __call__(self, x):
        y = jnp.einsum("btd,dhk->bthk", x, self.w[...])
        y = eva_optax.tap_einsum(self, "w", "btd,dhk->bthk", x, y)
        z = jnp.einsum("bthk,hkd->btd", y, self.out[...])
        z = z + jnp.broadcast_to(self.bias[...], z.shape)
        return eva_optax.tap_einsum(self, "out", "...hk,hkd->...d", y, z, bias="bias")


class LinenLayers(nn.Module):
    """The same from Flax's own layers."""

    @nn.compact
    def __call__(self, x):
        y = nn.DenseGeneral((2, 4), use_bias=False, name="w")(x)
        return nn.DenseGeneral(3, axis=(-2, -1), name="out")(y)


def test_raw_einsums_get_the_vectors_of_flax_layers():
    x = draw((2, 5, 3), 3)
    model = eva_optax.tap(LinenAttention())
    params = model.init(jax.random.key(0), x)["params"]
    assert eva_optax.coverage(model, x).share == 1
    grads = linen_gradients(model, params, x)
    layers = {"w": {"kernel": params["w"]}, "out": {"kernel": params["out"], "bias": params["bias"]}}
    twin = eva_optax.tap(LinenLayers())
    want = eva_optax.vectors(linen_gradients(twin, eva_optax.attach(twin, layers, x), x))
    assert_vectors_close(eva_optax.vectors(grads), want)
    model = eva_optax.tap(Attention(), x)
    assert eva_optax.coverage(model).share == eva_optax.coverage(Attention(), x).share == 1
    assert_vectors_close(eva_optax.vectors(jit(nnx.grad(lambda m: squares(m(x))))(model)), want)


def assert_vectors_close(got, want, tolerance=1e-5):
    assert set(got) == set(want)
    for name in want:
        for mine, theirs in zip(got[name], want[name], strict=True):
            assert mine.shape == theirs.shape
            np.testing.assert_allclose(mine, theirs, rtol=tolerance, atol=tolerance * max(1e-2, np.abs(theirs).max()))


def test_untapped_modules_that_call_tap_einsum_run_as_they_are():
    x = draw((2, 5, 3), 3)
    params = LinenAttention().init(jax.random.key(0), x)["params"]
    assert set(params) == {"w", "out", "bias"}
    plain = LinenAttention(tapped=False)
    y = plain.apply({"params": params}, x)
    np.testing.assert_array_equal(LinenAttention().apply({"params": params}, x), y)
    np.testing.assert_array_equal(Attention()(x), y)
    tapped = eva_optax.tap(LinenAttention())
    np.testing.assert_array_equal(tapped.apply({"params": eva_optax.attach(tapped, params, x)}, x), y)
    grads = linen_gradients(tapped, eva_optax.attach(tapped, params, x), x)
    for mine, theirs in zip(
        jax.tree.leaves(eva_optax.strip(grads)), jax.tree.leaves(linen_gradients(plain, params, x)), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)


def test_equal_inputs_give_a_gradient_of_a_times_b():
    x = jnp.broadcast_to(draw((3,), 3), (2, 5, 3))
    grads = jit(nnx.grad(lambda m: squares(m(x))))(eva_optax.tap(Attention(), x))
    for name, (a, b) in eva_optax.vectors(grads).items():
        np.testing.assert_allclose(a * b, grads[name][...], rtol=1e-4, atol=1e-4)


class Layer(nnx.Module):
    """One raw matrix, to be stacked."""

    def __init__(self, rngs: nnx.Rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (3, 3)))

    def __call__(self, x):
        return x + eva_optax.tap_einsum(self, "w", "...i,io->...o", x, jnp.sin(x) @ self.w[...])


class Stack(nnx.Module):
    """Stacked and rematerialised layers with raw matrices."""

    def __init__(self):
        self.layers = nnx.split_rngs(splits=2)(nnx.vmap(Layer))(nnx.Rngs(0))

    def __call__(self, x):
        call = nnx.remat(Layer.__call__)
        return nnx.scan(lambda x, layer: call(layer, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def test_raw_matrices_in_stacked_layers():
    x = draw((4, 3))
    model = eva_optax.tap(Stack(), x)
    vectors = eva_optax.vectors(jit(nnx.grad(lambda m: squares(m(x))))(model))["layers"]
    np.testing.assert_allclose(vectors.a[0, :, 0], x.mean(0), rtol=1e-5)
    assert vectors.b.shape == (2, 1, 3)
    assert np.all(vectors.b != 0)


def test_an_nnx_model_of_raw_matrices_wants_an_example():
    with pytest.raises(ValueError, match=r"eva_optax\.tap\(model, x\)"):
        eva_optax.tap(Attention())
    with pytest.raises(TypeError, match="takes no example input"):
        eva_optax.tap(LinenAttention(), draw((2, 5, 3)))


class Wrong(nnx.Module):
    """Calls `tap_einsum` as it is told."""

    def __init__(self):
        self.w = nnx.Param(draw((3, 4)))

    def __call__(self, x, kernel="w", equation="bi,io->bo", **options):
        return eva_optax.tap_einsum(self, kernel, equation, x, x @ self.w[...], **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": "v"}, "kernel='v'"),
        ({"bias": "v"}, "bias='v'"),
        ({"equation": "bi,io"}, "must have the form"),
        ({"equation": "bti,io->bto"}, "does not fit"),
        ({"equation": "bi,ii->bi"}, "does not fit"),
        ({"equation": "bi,oi->bo"}, "does not fit"),
    ],
)
def test_wrong_calls_name_the_argument(arguments, message):
    with pytest.raises(ValueError, match=message):
        Wrong()(draw((2, 3)), **arguments)


def test_tapping_something_else_than_a_module_is_a_type_error():
    with pytest.raises(TypeError, match="module must be"):
        eva_optax.tap_einsum({}, "w", "bi,io->bo", draw((2, 3)), draw((2, 4)))


# Registered classes


class TransposedDense(nn.Module):
    """A layer of somebody else's: its kernel is stored transposed."""

    features: int

    @nn.compact
    def __call__(self, inputs):
        kernel = self.param("kernel", nn.initializers.normal(), (self.features, inputs.shape[-1]))
        y = inputs @ kernel.T
        return y + jnp.broadcast_to(self.param("bias", nn.initializers.zeros, (self.features,)), y.shape)


class ScaledTransposedDense(TransposedDense):
    """A subclass that calls `super()`."""

    @nn.compact
    def __call__(self, inputs):
        return 2 * super().__call__(inputs)


class General(nnx.Module):
    """A layer of somebody else's: any number of output axes, and a bias on request."""

    def __init__(self, inputs, features, use_bias, rngs):
        self.features = features
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (inputs, *features)))
        self.offset = nnx.Param(jnp.zeros(features)) if use_bias else None

    def __call__(self, inputs):
        y = jnp.tensordot(inputs, self.weight[...], 1)
        return y if self.offset is None else y + jnp.broadcast_to(self.offset[...], y.shape)


class Shifted(General):
    """A subclass that calls `super()`."""

    def __call__(self, inputs):
        return super().__call__(inputs + 1)


def general_equation(layer):
    letters = "xyz"[: len(layer.features)]
    return f"...i,i{letters}->...{letters}"


@pytest.mark.parametrize("layer", [TransposedDense(4), ScaledTransposedDense(4)], ids=lambda m: type(m).__name__)
def test_a_registered_linen_class_is_tapped_until_it_is_removed(layer):
    x = draw((5, 3))
    model = eva_optax.tap(nn.Sequential([layer, nn.Dense(2)]))
    assert eva_optax.coverage(model, x).untapped["layers_0/kernel"].endswith("is used directly (eva_optax.register)")
    with eva_optax.register(TransposedDense, kernel="kernel", bias="bias", equation="...i,oi->...o"):
        params = model.init(jax.random.key(0), x)["params"]
        assert eva_optax.coverage(model, x).share == 1
        grads = linen_gradients(model, params, x)
    a, b = eva_optax.vectors(grads)["layers_0"]
    np.testing.assert_allclose(a, x.mean(0)[None], rtol=1e-5)
    np.testing.assert_allclose(b[:, 0], grads["layers_0"]["bias"], rtol=1e-5)
    assert set(model.init(jax.random.key(0), x)["params"]["layers_0"]) == {"kernel", "bias"}


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize(("cls", "shift"), [(General, 0), (Shifted, 1)])
def test_a_registered_nnx_class_is_tapped(cls, shift, use_bias):
    x = jnp.broadcast_to(draw((3,)), (5, 3))

    def make(rngs):
        return cls(3, (2, 4), use_bias, rngs)

    with pytest.raises(ValueError, match="no layer that can be tapped"):
        eva_optax.tap(make(nnx.Rngs(0)))
    with eva_optax.register(General, kernel="weight", bias="offset", equation=general_equation) as registration:
        model = eva_optax.tap(make(nnx.Rngs(0)))
        stacked = eva_optax.tap(nnx.split_rngs(splits=3)(nnx.vmap(make))(nnx.Rngs(0)))
        # Again, with the same arguments: nothing changes.
        assert eva_optax.register(General, kernel="weight", bias="offset", equation=general_equation) == registration
        assert type(eva_optax.tap(make(nnx.Rngs(1)))) is type(model)
    grads = jit(nnx.grad(lambda m: squares(m(x))))(model)  # stays tapped
    ((name, (a, b)),) = eva_optax.vectors(grads).items()
    np.testing.assert_allclose(a[:, 0, 0], x[0] + shift, rtol=1e-5)
    np.testing.assert_allclose(a * b, grads["weight"][...], rtol=1e-4, atol=1e-5)
    assert name == ""
    assert isinstance(model, cls)
    key = "weight,offset" if use_bias else "weight"
    assert stacked.kronecker[key]["b"].shape == (3, 1, 2, 4)
    with pytest.raises(ValueError, match="no layer that can be tapped"):
        eva_optax.tap(make(nnx.Rngs(0)))


def test_register_checks_its_arguments():
    with pytest.raises(TypeError, match="must be a class"):
        eva_optax.register(TransposedDense(4), kernel="kernel", equation="...i,io->...o")
    with pytest.raises(ValueError, match="must have the form"):
        eva_optax.register(TransposedDense, kernel="kernel", equation="io")
    with (
        eva_optax.register(TransposedDense, kernel="weight", equation="...i,oi->...o"),
        pytest.raises(ValueError, match="no layer that can be tapped"),
    ):
        eva_optax.tap(TransposedDense(4)).init(jax.random.key(0), draw((5, 3)))


# Mixtures of experts

SIZES = jnp.array([3, 0, 4, 1])
ROWS = 10  # the last two belong to no expert


class LinenExperts(nn.Module):
    """Experts over rows that are sorted by expert."""

    use_bias: bool

    @nn.compact
    def __call__(self, x, group_sizes):
        w = self.param("w", lambda key: draw((4, 3, 2)))
        y = jax.lax.ragged_dot(x, w, group_sizes)
        if self.use_bias:
            b = self.param("b", lambda key: draw((4, 2), 1))
            expert = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(x.shape[0]), side="right")
            y = y + jnp.take(b, expert, axis=0, mode="fill", fill_value=0)
        return eva_optax.tap_ragged_dot(self, "w", x, y, group_sizes, bias="b" if self.use_bias else None)


class Experts(nnx.Module):
    """`LinenExperts` in NNX, without a bias."""

    def __init__(self):
        self.w = nnx.Param(draw((4, 3, 2)))

    def __call__(self, x, group_sizes):
        y = jax.lax.ragged_dot(x, self.w[...], group_sizes)
        return eva_optax.tap_ragged_dot(self, "w", x, y, group_sizes)


@pytest.mark.parametrize("use_bias", [True, False])
def test_each_expert_gets_the_mean_and_the_sum_of_its_own_rows(use_bias):
    x = draw((ROWS, 3), 2)
    model = eva_optax.tap(LinenExperts(use_bias))
    params = model.init(jax.random.key(0), x, SIZES)["params"]
    grads = linen_gradients(model, params, x, SIZES)
    a, b = eva_optax.vectors(grads)[""]
    dy = jnp.cos(model.apply({"params": params}, x, SIZES))
    ends = np.cumsum(SIZES)
    for expert, (start, end) in enumerate(zip(ends - np.asarray(SIZES), ends, strict=True)):
        rows, cotangents = x[start:end], dy[start:end]
        np.testing.assert_allclose(a[expert, :, 0], rows.mean(0) if end > start else np.zeros(3), rtol=1e-5)
        np.testing.assert_allclose(b[expert, 0], cotangents.sum(0), rtol=1e-5, atol=1e-6)
    plain = LinenExperts(use_bias)
    want = linen_gradients(plain, eva_optax.strip(params), x, SIZES)
    for mine, theirs in zip(jax.tree.leaves(eva_optax.strip(grads)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)
    if use_bias:
        np.testing.assert_allclose(b[:, 0], grads["b"], rtol=1e-5, atol=1e-6)
    else:
        twin = eva_optax.tap(Experts(), x, SIZES)
        got = eva_optax.vectors(jit(nnx.grad(lambda m: squares(m(x, SIZES))))(twin))
        assert_vectors_close(got, {"": eva_optax.KroneckerVectors(a, b)})


def test_equal_rows_give_each_expert_a_gradient_of_a_times_b():
    x = jnp.repeat(draw((4, 3), 2), SIZES, axis=0, total_repeat_length=ROWS)
    model = eva_optax.tap(LinenExperts(True))
    grads = linen_gradients(model, model.init(jax.random.key(0), x, SIZES)["params"], x, SIZES)
    a, b = eva_optax.vectors(grads)[""]
    np.testing.assert_allclose(a * b, grads["w"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("use_bias", [True, False])
def test_an_expert_without_rows_keeps_its_averages_and_the_others_move(use_bias):
    model, tx = eva_optax.tap(LinenExperts(use_bias)), eva_optax.scale_by_eva(decay=0.5)
    everyone = jnp.array([3, 2, 4, 1])
    params = model.init(jax.random.key(0), draw((ROWS, 3)), everyone)["params"]
    state = tx.init(params)
    running = []
    for seed, sizes in enumerate([everyone, SIZES]):
        updates, state = tx.update(linen_gradients(model, params, draw((ROWS, 3), seed), sizes), state)
        running.append(averages(state))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state)))
    for name in ("a", "b"):
        np.testing.assert_array_equal(running[1][name][1], running[0][name][1])
        for expert in (0, 2, 3):
            assert np.count_nonzero(running[1][name][expert] != running[0][name][expert])
    np.testing.assert_array_equal(updates["w"][1], 0)
    assert state.skipped == 0


class DenseDispatch(nn.Module):
    """Experts over fixed numbers of slots, dispatched by einsum."""

    @nn.compact
    def __call__(self, x, dispatch):
        w = self.param("w", lambda key: draw((4, 3, 2)))
        slots = jnp.einsum("td,tec->ecd", x, dispatch)
        y = jnp.einsum("ecd,edf->ecf", slots, w)
        y = eva_optax.tap_einsum(self, "w", "ecd,edf->ecf", slots, y)
        return jnp.einsum("ecf,tec->tf", y, dispatch)


def test_dense_dispatch_gives_one_layer_for_each_expert():
    x = draw((6, 3))
    dispatch = jax.nn.one_hot(jnp.array([0, 2, 2, 0, 3, 3]), 4)[:, :, None] * jnp.eye(2)[jnp.arange(6) % 2][:, None]
    model = eva_optax.tap(DenseDispatch())
    params = model.init(jax.random.key(0), x, dispatch)["params"]
    a, b = eva_optax.vectors(linen_gradients(model, params, x, dispatch))[""]
    slots = jnp.einsum("td,tec->ecd", x, dispatch)
    np.testing.assert_allclose(a[:, :, 0], slots.mean(1), rtol=1e-5, atol=1e-7)
    assert b.shape == (4, 1, 2)
    np.testing.assert_array_equal(b[1], 0)
    tx = eva_optax.scale_by_eva()
    updates, _ = tx.update(linen_gradients(model, params, x, dispatch), tx.init(params))
    assert np.isfinite(updates["w"]).all()


@pytest.mark.parametrize("shapes", [((10, 2), (10, 2)), ((10, 3), (9, 2)), ((2, 5, 3), (2, 5, 2))])
def test_ragged_shapes_that_do_not_fit_are_named(shapes):
    x, y = map(draw, shapes)
    with pytest.raises(ValueError, match=r"\(experts, inputs, outputs\)"):
        eva_optax.tap_ragged_dot(Experts(), "w", x, y, SIZES)


def test_an_empty_batch_of_rows_is_an_error():
    model = eva_optax.tap(Experts(), draw((ROWS, 3)), SIZES)
    with pytest.raises(ValueError, match="empty batch"):
        nnx.grad(lambda m: squares(m(jnp.zeros((0, 3)), 0 * SIZES)))(model)


def test_an_example_may_hold_shapes_and_flags():
    class Flagged(Attention):
        def __call__(self, x, flag, name="a"):
            assert name == "b"
            return super().__call__(x) if flag else x

    model = eva_optax.tap(Flagged(), jax.ShapeDtypeStruct((2, 5, 3), jnp.float32), True, name="b")
    assert set(model.kronecker) == {"w", "out,bias"}


def test_the_state_of_an_nnx_model_shows_no_trace_of_the_example():
    model = eva_optax.tap(Attention(), draw((2, 5, 3)))
    assert "recorder" not in str(vars(model))
    assert set(pure(nnx.state(model))) == {"w", "out", "bias", "kronecker"}
