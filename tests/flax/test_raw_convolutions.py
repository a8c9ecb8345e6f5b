"""Convolution kernels that are raw parameters, in Linen and NNX."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import eva_optax
from tests.flax.nnx_cases import fast_jit
from tests.flax.test_custom_layers import assert_vectors_close, draw, linen_gradients, squares


@dataclass(frozen=True, eq=False)
class Case:
    """One convolution: its shapes, and what `jax.lax.conv_general_dilated` is given.

    Attributes:
      bias: the shape in which a bias of `outputs` entries is added; None without one.
    """

    x: tuple
    kernel: tuple
    how: dict
    outputs: int
    bias: tuple | None = None

    def convolve(self, x, w):
        return jax.lax.conv_general_dilated(x, w, **self.how)

    def layer(self, x, w, bias):
        y = self.convolve(x, w)
        return y if bias is None else y + jnp.broadcast_to(bias.reshape(self.bias), y.shape)


class Shifts(Case):
    """A causal depthwise convolution over time, written as shifts; its kernel has no input axis."""

    def convolve(self, x, w):
        width, length = len(w), x.shape[1]
        padded = jnp.pad(x, ((0, 0), (width - 1, 0), (0, 0)))
        return sum(padded[:, i : i + length] * jnp.broadcast_to(w[i], x.shape) for i in range(width))


NHWC, NWC = ("NHWC", "HWIO", "NHWC"), ("NWC", "WIO", "NWC")
SUBSAMPLING = Case(
    (2, 7, 6, 3),
    (3, 2, 3, 4),
    {"window_strides": (2, 1), "padding": "SAME", "dimension_numbers": NHWC},
    4,
    (1, 1, 1, 4),
)
GROUPED = Case(
    (3, 4, 9),
    (6, 2, 3),
    {
        "window_strides": (1,),
        "padding": [(4, 0)],
        "rhs_dilation": (2,),
        "dimension_numbers": ("NCW", "OIW", "NCW"),
        "feature_group_count": 2,
    },
    6,
    (1, 6, 1),
)
CASES = {
    "subsampling": SUBSAMPLING,
    "groups, channels first": GROUPED,
    "depthwise": Case(
        (2, 8, 3),
        (3, 1, 6),
        {"window_strides": (2,), "padding": "valid", "dimension_numbers": NWC, "feature_group_count": 3},
        6,
    ),
    "volume, jax.lax's own order": Case(
        (2, 2, 3, 4, 3),
        (3, 2, 2, 2, 2),
        {"window_strides": (1, 2, 1), "padding": [(1, 0), (0, 1), (-1, 1)], "lhs_dilation": (1, 2, 1)},
        3,
    ),
    "shifts": Shifts(
        (2, 7, 3),
        (4, 3),
        {
            "window_strides": (1,),
            "padding": [(3, 0)],
            "dimension_numbers": ("NWC", "WO", "NWC"),
            "feature_group_count": 3,
        },
        3,
        (1, 1, 3),
    ),
}


class LinenLayer(nn.Module):
    """One raw kernel, with or without a bias."""

    case: Case

    @nn.compact
    def __call__(self, x):
        w = self.param("w", lambda key: draw(self.case.kernel, 1))
        bias = self.param("bias", lambda key: draw((self.case.outputs,), 2)) if self.case.bias else None
        y = self.case.layer(x, w, bias)
        return eva_optax.tap_conv(self, "w", x, y, **self.case.how, bias="bias" if self.case.bias else None)


class Layer(nnx.Module):
    """`LinenLayer` in NNX."""

    def __init__(self, case):
        self.case = case
        self.w = nnx.Param(draw(case.kernel, 1))
        self.bias = nnx.Param(draw((case.outputs,), 2)) if case.bias else None

    def __call__(self, x):
        case = self.case
        y = case.layer(x, self.w[...], None if self.bias is None else self.bias[...])
        return eva_optax.tap_conv(self, "w", x, y, **case.how, bias="bias" if case.bias else None)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_raw_kernel_gets_its_mean_patch_and_its_summed_cotangent(case):
    x, model, tx = draw(case.x, 3), eva_optax.tap(LinenLayer(case)), eva_optax.scale_by_eva()
    params = model.init(jax.random.key(0), x)["params"]
    bias = params.get("bias")

    def everything(params):
        # Linear in w: the gradient of the mean output of each channel is the mean patch that it reads.
        y, pull = jax.vjp(lambda w: case.convolve(x, w), params["w"])
        (patches,) = pull(jnp.full(y.shape, case.outputs / y.size, y.dtype))
        plain = jax.grad(lambda w, bias: squares(case.layer(x, w, bias)), (0, 1))(params["w"], bias)
        grads = jax.grad(lambda p: squares(model.apply({"params": p}, x)))(params)
        return grads, patches, plain, tx.update(grads, tx.init(params))[0]

    grads, patches, (kernel, bias), updates = fast_jit(everything)(params)
    ((name, (a, b)),) = eva_optax.vectors(grads).items()
    np.testing.assert_allclose(np.broadcast_to(a, case.kernel), patches, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads["w"], kernel, rtol=1e-5, atol=1e-6)
    assert name == ""
    if case.bias:
        np.testing.assert_allclose(b.ravel(), bias, rtol=1e-5, atol=1e-5)
        assert set(params["kronecker"]) == {"w,bias"}
    assert np.isfinite(updates["w"]).all()
    assert np.count_nonzero(updates["w"] != grads["w"])


@pytest.mark.parametrize("case", [SUBSAMPLING, CASES["shifts"]])
def test_an_nnx_module_gets_the_same_vectors(case):
    x = draw(case.x, 3)
    linen = eva_optax.tap(LinenLayer(case))
    want = eva_optax.vectors(linen_gradients(linen, linen.init(jax.random.key(0), x)["params"], x))
    model = eva_optax.tap(Layer(case), x)
    got = eva_optax.vectors(nnx.jit(nnx.grad(lambda m: squares(m(x))))(model))
    assert_vectors_close(got, want)
    assert eva_optax.coverage(model).share == 1


def test_without_the_cotangent_depthwise_kernels_keep_theirs():
    model = eva_optax.tap(LinenLayer(CASES["shifts"]), statistics=("a",))
    params = model.init(jax.random.key(0), draw(CASES["shifts"].x))["params"]
    assert set(params["kronecker"]["w,bias"]) == {"a", "b", "n"}


def test_an_untapped_module_runs_as_it_is():
    x = draw(SUBSAMPLING.x, 3)
    params = LinenLayer(SUBSAMPLING).init(jax.random.key(0), x)["params"]
    assert set(params) == {"w", "bias"}
    want = SUBSAMPLING.layer(x, params["w"], params["bias"])
    np.testing.assert_array_equal(LinenLayer(SUBSAMPLING).apply({"params": params}, x), want)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"window_strides": (1, 1)}, r"output would have shape \(2, 7, 6, 4\)"),
        ({"padding": "VALID"}, "output would have shape"),
        ({"padding": "CIRCULAR"}, "padding=CIRCULAR"),
        ({"padding": 1}, "padding=1"),
        ({"rhs_dilation": (2,)}, r"rhs_dilation=\(2,\)"),
        ({"dimension_numbers": ("NHWC", "OIHW", "NHWC")}, "OIHW"),
        ({"dimension_numbers": ("NWC", "WIO", "NWC")}, "NWC"),
        ({"dimension_numbers": ("NHWC", "HWO", "NHWC")}, "HWO"),
        ({"feature_group_count": 3}, "feature_group_count=3"),
        ({"kernel": "v"}, "kernel='v'"),
        ({"bias": "v"}, "bias='v'"),
    ],
)
def test_wrong_calls_name_the_argument(changed, message):
    x, layer = draw(SUBSAMPLING.x), Layer(SUBSAMPLING)
    arguments = {"kernel": "w", **SUBSAMPLING.how, **changed}
    with pytest.raises(ValueError, match=rf"eva_optax\.tap_conv: .*{message}"):
        eva_optax.tap_conv(layer, arguments.pop("kernel"), x, layer(x), **arguments)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_factors_of_a_raw_kernel_are_the_moments_of_what_it_reads_and_writes(case):
    """Quadratic forms of A are the mean squares of outputs; B is the moment of the cotangents, a group at a time."""
    x, model = draw(case.x, 3), eva_optax.tap(LinenLayer(case), factors="both")
    params = model.init(jax.random.key(0), x)["params"]

    @jax.jit
    def everything(params):
        y = case.convolve(x, params["w"])
        return y, jax.grad(lambda params: jnp.sin(model.apply({"params": params}, x)).sum())(params)

    y, grads = everything(params)
    names = case.how.get("dimension_numbers", ("NCXYZ", "OIXYZ", "NCXYZ"))
    groups, samples = case.how.get("feature_group_count", 1), x.shape[names[0].index("N")]
    out, bias = names[1].index("O"), np.asarray(params.get("bias", 0))
    y = np.moveaxis(np.asarray(y, np.float64), names[2].index("C"), -1).reshape(-1, groups, case.outputs // groups)
    kernel = np.moveaxis(np.asarray(params["w"], np.float64), out, -1).reshape(-1, groups, case.outputs // groups)
    (found,) = eva_optax.factors(grads).values()
    size = len(kernel)
    a = np.reshape(found.A, (groups, size, size))
    np.testing.assert_allclose(np.einsum("igo,gij,jgo->go", kernel, a, kernel), np.mean(y**2, 0), rtol=1e-5)
    if isinstance(case, Shifts):
        assert found.B is None  # no axis of the kernel has room for its columns
        return
    dy = np.cos(y + bias.reshape(-1, groups, case.outputs // groups) if bias.ndim else y)
    wanted = samples * np.einsum("rgi,rgj->gij", dy, dy)
    np.testing.assert_allclose(np.reshape(found.B, wanted.shape), wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
