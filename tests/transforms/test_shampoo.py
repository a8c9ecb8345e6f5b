"""`scale_by_shampoo` and `shampoo`: the numbers of the public code, dense oracles, faults, and Optax around them."""

import pickle
import re
from functools import partial, reduce
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import eva_optax
from eva_optax._curvature.blocks import find_blocks, merge_axes
from tests.dense import two_layers
from tests.helpers import assert_close, assert_finite, assert_identical, assert_probes_are_zero

FOLDER = Path(__file__).parent / "reference"
FILES = sorted(path.stem for path in FOLDER.glob("shampoo_*.npz"))
GRAFT = {0: None, 1: "grad", 2: "adam"}


def options_of(file: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        "epsilon": float(file["epsilon"]),
        "relative": False,
        "decay": float(file["beta2"]),
        "block": int(file["max_preconditioner_dim"]),
        "merge": bool(file["merge_dims"]),
        "every": int(file["precondition_frequency"]),
        "start": int(file["start_preconditioning_step"]),
        "graft": GRAFT[int(file["graft"])],
        "graft_decay": float(file["graft_beta2"]),
        "graft_epsilon": float(file["graft_epsilon"]),
        "b1": float(file["beta1"]),
    }


def replay(file: dict[str, np.ndarray], tx: Any) -> Any:
    """Updates and states of all steps, from the stored gradients and parameters."""
    names = [f"p{index}" for index in range(int(file["num_params"]))]
    grads = {name: jnp.asarray(file[f"{name}.grad"]) for name in names}
    init = {name: jnp.asarray(file[f"{name}.init"]) for name in names}
    params = {name: jnp.concatenate([init[name][None], file[f"{name}.param"][:-1]]) for name in names}

    def step(state, inputs):
        updates, state = tx.update(inputs[0], state, inputs[1])
        return state, (updates, state)

    return jax.jit(lambda: jax.lax.scan(step, tx.init(init), (grads, params))[1])()


def blocks_of(file: dict[str, np.ndarray], name: str, options: dict[str, Any]) -> Any:
    """For each block of the file: its key, its place in ours (region, index), and its slices of the merged tensor."""
    ours = find_blocks(file[f"{name}.init"].shape, options["block"], options["merge"])
    assert ours.merged == tuple(file[f"{name}.merged_shape"])
    places = {}
    for region, (start, counts, block) in enumerate(ours.regions):
        for index, place in enumerate(np.ndindex(counts)):
            places[tuple(np.add(start, np.multiply(place, block)))] = region, index, block
    assert len(places) == file[f"{name}.num_blocks"]
    for number in range(len(places)):
        key = f"{name}.b{number}"
        start, stop = (file[f"{key}.{end}"] for end in ("start", "stop"))
        region, index, block = places[tuple(start)]
        assert tuple(start + block) == tuple(stop)
        slices = tuple(slice(*ends) for ends in zip(start, stop, strict=True))
        yield (
            key,
            region,
            index,
            lambda tensor, s=slices: np.asarray(tensor).reshape(-1, *ours.merged)[(slice(None), *s)],
        )


