"""Tapping NNX models: vectors, training, transformations, saving, and what is left alone."""

import copy
import pickle
import subprocess
import sys
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh

import eva_optax
from tests.dense import assert_preconditioned
from tests.flax.nnx_cases import (
    LAYERS,
    Block,
    Doubled,
    LayerPair,
    LinenNetwork,
    Network,
    fast_jit,
    inputs,
    jit,
    pure,
    random_state,
)
from tests.helpers import assert_close

assert_trees_close = partial(assert_close, floor=1e-2)


def squares(model, x):
    return jnp.sum(jnp.sin(model(x)))


def images():
    return inputs((6, 4, 4, 2)), jnp.arange(6) % 3


def loss(model, x, labels):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()


def update_in_place(model, optimizer, grads):
    optimizer.update(model, grads)


def first_update(tx, model, grads):
    params = params_of(model)
    return fast_jit(lambda grads: tx.update(grads, tx.init(params))[0])(grads)


def network(tapped=True):
    model = random_state(Network(nnx.Rngs(0)))
    return eva_optax.tap(model) if tapped else model


def take(array, index, axis):
    """One member of a stack, in NumPy: op by op, JAX would compile this for each shape."""
    return np.asarray(array).take(index, axis)


def params_of(model):
    return nnx.state(model, nnx.Param)


# Vectors


@pytest.mark.parametrize("pair", LAYERS, ids=str)
def test_nnx_and_linen_layers_with_equal_weights_give_equal_vectors_and_updates(pair: LayerPair):
    layer = eva_optax.tap(random_state(pair.nnx(nnx.Rngs(0))), embeddings=True)
    linen, x = eva_optax.tap(pair.linen, embeddings=True), pair.inputs()
    renamed = linen_names(params_of(layer))
    wanted = jax.eval_shape(linen.init, jax.random.key(0), x)["params"]
    assert jax.tree.structure(renamed) == jax.tree.structure(wanted)

    tx = eva_optax.scale_by_eva()

    def step(layer, x):
        grads, params = nnx.grad(squares)(layer, x), params_of(layer)
        return grads, tx.update(grads, tx.init(params))[0]

    def linen_step(params):
        grads = jax.grad(lambda params: jnp.sum(jnp.sin(linen.apply({"params": params}, x))))(params)
        return grads, tx.update(grads, tx.init(params))[0]

    (grads, updates), (linen_grads, linen_updates) = jit(step)(layer, x), fast_jit(linen_step)(renamed)
    ours = {name.replace("if_", "if"): vectors for name, vectors in eva_optax.vectors(grads).items()}
    assert_trees_close(ours, eva_optax.vectors(linen_grads), 1e-5)
    assert_trees_close(linen_names(updates), linen_updates, 1e-4)


def linen_names(state):
    """A state under the names that Linen gives the parts of its cells."""
    tree = pure(state)
    if "cell" in tree:
        tree["cell"] = {"if" if name == "if_" else name: value for name, value in tree["cell"].items()}
    return tree


@pytest.mark.parametrize("pair", [pair for pair in LAYERS if pair.equal], ids=str)
def test_equal_inputs_give_a_gradient_of_a_times_b(pair: LayerPair):
    layer = eva_optax.tap(random_state(pair.nnx(nnx.Rngs(0))), embeddings=True)
    x = pair.inputs()
    x = jnp.broadcast_to(x.reshape(-1)[: x.shape[-1]] if not pair.integers else 3, x.shape)
    weights = inputs(jax.eval_shape(layer, x).shape)
    grads = jit(nnx.grad(lambda layer: jnp.sum(weights * layer(x))))(layer)
    flat = {"/".join(path): leaf for path, leaf in flat_arrays(grads).items()}
    for name, (a, b) in eva_optax.vectors(grads).items():
        kernel = flat[f"{name}/kernel".strip("/")] if "embedding" not in flat else flat["embedding"]
        np.testing.assert_allclose(a * b, kernel, rtol=1e-4, atol=1e-5 * np.abs(kernel).max())


