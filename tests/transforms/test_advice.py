"""What the transformations refuse: each message names the function that was called, and what to do instead."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import eva_optax
from tests.helpers import FAMILY, WITHOUT_TAP

NEEDS_TAP = [name for name in FAMILY if name not in WITHOUT_TAP]
UNTAPPED = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "norm": {"scale": jnp.ones(3)}}


def tapped_params():
    model = eva_optax.tap(nn.Sequential([nn.Dense(3), nn.LayerNorm()]))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 2)))["params"]
    return jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)


def refusal(function, *args) -> str:
    with pytest.raises(ValueError, match="eva_optax") as caught:
        function(*args)
    return str(caught.value)


# Options


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "center"])
@pytest.mark.parametrize(
    ("damping", "said"),
    [
        (0.0, "damping must be greater than 0, got 0.0."),
        (float("inf"), "damping must be finite, got inf."),
        ("0.1", "damping must be a number or a scalar array, got '0.1'."),
        (None, "damping must be a number or a scalar array, got None."),
    ],
    ids=str,
)
def test_every_member_refuses_dampings_that_are_none_by_its_own_name(name, damping, said):
    assert refusal(lambda: FAMILY[name](damping=damping)).startswith(f"eva_optax.{name}: {said}")


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize(
    ("decay", "said"), [(1.5, "must lie in [0, 1), got 1.5"), (None, "must be a number or a scalar array, got None")]
)
def test_every_member_refuses_decays_that_are_none_by_its_own_name(name, decay, said):
    assert refusal(lambda: FAMILY[name](decay=decay)).startswith(f"eva_optax.{name}: decay {said}")


def test_a_schedule_that_is_no_number_is_sent_to_inject_hyperparams():
    schedule = optax.linear_schedule(1.0, 0.1, 10)
    advice = "optax.inject_hyperparams(eva_optax.scale_by_eva)(damping=schedule)"
    assert advice in refusal(lambda: eva_optax.scale_by_eva(schedule))
    tx = optax.inject_hyperparams(eva_optax.scale_by_eva)(damping=schedule)  # what it says
    assert "damping" in jax.eval_shape(tx.init, tapped_params()).hyperparams


@pytest.mark.parametrize("damping", [np.float32(0.1), np.array(0.1), jnp.array(0.1), 1, True], ids=repr)
def test_numbers_of_every_kind_are_taken(damping):
    assert eva_optax.scale_by_eva(damping).init(tapped_params()).count == 0


# Trees without probes


@pytest.mark.parametrize("name", NEEDS_TAP)
def test_every_member_refuses_untapped_parameters_by_its_own_name(name):
    said = refusal(FAMILY[name]().init, UNTAPPED)
    assert said.startswith(f"eva_optax.{name}: the parameters hold no probes")
    assert "eva_optax.tap(model), then model.init(key, x)" in said
    assert "eva_optax.attach(model, params, x)" in said
    assert "mask" not in said


@pytest.mark.parametrize("name", NEEDS_TAP)
def test_every_member_refuses_gradients_without_probes_by_its_own_name(name):
    params = tapped_params()
    tx = FAMILY[name]()
    said = refusal(tx.update, eva_optax.strip(params), tx.init(params), params)
    assert said.startswith(f"eva_optax.{name}: the updates hold no tapped layer")


def test_nnx_users_are_told_what_is_written_in_nnx():
    model = nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.LayerNorm(3, rngs=nnx.Rngs(0))])
    tx = eva_optax.eva_adamw(0.1)
    for refuse in (
        lambda: nnx.Optimizer(model, tx, wrt=nnx.Param),
        lambda: tx.init(nnx.state(model)),
        lambda: tx.init({"policy": nnx.state(model)}),
    ):
        said = refusal(refuse)
        assert said.startswith("eva_optax.eva_adamw: the parameters hold no probes")
        assert "model = eva_optax.tap(model), then nnx.Optimizer(model, tx, wrt=nnx.Param)" in said
        assert "attach" not in said
        assert "init" not in said
    assert "eva_optax.tap(model), then nnx.Optimizer" in refusal(eva_optax.vectors, nnx.state(model))
    assert "attach" in refusal(eva_optax.vectors, UNTAPPED)
    nnx.Optimizer(eva_optax.tap(model), tx, wrt=nnx.Param)  # what it says


def named(tree, keep):
    return jax.tree_util.tree_map_with_path(lambda path, _: keep([key.key for key in path]), tree)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx, keep: optax.masked(tx, lambda tree: named(tree, keep)),
        lambda tx, keep: optax.partition({True: tx, False: optax.identity()}, lambda tree: named(tree, keep)),
    ],
    ids=["masked", "partition"],
)
def test_a_mask_by_leaf_names_is_answered_with_advice_about_masks(wrap):
    params = tapped_params()
    said = refusal(wrap(eva_optax.eva_adamw(0.1), lambda names: names[-1] in ("kernel", "bias")).init, params)
    assert said.startswith("eva_optax.eva_adamw: the probes are masked out")
    assert "decide by the layer's path" in said
    assert "tap(model)" not in said
    wrap(eva_optax.eva_adamw(0.1), lambda names: names[0] == "layers_0").init(params)  # what it says


def test_a_mask_that_drops_whole_modules_is_answered_with_both():
    tx = optax.masked(eva_optax.scale_by_eva(), {"layers_0": False, "layers_1": True})
    said = refusal(tx.init, tapped_params())
    assert said.startswith("eva_optax.scale_by_eva: the parameters that the mask leaves hold no probes")
    assert "decide by the layer's path" in said
    assert "eva_optax.tap(model)" in said


def test_a_member_inside_of_another_is_told_that_it_sees_no_probes():
    said = refusal(eva_optax.center(eva_optax.scale_by_eva()).init, tapped_params())
    assert said.startswith("eva_optax.scale_by_eva: the probes are masked out")
    assert "center" in said


# Somebody else's "kronecker"


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize(
    "theirs",
    [{"kernel": jnp.ones((2, 3))}, jnp.ones((2, 3)), {"Dense_0": {"kernel": jnp.ones((2, 3))}}],
    ids=["module", "parameter", "module of modules"],
)
def test_a_name_that_is_that_of_probes_is_refused(name, theirs):
    said = refusal(FAMILY[name]().init, {**tapped_params(), "net": {"kronecker": theirs}})
    assert said.startswith(f"eva_optax.{name}: 'net/kronecker")
    assert "another" in said