@pytest.mark.parametrize("name", FILES)
def test_numbers_are_those_of_the_public_code(name, x64):
    """Of two files the steps of the alias, with weight decay and momentum of both kinds."""
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as opened:
        file = dict(opened)
    options, wanted = options_of(file), "pre"
    tx: Any = eva_optax.scale_by_shampoo(**options)
    if name in ("shampoo_full", "shampoo_merge_sgdgraft"):
        options |= {"momentum": float(file["momentum"]), "nesterov": bool(file["nesterov"])}
        tx = eva_optax.shampoo(float(file["lr"]), **options, weight_decay=float(file["weight_decay"]))
        wanted = "delta"
    made, states = replay(file, tx)
    states = states if wanted == "pre" else states[0]
    close = partial(assert_close, tolerance=1e-10, floor=0.0)
    # Eigenvalues of exactly ε are known to float64's resolution of the largest one, relative to ε.
    close_roots = partial(assert_close, tolerance=1e-9 if options["epsilon"] < 1e-4 else 1e-10, floor=0.0)
    for parameter in made:
        for key, region, index, cut in blocks_of(file, parameter, options):
            roots = states.roots[parameter][region]
            for axis, statistic in enumerate(states.statistics[parameter][region]):
                close(statistic[:, 0, index], file[f"{key}.stat{axis}"])
                close_roots(roots.matrices[axis][:, 0, index], file[f"{key}.root{axis}"])
            close(cut(made[parameter]), file[f"{key}.{wanted}"])
            if options["graft"] == "adam":
                close(cut(states.second_moments[parameter]), file[f"{key}.graft_v"])
            if options["b1"] > 0:
                close(cut(states.means[parameter]), file[f"{key}.exp_avg"])


SHAPES = {"matrix": (3, 4), "tensor": (2, 3, 3), "vector": (5,), "scalar": (), "one": (1, 1), "empty": (0, 3)}


FEW = {"matrix": (3, 4), "scalar": ()}


def gradients(shapes: dict[str, Any] = FEW, steps: int = 3, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(steps, *shape)).astype(jnp.result_type(float)) for name, shape in shapes.items()}


def at(tree: Any, step: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[step], tree)


def run(tx: Any, grads: Any) -> Any:
    """Updates of all steps, and the last state, in one program."""

    def step(state, gradient):
        updates, state = tx.update(gradient, state)
        return state, updates

    state, updates = jax.lax.scan(step, tx.init(at(grads, 0)), grads)
    return updates, state


def dense_shampoo(grads: np.ndarray, *, epsilon, relative, decay, exponent, graft, graft_decay, graft_epsilon, b1):
    """The last step on one block, with the Kronecker product of all roots as one matrix; every step has new ones."""
    axes, gain = grads.ndim - 1, lambda weight: 1 - weight if weight < 1 else 1
    steps = len(grads)
    weights = {weight: gain(weight) * weight ** np.arange(steps)[::-1] for weight in (decay, graft_decay, b1)}
    correct = {weight: 1 - weight**steps if weight < 1 else 1 for weight in weights}
    roots = []
    for axis in range(axes):
        rows = np.moveaxis(grads, axis + 1, 1).reshape(steps, grads.shape[axis + 1], -1)
        statistic = np.einsum("t,tij,tkj->ik", weights[decay], rows, rows) / correct[decay]
        values, vectors = np.linalg.eigh(statistic)
        values = np.maximum(values, 0) + epsilon * (values[-1] if relative else 1)
        roots.append(vectors * values ** (exponent or -1 / (2 * axes)) @ vectors.T)
    direction = np.tensordot(weights[b1], grads, 1) / correct[b1]
    made = (reduce(np.kron, roots) @ direction.ravel()).reshape(direction.shape) if roots else direction
    square = np.tensordot(weights[graft_decay], grads**2, 1)
    wanted = {
        "grad": direction,
        "rms": direction / (np.sqrt(square) + graft_epsilon),
        "adam": direction / (np.sqrt(square / correct[graft_decay]) + graft_epsilon),
        None: made,
    }[graft]
    return made * np.linalg.norm(wanted) / np.linalg.norm(made) if roots else wanted