def flat_arrays(state):
    return {tuple(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(state) if "kronecker" not in path}


def test_lora_gets_the_vectors_of_its_two_matrices():
    layer = eva_optax.tap(random_state(nnx.LoRALinear(5, 4, lora_rank=2, rngs=nnx.Rngs(0))))
    x = inputs((3, 2, 5))
    grads, y = jit(nnx.grad(lambda m: (jnp.sum(jnp.sin(y := m(x))), y), has_aux=True))(layer)
    at_output, x = np.cos(y).sum((0, 1)), np.asarray(x)
    lora_a, lora_b = (np.asarray(part[...]) for part in (layer.lora.lora_a, layer.lora.lora_b))
    vectors = eva_optax.vectors(grads)
    assert set(vectors) == {"", "lora/lora_a", "lora/lora_b"}
    mean = x.mean((0, 1))
    np.testing.assert_allclose(vectors[""].b[0], at_output, rtol=1e-5)
    np.testing.assert_allclose(vectors["lora/lora_a"].a[:, 0], mean, rtol=1e-5)
    np.testing.assert_allclose(vectors["lora/lora_a"].b[0], lora_b @ at_output, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(vectors["lora/lora_b"].a[:, 0], mean @ lora_a, rtol=1e-5)
    np.testing.assert_allclose(vectors["lora/lora_b"].b[0], at_output, rtol=1e-5)


def test_lora_gets_the_second_moments_of_its_two_matrices():
    """Of all positions, the inputs of the second one being the products of the first; sketches of all directions."""
    x, by_lora = inputs((3, 2, 5)), nnx.DiffState(0, nnx.LoRAParam)
    options = {"factors": "both"}, {"rank": 5}
    layers = [eva_optax.tap(random_state(nnx.LoRA(5, 2, 4, rngs=nnx.Rngs(0))), **each) for each in options]

    def gradients(*layers):
        return [nnx.grad(lambda m: jnp.sum(jnp.sin(m(x))), argnums=by_lora)(layer) for layer in layers]

    whole, sketched = jit(gradients)(*layers)
    lora_a, lora_b = (np.asarray(part[...]) for part in (layers[0].lora_a, layers[0].lora_b))
    rows = np.asarray(x).reshape(6, 5)
    at_output = np.cos(rows @ lora_a @ lora_b)
    moments, sketches = eva_optax.factors(whole), eva_optax.sketches(sketched)
    pairs = {"lora_a": (rows, at_output @ lora_b.T), "lora_b": (rows @ lora_a, at_output)}
    assert moments.keys() == sketches.keys() == pairs.keys()
    for name, (read, written) in pairs.items():
        assert_close(moments[name].A, read.T @ read / 6, 1e-5)
        assert_close(moments[name].B, 3 * written.T @ written, 1e-5)  # three samples
        assert_close(sketches[name].moment @ sketches[name].directions.T, read.T @ read / 6, 1e-5)
        np.testing.assert_allclose(sketches[name].trace, np.sum(read**2) / 6, rtol=1e-5)


def test_lora_alone_is_found_by_its_own_filter():
    layer = eva_optax.tap(random_state(nnx.LoRA(5, 2, 4, rngs=nnx.Rngs(0))))
    x = jnp.broadcast_to(inputs((5,)), (6, 5))
    wrt = nnx.LoRAParam
    before, grads = jit(nnx.value_and_grad(squares, argnums=nnx.DiffState(0, wrt)))(layer, x)
    for name, (a, b) in eva_optax.vectors(grads).items():  # all inputs equal
        np.testing.assert_allclose(a * b, grads[name][...], rtol=1e-4, atol=1e-6)
    optimizer = nnx.Optimizer(layer, optax.chain(eva_optax.scale_by_eva(), optax.sgd(1e-2)), wrt=wrt)
    nnx.jit(update_in_place)(layer, optimizer, grads)
    assert jit(squares)(layer, x) < before


@pytest.mark.parametrize("cell", [nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell])
def test_a_cell_under_rnn_gives_the_vectors_of_a_loop(cell):
    made = eva_optax.tap(random_state(cell(3, 2, rngs=nnx.Rngs(0))))
    x = inputs((2, 4, 3))

    def unrolled(cell, x):
        carry = cell.initialize_carry(x[:, 0].shape, nnx.Rngs(0))
        ys = []
        for t in range(x.shape[1]):
            carry, y = cell(carry, x[:, t])
            ys.append(y)
        return jnp.sum(jnp.sin(jnp.stack(ys, 1)))

    want = jit(nnx.grad(unrolled))(made, x)
    got = jit(nnx.grad(squares))(nnx.RNN(made), x)["cell"]
    assert_trees_close(eva_optax.vectors(got), eva_optax.vectors(want), 1e-5)
    assert eva_optax.coverage(made).share == 1
    biases = {path: leaf for path, leaf in flat_arrays(got).items() if path[-1] == "bias"}
    assert biases
    for path, bias in biases.items():
        np.testing.assert_allclose(eva_optax.vectors(got)["/".join(path[:-1])].b[0], bias, rtol=1e-5, atol=1e-7)


def test_update_equals_a_dense_solve_in_float64():
    with jax.enable_x64(True):
        model = random_state(Network(nnx.Rngs(0)))
        nnx.update(model, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params_of(model)))
        model = eva_optax.tap(model)
        x, labels = images()
        grads = jit(nnx.grad(loss))(model, x.astype(jnp.float64), labels)
        updates = first_update(eva_optax.scale_by_eva(0.3), model, grads)
        vectors = eva_optax.vectors(grads)
        assert set(vectors) == {"conv", "twice", "blocks/0", "head"}
        assert {vector.dtype for pair in vectors.values() for vector in pair} == {jnp.dtype("float64")}
        assert set(assert_preconditioned(grads, updates, 0.3, 1e-9)) == set(vectors)


def test_vectors_of_half_precision_are_float32():
    layer = eva_optax.tap(nnx.Linear(3, 2, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    grads = jit(nnx.grad(lambda m: m(jnp.ones((4, 3), jnp.bfloat16)).astype(jnp.float32).sum()))(layer)
    assert grads["kernel"].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(eva_optax.vectors(grads))} == {jnp.dtype("float32")}


# Training


def test_loss_and_gradients_are_those_of_the_untapped_model():
    x, labels = images()
    tapped, plain = network(), network(tapped=False)
    value, grads = nnx.jit(nnx.value_and_grad(loss))(tapped, x, labels)
    plain_value, plain_grads = nnx.jit(nnx.value_and_grad(loss))(plain, x, labels)
    assert value == plain_value
    assert_trees_close(pure(eva_optax.strip(grads)), pure(plain_grads), 1e-6)
    assert isinstance(tapped.blocks[0], Doubled)


def test_ten_steps_of_an_nnx_optimizer_equal_ten_steps_of_plain_optax_and_of_linen():
    x, labels = images()
    tx = optax.chain(eva_optax.scale_by_eva(step_rule="grad_norm"), optax.sgd(0.03, momentum=0.9))
    model = network()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    start = pure(nnx.state(model, nnx.Param))

    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(loss)(model, x, labels)
        optimizer.update(model, grads)
        return value

    graphdef, params = nnx.split(network())
    state = tx.init(params)

    @fast_jit
    def plain_step(params, state):
        grads = jax.grad(lambda params: loss(nnx.merge(graphdef, params), x, labels))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    linen = eva_optax.tap(LinenNetwork())
    linen_params = {("block" if name == "blocks" else name): value for name, value in start.items()}
    linen_params["block"] = linen_params["block"]["0"]
    linen_state = tx.init(linen_params)

    @fast_jit
    def linen_step(params, state):
        grads = jax.grad(lambda params: loss(lambda x: linen.apply({"params": params}, x), x, labels))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    values = []
    for _ in range(10):
        values.append(float(step(model, optimizer)))
        params, state = plain_step(params, state)
        linen_params, linen_state = linen_step(linen_params, linen_state)
    assert values[-1] < values[0]
    got = pure(params_of(model))
    assert_trees_close(got, pure(params), 1e-5)
    got["block"] = got.pop("blocks")["0"]
    assert_trees_close(got, linen_params, 1e-5)
    assert optimizer.step[...] == 10


def test_an_optimizer_without_a_tap_trains_and_holds_one_array_in_each_variable():
    model, x = random_state(nnx.Linear(3, 2, rngs=nnx.Rngs(0))), inputs((4, 3))
    optimizer = nnx.Optimizer(model, eva_optax.eva_s(0.1), wrt=nnx.Param)
    params, plain = pure(params_of(model)), eva_optax.eva_s(0.1)
    state, held = plain.init(params), jax.tree.structure(optimizer.opt_state)
    for _ in range(3):
        grads = nnx.grad(squares)(model, x)
        updates, state = plain.update(pure(grads), state, params)
        params = optax.apply_updates(params, updates)
        optimizer.update(model, grads)
        assert jax.tree.structure(optimizer.opt_state) == held
    assert_trees_close(pure(params_of(model)), params)


# Transformations


class Stack(nnx.Module):
    """Blocks stacked by `nnx.vmap` and run by `nnx.scan`."""

    def __init__(self, rngs: nnx.Rngs, axis: int = 0, inside: bool = False, remat: bool = False):
        @nnx.split_rngs(splits=4)
        @partial(nnx.vmap, in_axes=(0,), out_axes=axis)
        def make(rngs: nnx.Rngs) -> Block:
            return eva_optax.tap(Block(rngs)) if inside else Block(rngs)

        self.blocks = make(rngs)
        self.axis, self.remat = axis, remat

    def __call__(self, x):
        call = nnx.remat(Block.__call__) if self.remat else Block.__call__

        @partial(nnx.scan, in_axes=(nnx.Carry, self.axis), out_axes=nnx.Carry)
        def run(x, block):
            return call(block, x)

        return run(x, self.blocks)


@pytest.mark.parametrize(
    "options",
    [{}, {"inside": True}, {"remat": True}, {"axis": 1}, {"axis": 1, "inside": True}],
    ids=["tapped afterwards", "tapped inside", "rematerialised", "axis 1", "axis 1, tapped inside"],
)
def test_stacked_layers_give_the_vectors_and_updates_of_a_loop(options):
    x, axis = inputs((4, 3)), options.get("axis", 0)
    stack = random_state(Stack(nnx.Rngs(0), **options))
    stack = stack if options.get("inside") else eva_optax.tap(stack)
    value, grads = jit(nnx.value_and_grad(squares))(stack, x)

    loop = nnx.List([eva_optax.tap(Block(nnx.Rngs(0))) for _ in range(4)])
    for index, block in enumerate(loop):
        for name in ("up", "down"):
            layer, stacked = getattr(block, name), getattr(stack.blocks, name)
            layer.kernel[...] = jnp.asarray(take(stacked.kernel[...], index, axis))
            if layer.bias is not None:
                layer.bias[...] = jnp.asarray(take(stacked.bias[...], index, axis))

    def run(blocks):
        y = x
        for block in blocks:
            y = block(y)
        return jnp.sum(jnp.sin(y))

    want_value, want = jit(nnx.value_and_grad(run))(loop)
    np.testing.assert_allclose(value, want_value, rtol=1e-5)
    tx = eva_optax.scale_by_eva()
    updates, want_updates = first_update(tx, stack, grads), first_update(tx, loop, want)
    vectors, want_vectors = eva_optax.vectors(grads), eva_optax.vectors(want)
    for index in range(4):
        for name in ("up", "down"):
            for stacked, plain in zip(vectors[f"blocks/{name}"], want_vectors[f"{index}/{name}"], strict=True):
                np.testing.assert_allclose(take(stacked, index, axis), plain, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(
                take(updates["blocks"][name]["kernel"][...], index, axis),
                want_updates[index][name]["kernel"][...],
                rtol=1e-4,
                atol=1e-5,
            )


def ensemble(axis, members, inside, use_bias=True):
    @nnx.split_rngs(splits=members)
    @partial(nnx.vmap, in_axes=(0,), out_axes=axis)
    def make(rngs):
        layer = nnx.Linear(3, 2, use_bias=use_bias, rngs=rngs)
        return eva_optax.tap(layer) if inside else layer

    return make(nnx.Rngs(0)) if inside else eva_optax.tap(make(nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("axis", "members", "inside"), [(1, 3, False), (-1, 3, False), (1, 2, True), (-1, 2, True), (-1, 3, True)]
)
def test_as_many_members_as_features_are_told_apart(axis, members, inside):
    layers, x = ensemble(axis, members, inside), inputs((4, 3))
    grads = jit(nnx.grad(lambda layers: nnx.vmap(squares, in_axes=(axis, None))(layers, x).sum()))(layers)
    (a, b), x = map(np.asarray, eva_optax.vectors(grads)[""]), np.asarray(x)
    for member in range(members):
        kernel, bias = (take(part[...], member, axis) for part in (layers.kernel, layers.bias))
        np.testing.assert_allclose(take(a, member, axis)[:, 0], x.mean(0), rtol=1e-6)
        np.testing.assert_allclose(take(b, member, axis)[0], np.cos(x @ kernel + bias).sum(0), rtol=1e-5)


@pytest.mark.parametrize("use_bias", [True, False])
def test_an_ensemble_whose_shapes_do_not_tell_its_axis_is_tapped_inside(use_bias):
    with pytest.raises(ValueError, match=r"stacked Linear .* shape \(3, 2, 2\).*inside nnx\.vmap"):
        ensemble(-1, 2, inside=False, use_bias=use_bias)


def test_split_and_merge_and_vmapped_gradients():
    x, labels = images()
    graphdef, params = nnx.split(network())
    whole = fast_jit(jax.grad(lambda params: loss(nnx.merge(graphdef, params), x, labels)))(params)
    each = fast_jit(
        jax.vmap(jax.grad(lambda params, x, y: loss(nnx.merge(graphdef, params), x, y)), in_axes=(None, 0, 0))
    )(params, x.reshape(3, 2, 4, 4, 2), labels.reshape(3, 2))
    summed = jax.tree.map(lambda leaf: leaf.mean(0), each)
    assert_trees_close(eva_optax.vectors(summed), eva_optax.vectors(whole), 1e-5)


@pytest.mark.skipif(not hasattr(nnx, "set_graph_mode"), reason="this Flax has no tree mode")
def test_tree_mode():
    x, labels = images()
    model = network()
    want = jit(nnx.grad(loss))(model, x, labels)
    grads = nnx.jit(nnx.grad(loss, graph=False), graph=False)(model, x, labels)
    assert isinstance(grads, Network)
    assert_trees_close(eva_optax.vectors(grads), eva_optax.vectors(want), 1e-5)
    optimizer = nnx.Optimizer(model, optax.chain(eva_optax.scale_by_eva(), optax.sgd(0.1)), wrt=nnx.Param, graph=False)
    before = loss(model, x, labels)

    @partial(nnx.jit, graph=False)
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss, graph=False)(model, x, labels))

    step(model, optimizer)
    with nnx.set_graph_mode(False):
        assert loss(model, x, labels) < before
        assert eva_optax.coverage(model).share > 0.9
        assert set(eva_optax.vectors(grads)) == set(eva_optax.vectors(want))


@pytest.mark.parametrize("tapped_linen", [False, True])
def test_bridge_to_linen(tapped_linen):
    linen = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)])
    if tapped_linen:
        model = nnx.bridge.ToNNX(eva_optax.tap(linen), rngs=nnx.Rngs(0))
    else:
        model = eva_optax.tap(nnx.bridge.ToNNX(linen, rngs=nnx.Rngs(0)))
    x = inputs((5, 3))
    model.lazy_init(x)
    value, grads = nnx.jit(nnx.value_and_grad(squares))(model, x)
    params = {"params": pure(params_of(model))}
    want = fast_jit(jax.grad(lambda v: jnp.sum(jnp.sin(eva_optax.tap(linen).apply(v, x)))))(params)["params"]
    assert_trees_close(eva_optax.vectors(grads), eva_optax.vectors(want), 1e-5)
    assert eva_optax.coverage(model).share == 1
    optimizer = nnx.Optimizer(model, optax.chain(eva_optax.scale_by_eva(), optax.sgd(1e-2)), wrt=nnx.Param)
    nnx.jit(update_in_place)(model, optimizer, grads)
    after = nnx.jit(squares)(model, x)
    assert after < value
    stripped = eva_optax.strip(model)
    assert "kronecker" not in str(jax.tree.leaves_with_path(params_of(stripped)))
    assert nnx.jit(squares)(stripped, x) == after
    assert stripped.to_nnx__module is linen


