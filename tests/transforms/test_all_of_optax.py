"""Every optimizer that the installed Optax exports: on a tapped tree it updates real parameters as on an untapped one.

Bit for bit, without the library's transformations: probes' gradients are stored far below the rounding of any other, so
that nothing that joins the leaves of a tree (norms, inner products, line searches) sees them.
"""

import inspect
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eva_optax
from tests.helpers import assert_close, assert_identical, first_update, names

STEPS = 2


class Network(nn.Module):
    """One tapped layer and others whose shapes are those of its probe: what is compiled op by op serves both trees."""

    @nn.compact
    def __call__(self, x):
        column, row = (self.param(name, nn.initializers.normal(1.0), shape) for name, shape in SHAPES.items())
        return nn.Dense(2, bias_init=nn.initializers.normal(1.0))(x) @ column * row


SHAPES = {"column": (2, 1), "row": (1, 2)}
X = np.random.default_rng(0).normal(1, 1, (STEPS, 4, 2)).astype(np.float32)
TAPPED, PLAIN = eva_optax.tap(Network()), Network()

random = "draws as many random keys as there are leaves"
NO_OPTIMIZER = {
    "add_noise": random,
    "differentially_private_aggregate": "takes a gradient for each example; " + random,
    "dpsgd": "takes a gradient for each example; " + random,
    "hutchinson_estimator_diag_hessian": random,
    "noisy_sgd": random,
    "sophia": random,
    "inject_hyperparams": "makes a factory; see test_optax.py",
    "inject_stateful_hyperparams": "makes a factory",
    "measure_with_ema": "returns a measurement in the place of updates",
    "skip_large_updates": "an argument of MultiSteps",
    "skip_not_finite": "an argument of MultiSteps",
}


def labels(params: Any) -> Any:
    """Matrices "a", all else "b"."""
    return jax.tree.map(lambda leaf: "a" if jnp.ndim(leaf) == 2 else "b", params)


def adam() -> optax.GradientTransformation:
    return optax.adam(0.1)


# The arguments that have no default, by name; where one name means two things, by the optimizer's.
COMMON = {
    **dict.fromkeys(("learning_rate", "step_size", "clipping", "max_delta", "threshold", "max_norm"), 0.1),
    **dict.fromkeys(("inner", "optimizer", "base_optimizer", "tx", "fast_optimizer"), adam()),
    **{"decay": 0.9, "mask": labels, "freeze_mask": False, "step_size_fn": lambda step: 0.1 / (1 + step)},
    **{"max_consecutive_errors": 3, "should_transform_fn": lambda step, **_: step % 2 == 0},
    **{"sync_period": 2, "slow_step_size": 0.5, "max_backtracking_steps": 3, "max_linesearch_steps": 2},
    **{"adv_optimizer": optax.sgd(0.05), "measure_name": "norm", "measure": optax.tree.norm, "f": lambda g, p: 2 * g},
    **{"transforms": {"a": optax.adam(0.1), "b": optax.sgd(0.1)}, "param_labels": labels},
}
OWN: dict[str, Callable[[Any], Any]] = {
    "chain": lambda make: make(optax.scale_by_adam(), optax.clip(0.1)),
    "named_chain": lambda make: make(("adam", adam()), ("clip", optax.clip(0.1))),
    "masked": lambda make: make(adam(), lambda params: jax.tree.map(lambda leaf: jnp.ndim(leaf) == 2, params)),
    "freeze": lambda make: make(lambda params: jax.tree.map(lambda leaf: jnp.ndim(leaf) == 1, params)),
    "stateless": lambda make: make(lambda updates, params: jax.tree.map(lambda leaf: 2 * leaf, updates)),
    "lbfgs": lambda make: make(memory_size=2, linesearch=optax.scale_by_zoom_linesearch(2)),
    "scale_by_lbfgs": lambda make: make(memory_size=2),
    "monitor": lambda make: make({"norm": optax.tree.norm}),
    "scale_by_muon": lambda make: optax.masked(
        make(
            weight_dimension_numbers=lambda params: jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), params)
        ),
        lambda params: jax.tree.map(lambda leaf: jnp.ndim(leaf) == 2, params),
    ),
}
LINE_SEARCHES = ("lbfgs", "scale_by_backtracking_linesearch", "scale_by_zoom_linesearch")


