"""What tapping refuses, in Linen and NNX: each message says what to do, and doing it helps."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import eva_optax
from tests.flax.cases import Experts, Scanned, Skipped
from tests.flax.nnx_cases import fast_jit

X = jnp.ones((5, 4))
KEY = jax.random.key(0)


def zeros(model, *inputs):
    """Parameters of a Linen model, without the time that initializers take to compile."""
    shapes = jax.eval_shape(model.init, KEY, *inputs)["params"]
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def refusal(function, *args, kind=ValueError) -> str:
    with pytest.raises(kind, match="eva_optax") as caught:
        function(*args)
    return str(caught.value)


# Layers without probes beside layers with probes


class Finetuned(nn.Module):
    """A backbone whose parameters may be loaded, and a new head."""

    backbone: nn.Module

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(self.backbone(x))

    def features(self, x):
        return self.backbone(x)


BACKBONES = {
    "a layer": (nn.Dense(4), "'backbone'"),
    "layers": (nn.Sequential([nn.Dense(4), nn.Dense(4)]), "'backbone/layers_0', 'backbone/layers_1'"),
    "scanned": (Scanned(3), "'backbone/blocks/linear'"),
    "experts": (Experts(split_inputs=False), "'backbone/experts/linear'"),
    "layers some of which are skipped": (Skipped(), "'backbone/tapped', 'backbone/last'"),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_parameters_that_were_loaded_without_probes_are_refused_by_the_names_of_their_layers(name):
    backbone, layers = BACKBONES[name]
    x = jnp.ones((3, 4, 4)) if name == "layers some of which are skipped" else X
    model, mutable = eva_optax.tap(Finetuned(backbone)), ["batch_stats"]
    variables = jax.eval_shape(model.init, KEY, x)
    params = variables.pop("params")
    partly = {**params, "backbone": eva_optax.strip(params["backbone"])}

    def run(model, params):
        return jax.eval_shape(partial(model.apply, mutable=mutable), {"params": params, **variables}, x)

    said = refusal(run, model, partly)
    assert said.startswith("eva_optax.tap: ")
    assert f"no probe among the parameters: {layers}. " in said
    # What it says.
    run(eva_optax.tap(model, partial=True), partly)
    run(model, eva_optax.attach(model, partly, x))
    # Neither the model as it was made, nor a tree without any probe, nor the untapped model is refused.
    run(model, params)
    run(model, eva_optax.strip(params))
    run(model.module, partly)


def test_a_partial_model_trains_what_has_probes_and_goes_with_a_mask():
    model = eva_optax.tap(Finetuned(nn.Dense(4)), partial=True)
    params = zeros(model, X)
    params["backbone"] = eva_optax.strip(params["backbone"])
    frozen = {"backbone": "frozen", "head": "trained"}
    tx = optax.partition({"trained": eva_optax.scale_by_eva(), "frozen": optax.set_to_zero()}, frozen)

    @fast_jit
    def step(params):
        grads = jax.grad(lambda p: model.apply({"params": p}, X).sum())(params)
        return grads, tx.update(grads, tx.init(params), params)[0]

    grads, updates = step(params)
    assert set(eva_optax.vectors(grads)) == {"head"}
    assert not any(np.count_nonzero(leaf) for leaf in jax.tree.leaves(updates["backbone"]))
    assert np.count_nonzero(updates["head"]["bias"])
    assert eva_optax.tap(model).partial
    assert not eva_optax.tap(model.module).partial


@pytest.mark.parametrize("run", ["apply", "bind", "method", "function", "tapping"])
def test_partly_probed_parameters_are_refused_however_they_are_used(run):
    module = Finetuned(nn.Sequential([nn.Dense(4), nn.Dense(4)]))
    model = eva_optax.tap(module)
    params = zeros(model, X)
    backbone = {**params["backbone"], "layers_0": eva_optax.strip(params["backbone"]["layers_0"])}
    partly = {"params": {**params, "backbone": backbone}}

    def tapping():
        with eva_optax.tapping():
            module.apply(partly, X)

    ways = {
        "apply": lambda: model.apply(partly, X),
        "bind": lambda: model.bind(partly)(X),
        "method": lambda: model.apply(partly, X, method="features"),
        "function": lambda: model.apply(partly, X, method=lambda m, x: m.backbone.layers[1](m.backbone.layers[0](x))),
        "tapping": tapping,
    }
    assert "1 of" in refusal(ways[run])


def test_a_teacher_without_probes_may_run_beside_a_student_with_probes():
    student, teacher = nn.Sequential([nn.Dense(4)]), nn.Dense(4)
    params, theirs = zeros(eva_optax.tap(student), X), zeros(teacher, X)
    with eva_optax.tapping():
        for _ in range(2):
            student.apply({"params": params}, X)
            teacher.apply({"params": theirs}, X)
    with eva_optax.tapping(partial=True):
        student.apply({"params": params}, X)


def test_a_jitted_step_is_refused_when_it_is_traced_and_leaves_no_tracers():
    model = eva_optax.tap(Finetuned(nn.Dense(4)))
    params = zeros(model, X)
    partly = {**params, "backbone": eva_optax.strip(params["backbone"])}
    step = jax.jit(jax.grad(lambda p: model.apply({"params": p}, X).sum()))
    with jax.checking_leaks():
        assert "'backbone'" in refusal(step.trace, partly)
        step.trace(params)
        with eva_optax.tapping():
            jax.eval_shape(lambda p: model.module.apply({"params": p}, X), params)


# Names


class Named(nn.Module):
    """A module, or a parameter, that is called as probes are."""

    kind: str

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="dense")(x)
        if self.kind == "parameter":
            return x * self.param("kronecker", nn.initializers.ones, (1, 4))
        return nn.Dense(4, name="kronecker" if self.kind == "module" else "free")(x)


class NamedNNX(nnx.Module):
    """The same in NNX."""

    def __init__(self, kind, rngs):
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.kronecker = nnx.Linear(4, 4, rngs=rngs) if kind == "module" else nnx.Param(jnp.ones(4))


@pytest.mark.parametrize("kind", ["module", "parameter"])
def test_the_name_of_probes_is_not_free(kind):
    nnx_model = NamedNNX(kind, nnx.Rngs(0))
    for caller, refuse in (
        ("tap", partial(jax.eval_shape, eva_optax.tap(Named(kind)).init, KEY, X)),
        ("coverage", partial(eva_optax.coverage, Named(kind), X)),
        ("attach", partial(eva_optax.attach, Named(kind), {}, X)),
        ("tap", partial(eva_optax.tap, nnx_model)),
        ("coverage", partial(eva_optax.coverage, nnx_model)),
        ("attach", partial(eva_optax.attach, nnx_model, nnx.state(nnx_model))),
    ):
        said = refusal(refuse)
        assert said.startswith(f"eva_optax.{caller}: 'kronecker' is no probe")
        assert "another one" in said
    assert eva_optax.coverage(Named("free"), X).share == 1


# Tapped models inside of others


class Outer(nn.Module):
    """A module with another one inside, as an attribute or from `setup`."""

    inner: nn.Module | None = None

    def setup(self):
        self.chosen = self.inner or eva_optax.tap(nn.Dense(3))

    def __call__(self, x):
        return self.chosen(x)


@pytest.mark.parametrize(
    "model", [Outer(eva_optax.tap(nn.Dense(3))), Outer(), nn.Sequential([eva_optax.tap(nn.Dense(3))])], ids=str
)
@pytest.mark.parametrize("wrap", [lambda model: model, eva_optax.tap], ids=["untapped", "tapped"])
def test_a_tapped_model_inside_of_another_is_refused(model, wrap):
    said = refusal(partial(wrap(model).init, KEY), X, kind=TypeError)
    assert said.startswith("eva_optax.tap: a tapped Dense was called.")
    assert "tap the outermost module" in said
    eva_optax.coverage(eva_optax.tap(Outer(nn.Dense(3))), X)  # what it says


# Example inputs


class NoInput(nn.Module):
    """A model that is called with nothing."""

    @nn.compact
    def __call__(self, scale=1.0):
        return nn.Dense(3)(jnp.ones((1, 4)))


def test_linen_models_need_an_example_of_their_input():
    model = nn.Sequential([nn.Dense(3)])
    params = zeros(model, X)
    for caller, refuse in {
        "coverage": lambda: eva_optax.coverage(eva_optax.tap(model)),
        "attach": lambda: eva_optax.attach(model, params),
    }.items():
        said = refusal(refuse, kind=TypeError)
        assert said.startswith(f"eva_optax.{caller}: Sequential was called with nothing: ")
        assert "'inputs'" in said
        assert "model.init(key, x)" in said
    assert eva_optax.coverage(NoInput()).share == 1
    with pytest.raises(TypeError, match="unexpected") as caught:  # other mistakes are Python's to report
        eva_optax.coverage(model, X, train=True)
    assert "eva_optax" not in str(caught.value)


class Heads(nnx.Module):
    """A raw matrix, and a layer of NNX's own."""

    def __init__(self, rngs):
        self.w = nnx.Param(jnp.ones((4, 2, 3)))
        self.dense = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        x = self.dense(x)
        return eva_optax.tap_einsum(self, "w", "...i,ihd->...hd", x, jnp.einsum("...i,ihd->...hd", x, self.w[...]))