def test_tapping_a_bridge_with_parameters_says_what_to_do():
    model = nnx.bridge.ToNNX(nn.Dense(2), rngs=nnx.Rngs(0)).lazy_init(jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="before lazy_init"):
        eva_optax.tap(model)


def test_a_tapped_layer_is_shown_under_its_own_name_and_its_stripped_copy_as_if_never_tapped():
    shown = repr(nnx.Linear(3, 2, rngs=nnx.Rngs(0))).splitlines()
    model = eva_optax.tap(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), rank=2)
    assert repr(model).startswith("Linear(")
    assert sorted(line.strip(" ,") for line in repr(eva_optax.strip(model)).splitlines()) == sorted(
        line.strip(" ,") for line in shown
    )


# Saving and copying


def pickled(value):
    try:
        pickle.dumps(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    except AttributeError:
        pytest.skip("no layer of this Flax can be pickled")
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, nnx.clone, pickled])
def test_copies_stay_tapped(duplicate):
    model = eva_optax.tap(Doubled(3, 2, rngs=nnx.Rngs(1)))
    x = inputs((4, 3))
    twin = duplicate(model)
    assert twin is not model
    assert type(twin) is type(model)
    assert isinstance(twin, Doubled)
    assert_trees_close(
        eva_optax.vectors(jit(nnx.grad(squares))(twin, x)), eva_optax.vectors(jit(nnx.grad(squares))(model, x))
    )


