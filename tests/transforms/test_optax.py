"""Eva inside every Optax wrapper: each combination equals a computed expectation, or is refused in so many words.

Most expectations come from one comparison. A wrapper around Eva trains a tapped model; beside it the same wrapper, on
the same parameters without their probes, trains with an inner transformation that only returns what Eva would: the
probes must be invisible to the wrapper, and the wrapper to Eva.
"""

from functools import partial
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import eva_optax
from tests import helpers
from tests.helpers import FAMILY, WITHOUT_TAP, assert_probes_are_zero


class Network(nn.Module):
    """Two tapped layers and a slope that is not tapped."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.PReLU()(nn.tanh(nn.Dense(4)(x))))


MODEL = eva_optax.tap(Network())
RATE = 0.1
SUMMED = 1e-4  # what another order of sums may do, with Muon's orthogonalization behind it
assert_close = partial(helpers.assert_close, floor=1.0)


def compiled(tx):
    return optax.GradientTransformation(tx.init, jax.jit(tx.update))


MEMBERS = {name: compiled(build()) for name, build in FAMILY.items()}
family = pytest.mark.parametrize("member", MEMBERS.values(), ids=MEMBERS.keys())
TAPPED = {name: member for name, member in MEMBERS.items() if name not in WITHOUT_TAP}


def batch(size: int = 8, seed: int = 0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(size, 5)).astype(np.float32), rng.normal(size=(size, 3)).astype(np.float32)


def loss(params, x, y):
    return jnp.mean((MODEL.apply({"params": params}, x) - y) ** 2)


value_and_grad = jax.jit(jax.value_and_grad(loss))


def gradient(params, seed: int = 0):
    return value_and_grad(params, *batch(seed=seed))[1]


def in_float64(params):
    """In float32 the iterations of Muon make of two orders of rounding more than the usual tolerance."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0), batch()[0])["params"]


class Inner(NamedTuple):
    """Marks the state of the wrapped transformation inside the wrapper's."""

    state: Any


def marked(tx):
    def update(updates, state, params=None):
        updates, inner = tx.update(updates, state.state, params)
        return updates, Inner(inner)

    return optax.GradientTransformation(lambda params: Inner(tx.init(params)), update)


def inner_state(state):
    leaves = jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, Inner))
    return next(leaf for leaf in leaves if isinstance(leaf, Inner)).state


class Answer(NamedTuple):
    """The state of a transformation that returns what it is told to."""

    told: Any


answer = optax.GradientTransformation(Answer, lambda updates, state, params=None: (state.told, state))


sgd = optax.scale(-RATE)
adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))

WRAPPERS = {
    "chain": lambda inner: optax.chain(inner, optax.trace(0.9), sgd),
    "named_chain": lambda inner: optax.named_chain(("eva", inner), ("adam", optax.adam(1e-2))),
    "apply_if_finite": lambda inner: optax.apply_if_finite(optax.chain(inner, sgd), 3),
    "conditionally_transform": lambda inner: optax.chain(
        optax.conditionally_transform(inner, lambda step: step % 2 == 0), sgd
    ),
    "conditionally_mask": lambda inner: optax.chain(optax.conditionally_mask(inner, lambda step: step % 2 == 0), sgd),
    "schedule_free": lambda inner: optax.contrib.schedule_free(optax.chain(inner, sgd), RATE),
    "mechanize": lambda inner: optax.contrib.mechanize(optax.chain(inner, sgd), weight_decay=0.0),
    "reduce_on_plateau": lambda inner: optax.chain(inner, sgd, optax.contrib.reduce_on_plateau(0.5, patience=1)),
    "sam": lambda inner: optax.contrib.sam(optax.chain(inner, sgd), adversary),
    "ema": lambda inner: optax.chain(inner, optax.ema(0.9), sgd),
    "clip_by_global_norm after": lambda inner: optax.chain(inner, optax.clip_by_global_norm(0.01), sgd),
    "add_decayed_weights after": lambda inner: optax.chain(inner, optax.add_decayed_weights(0.1), sgd),
    "normalize_by_update_norm after": lambda inner: optax.chain(inner, optax.normalize_by_update_norm(), sgd),
    "trust ratio after": lambda inner: optax.chain(inner, optax.scale_by_trust_ratio(), sgd),
    "adamw": lambda inner: optax.chain(inner, optax.adamw(1e-2)),
    "lion": lambda inner: optax.chain(inner, optax.lion(1e-2)),
}