def test_nnx_models_with_raw_matrices_need_an_example_of_their_input():
    model = nnx.Dict(heads=Heads(nnx.Rngs(0)))
    state = nnx.state(model)
    for caller, refuse in (
        ("tap", partial(eva_optax.tap, model)),
        ("attach", partial(eva_optax.attach, model, state)),
    ):
        said = refusal(refuse)
        assert said.startswith(f"eva_optax.{caller}: Heads at 'heads' calls tap_einsum, which needs an example input")
    reasons = eva_optax.coverage(model).untapped
    assert list(reasons) == ["heads/w"]
    assert "eva_optax.tap(model, x)" in reasons["heads/w"]
    heads = eva_optax.tap(model["heads"], X)  # what it says
    assert eva_optax.coverage(heads).share == 1
    eva_optax.tap(heads)


def test_partial_is_for_linen_models():
    assert "tap(model.head)" in refusal(
        partial(eva_optax.tap, nnx.Linear(2, 3, rngs=nnx.Rngs(0)), partial=True), kind=TypeError
    )


# Models without a layer that can be tapped


class Rotation(nn.Module):
    """A matrix that is a raw parameter, with a bias."""

    features: int

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.ones, (x.shape[-1], self.features))
        return x @ w + self.param("b", nn.initializers.zeros, (self.features,)).reshape(1, -1)