def test_a_pickled_graph_definition_is_tapped():
    graphdef, state = nnx.split(eva_optax.tap(Doubled(3, 2, rngs=nnx.Rngs(0))))
    again = nnx.merge(pickled(graphdef), state)
    assert set(eva_optax.vectors(jit(nnx.grad(squares))(again, jnp.ones((2, 3))))) == {""}


def test_orbax_round_trip(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    model = network()
    graphdef, state = nnx.split(model)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", pure(state))
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), pure(state))
        restored = checkpointer.restore(tmp_path / "state", abstract)
    np.testing.assert_array_equal(restored["head"]["kernel"], model.head.kernel[...])
    assert_trees_close(restored, pure(state), 0)
    del graphdef


def test_strip_gives_an_untapped_copy_and_leaves_the_model():
    x, labels = images()
    model, plain = network(), network(tapped=False)
    stripped = eva_optax.strip(model)
    assert type(stripped.conv) is nnx.Conv
    assert type(stripped.blocks[0]) is Doubled
    assert jax.tree.structure(nnx.state(stripped)) == jax.tree.structure(nnx.state(plain))
    assert stripped.conv.kernel[...] is model.conv.kernel[...]
    assert jit(loss)(stripped, x, labels) == jit(loss)(model, x, labels)
    assert "conv" in eva_optax.vectors(jit(nnx.grad(loss))(model, x, labels))
    state = eva_optax.strip(nnx.state(model))
    assert isinstance(state, nnx.State)
    assert jax.tree.structure(state) == jax.tree.structure(nnx.state(plain))
    optimizer_state = optax.adam(1e-3).init(nnx.state(model))
    assert jax.tree.structure(eva_optax.strip(optimizer_state)) == jax.tree.structure(optax.adam(1e-3).init(state))


