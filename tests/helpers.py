"""What several test files need: the family, comparisons of trees, and what stands in probes and averages."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eva_optax

# Every transformation of the family by its name; each takes decay as a keyword argument, and all but `center` damping.
FAMILY = {
    "scale_by_eva": eva_optax.scale_by_eva,
    "scale_by_eva_f": eva_optax.scale_by_eva_f,
    "scale_by_eva_s": eva_optax.scale_by_eva_s,
    "conjugate": partial(eva_optax.conjugate, optax.scale_by_adam()),
    "center": partial(eva_optax.center, optax.trace(0.9)),
    "eva": partial(eva_optax.eva, 0.1),
    "eva_f": partial(eva_optax.eva_f, 0.1),
    "eva_s": partial(eva_optax.eva_s, 0.1),
    "eva_adamw": partial(eva_optax.eva_adamw, 0.1),
    "eva_muon": partial(eva_optax.eva_muon, 0.1),
}
WITHOUT_TAP = ("scale_by_eva_s", "eva_s")  # these read gradients alone


def random_like(shapes: Any, seed: int = 0) -> Any:
    """Random parameters of given shapes; boxes and dtypes are kept."""
    rng = np.random.default_rng(seed)
    # Cast by NumPy and put on the device: jnp.asarray is compiled for each shape.
    return jax.tree.map(lambda leaf: jax.device_put(rng.normal(0, 0.5, leaf.shape).astype(leaf.dtype)), shapes)


def curved(y: jax.Array) -> jax.Array:
    """A loss with a different cotangent for each output."""
    return jnp.sum(jnp.sin(3 * y + jnp.arange(y.size).reshape(y.shape)))


@contextmanager
def programs_of_a_gpu() -> Iterator[None]:
    """Takes what is meant for a GPU, such as another order of sums, on every backend."""

    def choose(*arguments: Any, default: Any, **branches: Any) -> Any:
        return branches.get("cuda", default)(*arguments)

    jax.clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", choose)
        yield
    jax.clear_caches()


def first_update(tx: Any, grads: Any, params: Any = None) -> tuple[Any, Any]:
    """Updates and state of the first step, compiled: op by op each operation would be compiled for itself."""

    def step(grads: Any, params: Any) -> tuple[Any, Any]:
        return tx.update(grads, tx.init(grads if params is None else params), params)

    return jax.jit(step)(grads, params)


def assert_close(got: Any, want: Any, tolerance: float = 1e-6, floor: float = 0.1) -> None:
    """Equal trees of equal shapes; entries are equal up to `tolerance` of the leaf's largest, or of `floor`."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.shape(mine) == np.shape(theirs)
        largest = float(np.abs(theirs).max(initial=floor))
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance * largest)


def assert_identical(got: Any, want: Any) -> None:
    """Equal trees with equal bits."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert jnp.asarray(mine).dtype == jnp.asarray(theirs).dtype
        np.testing.assert_array_equal(mine, theirs)


def assert_finite(tree: Any) -> None:
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(tree))


def names(path: Any) -> tuple[str, ...]:
    """A JAX key path as names, without the box around a leaf."""
    parts = tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
    boxed = path and isinstance(path[-1], jax.tree_util.GetAttrKey) and parts[-1] == "value"
    return parts[:-1] if boxed else parts


def by_path(tree: Any) -> dict[tuple[str, ...], np.ndarray]:
    """The leaves of a tree by their names."""
    return {names(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def probes(tree: Any) -> list[Any]:
    """The leaves of all probes."""
    return [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree) if "kronecker" in names(path)]


def assert_probes_are_zero(tree: Any) -> None:
    assert probes(tree)
    assert not any(np.count_nonzero(np.asarray(leaf)) for leaf in probes(tree))


def averages(state: Any, layer: str = "") -> dict[str, Any]:
    """The running averages "a" and "b", as far as there are any, that an optimizer's state holds of one layer."""
    place = tuple(layer.split("/")) if layer else ()
    leaves = jax.tree_util.tree_leaves_with_path(optax.tree.get(state, "vectors"))
    found = {names(path): leaf for path, leaf in leaves if names(path)[: len(place)] == place}
    return {path[-1]: leaf for path, leaf in found.items() if path[-1] in ("a", "b")}


def stacks_of(factorization: str, function: Callable[..., Any], *arguments: Any) -> list[str]:
    """The shapes of the stacks that a function factorizes, each once."""
    jaxpr = str(jax.make_jaxpr(partial(function, *arguments))())
    return sorted(set(re.findall(rf"f64\[([\d,]+)\](?: \S+)? = {factorization}\b", jaxpr)))