PLAIN = {"epsilon": 1e-3, "relative": True, "decay": 0.9, "exponent": None, "graft": None, "b1": 0.0}
CASES = {
    "relative": PLAIN,
    "absolute, sum, grad": PLAIN | {"relative": False, "decay": 1.0, "graft": "grad", "b1": 0.8},
    "exponent, rms": PLAIN | {"exponent": -0.4, "graft": "rms", "b1": 0.8},
    "last step alone, adam": PLAIN | {"decay": 0.0, "graft": "adam"},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_updates_equal_dense_products_for_tensors_of_any_rank(case, x64):
    """Blocks of (2, 2, 2) and what is cut off; scalars take the grafted step."""
    options = case | {"graft_decay": 0.7, "graft_epsilon": 1e-2}
    grads = gradients(SHAPES)
    made, state = jax.jit(partial(run, eva_optax.scale_by_shampoo(**options, every=1, start=1, block=2, merge=False)))(
        grads
    )
    for name, shape in SHAPES.items():
        got, parts = made[name][-1], [slice(0, size, 2) for size in shape]
        assert got.shape == shape
        for corner in np.ndindex(*(len(range(size)[part]) for part, size in zip(parts, shape, strict=True))):
            place = tuple(slice(2 * index, 2 * index + 2) for index in corner)
            block = grads[name][(slice(None), *place)]
            if name == "one":
                block = block.reshape(-1)  # no axis to speak of
            wanted = dense_shampoo(block, **options)
            np.testing.assert_allclose(np.reshape(got[place], wanted.shape), wanted, rtol=1e-9, atol=1e-10)
    assert state.skipped == 0


def test_one_gradient_becomes_its_orthogonal_factor_at_any_scale():
    """G = U S Vᵀ becomes U Vᵀ, also blocks of it, from 1e-15 to 1e12."""
    rng = np.random.default_rng(0)
    gradient = np.linalg.qr(rng.normal(size=(8, 8)))[0] * np.logspace(0, -1, 8) @ rng.normal(size=(8, 6))
    gradient[:4, :4] *= 2.0**-10
    gradient = gradient.astype(np.float32)
    tx = eva_optax.scale_by_shampoo(1e-7, start=1, graft=None, block=4)
    step = jax.jit(lambda grads: tx.update(grads, tx.init(grads))[0])
    for scale in (1.0, 2.0**-40, 2.0**40):
        made = step({"kernel": jnp.asarray(gradient * scale)})["kernel"]
        for rows, columns in [(0, 0), (0, 4), (4, 0), (4, 4)]:
            block = np.s_[rows : rows + 4, columns : columns + 4]
            u, _, v = np.linalg.svd(gradient[block], full_matrices=False)
            np.testing.assert_allclose(made[block], u @ v, atol=2e-3)


@pytest.mark.parametrize(
    ("shape", "block", "merged"),
    [
        ((3, 3, 16, 32), 1024, (144, 32)),
        ((64, 4, 16), 1024, (64, 64)),
        ((3, 3, 128, 128), 1024, (9, 128, 128)),
        ((1, 1, 5, 1), 4, (5,)),
        ((6, 4), 1024, (6, 4)),
        ((2, 3000, 2, 2), 8, (2, 3000, 4)),
        ((1, 1), 8, ()),
        ((), 8, ()),
    ],
)
def test_axes_are_merged_as_far_as_blocks_allow_and_matrices_stay_matrices(shape, block, merged):
    assert merge_axes(shape, block) == merged


def test_blocks_are_put_together_again():
    tensor = np.arange(7 * 4 * 5).reshape(7, 4, 5)
    blocks = find_blocks(tensor.shape, 3, merge=False)
    parts, joined = jax.jit(lambda both: (parts := blocks.cut(both), blocks.join(parts)))(np.stack([tensor, -tensor]))
    assert [part.shape[1:] for part in parts] == [
        *[(2, 3, 3, 3), (2, 3, 3, 2), (2, 3, 1, 3), (2, 3, 1, 2)],
        *[(1, 1, 3, 3), (1, 1, 3, 2), (1, 1, 1, 3), (1, 1, 1, 2)],
    ]
    np.testing.assert_array_equal(parts[1][1, 1], -tensor[3:6, :3, 3:])
    np.testing.assert_array_equal(joined, [tensor, -tensor])


def test_gradients_that_are_not_finite_pass_and_leave_what_is_kept_alone():
    """Also one whose squares overflow; other parameters go on as without it."""
    tx = eva_optax.scale_by_shampoo(start=1, every=1, b1=0.9)
    update, grads = jax.jit(tx.update), gradients(steps=4)
    _, before = update(at(grads, 0), tx.init(at(grads, 0)))
    for value in (np.nan, 1e30):
        broken = at(grads, 1) | {"matrix": np.where(np.arange(12).reshape(3, 4) == 5, value, at(grads, 1)["matrix"])}
        updates, after = update(broken, before)
        np.testing.assert_array_equal(updates["matrix"], broken["matrix"])
        whole, wanted = update(at(grads, 1), before)
        for part in ("statistics", "second_moments", "means"):
            old, new, good = (getattr(state, part) for state in (before, after, wanted))
            assert_identical(new["matrix"], old["matrix"])
            assert_identical(new | {"matrix": 0}, good | {"matrix": 0})
        assert_identical(updates | {"matrix": 0}, whole | {"matrix": 0})
        assert (after.skipped, wanted.skipped) == (1, 0)
        assert after.observed == {"matrix": 1, "scalar": 2}
        with pytest.raises(ValueError, match="1 times a gradient or the roots"):
            eva_optax.check(after)
    eva_optax.check(wanted)


def test_roots_that_fail_leave_the_old_ones_in_their_block_alone():
    """Statistics that are not finite fail. Those of rank one, of a condition of 1e8, and zeros do not."""
    rng = np.random.default_rng(0)
    orthogonal = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    grads = {
        "two blocks": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32),
        "rank one": jnp.asarray(np.outer(rng.normal(size=4), rng.normal(size=3)), jnp.float32),
        "condition": jnp.asarray(orthogonal * np.logspace(0, -4, 4) @ orthogonal.T, jnp.float32),
        "wide": jnp.asarray(rng.normal(size=(2, 4)), jnp.float32),
        "zero": jnp.zeros((3, 3)),
    }
    tx = eva_optax.scale_by_shampoo(start=1, every=1, block=4, graft=None)
    update = jax.jit(tx.update)
    updates, state = update(grads, tx.init(grads))
    assert_finite((updates, state))
    assert state.skipped == 0
    assert not np.count_nonzero(updates["zero"])
    np.testing.assert_array_equal(state.roots["zero"][0].step, 0)
    for name in ("rank one", "wide"):  # of the second axis, of rank two
        np.testing.assert_allclose(state.roots[name][0].condition, 1e6, rtol=0.2)
    ((rows, columns),) = state.statistics["two blocks"]
    statistics = state.statistics | {"two blocks": ((rows.at[0, 1, 0, 0].set(jnp.nan), columns),)}
    updates, after = update(grads, state._replace(statistics=statistics))
    (old,), (new,) = (each.roots["two blocks"] for each in (state, after))
    np.testing.assert_array_equal(new.step.ravel(), [2, 1])
    assert_identical(jax.tree.map(lambda leaf: leaf[0, 1], new), jax.tree.map(lambda leaf: leaf[0, 1], old))
    assert_finite((updates, after.roots))
    assert after.skipped == 1
    found = eva_optax.diagnostics(after)
    assert found["two blocks/age"] == 1
    assert found["condition/age"] == 0
    assert found["two blocks/condition"] == jnp.max(new.condition)