@pytest.mark.parametrize("given", [nnx.state, lambda model: pure_keys(model)], ids=["state", "nested dicts"])
def test_attach_adds_probes_to_a_state(given):
    plain, model = network(tapped=False), network()
    attached = eva_optax.attach(plain, given(plain))
    assert type(plain.conv) is nnx.Conv
    assert jax.tree.structure(attached) == jax.tree.structure(given(model))
    assert_trees_close(attached, given(model), 0)
    assert_trees_close(eva_optax.attach(model, given(model)), given(model), 0)


def pure_keys(model):
    return nnx.to_pure_dict(nnx.state(model))


def test_attach_names_the_missing_layer():
    with pytest.raises(ValueError, match="head"):
        eva_optax.attach(network(), nnx.state(network(tapped=False).conv))


def test_an_untapped_checkpoint_loads_into_a_tapped_model():
    model, other = network(), random_state(Network(nnx.Rngs(1)), seed=5)
    nnx.update(model, nnx.state(other))
    np.testing.assert_array_equal(model.head.kernel[...], other.head.kernel[...])
    assert "head" in eva_optax.vectors(jit(nnx.grad(loss))(model, *images()))


# What is tapped and what is not


def test_tapping_twice_changes_nothing_and_takes_up_embeddings():
    model = nnx.List([nnx.Embed(5, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(0))])
    assert eva_optax.tap(model) is model
    before, cls = model[1].kronecker["kernel,bias"]["a"], type(model[1])
    assert type(model[0]) is nnx.Embed
    eva_optax.tap(model, embeddings=True)
    assert model[1].kronecker["kernel,bias"]["a"] is before
    assert type(model[1]) is cls
    assert type(model[0]) is not nnx.Embed
    assert isinstance(before, nnx.Param)


