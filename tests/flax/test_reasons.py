"""The reasons in a coverage report: each is true, and what it advises helps."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import eva_optax
from eva_optax._flax.plans import Skip, equation_plan
from tests.dense import assert_preconditioned
from tests.flax.nnx_cases import fast_jit, random_state

X = jnp.ones((5, 4))
RNGS = nnx.Rngs(0)


def reasons(model, *inputs, **options) -> dict[str, str]:
    return eva_optax.coverage(eva_optax.tap(model, **options), *(inputs or (X,))).untapped


# Subclasses that read their kernel


class Logged(nn.Dense):
    """Reads its kernel and records its norm."""

    @nn.compact
    def __call__(self, inputs):
        y = super().__call__(inputs)
        self.sow("losses", "square", jnp.sum(self.get_variable("params", "kernel") ** 2))
        return y


class Watched(nn.Dense):
    """Looks at its kernel on its way, and passes it on."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        if name == "kernel":
            self.sow("losses", name, jnp.sum(value**2))
        return value


class Pruned(nn.Dense):
    """Changes its kernel on the way, and only that."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        return jnp.where(jnp.abs(value) > 0.1, value, 0) if name == "kernel" else value


class WatchedPruned(Pruned):
    """Passes on what its base has changed."""

    def param(self, name, *args, **kwargs):
        return super().param(name, *args, **kwargs)


class Unnoticed(nn.Dense):
    """Changes its kernel where no interceptor looks."""

    @nn.nowrap
    def param(self, name, *args, **kwargs):
        return 2 * super().param(name, *args, **kwargs)


@pytest.mark.parametrize("layer", [Logged, Watched])
def test_linen_subclasses_that_merely_read_their_kernel_are_tapped(layer):
    model = eva_optax.tap(nn.Sequential([layer(3), jnp.tanh, nn.Dense(2)]))
    assert eva_optax.coverage(model, X).share == 1
    shapes = jax.eval_shape(model.init, jax.random.key(0), X)["params"]
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(np.float32), shapes)
    x = random.normal(size=(5, 4)).astype(np.float32)
    tx = eva_optax.scale_by_eva()

    @fast_jit
    def step(params):
        def loss(params):
            y, found = model.apply({"params": params}, x, mutable=["losses"])
            return jnp.sum(jnp.sin(y)) + 1e-2 * sum(map(jnp.sum, jax.tree.leaves(found)))

        grads = jax.grad(loss)(params)
        return grads, tx.update(grads, tx.init(params))[0]

    assert set(assert_preconditioned(*step(params), 0.1)) == {"layers_0", "layers_2"}


@pytest.mark.parametrize("layer", [Pruned, WatchedPruned, Unnoticed])
def test_linen_subclasses_that_change_their_kernel_are_not_tapped(layer):
    found = reasons(nn.Sequential([layer(3), nn.Dense(2)]))
    reason = f"computed by {layer.__name__}.param"
    assert found == {"layers_0/bias": f"beside an untapped kernel ({reason})", "layers_0/kernel": reason}


class LoggedNNX(nnx.Linear):
    """Reads its kernel and keeps the square of its norm."""

    def __init__(self, rngs):
        super().__init__(4, 3, rngs=rngs)
        self.square = nnx.data(None)

    def __call__(self, inputs):
        y = super().__call__(inputs)
        self.square = jnp.sum(self.kernel[...] ** 2)
        return y


class Centred(nnx.Linear):
    """Writes into its kernel."""

    def __call__(self, inputs):
        self.kernel[...] -= jnp.mean(self.kernel[...])
        return super().__call__(inputs)


class Replaced(nnx.Linear):
    """Puts another kernel in the place of its own."""

    def __call__(self, inputs):
        kept, self.kernel = self.kernel, nnx.Param(2 * self.kernel[...])
        y = super().__call__(inputs)
        self.kernel = kept
        return y


class Valued(nnx.Linear):
    """Sets the value of its kernel."""

    def __call__(self, inputs):
        self.kernel.value = 2 * self.kernel[...]
        return super().__call__(inputs)


class SetByName(nnx.Linear):
    """Sets its kernel by a function."""

    def __call__(self, inputs):
        setattr(self, "kernel", nnx.Param(2 * self.kernel[...]))  # noqa: B010
        return super().__call__(inputs)


def test_an_nnx_subclass_that_merely_reads_its_kernel_is_tapped():
    model = eva_optax.tap(random_state(LoggedNNX(RNGS)))
    assert eva_optax.coverage(model).share == 1
    x = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    graphdef, params = nnx.split(model)
    tx = eva_optax.scale_by_eva()

    @fast_jit
    def step(params):
        def loss(params):
            model = nnx.merge(graphdef, params)
            return jnp.sum(jnp.sin(model(x))) + 1e-2 * model.square

        grads = jax.grad(loss)(params)
        return grads, tx.update(grads, tx.init(params))[0]

    assert set(assert_preconditioned(*step(params), 0.1)) == {""}


@pytest.mark.parametrize("layer", [Centred, Replaced, Valued, SetByName])
def test_nnx_subclasses_that_may_change_their_kernel_are_not_tapped(layer):
    found = eva_optax.coverage(nnx.List([layer(4, 3, rngs=RNGS), nnx.Linear(3, 2, rngs=RNGS)])).untapped
    reason = f"{layer.__name__} may change its kernel before the layer uses it"
    assert found == {"0/bias": f"beside an untapped kernel ({reason})", "0/kernel": reason}


# Embeddings


class Tokens(nn.Module):
    """An embedding, or something that looks like one; and a layer that is tapped."""

    embed: nn.Module

    @nn.compact
    def __call__(self, ids):
        y = nn.Dense(4, name="dense")(jnp.ones((1, 4)))
        return self.embed(ids) if isinstance(self.embed, nn.Embed) else y


class Tied(nn.Module):
    """A table that is only multiplied with."""

    @nn.compact
    def __call__(self, x):
        return nn.Embed(7, 4, name="embed").attend(nn.Dense(4, name="dense")(x))


class Positions(nn.Embed):
    """A table beside the table, in one scope."""

    @nn.compact
    def __call__(self, inputs):
        return super().__call__(inputs) + self.param("positions", nn.initializers.zeros, (1, 1, self.features))


class Scaled(nn.Embed):
    """A table that is scaled before it is looked up."""

    def param(self, name, *args, **kwargs):
        return 2 * super().param(name, *args, **kwargs)


IDS = jnp.zeros((2, 5), int)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Tokens(nn.Embed(7, 4)), IDS),
        (Tokens(nn.Embed(7, 4, param_dtype=jnp.complex64)), IDS),
        (Tokens(Positions(7, 4)), IDS),
        (Tokens(Scaled(7, 4)), IDS),
        (Tied(), X),
    ],
    ids=["looked up", "complex", "with positions", "scaled", "attend"],
)
def test_embeddings_are_said_to_be_off_exactly_where_turning_them_on_helps(model, x):
    off, on = reasons(model, x), reasons(model, x, embeddings=True)
    said = {path for path, reason in off.items() if "embeddings=True" in reason}
    assert said == off.keys() - on.keys()
    assert off.keys() >= on.keys()


class OwnLookup(nnx.Embed):
    """A lookup of its own."""

    def __call__(self, inputs):
        return jnp.take(self.embedding[...], inputs, 0)


@pytest.mark.parametrize(
    "embed",
    [
        lambda: nnx.Embed(7, 4, rngs=RNGS),
        lambda: nnx.Embed(7, 4, param_dtype=jnp.complex64, rngs=RNGS),
        lambda: OwnLookup(7, 4, rngs=RNGS),
    ],
    ids=["looked up", "complex", "own lookup"],
)
def test_nnx_embeddings_are_said_to_be_off_exactly_where_turning_them_on_helps(embed):
    model = nnx.List([embed(), nnx.Linear(4, 3, rngs=RNGS)])
    off, on = eva_optax.coverage(model).untapped, eva_optax.coverage(model, embeddings=True).untapped
    assert list(off) == ["0/embedding"]
    assert {path for path, reason in off.items() if "embeddings=True" in reason} == off.keys() - on.keys()


# Equations


@pytest.mark.parametrize(
    ("equation", "x", "kernel", "reason"),
    [
        ("bi,ii->bi", (5, 4), (4, 4), "einsum equation takes a diagonal"),
        ("...i,io->...o", (5, 1), (4, 3), "einsum broadcasts the kernel or the input"),
        ("...i,io->...o", (5, 4), (1, 3), "einsum broadcasts the kernel or the input"),
        ("...i,oi->...o", (5, 4), (4, 3), "einsum equation '...i,oi->...o' does not fit"),
        ("bti,io->bto", (5, 4), (4, 3), "does not fit an input of shape (5, 4) and a kernel of shape (4, 3)"),
        ("...i,io->...o", (5, 4), (4, 2, 3), "does not fit"),
        ("...i,io->...o", (), (4, 3), "does not fit"),
        ("...ti,io->...o", (4,), (4, 3), "does not fit"),
    ],
)
def test_an_equation_that_does_not_fit_is_not_said_to_broadcast(equation, x, kernel, reason):
    plan = equation_plan(equation, kernel, x)
    assert isinstance(plan, Skip)
    assert reason in plan.reason


# Whose classes, and which of two


class Einsum(nn.Module):
    """Somebody else's class of this name."""

    @nn.compact
    def __call__(self, x):
        return x @ self.param("w", nn.initializers.ones, (x.shape[-1], 3))


