"""`scale_by_eva` against dense solves: every layout, both kinds of damping, running averages and step rules."""

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import eva_optax
from eva_optax import _fusion, _rank_one, _tap
from tests.dense import each_layer, gradients, solve_eva


@dataclass(frozen=True)
class LayoutCase:
    """A kernel, its vectors, and which kernel axes the bias and the stacked layers have."""

    name: str
    kernel: tuple[int, ...]
    a: tuple[int, ...]
    b: tuple[int, ...]
    bias_axes: tuple[int, ...] | None
    stacks: tuple[int, ...] = ()

    @property
    def bias(self) -> tuple[int, ...] | None:
        return None if self.bias_axes is None else tuple(self.kernel[axis] for axis in self.bias_axes)

    @property
    def counter(self) -> tuple[int, ...]:
        axes = range(len(self.kernel)) if self.bias_axes is None else self.bias_axes
        return tuple(self.kernel[axis] if axis in self.stacks else 1 for axis in axes)


LAYOUTS = [
    LayoutCase("dense", (5, 4), (5, 1), (1, 4), (1,)),
    LayoutCase("dense without bias", (5, 4), (5, 1), (1, 4), None),
    LayoutCase("one input", (1, 4), (1, 1), (1, 4), (1,)),
    LayoutCase("one output", (5, 1), (5, 1), (1, 1), (1,)),
    LayoutCase("dense general", (2, 3, 4, 2), (2, 3, 1, 1), (1, 1, 4, 2), (2, 3)),
    LayoutCase("batch axis", (3, 5, 4), (3, 5, 1), (3, 1, 4), (0, 2)),
    LayoutCase("convolution", (3, 2, 2, 4), (3, 2, 2, 1), (1, 1, 1, 4), (3,)),
    LayoutCase("grouped convolution", (3, 2, 2, 6), (3, 2, 2, 3), (1, 1, 1, 6), (3,)),
    LayoutCase("depthwise convolution", (3, 2, 1, 4), (3, 2, 1, 4), (1, 1, 1, 4), (3,)),
    LayoutCase("local convolution", (2, 3, 4, 5), (2, 3, 4, 1), (2, 3, 1, 5), (0, 1, 3)),
    LayoutCase("transposed kernel", (3, 2, 4, 5), (3, 2, 1, 5), (1, 1, 4, 1), (2,)),
    LayoutCase("embedding", (7, 3), (7, 1), (1, 3), None),
    LayoutCase("stacked at 0", (3, 5, 4), (3, 5, 1), (3, 1, 4), (0, 2), (0,)),
    LayoutCase("stacked at 1", (5, 3, 4), (5, 3, 1), (1, 3, 4), (2, 1), (1,)),
    LayoutCase("stacked at 1, as many as outputs", (5, 4, 4), (5, 4, 1), (1, 4, 4), (2, 1), (1,)),
    LayoutCase("stacked at -2, as many as outputs", (5, 4, 4), (5, 4, 1), (1, 4, 4), (1, 2), (1,)),
    LayoutCase("stacked at -1", (5, 4, 3), (5, 1, 3), (1, 4, 3), (1, 2), (2,)),
    LayoutCase("stacked without bias", (3, 5, 4), (3, 5, 1), (3, 1, 4), None, (0,)),
    LayoutCase("stacked once", (1, 5, 4), (1, 5, 1), (1, 1, 4), (0, 2), (0,)),
    LayoutCase("stacked twice", (2, 3, 5, 4), (2, 3, 5, 1), (2, 3, 1, 4), (0, 1, 3), (0, 1)),
    LayoutCase("stacked batch axis", (3, 3, 5, 4), (3, 3, 5, 1), (3, 3, 1, 4), (0, 1, 3), (0,)),
    LayoutCase("stacked behind a batch axis", (3, 3, 5, 4), (3, 3, 5, 1), (3, 3, 1, 4), (0, 1, 3), (1,)),
    LayoutCase("stacked grouped convolution", (3, 2, 2, 2, 6), (3, 2, 2, 2, 3), (1, 2, 1, 1, 6), (4, 1), (1,)),
    LayoutCase("grouped convolution stacked at -1", (3, 2, 6, 2), (3, 2, 3, 2), (1, 1, 6, 2), (2, 3), (3,)),
]


def draw(case: LayoutCase, seed: int = 0) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    kernel, a, b = (rng.normal(size=shape) for shape in (case.kernel, case.a, case.b))
    return kernel, None if case.bias is None else rng.normal(size=case.bias), a, b