class Standardised(nnx.Conv):
    """A subclass that computes its kernel from the parameter."""

    def __call__(self, inputs):
        kernel = self.kernel[...]
        self.kernel[...] = kernel - kernel.mean()
        y = super().__call__(inputs)
        self.kernel[...] = kernel
        return y


class Own(nnx.Linear):
    """A subclass that computes its output in its own way."""

    def __call__(self, inputs):
        return inputs @ jnp.tanh(getattr(self, "ker" + "nel")[...])


class AsProperty(nnx.Linear):
    """A subclass whose kernel is no parameter."""

    @property
    def kernel(self):
        return nnx.Param(jnp.tanh(self.raw[...]))

    @kernel.setter
    def kernel(self, value):
        self.raw = value


SKIPPED = {
    "standardised": (lambda r: Standardised(2, 3, 3, rngs=r), "Standardised may change its kernel"),
    "own": (lambda r: Own(2, 3, rngs=r), "Own computes its output in its own way"),
    "property": (lambda r: AsProperty(2, 3, rngs=r), "computed from other parameters"),
    "masked": (lambda r: nnx.Conv(2, 3, 3, mask=jnp.ones((3, 2, 3)), rngs=r), "masked"),
    "embedding": (lambda r: nnx.Embed(2, 3, rngs=r), "embeddings=True"),
    "complex": (lambda r: nnx.Linear(2, 3, param_dtype=jnp.complex64, rngs=r), "complex"),
    "diagonal": (lambda r: nnx.Einsum("bi,ii->bi", (3, 3), rngs=r), "diagonal"),
}