def test_parameters_of_one_kind_are_stacked_and_stay_apart():
    """Names that differ in numbers alone, of one shape: each as by itself, also where one of them is broken."""
    rng = np.random.default_rng(0)
    kernels = {f"layer_{index}": {"kernel": rng.normal(size=(4, 3)).astype(np.float32)} for index in range(3)}
    kernels["layer_1"]["kernel"][0, 0] = np.nan
    grads = {**kernels, "layer_3": {"kernel": rng.normal(size=(3, 3)).astype(np.float32)}, "head": kernels["layer_2"]}
    tx = eva_optax.scale_by_shampoo(1e-2, start=1, b1=0.9)
    step = jax.jit(lambda grads: tx.update(grads, tx.init(grads)))
    updates, state = step(grads)
    assert list(state.statistics) == ["head/kernel", "layer_0/kernel", "layer_3/kernel"]
    np.testing.assert_array_equal(state.observed["layer_0/kernel"], [1, 0, 1])
    assert state.skipped == 1
    assert_close(updates["layer_2"], updates["head"], 1e-5)
    alone, _ = step({"layer_0": grads["layer_0"]})
    assert_close(updates["layer_0"], alone["layer_0"], 1e-5)
    np.testing.assert_array_equal(updates["layer_1"]["kernel"], kernels["layer_1"]["kernel"])
    found = eva_optax.diagnostics(state)
    assert {"layer_0/kernel[2]/condition", "layer_3/kernel/age"} <= found.keys()
    assert [found[f"layer_0/kernel[{index}]/condition"] > 1 for index in range(3)] == [True, False, True]
    assert_close(found["layer_0/kernel[2]/condition"], found["head/kernel/condition"], 1e-4)


