"""The coverage report: which parameters are tapped, which are not, and why."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eva_optax
from tests.flax.cases import LanguageModel, ModelCase, Regularized, Scanned, Skipped, StandardizedDense, transparent

X = jnp.ones((3, 4, 4))
IDS = jnp.zeros((2, 5), int)


@pytest.mark.parametrize("case", transparent(), ids=str)
def test_the_report_agrees_with_the_parameters(case: ModelCase) -> None:
    model = eva_optax.tap(case.model, embeddings=case.embeddings)
    report = eva_optax.coverage(model, case.inputs())
    params = jax.eval_shape(lambda: case.init(model, jax.random.key(0)))["params"]
    leaves = {"/".join(str(key.key) for key in path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    shapes = {path: leaf.shape for path, leaf in leaves.items() if "kronecker" not in path}
    assert {row.path: row.shape for row in report.rows} == shapes
    assert report.total == sum(map(np.prod, shapes.values()))
    # A probe is named after the parameters that it speaks for.
    tapped = set()
    for path in leaves:
        layer, _, probe = path.rpartition("kronecker/")
        if probe and "kronecker" in path:
            tapped |= {layer + name for name in probe.partition("/")[0].split(",")}
    assert {row.path for row in report.rows if row.tapped} == tapped
    assert set(report.untapped) == shapes.keys() - tapped
    assert all(report.untapped.values())
    assert report.tapped == sum(np.prod(shapes[path]) for path in tapped) > 0


class Mixed(nn.Module):
    """A bit of everything."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.LayerNorm(name="norm")(nn.Dense(4, name="dense")(x))
        x = nn.PReLU(name="prelu")(StandardizedDense(4, name="standardized")(x))
        x = nn.Conv(4, (2,), mask=jnp.ones((2, 4, 4)), name="masked")(x)
        x = nn.Einsum((4, 2, 2), "nti,ioh->ntho", name="permuted")(x).reshape(3, 4, 4)
        gain = self.param("gain", nn.initializers.ones, (4,))
        return (x * gain.reshape(1, 1, 4)) @ self.param("matrix", nn.initializers.ones, (4, 4))


def test_every_untapped_parameter_has_its_reason() -> None:
    report = eva_optax.coverage(Mixed(), X)
    words = {
        "gain": "vector",
        "masked/bias": "masked",
        "masked/kernel": "masked",
        "matrix": "Mixed",
        "norm/bias": "LayerNorm",
        "norm/scale": "LayerNorm",
        "permuted/bias": "ordered",
        "prelu/negative_slope": "vector",
        "standardized/bias": "computed",
        "standardized/kernel": "computed by StandardizedDense.param",
    }
    assert report.untapped.keys() == words.keys()
    assert not [path for path, word in words.items() if word not in report.untapped[path]]
    assert [row.path for row in report.rows if row.tapped] == ["dense/bias", "dense/kernel", "permuted/kernel"]
    assert (report.tapped, report.total) == (20 + 16, 20 + 16 + 20 + 36 + 8 + 4 + 16 + 4 + 1)
    assert report.share == 36 / 125
    assert report.uncentered == ("permuted/kernel",)