BRANCHING = [WRAPPERS[name] for name in ("apply_if_finite", "conditionally_transform", "conditionally_mask")]


def compare(wrapper, member, params, steps=3, pair=False):
    """Trains both ways, see above; returns the last parameters."""
    wrapped, plain = wrapper(marked(member)), wrapper(answer)
    if wrapper in BRANCHING:  # op by op, their branches would be compiled in each step
        wrapped, plain = compiled(wrapped), compiled(plain)
    both = optax.LookaheadParams.init_synced(params) if pair else params
    state, plain_state = wrapped.init(both), plain.init(eva_optax.strip(both))
    for step in range(steps):
        params = both.fast if pair else both
        value, grads = value_and_grad(params, *batch(seed=step))
        told, _ = member.update(grads, inner_state(state), params)
        plain_state = optax.tree.set(plain_state, told=eva_optax.strip(told))
        extra = {"value": value} if wrapper is WRAPPERS["reduce_on_plateau"] else {}
        updates, state = wrapped.update(grads, state, both, **extra)
        wanted, plain_state = plain.update(eva_optax.strip(grads), plain_state, eva_optax.strip(both), **extra)
        assert_close(eva_optax.strip(updates), wanted)
        assert step or np.count_nonzero(jax.tree.leaves(wanted)[0])
        both = optax.apply_updates(both, updates)
    return both


# A wrapper sees what a member returns and nothing of how it does: all of them around one member of each kind of state,
# and around all others some that do different things with state and parameters.
PAIRS = [
    (name, wrapper)
    for name in MEMBERS
    for wrapper in (
        WRAPPERS if name in ("scale_by_eva", "conjugate") else ("chain", "apply_if_finite", "schedule_free")
    )
]


@pytest.mark.parametrize(("member", "name"), PAIRS)
def test_wrappers_do_not_see_probes_and_eva_does_not_see_the_wrapper(member, name, params):
    params = compare(WRAPPERS[name], MEMBERS[member], params)
    if not name.startswith(("conditionally", "sam")):  # these apply plain gradients, the probes' with the others
        assert_probes_are_zero(params)


@family
def test_lookahead_steps_on_both_sets_of_parameters(member, params):
    params = compare(
        lambda inner: optax.lookahead(optax.chain(inner, sgd), sync_period=2, slow_step_size=0.5),
        member,
        params,
        pair=True,
    )
    assert_probes_are_zero(params.fast)
    assert_probes_are_zero(params.slow)


# Before Eva: what is linear in the whole gradient.


@pytest.mark.parametrize("name", MEMBERS)
def test_clipping_before_eva_scales_gradient_and_vectors_alike(name, params):
    with jax.enable_x64("muon" in name):
        clip(MEMBERS[name], in_float64(params) if "muon" in name else params)


def clip(member, params):
    grads = gradient(params)
    tx = optax.chain(optax.clip_by_global_norm(0.01), member)
    updates, _ = tx.update(grads, tx.init(params), params)
    factor = 0.01 / optax.tree.norm(eva_optax.strip(grads))
    assert factor < 0.5
    wanted, _ = member.update(jax.tree.map(lambda leaf: factor * leaf, grads), member.init(params), params)
    assert_close(updates, wanted)


@family
def test_decay_before_eva_joins_the_gradient(member, params):
    tx = optax.chain(optax.add_decayed_weights(0.1), member)
    updates, _ = tx.update(gradient(params), tx.init(params), params)
    decayed = jax.tree.map(lambda g, p: g + 0.1 * p, gradient(params), params)
    wanted, _ = member.update(decayed, member.init(params), params)
    assert_close(updates, wanted)


@family
def test_an_average_of_gradients_before_eva_has_the_averaged_vectors(member, params):
    tx = optax.chain(optax.ema(0.9, debias=True), member)
    state, own = tx.init(params), member.init(params)
    mean = jax.tree.map(jnp.zeros_like, params)
    for step in range(3):
        grads = gradient(params, step)
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, grads)
        average = jax.tree.map(lambda m: m / (1 - 0.9 ** (step + 1)), mean)  # noqa: B023
        updates, state = tx.update(grads, state, params)
        wanted, own = member.update(average, own, params)
        assert_close(updates, wanted, SUMMED)


# Before Eva: what changes entries one by one.