def optimizers() -> Iterator[tuple[str, Callable[[], Any]]]:
    """All public functions of Optax that make a transformation."""
    for module in (optax, optax.contrib):
        for name, make in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("_") or name in NO_OPTIMIZER:
                continue
            if name in OWN:
                yield name, lambda make=make, name=name: OWN[name](make)
                continue
            signature = inspect.signature(make)
            needed = [p for p in signature.parameters.values() if p.default is p.empty and p.kind not in (2, 4)]
            arguments = {p.name: COMMON[p.name] for p in needed if p.name in COMMON}
            declared = "GradientTransformation" in str(signature.return_annotation)
            if declared or (len(arguments) == len(needed) and hasattr(make(**arguments), "update")):
                yield name, lambda make=make, arguments=arguments: make(**arguments)


OPTIMIZERS = dict(optimizers())


@cache
def steps() -> Any:
    """Parameters, and for each step the value, the gradient, and the losses of tapped and of untapped parameters."""
    params = TAPPED.init(jax.random.key(0), X[0])["params"]

    def loss(model: Any, x: Any) -> Any:
        return jax.jit(lambda params: jnp.mean(jnp.sin(model.apply({"params": params}, x)) ** 2))

    losses = [{True: loss(TAPPED, x), False: loss(PLAIN, x)} for x in X]
    return params, [(*jax.jit(jax.value_and_grad(each[True]))(params), each) for each in losses]


def updates_of(name: str, tapped: bool) -> list[Any]:
    """What an optimizer makes of the same gradients with and without probes."""
    tree = (lambda tree: tree) if tapped else eva_optax.strip
    tx = OPTIMIZERS[name]()
    params, found = steps()
    params, updates = tree(params), []
    if name == "lookahead":
        params = optax.LookaheadParams.init_synced(params)
    tx = tx if isinstance(tx, optax.MultiSteps) else optax.with_extra_args_support(tx)
    state = tx.init(params)
    for value, grads, losses in found:
        extra = {} if name == "sam" else {"value": value}
        if name in LINE_SEARCHES:
            extra |= {"grad": tree(grads), "value_fn": losses[tapped]}
        made, state = tx.update(tree(grads), state, params, **extra)
        params = optax.apply_updates(params, made)
        updates.append(made)
    return updates


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_real_parameters_of_a_tapped_tree_are_updated_as_without_probes(name):
    steps()
    with jax.disable_jit():  # op by op: two programs may round each in its own way
        wanted = updates_of(name, tapped=False)
        assert_identical(eva_optax.strip(updates_of(name, tapped=True)), wanted)
    assert len(wanted) == STEPS


@pytest.mark.parametrize(
    "build",
    [
        lambda: optax.chain(optax.scale_by_lion(), optax.clip_by_global_norm(0.01)),
        lambda: optax.noisy_sgd(0.1, key=jax.random.key(0)),
    ],
    ids=["norms of signs", "random keys"],
)
def test_a_mask_hides_probes_from_what_sees_them(build):
    def without_probes(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: "kronecker" not in names(path), params)

    params, ((_, grads, _), *_) = steps()
    wanted, _ = first_update(build(), eva_optax.strip(grads), eva_optax.strip(params))
    seen, _ = first_update(build(), grads, params)
    assert np.count_nonzero(seen["column"] != wanted["column"])
    hidden, _ = first_update(optax.masked(build(), without_probes), grads, params)
    assert_close(eva_optax.strip(hidden), wanted)


def test_no_optimizer_of_optax_is_left_out():
    assert {"adam", "dog", "lbfgs", "masked", "muon", "prodigy", "sam", "schedule_free"} <= OPTIMIZERS.keys()
    assert len(OPTIMIZERS) > 100