@pytest.mark.parametrize("name", [name for name in ("SpectralNorm", "WeightNorm") if hasattr(nnx, name)])
def test_layers_inside_of_a_reparametrisation_are_reported(name):
    rngs = nnx.Rngs(0)
    model = nnx.List([getattr(nnx, name)(nnx.Linear(2, 3, rngs=rngs), rngs=rngs), nnx.Linear(3, 2, rngs=rngs)])
    reasons = eva_optax.coverage(model).untapped
    assert reasons["0/layer_instance/kernel"] == "kernel is computed from other parameters"
    assert not any(path.startswith("1/") for path in reasons)
    with pytest.raises(ValueError, match="no layer that can be tapped"):
        eva_optax.tap(model[0])


@pytest.mark.parametrize("name", SKIPPED)
def test_layers_untapped_by_intention_are_reported_and_alone_they_raise(name):
    make, reason = SKIPPED[name]
    layer = make(nnx.Rngs(0))
    classes = [type(module) for _, module in nnx.iter_graph(layer) if isinstance(module, nnx.Module)]
    model = nnx.List([layer, nnx.Linear(3, 2, rngs=nnx.Rngs(0))])
    reasons = eva_optax.coverage(model).untapped
    assert any(reason in text for path, text in reasons.items() if path.startswith("0/")), reasons
    assert not any(path.startswith("1/") for path in reasons)
    with pytest.raises(ValueError, match="no layer that can be tapped"):
        eva_optax.tap(layer)
    assert classes == [type(module) for _, module in nnx.iter_graph(layer) if isinstance(module, nnx.Module)]


def test_coverage_reports_every_parameter_and_changes_nothing():
    model = network(tapped=False)
    report = eva_optax.coverage(model)
    assert type(model.conv) is nnx.Conv
    assert {row.path: row.tapped for row in report.rows} == {
        "blocks/0/bias": True,
        "blocks/0/kernel": True,
        "conv/kernel": True,
        "head/bias": True,
        "head/kernel": True,
        "norm/bias": False,
        "norm/scale": False,
        "twice/bias": True,
        "twice/kernel": True,
    }
    assert report.untapped["norm/scale"] == "LayerNorm: scales or shifts element by element"
    assert report == eva_optax.coverage(network())