SPOILERS = {
    "adam": optax.adam(1e-3),
    "adamw": optax.adamw(1e-3, eps=1e-10),
    "nadam": optax.nadam(1e-3),
    "lion": optax.lion(1e-3),
    "sign": optax.sign_sgd(1e-3),
    "noise": optax.add_noise(0.1, 0.5, 0),
    "scale_by_belief": optax.scale_by_belief(),
    "large eps": optax.scale_by_adam(eps=1e-6),
    # A negative count of calls says that a learning rate was applied.
    "adadelta": optax.adadelta(1.0),
    "stddev": optax.rmsprop(1e-3, centered=True),
    "rmsprop": optax.rmsprop(1e-3),
    "adagrad": optax.adagrad(1e-3),
    "radam": optax.radam(1e-3),  # whose first five steps are averages
    "adopt": optax.contrib.adopt(1e-3),
}


@pytest.mark.parametrize("name", SPOILERS)
def test_eva_after_a_transformation_of_single_entries_is_refused(name, params):
    spoiler = SPOILERS[name]
    if name == "adopt":  # whose first step is zero
        started = spoiler.update(gradient(params), spoiler.init(params), params)[1]
        spoiler = optax.GradientTransformation(lambda params: started, spoiler.update)
    tx = optax.chain(spoiler, eva_optax.scale_by_eva())
    grads, state = gradient(params), tx.init(params)
    # Compiled, values are not known when the step is traced: the layers are skipped, and counted.
    own = spoiler.init(params)
    (spoiled, state), (wanted, _) = jax.jit(lambda *args: (tx.update(*args), spoiler.update(args[0], own, args[2])))(
        grads, state, params
    )
    assert optax.tree.get(state, "skipped") == 2
    assert_close(eva_optax.strip(spoiled), eva_optax.strip(wanted))
    if name in ("adam", "scale_by_belief", "adadelta"):  # op by op, where values are known
        with pytest.raises(ValueError, match=r"not the gradient of a probe.*Put Eva first: optax\."):
            tx.update(grads, tx.init(params), params)
    _, state = jax.jit(MEMBERS["eva"].update)(wanted, MEMBERS["eva"].init(params), params)
    assert optax.tree.get(state, "skipped") == 2


@pytest.mark.parametrize("name", ["scale_by_eva", "eva_adamw"])
def test_eva_after_centralized_gradients_is_refused(name, params):
    grads, _ = optax.centralize().update(gradient(params), optax.EmptyState())
    _, state = MEMBERS[name].update(grads, MEMBERS[name].init(params), params)
    assert optax.tree.get(state, "skipped") == 2
    with pytest.raises(ValueError, match=r"centred, as optax\.centralize.*Put Eva first"):
        FAMILY[name]().update(grads, MEMBERS[name].init(params), params)
    _, state = MEMBERS[name].update(gradient(params), MEMBERS[name].init(params), params)
    assert optax.tree.get(state, "skipped") == 0


@pytest.mark.parametrize("name", ["scale_by_eva", "eva_adamw"])
def test_inputs_of_zero_are_not_taken_for_centralized_ones(name):
    model, x = eva_optax.tap(nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(3)])), jnp.zeros((2, 5))
    params = jax.jit(model.init)(jax.random.key(0), x)["params"]
    grads = jax.jit(jax.grad(lambda params: jnp.sin(model.apply({"params": params}, x) + 1).sum()))(params)
    tx = FAMILY[name]() if name == "scale_by_eva" else MEMBERS[name]  # op by op, where values are known, and compiled
    updates, state = tx.update(grads, tx.init(params), params)
    assert optax.tree.get(state, "skipped") == 0
    assert np.count_nonzero(updates["layers_2"]["bias"])


def test_half_precision_probes_are_told_apart_from_signs(params):
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.float16), params)
    x, y = (part.astype(np.float16) for part in batch())
    eva = eva_optax.scale_by_eva()
    grads = jax.jit(jax.grad(loss))(half, x, y)
    updates, state = jax.jit(eva.update)(grads, eva.init(half))
    wanted, _ = eva.update(gradient(params), eva.init(params))
    assert state.skipped == 0
    assert_close(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), updates), wanted, 0.01)
    _, state = jax.jit(eva.update)(jax.tree.map(jnp.sign, grads), eva.init(half))
    assert state.skipped == 2


def test_noise_after_eva_is_added_to_its_update(params):
    noise = optax.add_noise(0.1, 0.5, 0)
    eva = eva_optax.scale_by_eva()
    tx = optax.chain(eva, noise)
    updates, _ = tx.update(gradient(params), tx.init(params), params)
    clean, _ = eva.update(gradient(params), eva.init(params))
    alone, _ = noise.update(jax.tree.map(jnp.zeros_like, params), noise.init(params))
    assert_close(updates, jax.tree.map(jnp.add, clean, alone))


