"""One step on eight devices equals the step on one, and the update neither gathers nor reshards a kernel."""

import re
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import eva_optax
from tests.helpers import averages

AXES = ("data", "fsdp", "model")


class Network(nn.Module):
    """Up and down projection, after a convolution and heads; `dot_general` as `nn.Dense` takes it."""

    dot_general: object = None

    @nn.compact
    def __call__(self, x):
        dot = {} if self.dot_general is None else {"dot_general": self.dot_general}
        x = x + nn.Conv(8, (3,), name="conv")(x)
        x = nn.DenseGeneral((4, 2), name="heads")(x).reshape(x.shape)
        return nn.Dense(8, name="down", **dot)(nn.gelu(nn.Dense(16, name="up")(x)))


MODEL = eva_optax.tap(Network())
TX = eva_optax.scale_by_eva(step_rule="kl_clip")
LARGEST_VECTOR = 24
PROBE_ENTRIES = 4 * (16 + 32 + 2)  # a, b and two counters of each layer; no kernel is as small as all of these

# Where each kernel lies: (batch, kernels by layer, biases by layer); everything else is replicated.
LAYOUTS = {
    "data parallel": (AXES, {}, {}),
    "fsdp": (
        ("data", "fsdp"),
        {
            "conv": P(None, None, "fsdp"),
            "heads": P("fsdp", None, None),
            "up": P("fsdp", None),
            "down": P("fsdp", None),
        },
        {"up": P("fsdp")},
    ),
    "tensor parallel": (
        "data",
        {"heads": P(None, "model", None), "up": P(None, "model"), "down": P("model", None)},
        {"heads": P("model", None), "up": P("model")},
    ),
    "data x fsdp x model": (
        ("data", "fsdp"),
        {
            "conv": P(None, "fsdp", "model"),
            "heads": P("fsdp", "model", None),
            "up": P("fsdp", "model"),
            "down": P("model", "fsdp"),
        },
        {"heads": P("model", None), "up": P("model"), "down": P("fsdp")},
    ),
}


def make_mesh(kind=AxisType.Auto):
    return jax.make_mesh((2, 2, 2), AXES, axis_types=(kind,) * 3)


def batch():
    rng = np.random.default_rng(0)
    return rng.normal(size=(16, 4, 8)).astype(np.float32), rng.normal(size=(16, 4, 8)).astype(np.float32)


def loss(params, x, y, model=MODEL):
    return jnp.mean((model.apply({"params": params}, x) - y) ** 2)


def step(params, state, x, y, model=MODEL):
    grads = jax.grad(partial(loss, model=model))(params, x, y)
    updates, state = TX.update(grads, state, params)
    return jax.tree.map(lambda p, u: p - 0.1 * u, params, updates), state


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0), batch()[0])["params"]


@pytest.fixture(scope="module")
def single(params):
    """Parameters and state after two steps on one device."""
    carry = params, TX.init(params)
    for _ in range(2):
        carry = jax.jit(step)(*carry, *batch())
    return carry


def shardings(tree, mesh, kernels, biases):
    """Kernels and biases as given; probes as their kernel, without the axes that they have at size 1."""

    def one(path, leaf):
        layer, name = path[0].key, path[-1].key
        spec = biases.get(layer, P()) if name == "bias" else kernels.get(layer, P())
        if name not in ("kernel", "bias", "a", "b"):
            spec = P()
        spec = P(*(axis if size > 1 else None for axis, size in zip(spec, leaf.shape, strict=False)))
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, tree)


def place(params, mesh, layout):
    rows, kernels, biases = layout
    data = [jax.device_put(part, NamedSharding(mesh, P(rows))) for part in batch()]
    return jax.device_put(params, shardings(params, mesh, kernels, biases)), data


def assert_close(got, want, tolerance=1e-6):
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance * max(1.0, float(np.abs(theirs).max())))


def assert_shardings_kept(updates, params):
    for name, layer in params.items():
        assert updates[name]["kernel"].sharding.is_equivalent_to(layer["kernel"].sharding, layer["kernel"].ndim), name