def expected(case: LayoutCase, kernel, bias, a, b, damping: float, relative: bool):
    """Solves each independent layer of the case by itself."""
    kernel_update = np.full_like(kernel, np.nan)
    bias_update = None if bias is None else np.full_like(bias, np.nan)
    for at, at_a, at_b in each_layer(case.kernel, case.a, case.b):
        at_bias = None if bias is None else tuple(at[axis] for axis in case.bias_axes)
        part = None if bias is None else bias[at_bias]
        kernel_update[at], solved_bias = solve_eva(kernel[at], part, a[at_a], b[at_b], damping, relative)
        if bias is not None:
            bias_update[at_bias] = solved_bias
    return kernel_update, bias_update


@pytest.mark.parametrize("case", LAYOUTS, ids=lambda case: case.name)
def test_update_equals_dense_solve(case: LayoutCase):
    kernel, bias, a, b = draw(case)
    both = {relative: eva_optax.scale_by_eva(0.3, relative=relative) for relative in (True, False)}
    for dtype, tolerance in ((np.float64, 1e-10), (np.float32, 1e-6)):
        with jax.enable_x64(dtype == np.float64):
            cast = [None if part is None else part.astype(dtype) for part in (kernel, bias, a, b)]
            grads = gradients(*cast, case.counter)
            # One compilation for both kinds of damping.
            steps = jax.jit(lambda grads: {key: tx.update(grads, tx.init(grads)) for key, tx in both.items()})(grads)
            for relative, (updates, state) in steps.items():
                wanted = expected(case, kernel, bias, a, b, 0.3, relative)
                for got, want in zip((updates["layer"]["kernel"], updates["layer"].get("bias")), wanted, strict=True):
                    if want is not None:
                        assert got.dtype == dtype
                        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, np.abs(want).max()))
                assert state.skipped == 0
                assert all(not np.any(leaf) for leaf in jax.tree.leaves(updates["layer"]["kronecker"]))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Takes what is meant for a GPU, where sums run in another order, on every backend."""
    for module in (_fusion, _rank_one, _tap):
        monkeypatch.setattr(module, "on_gpu", lambda function, otherwise, *arguments: function(*arguments))


@pytest.mark.parametrize("case", LAYOUTS[::4], ids=lambda case: case.name)
def test_update_in_the_order_of_a_gpu_equals_dense_solve(case: LayoutCase, as_on_a_gpu: None):
    kernel, bias, a, b = draw(case)
    wanted = expected(case, kernel, bias, a, b, 0.3, relative=True)
    with jax.enable_x64(True):
        grads = gradients(kernel, bias, a, b, case.counter)
        tx = eva_optax.scale_by_eva(0.3)
        updates, _ = tx.update(grads, tx.init(grads))
    for got, want in zip((updates["layer"]["kernel"], updates["layer"].get("bias")), wanted, strict=True):
        if want is not None:
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)


def test_rounding_noise_is_recognised_in_the_order_of_a_gpu(as_on_a_gpu: None):
    """BatchNorm makes the cotangents before it, and the inputs after it, cancel."""
    model = eva_optax.tap(nn.Sequential([nn.Dense(8), nn.BatchNorm(use_running_average=False), nn.Dense(4, False)]))
    x = jax.random.normal(jax.random.key(0), (64, 5))
    variables = model.init(jax.random.key(1), x)

    def loss(params):
        y, _ = model.apply(variables | {"params": params}, x, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y))

    before, after = eva_optax.vectors(jax.grad(loss)(variables["params"])).values()
    assert not np.any(before.b)
    assert not np.any(after.a)
    assert np.all(before.a)
    assert np.all(after.b)


@settings(max_examples=25, deadline=None)
@given(
    inputs=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    outputs=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    layers=st.sampled_from([0, 1, 2]),
    biased=st.booleans(),
    relative=st.booleans(),
    damping=st.floats(1e-3, 10),
    seed=st.integers(0, 2**16),
)
def test_update_equals_dense_solve_for_any_shape(inputs, outputs, layers, biased, relative, damping, seed):
    """Any number of input and output axes, stacked in front or not; float64 in eager mode."""
    stack = [layers] * (layers > 0)
    ones = [1] * len(inputs), [1] * len(outputs)
    rank, offset = len(stack) + len(inputs) + len(outputs), len(stack)
    bias_axes = (*range(offset), *range(offset + len(inputs), rank)) if biased else None
    case = LayoutCase(
        "drawn",
        (*stack, *inputs, *outputs),
        (*stack, *inputs, *ones[1]),
        (*stack, *ones[0], *outputs),
        bias_axes,
        tuple(range(offset)),
    )
    kernel, bias, a, b = draw(case, seed)
    wanted = expected(case, kernel, bias, a, b, damping, relative)
    with jax.enable_x64(True):
        grads = gradients(kernel, bias, a, b, case.counter)
        tx = eva_optax.scale_by_eva(damping, relative=relative)
        updates, _ = tx.update(grads, tx.init(grads))
        for got, want in zip((updates["layer"]["kernel"], updates["layer"].get("bias")), wanted, strict=True):
            if want is not None:
                np.testing.assert_allclose(got, want, rtol=0, atol=1e-9 * max(1.0, np.abs(want).max()))


def dense_case(seed: int, scale: float = 1.0) -> dict:
    kernel, bias, a, b = draw(LAYOUTS[0], seed)
    return gradients(scale * kernel, scale * bias, a, scale * b, (1,))


def two_layers(seed: int) -> dict:
    """A tapped dense layer, a tapped convolution, and a parameter that is not tapped."""
    conv = next(case for case in LAYOUTS if case.name == "convolution")
    kernel, bias, a, b = draw(conv, seed + 1)
    return {
        "dense": dense_case(seed)["layer"],
        "conv": gradients(kernel, bias, a, b, conv.counter)["layer"],
        "scale": jnp.arange(3.0),
    }


def test_running_average_takes_the_first_value_and_then_decays():
    with jax.enable_x64(True):
        tx = eva_optax.scale_by_eva(0.1, decay=0.3)
        state, mean = tx.init(dense_case(0)), None
        for seed in range(4):
            _, _, a, b = draw(LAYOUTS[0], seed)
            mean = (a, b) if mean is None else tuple(0.3 * m + 0.7 * v for m, v in zip(mean, (a, b), strict=True))
            updates, state = jax.jit(tx.update)(dense_case(seed), state)
            running = state.vectors["layer"]["kronecker"]["kernel,bias"]
            np.testing.assert_allclose(running["a"], mean[0], rtol=1e-12)
            np.testing.assert_allclose(running["b"], mean[1], rtol=1e-12)
            kernel, bias, _, _ = draw(LAYOUTS[0], seed)
            wanted = expected(LAYOUTS[0], kernel, bias, *mean, 0.1, True)
            np.testing.assert_allclose(updates["layer"]["kernel"], wanted[0], rtol=0, atol=1e-10)
        assert state.count == 4


@pytest.mark.parametrize("relative", [True, False], ids=["relative", "absolute"])
@pytest.mark.parametrize("step_rule", ["none", "kl_clip", "kl_norm", "grad_norm"])
def test_step_rule_is_its_formula_over_all_tapped_layers(step_rule: str, relative: bool):
    """ν from P and G themselves, with P from the dense solve."""
    rate, clip, damping = 0.5, 1e-3, 0.2
    with jax.enable_x64(True):
        grads = two_layers(0)
        tx = eva_optax.scale_by_eva(
            damping, relative=relative, step_rule=step_rule, kl_clip=clip, learning_rate=lambda count: rate + count
        )
        updates, state = jax.jit(lambda grads: tx.update(grads, tx.init(grads)))(grads)
        plain, products = {}, np.zeros(3)
        for key, case, seed in (("dense", LAYOUTS[0], 0), ("conv", LAYOUTS[6], 1)):
            kernel, bias, a, b = draw(case, seed)
            solved = expected(case, kernel, bias, a, b, damping, relative)
            if step_rule == "kl_norm" and not relative:
                solved = tuple(damping * part for part in solved)
            plain[key] = solved
            for p, g in zip(solved, (kernel, bias), strict=True):
                products += [np.sum(p * g), np.sum(g * g), np.sum(p * p)]
        pg, gg, pp = products
        wanted = {
            "none": 1.0,
            "kl_clip": min(1.0, np.sqrt(clip / (rate**2 * pg))),
            "kl_norm": 1 / np.sqrt(pg),
            "grad_norm": np.sqrt(gg / pp),
        }[step_rule]
        np.testing.assert_allclose(state.nu, wanted, rtol=1e-10)
        assert step_rule == "none" or abs(wanted - 1) > 1e-3
        for key, (kernel, bias) in plain.items():
            np.testing.assert_allclose(updates[key]["kernel"], wanted * kernel, rtol=0, atol=1e-9)
            np.testing.assert_allclose(updates[key]["bias"], wanted * bias, rtol=0, atol=1e-9)
        np.testing.assert_array_equal(updates["scale"], grads["scale"])


def test_kl_clip_follows_the_schedule():
    rates = jnp.array([10.0, 1.0, 0.1])
    tx = eva_optax.scale_by_eva(step_rule="kl_clip", learning_rate=lambda count: rates[count])
    state, nus = tx.init(dense_case(0)), []
    for _ in range(3):
        _, state = tx.update(dense_case(0), state)
        nus.append(float(state.nu))
    np.testing.assert_allclose(np.array(nus[:2]) * [10, 1], nus[0] * 10, rtol=1e-5)
    assert nus[0] < nus[1] < nus[2]


def test_kl_clip_never_lengthens_the_step():
    tx = eva_optax.scale_by_eva(step_rule="kl_clip", kl_clip=1e6)
    _, state = tx.update(dense_case(0), tx.init(dense_case(0)))
    assert state.nu == 1


def test_relative_damping_is_scale_free():
    """A loss a thousand times larger gives an update a thousand times larger: no other effect."""
    tx = eva_optax.scale_by_eva()
    one, _ = tx.update(dense_case(0), tx.init(dense_case(0)))
    thousand, _ = tx.update(dense_case(0, 1024.0), tx.init(dense_case(0)))
    np.testing.assert_allclose(thousand["layer"]["kernel"], 1024 * one["layer"]["kernel"], rtol=1e-5)


def test_update_does_not_depend_on_a_linear_factor_of_the_vectors_alone_being_counted():
    """Summing over devices or calls instead of averaging: a and its counter grow together, G and b grow together."""
    tx = eva_optax.scale_by_eva()
    once = dense_case(0)
    summed = jax.tree.map(lambda leaf: 8 * leaf, once)
    one, state_one = tx.update(once, tx.init(once))
    eight, state_eight = tx.update(summed, tx.init(once))
    np.testing.assert_allclose(eight["layer"]["kernel"], 8 * one["layer"]["kernel"], rtol=1e-5)
    a = [state.vectors["layer"]["kronecker"]["kernel,bias"]["a"] for state in (state_one, state_eight)]
    np.testing.assert_array_equal(*a)


def test_updates_and_averages_keep_their_dtypes():
    grads = dense_case(0)
    half = {"layer": dict(grads["layer"])}
    half["layer"] |= {name: grads["layer"][name].astype(jnp.bfloat16) for name in ("kernel", "bias")}
    tx = eva_optax.scale_by_eva()
    updates, state = tx.update(half, tx.init(half))
    assert updates["layer"]["kernel"].dtype == updates["layer"]["bias"].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(state.vectors)} == {jnp.dtype(jnp.float32)}
    reference, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(
        updates["layer"]["kernel"].astype(np.float32), reference["layer"]["kernel"], rtol=0, atol=0.03
    )


def test_eva_alias_decouples_weight_decay_on_request():
    grads = dense_case(0)
    params = jax.tree.map(jnp.ones_like, grads)
    zero = jax.tree.map(jnp.zeros_like, grads)
    for decoupled, steps in ((False, [1.0, 1.9]), (True, [1.0, 1.0])):
        tx = eva_optax.eva(0.1, weight_decay=0.01, decoupled=decoupled)
        state = tx.init(params)
        for step in steps:  # no gradient: what moves is the decay, through the momentum or past it
            updates, state = tx.update(zero, state, params)
            np.testing.assert_allclose(updates["layer"]["kernel"], -0.1 * 0.01 * step, rtol=1e-6)


def test_state_is_masked_outside_of_probes_and_works_with_map_params():
    grads = two_layers(0)
    tx = eva_optax.scale_by_eva()
    state = tx.init(grads)
    assert isinstance(state.vectors["scale"], optax.MaskedNode)
    assert isinstance(state.vectors["dense"]["kernel"], optax.MaskedNode)
    doubled = optax.tree.map_params(tx, lambda leaf: leaf + 1, state)
    assert doubled.vectors["dense"]["kronecker"]["kernel,bias"]["a"][0, 0] == 1
    assert doubled.count == state.count