@pytest.mark.parametrize("member", TAPPED.values(), ids=TAPPED.keys())
def test_flatten_around_eva_is_refused(member, params):
    with pytest.raises(ValueError, match=r"one array, as optax\.flatten makes them"):
        optax.flatten(member).init(params)


@family
def test_flatten_after_eva_works(member, params):
    compare(lambda inner: optax.chain(inner, optax.flatten(optax.adam(1e-2))), member, params)


# Parts of the tree.


def by_layer(params, chosen: str):
    """True for everything that belongs to the layers whose name contains `chosen`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: chosen in path[0].key, params)


@family
def test_masked_preconditions_its_layers_as_if_they_were_alone(member, params):
    grads = gradient(params)
    tx = optax.masked(member, lambda tree: by_layer(tree, "Dense_0"))
    updates, _ = tx.update(grads, tx.init(params), params)
    part = {"Dense_0": params["Dense_0"]}
    wanted, _ = member.update({"Dense_0": grads["Dense_0"]}, member.init(part), part)
    assert_close(updates["Dense_0"], wanted["Dense_0"])
    assert_close({**updates, "Dense_0": None}, {**grads, "Dense_0": None})


@family
def test_partition_gives_each_layer_its_own_optimizer(member, params):
    grads, adam = gradient(params), optax.adam(1e-2)
    labels = {name: "eva" if name == "Dense_0" else "adam" for name in params}
    tx = optax.partition({"eva": optax.chain(member, sgd), "adam": adam}, labels)
    updates, _ = tx.update(grads, tx.init(params), params)
    part = {"Dense_0": params["Dense_0"]}
    eva, _ = member.update({"Dense_0": grads["Dense_0"]}, member.init(part), part)
    assert_close(updates["Dense_0"], jax.tree.map(lambda leaf: -RATE * leaf, eva["Dense_0"]))
    wanted, _ = adam.update(grads, adam.init(params), params)
    assert_close({**updates, "Dense_0": None}, {**wanted, "Dense_0": None})


def test_partition_that_leaves_eva_without_probes_is_refused(params):
    labels = jax.tree_util.tree_map_with_path(lambda path, _: "rest" if "kronecker" in str(path) else "eva", params)
    tx = optax.partition({"eva": eva_optax.scale_by_eva(), "rest": optax.set_to_zero()}, labels)
    with pytest.raises(ValueError, match="the probes are masked out"):
        tx.init(params)


# Accumulation.


@family
def test_multi_steps_equals_the_full_batch(member, params):
    tx = optax.MultiSteps(member, 4)
    state, update = tx.init(params), jax.jit(tx.update)
    x, y = batch(16)
    for part in range(4):
        rows = slice(4 * part, 4 * part + 4)
        _, grads = value_and_grad(params, x[rows], y[rows])
        updates, state = update(grads, state, params)
        if part < 3:
            assert not any(np.count_nonzero(leaf) for leaf in jax.tree.leaves(updates))
    wanted, _ = member.update(value_and_grad(params, x, y)[1], member.init(params), params)
    assert_close(updates, wanted, SUMMED)


@pytest.mark.skipif(not hasattr(optax, "microbatching"), reason="this Optax has no microbatching")
@pytest.mark.parametrize("accumulate", ["MEAN", "SUM"])
@family
def test_microbatching_equals_the_full_batch(accumulate, member, params):
    kind = getattr(optax.microbatching.AccumulationType, accumulate)
    summed = jax.grad(lambda params, x, y: loss(params, x, y) / (1 if accumulate == "MEAN" else 4))
    x, y = batch(16)
    gradient = optax.microbatching.microbatch(summed, argnums=(1, 2), microbatch_size=4, accumulator=kind)
    updates, _ = member.update(jax.jit(gradient)(params, x, y), member.init(params), params)
    wanted, _ = member.update(value_and_grad(params, x, y)[1], member.init(params), params)
    assert_close(updates, wanted, SUMMED)


@pytest.mark.skipif(not hasattr(optax, "microbatching"), reason="this Optax has no microbatching")
def test_per_example_gradients_add_up_to_the_full_batch(params):
    x, y = batch()
    kind = optax.microbatching.AccumulationType.MEAN
    grads, _ = optax.microbatching.micro_grad(loss, batch_argnums=(1, 2), microbatch_size=4, accumulator=kind)(
        params, x, y
    )
    eva = MEMBERS["scale_by_eva"]
    assert_close(eva.update(grads, eva.init(params))[0], eva.update(gradient(params), eva.init(params))[0])


# Options as schedules, states, and the contract of a transformation.


def test_injected_schedules_reach_damping_decay_and_learning_rate(params):
    damping, decay, rate = (optax.linear_schedule(*ends, 4) for ends in ((0.5, 0.01), (0.9, 0.1), (1.0, 0.2)))
    tx = optax.inject_hyperparams(eva_optax.eva)(rate, damping, decay=decay, momentum=0.0)
    state = tx.init(params)
    own = eva_optax.scale_by_eva().init(params)
    for step in range(4):
        grads = gradient(params, step)
        updates, state = tx.update(grads, state, params)
        now = {"decay": float(decay(step)), "learning_rate": float(rate(step))}
        eva = eva_optax.scale_by_eva(float(damping(step)), relative=False, step_rule="kl_clip", **now)
        wanted, own = eva.update(grads, own)
        assert_close(updates, jax.tree.map(lambda leaf: -now["learning_rate"] * leaf, wanted))  # noqa: B023
        np.testing.assert_allclose(state.hyperparams["damping"], damping(step), rtol=1e-6)
        np.testing.assert_allclose(optax.tree.get(state, "nu"), own.nu, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in FAMILY if name != "center"])  # which has no damping
def test_injected_options_reach_every_member(name, params, x64):
    params = in_float64(params)
    tx, member = optax.inject_hyperparams(FAMILY[name])(damping=2.0), FAMILY[name](damping=2.0)
    updates, state = helpers.first_update(tx, gradient(params), params)
    assert state.hyperparams["damping"] == 2
    wanted, _ = helpers.first_update(member, gradient(params), params)
    assert_close(updates, wanted)
    default, _ = MEMBERS[name].update(gradient(params), MEMBERS[name].init(params), params)
    assert np.count_nonzero(
        optax.tree.norm(jax.tree.map(jnp.subtract, default, wanted)) > 1e-3 * optax.tree.norm(wanted)
    )


def test_an_injected_option_is_set_by_hand(params):
    tx = optax.inject_hyperparams(eva_optax.scale_by_eva)(damping=0.1)
    state = optax.tree.set(tx.init(params), damping=jnp.asarray(2.0))
    updates, _ = tx.update(gradient(params), state, params)
    eva = eva_optax.scale_by_eva(2.0)
    assert_close(updates, eva.update(gradient(params), eva.init(params))[0])


@family
def test_state_is_read_set_and_mapped_by_name(member, params):
    tx = optax.chain(member, optax.trace(0.9))
    _, state = tx.update(gradient(params), tx.init(params), params)
    assert optax.tree.get(state, "skipped") == 0
    state = optax.tree.set(state, skipped=jnp.int32(7))
    assert optax.tree.get(state, "skipped") == 7
    doubled = optax.tree.map_params(tx, lambda leaf: 2 * leaf, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    before, after = (optax.tree.get(s, "vectors") for s in (state, doubled))
    assert any(np.count_nonzero(leaf) for leaf in jax.tree.leaves(before))
    assert_close(after, jax.tree.map(lambda leaf: 2 * leaf, before))
    assert optax.tree.get(doubled, "skipped") == 7  # no parameter, and so not doubled


@family
def test_state_is_mapped_beside_the_parameters(member, params):
    def shape(leaf, param):
        return leaf if isinstance(leaf, optax.MaskedNode) else (leaf.shape, param.shape)

    masked = {"is_leaf": lambda leaf: isinstance(leaf, optax.MaskedNode)}  # as for optax.masked
    state = optax.tree.map_params(member, shape, member.init(params), params, **masked)
    layer = optax.tree.get(state, "vectors")["Dense_0"]
    mean_input = layer["kronecker"]["kernel,bias"]["a"]
    if isinstance(mean_input, optax.MaskedNode):
        assert layer["kernel"] == ((2, 4), (4, 3))  # both means, as rows
    else:
        assert mean_input == ((4, 1), (4, 1))


@pytest.mark.parametrize("options", [{"rank": 2}, {"factors": "both", "sharing": "reduce"}], ids=["sketch", "factors"])
def test_states_of_second_moments_are_mapped_beside_the_parameters(options):
    """Averages and moments lie as parameters do; inverses, which have no place among them, are one leaf for all."""
    model = eva_optax.tap(nn.Dense(3), **options)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((2, 4)))["params"]
    masked = {"is_leaf": lambda leaf: isinstance(leaf, optax.MaskedNode)}  # as for optax.masked
    of_all = [eva_optax.conjugate(optax.scale_by_adam()), eva_optax.eva_adamw(0.1), eva_optax.eva_muon(0.1)]
    of_matrices = [eva_optax.scale_by_foof(), eva_optax.kfac(0.1), eva_optax.foof_adamw(0.1)]

    def place(leaf, param):
        return leaf if isinstance(leaf, optax.MaskedNode) else str(param.shape)

    def check(place, part):
        assert place in ("whole", str(getattr(part, "shape", part)))

    for tx in (*of_all, *(of_matrices if "factors" in options else ())):
        state = jax.eval_shape(tx.init, params)
        mapped = optax.tree.map_params(tx, place, state, params, transform_non_params=lambda _: "whole", **masked)
        jax.tree.map(check, mapped, state)
        (averages,) = (part for path, part in optax.tree.get_all_with_path(mapped, "vectors"))
        assert len(jax.tree.leaves(averages)) > 1
        assert "whole" not in jax.tree.leaves(averages)
        assert [part for name in ("bases", "inverses") for _, part in optax.tree.get_all_with_path(mapped, name)] == [
            "whole"
        ]


@family
def test_unknown_extra_arguments_are_ignored(member, params):
    tx = optax.with_extra_args_support(member)
    updates, _ = tx.update(gradient(params), tx.init(params), params, value=1.0, unknown="anything")
    assert_close(updates, member.update(gradient(params), member.init(params), params)[0])


def test_a_finite_step_after_one_that_was_not_goes_on_from_the_old_state(params):
    eva = MEMBERS["scale_by_eva"]
    tx = compiled(optax.apply_if_finite(eva, 3))
    good, bad = gradient(params), jax.tree.map(lambda leaf: leaf * jnp.nan, gradient(params, 1))
    _, state = tx.update(good, tx.init(params), params)
    for _ in range(2):
        skipped, state = tx.update(bad, state, params)
        assert not any(np.count_nonzero(leaf) for leaf in jax.tree.leaves(skipped))
    updates, state = tx.update(gradient(params, 2), state, params)
    _, own = eva.update(good, eva.init(params))
    assert_close(updates, eva.update(gradient(params, 2), own)[0])
    assert state.total_notfinite == 2


@family
def test_second_call_does_not_recompile_and_types_are_those_of_init(member, params):
    chex.clear_trace_counter()
    tx = optax.chain(member, optax.adamw(1e-2))
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    state = tx.init(params)
    before = jax.tree.map(jax.typeof, state)
    for seed in range(3):
        _, state = update(gradient(params, seed), state, params)
        assert jax.tree.map(jax.typeof, state) == before


@pytest.mark.parametrize(
    ("name", "precision", "stored"),
    [
        ("scale_by_eva", jnp.float32, jnp.float32),
        ("scale_by_eva", jnp.float32, jnp.bfloat16),
        ("scale_by_eva", jnp.bfloat16, jnp.float32),
        ("scale_by_eva", jnp.bfloat16, jnp.bfloat16),
        ("eva", jnp.bfloat16, jnp.float32),
    ],
)
def test_scan_and_cond_carry_states_of_any_precision(name, precision, stored, params):
    """bfloat16 parameters have float32 averages; averages that the user stores in bfloat16 stay so."""
    member = MEMBERS[name]

    def cast(tree, dtype):
        return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.dtype == jnp.float32 else leaf, tree)

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(gradient(params, seed) for seed in range(3)))

    def run(params, state):
        def step(state, grads):
            def skip():
                return jax.tree.map(jnp.zeros_like, grads), state

            updates, state = jax.lax.cond(
                jnp.isfinite(grads["Dense_0"]["bias"][0]), lambda: member.update(grads, state, params), skip
            )
            return state, updates

        grads = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), stacked, params)
        return jax.lax.scan(step, state, grads)

    state = member.init(cast(params, precision))
    state = optax.tree.set(state, vectors=cast(optax.tree.get(state, "vectors"), stored))
    state, updates = jax.jit(run)(cast(params, precision), state)
    assert {leaf.dtype for leaf in jax.tree.leaves(optax.tree.get(state, "vectors"))} == {jnp.dtype(stored)}
    assert updates["Dense_0"]["kernel"].dtype == precision
    _, wanted = jax.jit(run)(params, member.init(params))
    exact = precision == stored == jnp.float32
    assert_close(cast(updates, jnp.float32), wanted, 1e-6 if exact else 0.05)