def collectives(compiled) -> dict[str, list[int]]:
    """The collectives of a compiled program by kind, each with the number of entries of its result."""
    found: dict[str, list[int]] = {}
    pattern = r"= (\S+|\(.*?\)) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    for result, kind in re.findall(pattern, compiled.as_text()):
        sizes = [
            int(np.prod([int(n) for n in shape.split(",") if n])) for shape in re.findall(r"\w+\[([\d,]*)\]", result)
        ]
        found.setdefault(kind, []).append(sum(sizes))
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_steps_on_eight_devices_equal_one_and_the_update_moves_no_kernel(name, params, single):
    mesh = make_mesh()
    placed, data = place(params, mesh, LAYOUTS[name])
    state = jax.jit(TX.init)(placed)
    update = jax.jit(TX.update)
    grads = jax.jit(jax.grad(loss), out_shardings=jax.tree.map(lambda leaf: leaf.sharding, placed))(placed, *data)
    updates, _ = update(grads, state, placed)
    assert_shardings_kept(updates, placed)
    moved = collectives(update.lower(grads, state, placed).compile())
    assert set(moved) <= {"all-reduce", "all-gather"}
    assert max(moved.get("all-gather", [0])) <= LARGEST_VECTOR
    assert sum(moved.get("all-reduce", [0])) <= PROBE_ENTRIES
    assert bool(moved) == (name != "data parallel")
    carry = placed, state
    for _ in range(2):
        carry = jax.jit(step)(*carry, *data)
    assert_close(carry, single)


def test_vectors_join_the_all_reduce_of_the_gradients(params):
    mesh = make_mesh()
    placed, data = place(params, mesh, LAYOUTS["data parallel"])
    replicated = NamedSharding(mesh, P())

    def compiled(model, params):
        gradient = jax.jit(jax.grad(partial(loss, model=model)), out_shardings=replicated)
        return collectives(gradient.lower(params, *data).compile())

    tapped, plain = compiled(MODEL, placed), compiled(MODEL.module, eva_optax.strip(placed))
    assert set(tapped) == set(plain) == {"all-reduce"}
    assert len(tapped["all-reduce"]) == len(plain["all-reduce"])
    assert sum(tapped["all-reduce"]) - sum(plain["all-reduce"]) <= PROBE_ENTRIES


@pytest.mark.parametrize("name", LAYOUTS)
def test_explicit_sharding_equals_one_device(name, params, single):
    """Shardings are part of the types; contractions over a sharded axis say where their result lies."""
    rows, kernels, biases = LAYOUTS[name]
    # Flax has no option for where the outputs of convolutions lie, nor for the sum of a bias and what it is added to.
    kernels = {layer: spec for layer, spec in kernels.items() if layer != "conv"}
    if "fsdp" in rows:
        kernels = {**kernels, "heads": P("fsdp", None, None)}
        biases = {layer: spec for layer, spec in biases.items() if spec == P("model")}
    layout = rows, kernels, biases
    mesh = make_mesh(AxisType.Explicit)
    dot_general = partial(jax.lax.dot_general, out_sharding=P(rows, None, None))
    model = eva_optax.tap(Network(dot_general))
    with jax.set_mesh(mesh):
        placed, data = place(params, mesh, layout)
        carry = placed, jax.jit(TX.init)(placed)
        for _ in range(2):
            carry = jax.jit(partial(step, model=model))(*carry, *data)
    assert_shardings_kept(carry[0], placed)
    assert_close(carry, single)