class LinearGeneral(nnx.Module):
    """Somebody else's class of this name in NNX."""

    def __init__(self):
        self.w = nnx.Param(jnp.ones((4, 3)))


def test_somebody_elses_class_has_its_modules_name_and_the_remedy_helps():
    model, wanted = nn.Sequential([nn.Dense(4), Einsum()]), "has no rule: its parameter is used directly"
    assert reasons(model) == {"layers_1/w": f"{__name__}.Einsum {wanted} (eva_optax.register)"}
    with eva_optax.register(Einsum, kernel="w", equation="...i,io->...o"):
        assert reasons(model) == {}
    found = eva_optax.coverage(nnx.List([LinearGeneral(), nnx.Linear(2, 2, rngs=RNGS)])).untapped
    assert found == {"0/w": f"{__name__}.LinearGeneral {wanted} (eva_optax.register)"}


class Inner(nn.Module):
    """Two matrices of its own."""

    def setup(self):
        self.early = self.param("early", nn.initializers.ones, (4, 4))

    @nn.compact
    def __call__(self, x):
        return x @ self.early @ self.param("late", nn.initializers.ones, (4, 4))


class Outer(nn.Module):
    """Shares its scope with the module inside, and has matrices too."""

    def setup(self):
        self.inner = Inner()
        nn.share_scope(self, self.inner)
        self.zeroth = self.param("zeroth", nn.initializers.ones, (4, 4))

    @nn.compact
    def __call__(self, x):
        first = self.param("first", nn.initializers.ones, (4, 4))
        x = self.inner(x @ self.zeroth @ first) @ self.param("last", nn.initializers.ones, (4, 4))
        return nn.Dense(2, name="dense")(x)