def test_start_and_period_of_the_roots_are_those_that_were_asked_for():
    """Before the start the grafted step alone; then statistics go on, and roots are renewed every third step."""
    grads = gradients(steps=8)
    tx = eva_optax.scale_by_shampoo(start=5, every=3, graft="grad")

    def step(state, gradient):
        updates, state = tx.update(gradient, state)
        return state, (updates, state.roots["matrix"][0].step[0, 0, 0, 0])

    state, (updates, steps) = jax.jit(lambda grads: jax.lax.scan(step, tx.init(at(grads, 0)), grads))(grads)
    np.testing.assert_array_equal(steps, [0, 0, 0, 0, 5, 6, 6, 6])
    np.testing.assert_array_equal(updates["matrix"][:4], grads["matrix"][:4])
    norms = [np.linalg.norm(part.reshape(8, -1), axis=1) for part in (updates["matrix"], grads["matrix"])]
    np.testing.assert_allclose(*norms, rtol=1e-6)
    assert not np.allclose(updates["matrix"][4], grads["matrix"][4])
    assert eva_optax.diagnostics(state)["matrix/age"] == 2


def test_one_program_serves_all_steps_and_every_way_to_call_it(x64):
    """A loop, a loop that gives its state away, a scan, and two seeds at once."""
    tx = eva_optax.shampoo(0.1, every=2)
    grads, update = gradients(steps=4), jax.jit(tx.update, donate_argnums=1)
    params = at(grads, 0)
    state, taken = tx.init(params), []
    for step in range(4):
        updates, state = update(at(grads, step), state, params)
        taken.append(updates)
    assert update._cache_size() == 1
    np.testing.assert_allclose(np.abs(taken[0]["matrix"]), 0.1, rtol=1e-5)  # Adam's step: the start is `every`
    assert not np.allclose(np.abs(taken[1]["matrix"]), 0.1, rtol=1e-2)

    def seeds(grads, params):
        def step(state, gradient):
            updates, state = tx.update(gradient, state, params)
            return state, updates

        return jax.lax.scan(step, tx.init(params), grads)

    both = jax.tree.map(lambda *leaves: np.stack(leaves), grads, gradients(steps=4, seed=1))
    states, made = jax.jit(jax.vmap(seeds, (0, None)))(both, params)
    assert_close(at(made, 0), jax.tree.map(lambda *leaves: np.stack(leaves), *taken), 1e-9)
    assert_close(at(states, 0), state, 1e-9)
    assert not np.allclose(made["matrix"][0], made["matrix"][1])


