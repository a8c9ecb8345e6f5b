"""Layers under `nn.map_variables`: their kernels are computed from the parameters, so that they are not tapped."""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eva_optax
from tests.flax.nnx_cases import fast_jit
from tests.helpers import assert_close, assert_finite, curved, probes, random_like

X = np.random.default_rng(0).normal(0.3, 1, (5, 4)).astype(np.float32)


def standardize(w: jax.Array) -> jax.Array:
    return (w - jnp.mean(w)) / jnp.std(w)


MAPS = {"standardized": standardize, "centred": lambda w: w - jnp.mean(w), "transposed": jnp.transpose}


class Inner(nn.Module):
    """A layer of Flax's, a raw matrix, and on request a cell that hides its gates."""

    cell: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.remat(nn.Dense)(4, use_bias=False)(x)
        raw = self.param("raw", nn.initializers.normal(1), (4, 4))
        x = eva_optax.tap_einsum(self, "raw", "bi,io->bo", x, x @ raw)
        if not self.cell:
            return x
        cell = nn.OptimizedLSTMCell(4)
        return cell(cell.initialize_carry(jax.random.key(0), x.shape), x)[1]


class Outer(nn.Module):
    """`Inner` with mapped parameters, or as it is, and a layer outside."""

    function: Callable[[jax.Array], jax.Array] | None
    collection: str = "params"
    mutable: bool = False
    cell: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inner = Inner(self.cell, name="inner")
        if self.function:
            # Biases stay as they are: the deviation of zeros has no derivative.
            function = partial(jax.tree.map, lambda w: self.function(w) if w.ndim == 2 else w)
            mapped = nn.map_variables(
                lambda inner, x: inner(x),
                self.collection,
                function,
                function if self.mutable else lambda variables: variables,
                init=not self.mutable and self.is_initializing(),
                mutable=self.mutable,
            )
            return nn.Dense(2, name="outside")(mapped(inner, x))
        return nn.Dense(2, name="outside")(inner(x))


def parameters(model: Any) -> Any:
    return random_like(jax.eval_shape(model.init, jax.random.key(0), X)["params"])


def gradients(model: Any, params: Any) -> Any:
    return fast_jit(jax.grad(lambda p: curved(model.apply({"params": p}, X))))(params)


@pytest.mark.parametrize("name", MAPS)
def test_layers_with_mapped_parameters_are_skipped_and_reported(name: str) -> None:
    model = Outer(MAPS[name], mutable=name == "transposed", cell=True)
    tapped = eva_optax.tap(model)
    params, untouched = (jax.eval_shape(m.init, jax.random.key(0), X)["params"] for m in (tapped, model))
    assert not probes(params["inner"])
    assert set(params["outside"]["kronecker"]) == {"kernel,bias"}
    assert eva_optax.strip(params) == untouched
    untapped = eva_optax.coverage(tapped, X).untapped
    assert {path.split("/")[0] for path in untapped} == {"inner"}
    kernels = {path: reason for path, reason in untapped.items() if "bias" not in path}
    assert len(kernels) == 10
    assert set(kernels.values()) == {"kernel is computed from other parameters"}


def test_gradients_of_standardized_layers_are_finite_and_those_of_the_model() -> None:
    model = Outer(standardize)
    tapped = eva_optax.tap(model)
    params = parameters(tapped)
    grads = gradients(tapped, params)
    assert_finite(grads)
    assert_close(eva_optax.strip(grads), gradients(model, eva_optax.strip(params)), tolerance=1e-5)
    assert set(eva_optax.vectors(grads)) == {"outside"}


def test_probes_that_a_checkpoint_brought_under_a_map_collect_nothing() -> None:
    params = parameters(eva_optax.tap(Outer(None)))
    assert probes(params["inner"])
    grads = gradients(eva_optax.tap(Outer(standardize)), params)
    assert_finite(grads)
    assert not any(np.count_nonzero(leaf) for leaf in probes(grads["inner"]))
    state = (tx := eva_optax.scale_by_eva()).init(params)
    _, state = fast_jit(tx.update)(grads, state)
    assert state.skipped == 0


def test_maps_over_other_collections_change_nothing() -> None:
    model = eva_optax.tap(Outer(jnp.negative, collection="batch_stats"))
    assert eva_optax.coverage(model, X).share == 1
    params = parameters(model)
    assert np.count_nonzero(gradients(model, params)["inner"]["kronecker"]["raw"]["a"])