def test_with_a_shared_scope_the_class_is_named_that_made_the_parameter():
    owners = {path: reason.split(" has no rule")[0] for path, reason in reasons(Outer()).items()}
    assert owners == {"early": "Inner", "late": "Inner", "zeroth": "Outer", "first": "Outer", "last": "Outer"}


# Stacks


class Scales(nn.Module):
    """Vectors and a matrix that nothing knows, in the signature of a scan."""

    @nn.compact
    def __call__(self, x, _):
        x = nn.Dense(4, name="dense")(nn.LayerNorm(name="norm")(x))
        scale = self.param("scale", nn.initializers.ones, (4,))
        gain = self.param("gain", nn.initializers.ones, ())
        matrix = self.param("matrix", nn.with_partitioning(nn.initializers.ones, (None, "model")), (4, 4))
        return gain * (x * scale.reshape(1, 4)) @ matrix, None


def scanned(axis):
    scan = nn.scan(
        nn.scan(
            Scales,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
            metadata_params={nn.PARTITION_NAME: "inner"},
        ),
        variable_axes={"params": axis},
        split_rngs={"params": True},
        length=3,
        metadata_params={nn.PARTITION_NAME: "outer"},
    )

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return scan(name="blocks")(x, None)[0]

    return Model()


@pytest.mark.parametrize("axis", [0, 1])
def test_stacked_vectors_are_vectors(axis):
    found = reasons(scanned(axis))
    assert found.pop("blocks/matrix").startswith("Scales has no rule: ")
    assert (
        found.pop("blocks/norm/scale")
        == found.pop("blocks/norm/bias")
        == "LayerNorm: scales or shifts element by element"
    )
    assert found == dict.fromkeys(("blocks/gain", "blocks/scale"), "a vector, not a matrix")


class ScaledNNX(nnx.Module):
    """Vectors and a matrix that nothing knows, beside a layer."""

    def __init__(self, rngs):
        self.norm, self.dense = nnx.LayerNorm(4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)
        self.scale, self.gain, self.matrix = (nnx.Param(jnp.ones(shape)) for shape in ((4,), (), (4, 4)))


@pytest.mark.parametrize("axis", [0, 1])
def test_stacked_vectors_of_nnx_are_vectors(axis):
    stack = nnx.split_rngs(splits=3)(nnx.vmap(ScaledNNX, out_axes=nnx.StateAxes({...: 0})))(nnx.Rngs(0))
    if axis == 1:  # behind the first axis, where there is one
        swapped = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, min(1, leaf.ndim - 1)), nnx.state(stack))
        nnx.update(stack, swapped)
    model = nnx.Dict(blocks=stack, head=nnx.Linear(4, 2, rngs=RNGS), matrix=nnx.Param(jnp.ones((2, 3))))
    found = eva_optax.coverage(model).untapped
    assert found.pop("blocks/matrix").startswith("ScaledNNX has no rule: ")
    assert found.pop("matrix") == "its parameter is used otherwise than by a call of Dict"
    assert found.pop("blocks/norm/scale") == found.pop("blocks/norm/bias")
    assert found == dict.fromkeys(("blocks/gain", "blocks/scale"), "a vector, not a matrix")