def test_works_within_the_wrappers_of_optax(x64):
    grads = at(gradients(), 0)
    plain = eva_optax.scale_by_shampoo(start=1)
    wanted, state = jax.jit(lambda grads: plain.update(grads, plain.init(grads)))(grads)
    matrices = {name: np.ndim(leaf) == 2 for name, leaf in grads.items()}
    labels = {name: "shampoo" if chosen else "sgd" for name, chosen in matrices.items()}
    injected = optax.inject_hyperparams(eva_optax.scale_by_shampoo, static_args=("block",))
    wrapped = {
        "masked": optax.masked(plain, matrices),
        "partition": optax.partition({"shampoo": plain, "sgd": optax.identity()}, labels),
        "MultiSteps": optax.MultiSteps(plain, 1),
        "apply_if_finite": optax.apply_if_finite(plain, 3),
        "inject_hyperparams": injected(start=1, b1=optax.constant_schedule(0.0)),
        "named_chain": optax.named_chain(("first", plain), ("second", optax.identity())),
    }

    def first(grads):
        return {name: tx.update(grads, tx.init(grads), grads)[0] for name, tx in wrapped.items()}

    for name, updates in jax.jit(first)(grads).items():
        masked = name in ("masked", "partition")
        assert_close(updates, {key: wanted[key] if matrices[key] or not masked else grads[key] for key in grads}, 1e-9)
    mapped = optax.tree.map_params(plain, lambda leaf, other: 2 * leaf, state, grads)
    assert_identical(mapped.second_moments, jax.tree.map(lambda leaf: 2 * leaf, state.second_moments))
    assert_identical(mapped._replace(second_moments=()), state._replace(second_moments=()))
    specs = optax.tree.map_params(plain, lambda _: "moved", state, transform_non_params=lambda _: "whole")
    assert set(jax.tree.leaves(specs.second_moments)) == {"moved"}
    assert specs.statistics == specs.roots == specs.count == "whole"


def test_a_state_is_stored_and_restored_bit_for_bit():
    tx, grads = eva_optax.scale_by_shampoo(start=1, b1=0.9), gradients()
    update = jax.jit(tx.update)
    _, state = update(at(grads, 0), tx.init(at(grads, 0)))
    wanted = update(at(grads, 1), state)
    stored = serialization.to_bytes(state)
    for restored in (
        serialization.from_bytes(tx.init(at(grads, 0)), stored),
        pickle.loads(pickle.dumps(state)),
    ):
        assert type(restored) is eva_optax.ShampooState
        assert_identical(restored, state)
        assert_identical(update(at(grads, 1), restored), wanted)


def test_half_precision_has_state_of_single_precision():
    tx = eva_optax.scale_by_shampoo(1e-2, start=1, every=1, b1=0.9)
    grads = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), gradients())
    half, state = jax.jit(partial(run, tx))(grads)
    single, wanted = jax.jit(partial(run, tx))(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), grads))
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.bfloat16.dtype}
    assert_close(state, wanted, 1e-5)
    assert_close(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half), single, 2.0**-8)


def test_probes_get_zeros_and_have_no_statistics():
    grads = two_layers(0)
    tx = eva_optax.scale_by_shampoo(start=1, graft=None)
    step = jax.jit(lambda grads: tx.update(grads, tx.init(grads)))
    updates, state = step(grads)
    assert_probes_are_zero(updates)
    wanted, plain = step(eva_optax.strip(grads))
    assert_identical(eva_optax.strip(updates), wanted)
    assert_identical(jax.tree.leaves(state), jax.tree.leaves(plain))


