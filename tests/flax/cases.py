"""Linen models: layers under every circumstance in which they may run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]


class Block(nn.Module):
    """One linear layer and a nonlinearity; its features are its input's."""

    layer: str = "dense"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        match self.layer:
            case "general":  # the bias has another rank than that of a Dense
                return jnp.tanh(nn.DenseGeneral(x.shape[-2:], axis=(-2, -1), name="linear")(x))
            case "no bias":
                return jnp.tanh(nn.Dense(x.shape[-1], use_bias=False, name="linear")(x))
            case "grouped":
                return jnp.tanh(nn.Conv(x.shape[-1], (2,), feature_group_count=2, name="linear")(x))
        return jnp.tanh(nn.Dense(x.shape[-1], name="linear")(x))


class Scanned(nn.Module):
    """`length` blocks whose parameters are stacked at `axis`, in one scan."""

    length: int = 3
    axis: int = 0
    layer: str = "dense"
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = (nn.remat(Block) if self.remat else Block)(self.layer, name="blocks")
        scan = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=self.length,
        )
        return scan(block, x, None)[0]


class NestedScan(nn.Module):
    """A scan of scans."""

    outer: int
    inner: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scan = nn.scan(
            lambda stage, x, _: (stage(x), None),
            variable_axes={"params": self.outer},
            split_rngs={"params": True},
            length=2,
        )
        return scan(Scanned(3, self.inner, name="stages"), x, None)[0]


def _sliced(tree: Any, index: int, axis: int) -> Any:
    return jax.tree.map(lambda leaf: jnp.take(leaf, index, axis), tree)


def _scanned(length: int, axis: int, layer: str = "dense") -> Callable[[Any, jax.Array], jax.Array]:
    """What `Scanned` computes, as a loop."""

    def plain(params: Any, x: jax.Array) -> jax.Array:
        for index in range(length):
            x = Block(layer).apply({"params": _sliced(params["blocks"], index, axis)}, x)
        return x

    return plain


def _nested(outer: int, inner: int) -> Callable[[Any, jax.Array], jax.Array]:
    def plain(params: Any, x: jax.Array) -> jax.Array:
        for index in range(2):
            x = _scanned(3, inner)(_sliced(params["stages"], index, outer), x)
        return x

    return plain


class Experts(nn.Module):
    """One block for each entry of the first axis, or one block for all of them."""

    shared: bool = False
    split_inputs: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        experts = nn.vmap(
            Block,
            variable_axes={"params": None if self.shared else 0},
            split_rngs={"params": not self.shared},
            in_axes=0 if self.split_inputs else None,
            axis_size=3,
        )
        return experts(name="experts")(x)


def _experts(split_inputs: bool) -> Callable[[Any, jax.Array], jax.Array]:
    def plain(params: Any, x: jax.Array) -> jax.Array:
        each = [
            Block().apply({"params": _sliced(params["experts"], index, 0)}, x[index] if split_inputs else x)
            for index in range(3)
        ]
        return jnp.stack(each)

    return plain


def _shared_experts(params: Any, x: jax.Array) -> jax.Array:
    return jnp.stack([Block().apply({"params": params["experts"]}, each) for each in x])


class Switched(nn.Module):
    """One of three blocks, by `nn.switch`, or one of the first two, by `nn.cond`."""

    taken: int
    cond: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        blocks = [Block(name=f"block_{index}") for index in range(3)]

        def run(index: int) -> Callable[[nn.Module, jax.Array], jax.Array]:
            return lambda module, x: blocks[index](x)

        if self.is_initializing():
            for index in range(3):
                blocks[index](x)
        if self.cond:
            return nn.cond(jnp.array(self.taken == 0), run(0), run(1), self, x)
        return nn.switch(jnp.array(self.taken), [run(0), run(1), run(2)], self, x)


