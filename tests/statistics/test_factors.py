"""Kronecker factors, against moments of rows that JAX's own Jacobian finds and of cotangents of zeros added."""

import contextlib
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import eva_optax
from tests.dense import each_layer
from tests.helpers import assert_close, random_like
from tests.statistics.cases import LayerCase
from tests.statistics.test_sketches import CASES, second_moments


def gradients(case: LayerCase, x: np.ndarray, **options: object) -> tuple[dict, np.ndarray]:
    """The gradient of a mean over samples, and that of zeros added to the output."""
    model = eva_optax.tap(case.layer, embeddings=True, factors="both", **options)
    params = random_like(jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.asarray(x), **case.call))["params"])

    def loss(params: dict, added: jax.Array) -> jax.Array:
        return jnp.sin(model.apply({"params": params}, x, **case.call) + added).sum()

    y = jax.eval_shape(lambda: case.layer.apply({"params": eva_optax.strip(params)}, jnp.asarray(x), **case.call))
    grads, cotangents = jax.jit(jax.grad(loss, (0, 1)))(params, jnp.zeros(y.shape))
    return {"params": params, "grads": grads}, np.asarray(cotangents, np.float64)


def cotangent_rows(case: LayerCase, dy: np.ndarray, b: tuple) -> np.ndarray:
    """Each position's cotangent laid out as b: (samples, positions, *b)."""
    positions = [axis for axis, size in enumerate(case.per_output) if size == 1]
    samples = math.prod(case.x[:-3]) if "2D" in case.name else dy.shape[positions[0]] if positions else 1
    rows = np.moveaxis(dy, positions, range(len(positions)))
    rows = rows.reshape(-1, *(size for size in case.per_output if size != 1))
    rows = np.stack([case.lay_out(row.reshape(case.per_output), b) for row in rows])
    return rows.reshape(samples, -1, *b)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_factors_are_the_second_moments_of_inputs_and_cotangents(case):
    x = case.inputs(case.x)
    found, dy = gradients(case, x)
    (factors,) = eva_optax.factors(found["grads"]).values()
    (probe,) = found["grads"]["kronecker"].values()
    a, b = probe["a"].shape, probe["b"].shape
    moments, rows = second_moments(case, eva_optax.strip(found["params"]), x, a, b)
    if isinstance(case.layer, nn.Embed):
        assert_close(factors.A, np.diag(moments[0]) / rows, 1e-5)
    else:
        if isinstance(case.layer, nn.ConvTranspose):
            # Each offset is as large as its mean over what it meets wants it: ones tell how often that is.
            rows = dy.size // math.prod(case.per_output)
            (met,) = map(np.diag, second_moments(case, eva_optax.strip(found["params"]), np.ones_like(x), a, b)[0])
            moments = [moments[0] * (rows / met) * (rows / met)[:, None]]
            mean = np.ravel(probe["a"])[:, None] / probe["n"].ravel()[0]
            homogeneous = np.block([[np.asarray(factors.A, np.float64), mean], [mean.T, np.ones((1, 1))]])
            assert np.linalg.eigvalsh(homogeneous).min() > -1e-5
        assert_close(factors.A.reshape(-1, *moments[0].shape), np.stack(moments) / rows, 1e-5)
    kernel = found["params"][case.kernel].shape
    per_position = cotangent_rows(case, dy, b)
    flat = per_position.reshape(-1, *b)
    wanted = []
    for _, _, at in each_layer(kernel, a, b):
        own = flat[(slice(None), *at)].reshape(len(flat), -1)
        wanted.append(len(per_position) * own.T @ own)
    assert_close(factors.B.reshape(-1, *wanted[0].shape), np.stack(wanted), 1e-5)


def dense_factors(x: np.ndarray, dy: np.ndarray, sharing: str) -> tuple[np.ndarray, np.ndarray]:
    """A and B of a Dense layer on (samples, positions, inputs)."""
    if sharing == "reduce":
        x, dy = x.mean(1, keepdims=True), dy.sum(1, keepdims=True)
    a = np.einsum("npi,npj->ij", x, x) / (x.shape[0] * x.shape[1])
    return a, len(dy) * np.einsum("npi,npj->ij", dy, dy)


