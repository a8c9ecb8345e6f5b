"""The recipes of docs/layers.md tap the layers of other libraries, of which stand-ins are run."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import eva_optax
from tests.dense import UNIT
from tests.flax import foreign_layers as foreign
from tests.flax.nnx_cases import fast_jit, jit, pure
from tests.helpers import assert_close, by_path, curved, random_like

TEXT = (Path(__file__).parents[2] / "docs" / "layers.md").read_text()
RECIPES = dict(section.split("\n", 1) for section in TEXT.split("\n## ")[1:])
X = jnp.asarray(np.random.default_rng(0).normal(0.3, 1, (2, 3, foreign.WIDTH)), jnp.float32)
TOKEN = X[:1, :1]


class EveryLinenModel(nn.Module):
    """All stand-ins side by side: compiled once, they are tested one by one."""

    models: tuple[Any, ...]

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return [make(name=f"model_{index}")(x) for index, make in enumerate(self.models)]


class EveryNNXModel(nnx.Module):
    """`EveryLinenModel` in NNX."""

    def __init__(self, recipes: dict[str, dict[str, Any]]):
        experts = [recipes["Routed experts"][name] for name in ("RaggedExperts", "DenseExperts")]
        for index, (heading, make) in enumerate(foreign.NNX.items()):
            arguments = experts if heading == "Routed experts" else []
            setattr(self, f"model_{index}", make(*arguments, rngs=nnx.Rngs(index)))

    def __call__(self, x: Any) -> Any:
        return [getattr(self, f"model_{index}")(x) for index in range(len(foreign.NNX))]


@pytest.fixture(scope="module")
def recipes() -> Iterator[dict[str, dict[str, Any]]]:
    """What the recipes define, after they ran where their imports find the stand-ins."""
    registrations, names, register = [], {}, eva_optax.register

    def remembered(*args: Any, **kwargs: Any) -> Any:
        registrations.append(register(*args, **kwargs))
        return registrations[-1]

    modules: dict[str, ModuleType] = {}
    for path, cls in foreign.PATHS.items():
        module, _, name = path.rpartition(".")
        setattr(modules.setdefault(module, ModuleType(module)), name, cls)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eva_optax, "register", remembered)
        for module in modules:
            patch.setitem(sys.modules, module, modules[module])
        for heading, text in RECIPES.items():
            names[heading] = {}
            for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
                exec(block, names[heading])
    yield names
    for registration in registrations:
        registration.remove()


def test_every_recipe_has_a_stand_in() -> None:
    assert set(RECIPES) == {*foreign.LINEN, *foreign.NNX}


@pytest.fixture(scope="module")
def linen(recipes: Any) -> tuple[eva_optax.Coverage, Any]:
    """The report on the Linen models, and their gradients for a single token."""
    makers = (recipes[heading][make] if isinstance(make, str) else make for heading, make in foreign.LINEN.items())
    model = eva_optax.tap(EveryLinenModel(tuple(makers)))
    params = random_like(jax.eval_shape(lambda: model.init(jax.random.key(0), TOKEN))["params"])
    grads = fast_jit(jax.grad(lambda p: sum(map(curved, model.apply({"params": p}, TOKEN)))))(params)
    return eva_optax.coverage(model, X, verify=True), grads


@pytest.fixture(scope="module")
def in_nnx(recipes: Any) -> tuple[eva_optax.Coverage, Any]:
    """The same of the NNX models."""
    model = eva_optax.tap(EveryNNXModel(recipes), X)
    grads = jit(nnx.grad(lambda m: sum(map(curved, m(TOKEN)))))(model)
    return eva_optax.coverage(model, X, verify=True), pure(grads)


def check_coverage(report: eva_optax.Coverage, index: int, compared: int) -> None:
    rows = [row for row in report.rows if row.path.startswith(f"model_{index}/") and len(row.shape) > 1]
    assert sum(row.size for row in rows if row.tapped) >= 0.97 * sum(row.size for row in rows) > 0
    errors = [row.error for row in rows if row.error is not None]
    assert len(errors) == compared
    assert max(errors, default=0) < 1e-4


def check_vectors(grads: Any, index: int, **factors: float) -> None:
    """Of a single token each matrix's gradient is a times b, but for a constant that its layer multiplies with."""
    leaves = by_path(grads)
    found = [path[:-1] for path in leaves if path[0] == f"model_{index}" and path[-3::2] == ("kronecker", "a")]
    assert found
    for *module, _, name in found:
        gradient = leaves[*module, name.partition(",")[0]].astype(float)
        a, b = (leaves[*module, "kronecker", name, leaf].astype(float) / UNIT for leaf in ("a", "b"))
        assert np.count_nonzero(gradient)
        assert_close(np.broadcast_to(a * b * factors.get(module[-1], 1), gradient.shape), gradient, 1e-4, floor=1e-3)


@pytest.mark.parametrize(("heading", "compared"), [*zip(foreign.LINEN, (2, 5, 2, 1, 3, 0), strict=True)])
def test_linen_recipes_tap_every_matrix(heading: str, compared: int, linen: Any) -> None:
    report, grads = linen
    check_coverage(report, list(foreign.LINEN).index(heading), compared)
    check_vectors(grads, list(foreign.LINEN).index(heading))


@pytest.mark.parametrize(("heading", "compared"), [*zip(foreign.NNX, (2, 4, 2, 2), strict=True)])
def test_nnx_recipes_tap_every_matrix(heading: str, compared: int, in_nnx: Any) -> None:
    report, grads = in_nnx
    check_coverage(report, list(foreign.NNX).index(heading), compared)
    check_vectors(grads, list(foreign.NNX).index(heading), scaled=0.25)