class Einsum(nn.Module):
    """Somebody else's class with a name that Flax has, too."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        return jnp.tensordot(x, self.param("w", nn.initializers.ones, self.shape), 1)


class EinsumNNX(nnx.Module):
    """The same in NNX."""

    def __init__(self):
        self.w = nnx.Param(jnp.ones((4, 20)))


EinsumNNX.__name__ = EinsumNNX.__qualname__ = "Einsum"


@pytest.mark.parametrize("init", ["init", "init_with_output", "lazy_init"])
def test_a_model_without_a_tapped_layer_names_the_two_largest_classes(init):
    model = nn.Sequential([nn.LayerNorm(), Rotation(3), nn.LayerNorm(), Einsum((3, 20))])
    x = jax.ShapeDtypeStruct((5, 4), jnp.float32) if init == "lazy_init" else X
    tapped = getattr(eva_optax.tap(model), init)
    said = refusal(lambda: tapped(KEY, x) if init == "lazy_init" else jax.eval_shape(tapped, KEY, x))
    assert said.startswith("eva_optax.tap: Sequential has parameters, but no layer that can be tapped.")
    assert f"{__name__}.Einsum (60 entries: " in said
    assert "; Rotation (15 entries: Rotation has no rule: its parameter is used directly (eva_optax.register))" in said
    assert "LayerNorm" not in said


def test_an_nnx_model_without_a_tapped_layer_names_the_two_largest_classes():
    rngs = nnx.Rngs(0)
    model = nnx.List([nnx.LayerNorm(4, rngs=rngs), EinsumNNX(), nnx.Conv(4, 3, 3, mask=jnp.ones((3, 4, 3)), rngs=rngs)])
    said = refusal(eva_optax.tap, model)
    assert said.startswith("eva_optax.tap: List has no layer that can be tapped.")
    assert f"{__name__}.Einsum (80 entries: {__name__}.Einsum has no rule: " in said
    assert "; Conv (39 entries: masked kernel)" in said
    assert "LayerNorm" not in said