def test_the_report_prints_as_a_table() -> None:
    lines = str(eva_optax.coverage(Mixed(), X)).splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    assert ["dense/kernel", "4×4", "16", "yes"] in cells
    assert ["permuted/kernel", "4×2×2", "16", "yes (without bias: not centred)"] in cells
    assert ["gain", "4", "4", "no: a vector, not a matrix"] in cells
    assert ["prelu/negative_slope", "scalar", "1", "no: a vector, not a matrix"] in cells
    assert len(cells) == 13
    assert "36 of 125" in lines[-1]
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("wrapper", [nn.WeightNorm, nn.SpectralNorm])
def test_reparametrised_kernels_are_not_tapped(wrapper: type[nn.Module]) -> None:
    class Wrapping(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            options = {"update_stats": True} if wrapper is nn.SpectralNorm else {}
            x = wrapper(nn.Dense(4, name="inside"), name="wrapper")(x, **options)
            return nn.Dense(4, name="outside")(x @ self.param("matrix", nn.initializers.ones, (4, 4)))

    untapped = eva_optax.coverage(Wrapping(), X).untapped
    assert untapped["inside/kernel"] == "kernel is computed from other parameters"
    assert "kernel is computed" in untapped["inside/bias"]
    assert untapped["matrix"] == "Wrapping has no rule: its parameter is used directly (eva_optax.register)"
    assert "outside/kernel" not in untapped


def test_all_layers_that_are_skipped_are_reported() -> None:
    untapped = eva_optax.coverage(Skipped(), X).untapped
    kernels = {path.split("/")[0] for path in untapped if path.endswith("/kernel")}
    assert kernels == {"standardized", "weight", "spectral", "masked"}


def test_a_complex_kernel_is_not_tapped() -> None:
    assert eva_optax.coverage(nn.Dense(2, param_dtype=jnp.complex64), X).untapped["kernel"] == "complex kernel"


def test_embeddings_are_reported_as_the_tapped_model_taps_them() -> None:
    off = eva_optax.coverage(LanguageModel(), IDS)
    on = eva_optax.coverage(eva_optax.tap(LanguageModel(), embeddings=True), IDS)
    assert off.untapped["Embed_0/embedding"] == "embedding: off by default, pass embeddings=True"
    assert "Embed_0/embedding" not in on.untapped
    assert on.tapped == off.tapped + 7 * 4


def test_stacked_parameters_are_counted_whole() -> None:
    report = eva_optax.coverage(Scanned(3), jnp.ones((5, 4)))
    assert (report.tapped, report.total, report.share) == (60, 60, 1)


def test_arguments_of_the_call_are_passed_on() -> None:
    x = jnp.ones((2, 3, 4, 2))
    report = eva_optax.coverage(Regularized(), x, train=False)
    assert report.rows == eva_optax.coverage(eva_optax.tap(Regularized()), x, False).rows


@pytest.mark.parametrize("x", [np.ones((5, 4)), jax.ShapeDtypeStruct((5, 4), jnp.float32)], ids=["array", "shape"])
def test_only_shapes_are_looked_at(x: object) -> None:
    class OnlyTraced(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            assert isinstance(x, jax.core.Tracer)
            return nn.Dense(3)(x)

    assert eva_optax.coverage(OnlyTraced(), x).share == 1


def test_models_without_anything_to_tap_have_a_report_too() -> None:
    assert eva_optax.coverage(nn.LayerNorm(), X).share == 0
    nothing = eva_optax.coverage(nn.Sequential([jnp.tanh]), X)
    assert (nothing.rows, nothing.tapped, nothing.total, nothing.share) == ((), 0, 0, 0.0)
    assert "0 of 0" in str(nothing)


def test_only_a_module_has_a_report() -> None:
    with pytest.raises(TypeError, match=r"flax\.linen\.Module"):
        eva_optax.coverage(jnp.tanh, X)


def test_the_report_says_which_second_moments_are_collected() -> None:
    layer = nn.Conv(6, (3, 2), feature_group_count=2)
    image = jnp.ones((2, 5, 5, 4))
    wanted = {"rank": "rank 4 of 12", "input": "A 12×12", "both": "A 12×12, B 3×3"}
    for options, said in (({"rank": 4}, "rank"), ({"factors": "input"}, "input"), ({"factors": "both"}, "both")):
        report = eva_optax.coverage(eva_optax.tap(layer, **options), image)
        assert {row.path: row.moments for row in report.rows} == {"kernel": wanted[said], "bias": ""}
        assert f"yes; {wanted[said]}" in str(report)
    whole = eva_optax.coverage(eva_optax.tap(nn.Dense(2), rank=16), jnp.ones((2, 3)))
    assert whole.rows[1].moments == "rank 3 of 3"
    words = eva_optax.coverage(eva_optax.tap(nn.Embed(7, 3), embeddings=True, factors="both"), IDS)
    assert words.rows[0].moments == "diagonal of A, B 3×3"