class Wrapped(nn.Module):
    """A block inside a lifted transformation that leaves the parameters alone."""

    lift: Callable[..., Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.lift(Block)(name="block")(x)


class SharedLayer(nn.Module):
    """One layer that is called twice."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = nn.Dense(x.shape[-1], name="shared")
        return layer(jnp.tanh(layer(x)) + 1)


class SetupStyle(nn.Module):
    """Submodules made in `setup`: one, a list and a dict of them."""

    def setup(self) -> None:
        self.first = nn.Dense(4)
        self.more = [nn.Dense(4), nn.Dense(3)]
        self.heads = {"a": nn.Dense(2), "b": nn.Dense(2)}

    def encode(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.first(x))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.encode(x)
        for layer in self.more:
            x = jnp.tanh(layer(x))
        return self.heads["a"](x) * self.heads["b"](x)


class Regularized(nn.Module):
    """Convolution, BatchNorm and Dropout: another collection, and another random stream."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = True) -> jax.Array:
        x = nn.Conv(4, (2, 2))(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(3)(x)


class Doubling(nn.Dense):
    """A subclass that changes what goes in and out, and leaves the rest to `nn.Dense`."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return 3 * super().__call__(2 * x)


class StandardizedDense(nn.Dense):
    """A subclass whose kernel is not the parameter."""

    def param(self, name: str, *args: Any, **kwargs: Any) -> Any:
        value = super().param(name, *args, **kwargs)
        return value / jnp.linalg.norm(value) if name == "kernel" else value


class Skipped(nn.Module):
    """Layers that cannot be tapped, between two that can."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(4, name="tapped")(x)
        x = StandardizedDense(4, name="standardized")(x)
        x = nn.WeightNorm(nn.Dense(4, name="weight"), name="weight_norm")(x)
        x = nn.SpectralNorm(nn.Dense(4, name="spectral"), name="spectral_norm")(x, update_stats=True)
        mask = jnp.tril(jnp.ones((2, 4)))[..., None] * jnp.ones((1, 1, 4))
        x = nn.Conv(4, (2,), mask=mask, name="masked")(x)
        x = x @ self.param("raw", nn.initializers.lecun_normal(), (4, 4))
        return nn.Dense(3, name="last")(jnp.tanh(x))


class LanguageModel(nn.Module):
    """A tiny transformer with a learnt embedding."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        x = nn.Embed(7, 4)(ids)
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=nn.make_causal_mask(ids))
        return nn.Dense(7)(nn.LayerNorm()(x))


@dataclass(frozen=True, eq=False)
class ModelCase:
    """A model whose layers run under some circumstance.

    Attributes:
      x: the shape of its input.
      plain: the same computation from the same parameters with every layer called as plain Python; the model itself if
        it has no lifted transformation.
      path: the path of the layer's calls in `plain`, for the one layer of a lifted model.
      stacks: axis and size of each stack of parameters of that layer, the outermost first.
      unused: layers that the loss does not depend on.
      oracle: whether the vectors can be compared with `plain` at all.
      variant: whether the model differs from one before it in its shapes alone.
    """

    name: str
    model: nn.Module
    x: Shape = (5, 4)
    plain: Callable[[Any, jax.Array], jax.Array] | None = None
    path: str | None = None
    stacks: tuple[tuple[int, int], ...] = ()
    unused: tuple[str, ...] = ()
    oracle: bool = True
    variant: bool = False
    integers: int = 0
    embeddings: bool = False
    rngs: tuple[str, ...] = ()
    mutable: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    def inputs(self) -> jax.Array:
        rng = np.random.default_rng(1)
        if self.integers:
            return jnp.asarray(rng.integers(self.integers, size=self.x))
        return jnp.asarray(rng.normal(0.5, 1, self.x), jnp.float32)

    def init(self, model: Any, key: jax.Array) -> Any:
        keys = {name: jax.random.fold_in(key, index) for index, name in enumerate(("params", *self.rngs))}
        return model.init(keys, self.inputs())

    def run(self, model: Any, variables: Any) -> tuple[jax.Array, Any]:
        """The output and the updated collections."""
        rngs = {name: jax.random.key(index) for index, name in enumerate(self.rngs)}
        return model.apply(variables, self.inputs(), rngs=rngs, mutable=list(self.mutable))


MODELS = [
    ModelCase("nested modules", nn.Sequential([Block(), jnp.tanh, nn.Dense(3)])),
    ModelCase("time axis", nn.Sequential([Block(), nn.Dense(3)]), x=(3, 2, 4), variant=True),
    ModelCase("no batch axis", nn.Sequential([Block(), nn.Dense(3)]), x=(4,), variant=True),
    ModelCase("shared layer", SharedLayer()),
    ModelCase("setup", SetupStyle()),
    ModelCase("setup in Sequential", nn.Sequential([SetupStyle(), nn.Dense(2)]), variant=True),
    *(
        ModelCase(
            f"scan at axis {axis}, {layer}",
            Scanned(3, axis, layer),
            x,
            _scanned(3, axis, layer),
            "linear",
            ((axis, 3),),
            variant=(axis, layer) not in [(0, "dense"), (1, "general"), (-1, "grouped")],
        )
        for axis, layer, x in [
            (0, "dense", (5, 4)),
            (1, "dense", (5, 4)),
            (-1, "dense", (5, 4)),
            (1, "no bias", (5, 4)),
            (0, "general", (5, 2, 3)),
            (1, "general", (5, 2, 3)),
            (-1, "general", (5, 2, 3)),
            (-2, "general", (5, 2, 3)),
            (1, "grouped", (3, 5, 4)),
            (-1, "grouped", (3, 5, 4)),
        ]
    ),
    ModelCase("scan of length one", Scanned(1), plain=_scanned(1, 0), path="linear", stacks=((0, 1),), variant=True),
    *(
        ModelCase(
            f"scan at axis {outer} of a scan at axis {inner}",
            NestedScan(outer, inner),
            plain=_nested(outer, inner),
            path="linear",
            stacks=((outer, 2), (inner, 3)),
            variant=(outer, inner) != (1, 0),
        )
        for outer, inner in [(0, 0), (0, 1), (1, 0), (-1, 0), (1, -1)]
    ),
    *(
        ModelCase(
            name, Wrapped(lift), plain=lambda params, x: Block().apply({"params": params["block"]}, x), path="linear"
        )
        for name, lift in [("remat", nn.remat), ("jit", nn.jit)]
    ),
    ModelCase("scan and remat", Scanned(remat=True), plain=_scanned(3, 0), path="linear", stacks=((0, 3),)),
    ModelCase("experts", Experts(), (3, 5, 4), _experts(True), "linear", ((0, 3),)),
    ModelCase(
        "experts with one input",
        Experts(split_inputs=False),
        plain=_experts(False),
        path="linear",
        stacks=((0, 3),),
        variant=True,
    ),
    ModelCase("vmap with shared parameters", Experts(shared=True), (3, 5, 4), _shared_experts, "linear"),
    *(
        ModelCase(
            f"{'cond' if cond else 'switch'} to block {taken}",
            Switched(taken, cond),
            plain=lambda params, x, taken=taken: Block().apply({"params": params[f"block_{taken}"]}, x),
            path="linear",
            unused=tuple(f"block_{index}/linear" for index in range(3) if index != taken),
            variant=taken > 0,
        )
        for taken, cond in [(0, True), (1, True), (0, False), (2, False)]
    ),
    ModelCase("BatchNorm and Dropout", Regularized(), (3, 3, 4, 2), rngs=("dropout",), mutable=("batch_stats",)),
    ModelCase("subclass that calls super", nn.Sequential([Doubling(4), nn.Dense(3)]), oracle=False),
    ModelCase("layers that are skipped", Skipped(), (3, 4, 4), oracle=False, mutable=("batch_stats",)),
    ModelCase("language model", LanguageModel(), (2, 5), integers=7, variant=True),
    ModelCase("language model with its embedding", LanguageModel(), (2, 5), integers=7, embeddings=True, oracle=False),
    ModelCase("recurrent", nn.RNN(nn.OptimizedLSTMCell(2)), (2, 3, 4), oracle=False),
    ModelCase("transposed convolution", nn.ConvTranspose(3, (2, 2), strides=(2, 2)), (2, 3, 3, 2), oracle=False),
    ModelCase("einsum", nn.Einsum((4, 2, 3), "...i,ihd->...hd"), oracle=False),
]


def transparent() -> list[ModelCase]:
    """The models that differ in more than shapes."""
    return [case for case in MODELS if not case.variant]