def test_works_with_an_optimizer_of_nnx():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, eva_optax.shampoo(0.1, every=1, momentum=0.9), wrt=nnx.Param)
    before, x = model.kernel[...], jnp.ones((4, 3))

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: jnp.sum(jnp.sin(model(x))))(model))

    for _ in range(2):
        step(model, optimizer)
    assert not np.allclose(model.kernel[...], before)
    assert eva_optax.diagnostics(optimizer)["kernel/age"] == 0
    eva_optax.check(optimizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0.0}, "epsilon must be greater than 0, got 0.0"),
        ({"decay": 1.5}, r"decay must lie in \[0, 1\], got 1.5"),
        ({"graft_decay": 1.0}, r"graft_decay must lie in"),
        ({"b1": -0.1}, r"b1 must lie in \[0, 1\), got -0.1"),
        ({"exponent": 0.25}, "exponent must be negative"),
        ({"block": 0}, "block must be an integer greater than 0, got 0"),
        ({"block": 8.0}, "static_args"),
        ({"graft": "adagrad"}, "graft must be one of"),
        ({"every": 0}, "every must be greater than 0"),
        ({"start": 0}, "start must be greater than 0"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    for caller, make in {
        "scale_by_shampoo": eva_optax.scale_by_shampoo,
        "shampoo": partial(eva_optax.shampoo, 0.1),
    }.items():
        with pytest.raises(ValueError, match=rf"^eva_optax\.{caller}: .*{message}"):
            make(**options)


def test_states_that_do_not_fit_are_refused():
    tx = eva_optax.scale_by_shampoo()
    state = tx.init({"kernel": jnp.ones((2, 3))})
    with pytest.raises(
        ValueError, match=r"of 'kernel' it has statistics of shapes \[\(1, 1, 2, 2\), .*want \[\(1, 1, 4, 4\)"
    ):
        tx.update({"kernel": jnp.ones((4, 3))}, state)
    with pytest.raises(ValueError, match=r"of 'bias' it has statistics of shapes nothing"):
        tx.update({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, state)
    with pytest.raises(ValueError, match="the state has unused second_moments: it was made with another graft or b1"):
        eva_optax.scale_by_shampoo(graft=None).update({"kernel": jnp.ones((2, 3))}, state)
    with pytest.raises(ValueError, match="must be a ShampooState"):
        tx.update({"kernel": jnp.ones((2, 3))}, optax.adam(0.1).init({"kernel": jnp.ones((2, 3))}))


LAYOUTS = {"up": P("fsdp", "model"), "down": P("model", "fsdp"), "conv": P(None, "fsdp", "model"), "bias": P("model")}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_eight_devices_equal_one_and_each_computes_its_share_of_the_roots(kind, x64):
    """Of (8, 8) there are five matrices, four devices with one; of (16, 16) two. Updates lie where gradients do."""
    rng = np.random.default_rng(0)
    shapes = {"up": (8, 16), "down": (16, 8), "conv": (3, 8, 8), "bias": (8,)}
    grads = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    tx = eva_optax.scale_by_shampoo(start=1, merge=False)

    def step(grads):
        return tx.update(grads, tx.init(grads))

    wanted = jax.jit(step)(grads)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "model"), axis_types=(kind,) * 3)
    with jax.set_mesh(mesh):
        placed = {name: jax.device_put(grads[name], NamedSharding(mesh, spec)) for name, spec in LAYOUTS.items()}
        compiled = jax.jit(step).lower(placed).compile()
        updates, state = compiled(placed)
    assert_close((updates, state), wanted, 1e-9)
    for name, spec in LAYOUTS.items():
        assert updates[name].sharding.is_equivalent_to(NamedSharding(mesh, spec), len(shapes[name])), name
    problems = re.findall(r"f64\[([\d,]+)\]\S*,[^=]*custom-call\(.*syevd", compiled.as_text())
    assert set(problems) == {"1,3,3", "1,8,8", "1,16,16"}


def test_devices_may_each_have_gradients_of_their_own():
    """Within `shard_map`, where nothing is shared out; and one array is a tree too."""
    grads = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    tx = eva_optax.scale_by_shampoo(1e-2, start=1)

    def step(gradient):
        updates, state = tx.update(gradient[0], tx.init(gradient[0]))
        return updates[None], eva_optax.diagnostics(state)["condition"][None]

    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        apart = jax.jit(jax.shard_map(step, in_specs=P("data"), out_specs=P("data")))(grads)
    together = [jax.jit(step)(gradient[None]) for gradient in grads]
    assert_close(apart, tuple(np.concatenate(parts) for parts in zip(*together, strict=True)), 1e-5)