def test_rows_are_positions_or_samples():
    """Dense over a sequence, and a convolution whose patches are found by hand."""
    rng = np.random.default_rng(0)
    x = rng.normal(0.5, 1, (4, 6, 3)).astype(np.float32)
    for layer, read in (
        (nn.Dense(2), x),
        (nn.Conv(2, (2,), padding="VALID"), np.concatenate([x[:, :-1], x[:, 1:]], -1)),
    ):
        for sharing in ("expand", "reduce"):
            model = eva_optax.tap(layer, factors="both", sharing=sharing)
            params = model.init(jax.random.key(0), x)["params"]

            def loss(params, added, model=model):
                return jnp.sin(model.apply({"params": params}, x) + added).sum()

            y = model.apply({"params": params}, x)
            grads, dy = jax.jit(jax.grad(loss, (0, 1)))(params, jnp.zeros_like(y))
            found = eva_optax.factors(grads)[""]
            for mine, theirs in zip(found, dense_factors(read, np.asarray(dy), sharing), strict=True):
                assert_close(mine, theirs, 1e-5)


class Net(nn.Module):
    """A layer of its own, scanned ones, and one that is called twice."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(4, name="first")(x))
        scanned = nn.scan(
            lambda layer, x, _: (jnp.tanh(layer(x)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = scanned(nn.Dense(4, name="scanned"), x, None)
        twice = nn.Dense(4, name="twice")
        return nn.Dense(2, name="last")(jnp.tanh(twice(jnp.tanh(twice(x)))))


@pytest.fixture(scope="module")
def net():
    model = eva_optax.tap(Net(), factors="both")
    x = np.random.default_rng(1).normal(0.5, 1, (8, 3)).astype(np.float32)
    return model, model.init(jax.random.key(0), x)["params"], x


def test_units_follow_the_gradients(net):
    """B is c² of that of the mean loss where gradients are c times its gradients, however they came by c."""
    model, params, x = net

    def loss(params, x):
        return (jnp.sin(model.apply({"params": params}, x)).sum(-1) ** 2).mean()

    gradient = jax.grad(loss)
    halves = [x[:4], x[4:]]

    def mean(trees):
        return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *trees)

    def scaled(factor, tree):
        return jax.tree.map(lambda leaf: factor * leaf, tree)

    def inside(params):
        _, values = jax.lax.scan(lambda carry, part: (carry, loss(params, part)), 0, x.reshape(2, 4, -1))
        return values.mean()

    def by_example(params):
        return jax.vmap(lambda row: jnp.sin(model.apply({"params": params}, row)).sum() ** 2)(x).mean()

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    data, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def mean_of_losses(params, x):
        shared = jax.shard_map(
            lambda p, x: jax.lax.pmean(loss(p, x), "data"), mesh=mesh, in_specs=(whole, data), out_specs=whole
        )
        return shared(params, x)

    @jax.jit
    def all_of_them(params):
        return {
            "plain": (1, gradient(params, x)),
            "loss scaling": (1, scaled(1 / 1024, jax.grad(lambda p: 1024 * loss(p, x))(params))),
            "not unscaled": (1024, jax.grad(lambda p: 1024 * loss(p, x))(params)),
            "summed": (8, jax.grad(lambda p: 8 * loss(p, x))(params)),
            "micro-batches": (1, mean([gradient(params, part) for part in halves])),
            "sum of micro-batches": (2, jax.tree.map(jnp.add, *[gradient(params, part) for part in halves])),
            "divided losses": (
                1,
                jax.tree.map(jnp.add, *[jax.grad(lambda p, q=q: loss(p, q) / 2)(params) for q in halves]),
            ),
            "scan": (1, jax.grad(inside)(params)),
            "vmap": (1, jax.grad(by_example)(params)),
            "mean gradient of examples": (
                1,
                jax.tree.map(lambda g: g.mean(0), jax.vmap(lambda row: gradient(params, row[None]))(x)),
            ),
            "clipped": (0.25, scaled(0.25, gradient(params, x))),
            "shard_map": (1, jax.grad(mean_of_losses)(params, x)),
            "remat": (1, jax.grad(jax.checkpoint(lambda p: loss(p, x)))(params)),
        }

    results = all_of_them(params)
    reference = eva_optax.factors(results["plain"][1])
    for name, (factor, grads) in results.items():
        found = eva_optax.factors(grads)
        assert found.keys() == reference.keys()
        for layer, (a, b) in found.items():
            np.testing.assert_allclose(a, reference[layer].A, rtol=2e-5, atol=1e-6, err_msg=f"{name} {layer}")
            wanted = factor**2 * reference[layer].B
            atol = 2e-5 * float(np.abs(wanted).max())
            np.testing.assert_allclose(b, wanted, rtol=1e-4, atol=atol, err_msg=f"{name} {layer}")


def dots(function, *arguments) -> int:
    return jax.jit(function).lower(*arguments).compile().as_text().count(" dot(")


def test_a_step_without_factors_has_the_products_of_the_untapped_program(net):
    model, params, x = net

    def gradient(params, flag):
        with eva_optax.tapping(factors=flag):
            return jax.grad(lambda p: jnp.sin(model.apply({"params": p}, x)).sum())(params)

    def without(params):
        return jax.grad(lambda p: jnp.sin(Net().apply({"params": p}, x)).sum())(params)

    plain = eva_optax.strip(params)
    assert dots(lambda p: gradient(p, False), params) == dots(without, plain)
    switched = jax.jit(gradient)
    on, off = switched(params, True), switched(params, False)
    assert switched._cache_size() == 1
    for grads, formed in ((on, True), (off, False), (jax.jit(lambda p: gradient(p, False))(params), False)):
        for a, b in eva_optax.factors(grads).values():
            assert bool(jnp.any(a != 0)) == bool(jnp.any(b != 0)) == formed
    jax.tree.map(np.testing.assert_array_equal, eva_optax.strip(on), eva_optax.strip(off))
    jax.tree.map(np.testing.assert_array_equal, eva_optax.vectors(on), eva_optax.vectors(off))
    text = jax.jit(gradient).lower(params, True).as_text()
    assert text.count("stablehlo.case") > 0  # and not a select, which would form them in each step


def test_flags_are_one_for_all_examples(net):
    model, params, x = net

    def gradient(flag):
        with eva_optax.tapping(factors=flag):
            return jax.grad(lambda p: model.apply({"params": p}, x).sum())(params)

    with pytest.raises(ValueError, match=r"factors must be one flag for all examples"):
        jax.vmap(gradient)(jnp.array([True, False]))
    with pytest.raises(ValueError, match=r"factors must be .* got 0.5"):
        eva_optax.tapping(factors=0.5)


def test_what_is_too_large_keeps_its_vector():
    x = np.random.default_rng(0).normal(0.5, 1, (6, 5)).astype(np.float32)
    model = eva_optax.tap(nn.Dense(3), factors="both", max_dim=4, statistics=("a",))
    params = model.init(jax.random.key(0), x)["params"]
    (probe,) = params["kronecker"].values()
    assert sorted(probe) == ["B", "a", "n"]
    model = eva_optax.tap(nn.Dense(8), factors="both", max_dim=6, statistics=("a",))
    (probe,) = model.init(jax.random.key(0), x)["params"]["kronecker"].values()
    assert sorted(probe) == ["A", "a", "b", "n"]


def test_some_rows_are_those_of_every_so_many_positions():
    x = np.random.default_rng(0).normal(0.5, 1, (4, 8, 3)).astype(np.float32)
    model = eva_optax.tap(nn.Dense(2), factors="both", factor_rows=8)
    params = model.init(jax.random.key(0), x)["params"]
    grads, dy = jax.grad(lambda p, z: jnp.sin(model.apply({"params": p}, x) + z).sum(), (0, 1))(
        params, jnp.zeros((4, 8, 2))
    )
    found = eva_optax.factors(grads)[""]
    some, cotangents = x[:, ::4], np.asarray(dy)[:, ::4]
    a, b = dense_factors(some, cotangents, "expand")
    assert_close(found.A, a, 1e-5)
    assert_close(found.B, 4 * b, 1e-5)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_padding_does_not_count_on_request(sharing):
    """Of a dense layer neither in A nor in B, of a convolution not in B; what it holds does not matter."""
    rng = np.random.default_rng(0)
    x = rng.normal(0.5, 1, (4, 6, 3)).astype(np.float32)
    real = np.arange(6) < np.array([4, 6, 0, 1])[:, None]  # of the third sample nothing
    x[~real] = 100
    padded = [np.float64(row[valid]) for row, valid in zip(x, real, strict=True) if valid.any()]
    for layer in (nn.Dense(2), nn.Conv(2, (1,))):
        model = eva_optax.tap(layer, factors="both", sharing=sharing, skip_padding=True)
        params = model.init(jax.random.key(0), x)["params"]

        def loss(params, added, model=model):
            with eva_optax.tapping(factors=jnp.array(True)):
                return jnp.sum(jnp.sin(model.apply({"params": params}, x) + added), where=real[..., None])

        grads, dy = jax.jit(jax.grad(loss, (0, 1)))(params, jnp.zeros((4, 6, 2)))
        found, dy = eva_optax.factors(grads)[""], np.asarray(dy, np.float64)
        rows = np.concatenate(padded) if sharing == "expand" else np.stack([row.mean(0) for row in padded])
        if isinstance(layer, nn.Dense):
            assert_close(found.A, rows.T @ rows / len(rows), 1e-5)
        else:
            assert found.A.max() > 1000
        written = dy.reshape(-1, 2) if sharing == "expand" else dy.sum(1)
        assert_close(found.B, 3 * written.T @ written, 1e-5)


def test_nnx_layers_collect_the_same_factors():
    """A linear layer, with and without padding; and half precision, whose products are exact."""
    x = np.random.default_rng(0).normal(0.5, 1, (6, 4)).astype(np.float32)
    model = eva_optax.tap(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), factors="both")

    def loss(model, x):
        with eva_optax.tapping(factors=jnp.array(True)):
            return jnp.sin(model(x)).sum(-1).mean()

    found = eva_optax.factors(nnx.grad(loss)(model, x))[""]
    kernel, bias = np.asarray(model.kernel[...]), np.asarray(model.bias[...])
    dy = np.cos(x @ kernel + bias) / len(x)
    for mine, theirs in zip(found, dense_factors(x[:, None], dy[:, None], "expand"), strict=True):
        assert_close(mine, theirs, 1e-5)

    def loss_of_four(model, x):
        return jnp.sin(model(x))[:4].sum(-1).mean()

    model = eva_optax.tap(eva_optax.strip(model), factors="both", skip_padding=True)
    found = eva_optax.factors(nnx.grad(loss_of_four)(model, x))[""]
    for mine, theirs in zip(found, dense_factors(x[:4, None], 1.5 * dy[:4, None], "expand"), strict=True):
        assert_close(mine, theirs, 1e-5)

    half = jnp.asarray(x, jnp.bfloat16)
    single = eva_optax.tap(nn.Dense(3, dtype=jnp.bfloat16), factors="input")
    params = single.init(jax.random.key(0), half)["params"]
    found = eva_optax.factors(jax.grad(lambda p: single.apply({"params": p}, half).sum())(params))[""]
    assert_close(found.A, dense_factors(np.asarray(half, np.float32)[:, None], dy[:, None], "expand")[0], 1e-6)


def test_grouped_equations_have_the_factors_of_the_split_product():
    class Heads(nn.Module):
        @nn.compact
        def __call__(self, x):
            w = self.param("w", nn.initializers.normal(), (2, 3, 5))
            y = jnp.einsum("nthi,hio->ntho", x.reshape(*x.shape[:2], 2, 3), w).reshape(*x.shape[:2], 10)
            return eva_optax.tap_einsum(self, "w", "...(h i),h i o->...(h o)", x, y)

    x = np.random.default_rng(0).normal(0.5, 1, (3, 4, 6)).astype(np.float32)
    model = eva_optax.tap(Heads(), factors="both")
    params = model.init(jax.random.key(0), x)["params"]

    def loss(params, added):
        return jnp.sin(model.apply({"params": params}, x) + added).sum()

    grads, dy = jax.jit(jax.grad(loss, (0, 1)))(params, jnp.zeros((3, 4, 10)))
    found = eva_optax.factors(grads)[""]
    rows, dy = x.reshape(12, 2, 3), np.asarray(dy).reshape(12, 2, 5)
    assert_close(found.A, np.einsum("rhi,rhj->hij", rows, rows) / 12, 1e-5)
    assert_close(found.B, 3 * np.einsum("rhi,rhj->hij", dy, dy), 1e-5)


@pytest.mark.parametrize("flag", [None, True])
def test_experts_have_the_moments_of_their_rows(flag):
    """The last row belongs to no expert, and one of them has no rows."""

    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x, sizes):
            w = self.param("w", nn.initializers.normal(), (3, 6, 5))
            return eva_optax.tap_ragged_dot(self, "w", x, jax.lax.ragged_dot(x, w, sizes), sizes)

    x, sizes = np.random.default_rng(0).normal(0.5, 1, (10, 6)).astype(np.float32), np.array([5, 0, 4])
    model = eva_optax.tap(Experts(), factors="both")
    params = model.init(jax.random.key(0), x, sizes)["params"]

    def loss(params, added, flag):
        with contextlib.nullcontext() if flag is None else eva_optax.tapping(factors=flag):
            return jnp.sin(model.apply({"params": params}, x, sizes) + added + 1).sum(-1).mean()

    grads, dy = jax.jit(jax.grad(loss, (0, 1)))(params, jnp.zeros((10, 5)), flag)
    found = eva_optax.factors(grads)[""]
    groups, dy = (slice(0, 5), slice(5, 5), slice(5, 9)), np.asarray(dy, np.float64)
    assert_close(found.A, np.stack([x[rows].T @ x[rows] / max(len(x[rows]), 1) for rows in groups]), 1e-5)
    assert_close(found.B, np.stack([10 * dy[rows].T @ dy[rows] for rows in groups]), 1e-5)
    for statistics in eva_optax.vectors(grads)[""]:
        assert jnp.any(statistics != 0)


def test_kernels_of_one_gradient_and_probes_of_another(net):
    model, params, x = net
    gradient = jax.jit(jax.grad(lambda p, scale: (scale * model.apply({"params": p}, x)).sum()))
    one, other = gradient(params, 1.0), gradient(params, 3.0)
    merged = eva_optax.merge_factors(one, other)
    jax.tree.map(np.testing.assert_array_equal, eva_optax.strip(merged), eva_optax.strip(one))
    jax.tree.map(np.testing.assert_array_equal, eva_optax.factors(merged), eva_optax.factors(other))
    with pytest.raises(ValueError, match=r"merge_factors: grads and sampled must be gradients of the same"):
        eva_optax.merge_factors(one, eva_optax.strip(other))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factors": "outputs"}, "factors must be"),
        ({"factors": "input", "rank": 4}, "rank=4 asks for a sketch"),
        ({"factors": "input", "max_dim": 0}, "max_dim must be a positive integer, got 0"),
        ({"factors": "input", "sharing": "mean"}, "sharing must be"),
        ({"factors": "input", "factor_rows": 4, "sharing": "reduce"}, "factor_rows=4 looks at some"),
        ({"skip_padding": True}, "skip_padding=True says which rows count"),
        ({"factors": "input", "factor_rows": 4, "skip_padding": True}, "leave out factor_rows"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        eva_optax.tap(nn.Dense(2), **options)


def test_a_tree_without_factors_is_refused():
    model, x = eva_optax.tap(nn.Dense(2)), jnp.ones((4, 3))
    params = model.init(jax.random.key(0), x)["params"]
    with pytest.raises(ValueError, match=r"factors: no factors in the tree.*tap\(model, factors"):
        eva_optax.factors(params)