def test_a_layer_that_occurs_twice_and_layers_that_share_a_kernel_see_all_calls():
    first = random_state(nnx.Linear(3, 3, use_bias=False, rngs=nnx.Rngs(0)))
    second = nnx.Linear(3, 3, use_bias=False, rngs=nnx.Rngs(0))
    second.kernel = first.kernel
    x = inputs((4, 3))
    want = eva_optax.vectors(jit(nnx.grad(lambda m: jnp.sum(jnp.sin(m(m(x))))))(eva_optax.tap(nnx.clone(first))))[""]
    for pair in ((first, first), (first, second)):
        model = eva_optax.tap(nnx.List(nnx.clone(nnx.List(pair))))
        found = eva_optax.vectors(jit(nnx.grad(lambda m: jnp.sum(jnp.sin(m[1](m[0](x))))))(model))
        (got,) = found.values()
        assert_trees_close(got, want)


def test_probes_get_the_kernels_partition_names():
    with jax.set_mesh(Mesh(np.array(jax.devices()[:1]), ("model",))):
        init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
        layer = nnx.Linear(3, 2, kernel_init=init, rngs=nnx.Rngs(0))
        probe = eva_optax.tap(layer).kronecker["kernel,bias"]
        key = "out_sharding" if "out_sharding" in layer.kernel.get_metadata() else "sharding_names"
        names = {name: tuple(leaf.get_metadata()[key]) for name, leaf in probe.items()}
    assert names["b"] == (None, "model")
    assert not any(any(part) for leaf, part in names.items() if leaf != "b")
    linen = nn.Dense(2, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model")))
    params = eva_optax.tap(linen).init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    assert {name: box.names for name, box in params["kronecker"]["kernel,bias"].items()} == names


# Traces, exceptions, caches


def test_importing_the_library_imports_no_flax():
    subprocess.run([sys.executable, "-c", "import eva_optax, sys; assert 'flax' not in sys.modules"], check=True)


def test_models_may_be_tapped_where_they_are_made():
    def make():
        return eva_optax.tap(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))

    def shapes(model):
        return jax.tree.map(lambda leaf: leaf.shape, pure(nnx.state(model)))

    assert shapes(nnx.eval_shape(make)) == shapes(make())
    made = nnx.jit(make)()
    assert set(eva_optax.vectors(jit(nnx.grad(squares))(made, jnp.ones((2, 3))))) == {""}


def test_no_tracer_leaks():
    x, labels = images()
    with jax.checking_leaks():
        graphdef, params = nnx.split(network())
        fast_jit(jax.grad(lambda params: loss(nnx.merge(graphdef, params), x, labels)))(params)


def test_exceptions_leave_nothing_behind():
    snapshot = {cls: dict(vars(cls)) for cls in (nnx.Linear, nnx.Conv, nnx.Module, Doubled, nn.Dense, nn.Module)}

    class Failing(nnx.Linear):
        def __call__(self, inputs):
            super().__call__(inputs)
            raise RuntimeError("inside the model")

    model = eva_optax.tap(Failing(3, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(RuntimeError, match="inside the model"):
        jit(nnx.grad(squares))(model, jnp.ones((2, 3)))
    bridge = eva_optax.tap(nnx.bridge.ToNNX(nn.Dense(2), rngs=nnx.Rngs(0)))
    with pytest.raises(Exception):  # noqa: B017, PT011
        bridge.lazy_init("no array")
    untapped = nn.Dense(2).init(jax.random.key(0), jnp.ones((2, 3)))["params"]
    assert set(untapped) == {"kernel", "bias"}
    assert snapshot == {cls: dict(vars(cls)) for cls in snapshot}
    assert type(nnx.Linear(3, 2, rngs=nnx.Rngs(0))) is nnx.Linear

    half = nnx.List([nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.bridge.ToNNX(nn.Dense(2), rngs=nnx.Rngs(0))])
    half[1].lazy_init(jnp.ones((1, 3)))
    with pytest.raises(ValueError, match="before lazy_init"):
        eva_optax.tap(half)
    assert type(half[0]) is nnx.Linear


def test_a_function_that_was_jitted_untapped_is_traced_again():
    gradient = nnx.jit(nnx.grad(squares))
    model, x = nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jnp.ones((2, 3))
    assert "kronecker" not in gradient(model, x)
    assert set(eva_optax.vectors(gradient(eva_optax.tap(model), x))) == {""}


def test_a_stacked_layer_called_without_its_scan_says_so():
    stack = eva_optax.tap(Stack(nnx.Rngs(0)))
    with pytest.raises((ValueError, TypeError)):
        stack.blocks.up(jnp.ones((4, 3)))
