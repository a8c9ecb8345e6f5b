"""Models nobody here wrote, so to speak: what is tapped in them, and that training steps are right."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import eva_optax
from tests.dense import assert_preconditioned
from tests.flax.nnx_cases import fast_jit
from tests.helpers import assert_finite
from tests.real_models import LINEN, RealModel
from tests.real_nnx_models import NNX


def matrix_share(case: RealModel, report) -> float:
    """The share that is tapped of the parameters of linear layers, embeddings apart."""
    counted = [
        row
        for row in report.rows
        if row.tapped
        or not (
            row.reason.startswith("embedding")
            or "element by element" in row.reason
            or "not a matrix" in row.reason
            or row.path.split("/")[-1] in case.additive
        )
    ]
    return sum(row.size for row in counted if row.tapped) / sum(row.size for row in counted)


def check_step(case: RealModel, report, tapped, untapped, updates) -> None:
    """Loss and gradients are those of the untapped model; every tapped layer's update is a dense solve."""
    assert matrix_share(case, report) >= 0.97, str(report)
    (value, grads), (plain_value, plain_grads) = tapped, untapped
    np.testing.assert_allclose(value, plain_value, rtol=1e-5)
    stripped = eva_optax.strip(grads)
    assert jax.tree.structure(stripped) == jax.tree.structure(plain_grads)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(plain_grads))
    for mine, theirs in zip(jax.tree.leaves(stripped), jax.tree.leaves(plain_grads), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4 * largest)
    assert_finite((grads, updates))
    vectors = eva_optax.vectors(grads)
    assert all(np.count_nonzero(a) for a, _ in vectors.values())
    changed = set(assert_preconditioned(grads, updates, DAMPING))
    # BatchNorm and softmax make some of the summed cotangents cancel.
    assert len(changed) >= (1 if case.name == "ResNet-50" else len(vectors) / 2)


def draw(random: np.random.Generator, leaf) -> jax.Array:
    """A parameter, or a statistic of BatchNorm: compiling the initializers would take longer than all the rest."""
    scale = 0.5 if leaf.ndim < 2 else leaf.shape[-2] ** -0.5
    return jnp.asarray(random.normal(0, scale, leaf.shape), leaf.dtype)


DAMPING = 0.1
TX = eva_optax.scale_by_eva(DAMPING)


@pytest.mark.filterwarnings("ignore:The `concrete` option:DeprecationWarning")  # Flax 0.12.0, in nn.remat
@pytest.mark.parametrize("case", LINEN, ids=str)
def test_linen(case: RealModel):
    model = case.make()
    tapped = eva_optax.tap(model)
    keys = {"params": jax.random.key(0), "noise": jax.random.key(1)}
    shapes = jax.eval_shape(tapped.init, keys, *case.inputs)
    variables = jax.tree.map(partial(draw, np.random.default_rng(0)), shapes)
    plain = jax.eval_shape(model.init, keys, *case.inputs)
    assert jax.tree.structure(eva_optax.strip(variables)) == jax.tree.structure(plain)
    params, rest = variables["params"], {name: value for name, value in variables.items() if name != "params"}

    def gradient(model, params):
        def loss(params):
            y, _ = model.apply(
                {"params": params, **rest}, *case.inputs, rngs={"noise": jax.random.key(2)}, mutable=list(rest)
            )
            return case.loss(y, jnp.asarray(case.targets))

        return jax.value_and_grad(loss)(params)

    @fast_jit
    def step(params):
        value, grads = gradient(tapped, params)
        updates, _ = TX.update(grads, TX.init(params), params)
        return (value, grads), updates

    got, updates = step(params)
    untapped = fast_jit(lambda params: gradient(model, params))(eva_optax.strip(params))
    check_step(case, eva_optax.coverage(tapped, *case.inputs), got, untapped, updates)


QUICK = ("decoder", "mixture of experts")  # the others differ from Linen's in names; with `pytest -m slow`


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case.name in QUICK else pytest.mark.slow) for case in NNX], ids=str
)
def test_nnx(case: RealModel):
    example = case.inputs if case.name == "mixture of experts" else ()

    @fast_jit
    def init():
        return nnx.split(case.make(nnx.Rngs(0, noise=1)))[1]

    abstract = nnx.eval_shape(lambda: case.make(nnx.Rngs(0, noise=1)))
    plain = nnx.merge(nnx.graphdef(abstract), init())
    model = eva_optax.tap(nnx.clone(plain), *example)

    def gradient(graphdef, params, rest):
        loss = nnx.value_and_grad(lambda model: case.loss(model(*case.inputs), jnp.asarray(case.targets)))
        return loss(nnx.merge(graphdef, params, rest))

    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @fast_jit
    def step(params, rest):
        value, grads = gradient(graphdef, params, rest)
        updates, _ = TX.update(grads, TX.init(params), params)
        return (value, grads), updates

    got, updates = step(params, rest)
    plain_graphdef, *states = nnx.split(plain, nnx.Param, ...)
    untapped = fast_jit(lambda *states: gradient(plain_graphdef, *states))(*states)
    check_step(case, eva_optax.coverage(model), got, untapped, updates)