MEMBERS = {
    "scale_by_eva_f": eva_optax.scale_by_eva_f(step_rule="kl_norm"),
    "scale_by_eva_s": eva_optax.scale_by_eva_s(),
    "eva_adamw": eva_optax.eva_adamw(0.1),
    "center": eva_optax.center(optax.trace(0.9)),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("member", MEMBERS.values(), ids=MEMBERS.keys())
def test_updates_of_the_family_equal_one_device_and_keep_shardings(member, kind, params):
    grads = jax.jit(jax.grad(loss))(params, *batch())
    wanted, wanted_state = jax.jit(member.update)(grads, member.init(params), params)
    mesh = make_mesh(kind)
    with jax.set_mesh(mesh):
        placed, spread = (place(tree, mesh, LAYOUTS["data x fsdp x model"])[0] for tree in (params, grads))
        state = jax.jit(member.init)(placed)
        update = jax.jit(member.update)
        updates, state = update(spread, state, placed)
        moved = collectives(update.lower(spread, state, placed).compile())
    assert_close((updates, state), (wanted, wanted_state))
    assert_shardings_kept(updates, placed)
    assert max(moved.get("all-gather", [0])) <= LARGEST_VECTOR


class Wide(nn.Module):
    """Kernels that are large beside their sketches: of two of one size the partitioner moves either."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(128, name="up")(nn.Conv(64, (3,), name="conv")(x))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_updates_by_sketches_equal_one_device_and_move_no_kernel(kind):
    tx, model = eva_optax.conjugate(optax.trace(0.9)), eva_optax.tap(Wide(), rank=2)
    x = np.repeat(batch()[0], 8, -1)
    params = model.init(jax.random.key(0), x)["params"]
    grads = jax.jit(jax.grad(lambda params: jnp.sin(model.apply({"params": params}, x)).mean()))(params)
    wanted, wanted_state = jax.jit(tx.update)(grads, tx.init(params), params)
    mesh = make_mesh(kind)
    kernels, biases = {"conv": P(None, "fsdp", "model"), "up": P("fsdp", "model")}, {"up": P("model")}
    with jax.set_mesh(mesh):
        placed, spread = (jax.device_put(tree, shardings(tree, mesh, kernels, biases)) for tree in (params, grads))
        state = jax.jit(tx.init)(placed)
        update = jax.jit(tx.update)
        updates, state = update(spread, state, placed)
        moved = collectives(update.lower(spread, state, placed).compile())
    assert_close((updates, state.vectors), (wanted, wanted_state.vectors), 1e-5)
    assert_shardings_kept(updates, placed)
    rows = 3 * 64 * 3  # of the largest layer with one vector more for the bias
    assert max(moved.get("all-gather", [0])) <= rows
    assert max(moved["all-reduce"]) < 64 * 128 / 4


@pytest.mark.parametrize("options", [{"rank": 2}, {"factors": "both"}], ids=["sketches", "factors"])
def test_second_moments_of_a_sharded_batch_join_the_all_reduce_of_the_gradients(options):
    mesh, model = make_mesh(), eva_optax.tap(Network(), **options)
    params = model.init(jax.random.key(0), batch()[0])["params"]
    placed, data = place(params, mesh, LAYOUTS["data parallel"])
    gradient = jax.jit(jax.grad(partial(loss, model=model)), out_shardings=NamedSharding(mesh, P()))
    moved = collectives(gradient.lower(placed, *data).compile())
    assert set(moved) == {"all-reduce"}
    wanted = jax.jit(jax.grad(partial(loss, model=model)))(params, *batch())
    assert_close(gradient(placed, *data), wanted)


def test_factors_of_sharded_layers_equal_those_of_one_device():
    """Where shardings are part of the types, and each layer's inputs or outputs are split; with a traced flag."""

    def gradient(model, params, x, y, flag):
        with eva_optax.tapping(factors=flag):
            return jax.grad(partial(loss, model=model))(params, x, y)

    model, mesh = eva_optax.tap(Network(), factors="both"), make_mesh(AxisType.Explicit)
    params = model.init(jax.random.key(0), batch()[0])["params"]
    wanted = jax.jit(partial(gradient, model))(params, *batch(), True)
    rows, kernels, biases = LAYOUTS["tensor parallel"]
    dot_general = partial(jax.lax.dot_general, out_sharding=P(rows, None, None))
    spread = eva_optax.tap(Network(dot_general), factors="both")
    with jax.set_mesh(mesh):
        placed, data = place(params, mesh, (rows, kernels, biases))
        grads = jax.jit(partial(gradient, spread))(placed, *data, True)
    assert_close(grads, wanted)


RULES = (("batch", ("data", "fsdp")), ("embed", "fsdp"), ("mlp", "model"))


class Logical(nn.Module):
    """A layer whose axes have logical names."""

    @nn.compact
    def __call__(self, x):
        def named(*names):
            return nn.with_logical_partitioning(nn.initializers.lecun_normal(), names)

        bias = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("mlp",))
        x = nn.with_logical_constraint(x, ("batch", None, "embed"))
        x = nn.gelu(nn.Dense(16, kernel_init=named("embed", "mlp"), bias_init=bias, name="up")(x))
        return nn.Dense(8, kernel_init=named("mlp", "embed"), use_bias=False, name="down")(x)


def test_logical_axis_rules_shard_parameters_and_optimizer_state():
    model, mesh = eva_optax.tap(Logical()), make_mesh()
    tx = optax.chain(eva_optax.scale_by_eva(), optax.adam(1e-2))
    x, y = batch()

    def create(key):
        params = model.init(key, x)["params"]
        return params, tx.init(params)

    def train(params, state, x, y):
        grads = jax.grad(partial(loss, model=model))(params, x, y)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    wanted = nn.unbox(create(jax.random.key(0)))
    for _ in range(2):
        wanted = jax.jit(train)(*wanted, x, y)

    specs = nn.get_partition_spec(jax.eval_shape(create, jax.random.key(0)))
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        places = nn.logical_to_mesh_sharding(specs, mesh, RULES)
        carry = nn.unbox(jax.jit(create, out_shardings=places)(jax.random.key(0)))
        rows = NamedSharding(mesh, P(("data", "fsdp")))
        for _ in range(2):
            carry = jax.jit(train)(*carry, *jax.device_put((x, y), rows))
    params, state = carry
    probe = params["up"]["kronecker"]["kernel,bias"]
    assert params["up"]["kernel"].sharding.spec == P("fsdp", "model")
    assert probe["a"].sharding.spec == P("fsdp")
    assert probe["b"].sharding.spec == P(None, "model")
    for name in "ab":
        assert averages(state, "up")[name].sharding.is_equivalent_to(probe[name].sharding, 2)
    assert_close(carry, wanted)
