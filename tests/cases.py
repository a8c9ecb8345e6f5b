"""Layers and models that the tests run through."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests import brute_force

Shape = tuple[int, ...]


def random_like(shapes: Any, seed: int = 0) -> Any:
    """Random parameters of given shapes; boxes and dtypes are kept."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype), shapes)


def assert_close(actual: Any, wanted: Any, tolerance: float = 1e-6) -> None:
    """Equal shapes, and equal entries up to `tolerance` of the largest one."""
    assert actual.shape == wanted.shape
    scale = np.abs(wanted).max(initial=0.1)
    np.testing.assert_allclose(actual, wanted, rtol=tolerance, atol=tolerance * scale)


@dataclass(frozen=True, eq=False)
class LayerCase:
    """One linear layer and what its Kronecker vectors are by definition.

    Attributes:
      layer: the module.
      x: the shape of its input.
      mean_input: a from the input, by brute force, in the kernel's layout.
      per_output: the output's shape with every batch and position axis 1: one entry for each entry of b.
      order: the axes of `per_output` in the order of b.
      equal_x: the input's shape with every batch and position axis 1; None if its patches differ all the same.
      integers: the number of different inputs, if the input holds integers.
    """

    name: str
    layer: nn.Module
    x: Shape
    mean_input: Callable[[np.ndarray], np.ndarray]
    per_output: Shape
    order: Shape | None = None
    equal_x: Shape | None = None
    integers: int = 0
    exact: bool = True
    kernel: str = "kernel"
    call: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def inputs(self, shape: Shape, seed: int = 1) -> np.ndarray:
        """A random input; its entries are not centred, so that no mean is near zero."""
        rng = np.random.default_rng(seed)
        return (
            rng.integers(self.integers, size=shape) if self.integers else rng.normal(0.5, 1, shape).astype(np.float32)
        )

    def lay_out(self, per_output: np.ndarray, shape: Shape) -> np.ndarray:
        """An array with one entry for each output, laid out as b."""
        return np.asarray(per_output).transpose(self.order or range(per_output.ndim)).reshape(shape)


def contraction(name: str, layer: nn.Module, equation: str, x: Shape, kernel: Shape, **call: Any) -> LayerCase:
    """A layer that computes einsum(equation, x, kernel), every letter of the equation spelt out."""
    (letters, in_kernel), y = equation.split("->")[0].split(","), equation.split("->")[1]
    sizes = dict(zip(letters, x, strict=True)) | dict(zip(in_kernel, kernel, strict=True))
    kept = sorted((c for c in y if c in in_kernel), key=in_kernel.index)
    return LayerCase(
        name,
        layer,
        x,
        lambda array: brute_force.contraction_mean(equation, array, kernel),
        per_output=tuple(sizes[c] if c in in_kernel else 1 for c in y),
        order=tuple(y.index(c) for c in y if c not in in_kernel) + tuple(y.index(c) for c in kept),
        equal_x=tuple(1 if c in y and c not in in_kernel else sizes[c] for c in letters),
        call=call,
    )


def _dense(name: str, x: Shape, features: int, **options: Any) -> LayerCase:
    letters = "ntsr"[: len(x) - 1]
    layer = nn.Dense(features, **options)
    return contraction(f"Dense {name}", layer, f"{letters}i,io->{letters}o", x, (x[-1], features))


def _general(name: str, equation: str, x: Shape, kernel: Shape, features: Any, **options: Any) -> LayerCase:
    return contraction(f"DenseGeneral {name}", nn.DenseGeneral(features, **options), equation, x, kernel)


def _einsum(equation: str, spelt_out: str, x: Shape, kernel: Shape, use_bias: bool = True) -> LayerCase:
    layer = nn.Einsum(kernel, equation, use_bias=use_bias)
    name = f"Einsum {equation}" + ("" if use_bias else " without bias")
    return contraction(name, layer, spelt_out, x, kernel)


def convolution(
    name: str, x: Shape, window: Any, features: int = 4, *, local: bool = False, **options: Any
) -> LayerCase:
    """A convolution; its patches are all equal where a constant input meets no padding with zeros."""
    layer = (nn.ConvLocal if local else nn.Conv)(features, window, **options)
    moves = brute_force.geometry(layer)
    rank = len(moves.window)
    outputs = brute_force.patches(np.zeros(x), layer).shape[1 : rank + 1]
    batch = len(x) - rank - 1

    def mean_input(array: np.ndarray) -> np.ndarray:
        found = brute_force.patches(array, layer)
        if local:
            return brute_force.local_patches(found, rank).mean(0)[..., None]
        mean = brute_force.mean_patch(found, rank)
        groups = layer.feature_group_count
        return mean[..., None] if groups == 1 else brute_force.group_channels(mean, groups, features)

    padded = not isinstance(moves.padding, str) or moves.padding.upper() in ("SAME", "SAME_LOWER", "CAUSAL")
    dilated = max(moves.input_dilation) > 1
    equal = (1,) * batch + x[batch:] if local else (1,) * (len(x) - 1) + x[-1:]
    return LayerCase(
        f"{'ConvLocal' if local else 'Conv'} {name}",
        layer,
        x,
        mean_input,
        per_output=(1,) * batch + (outputs if local else (1,) * rank) + (features,),
        equal_x=equal if local or not (padded or dilated) else None,
    )


def transposed(name: str, x: Shape, window: Any, features: int = 4, **options: Any) -> LayerCase:
    """A transposed convolution; its a is a definition, with which G = a b holds only where every patch is whole."""
    layer = nn.ConvTranspose(features, window, **options)
    flipped = options.get("transpose_kernel", False)

    def mean_input(array: np.ndarray) -> np.ndarray:
        mean = brute_force.met_mean(layer, array)
        return mean[..., None, :] if flipped else mean[..., None]

    whole = options.get("padding") == "CIRCULAR" and options.get("strides") is None
    return LayerCase(
        f"ConvTranspose {name}",
        layer,
        x,
        mean_input,
        per_output=(1,) * (len(x) - 1) + (features,),
        equal_x=(1,) * (len(x) - 1) + x[-1:] if whole else None,
        exact=whole,
    )


def _embed(name: str, x: Shape, vocabulary: int, features: int, ids: int | None = None) -> LayerCase:
    return LayerCase(
        f"Embed {name}",
        nn.Embed(vocabulary, features),
        x,
        lambda ids: brute_force.token_frequencies(np.minimum(ids, vocabulary - 1), vocabulary)[:, None],
        per_output=(1,) * len(x) + (features,),
        equal_x=(1,) * len(x),
        integers=ids or vocabulary,
        kernel="embedding",
    )


LAYERS = [
    _dense("over a batch", (6, 5), 4),
    _dense("without bias", (6, 5), 4, use_bias=False),
    _dense("over batch and time", (3, 4, 5), 2),
    _dense("over three position axes", (2, 3, 2, 4, 3), 2, use_bias=False),
    _dense("without batch axis", (5,), 3),
    _dense("with one feature", (6, 5), 1),
    _dense("with one input", (6, 1), 4),
    _dense("of a batch of one", (1, 5), 4),
    replace(_dense("of integers", (6, 5), 4), integers=3),
    _general("with two features", "nti,ihd->nthd", (3, 4, 5), (5, 2, 3), (2, 3)),
    _general("over two axes", "nthd,hdo->nto", (3, 4, 2, 5), (2, 5, 3), 3, axis=(-2, -1)),
    _general("over two axes in any order", "nthd,hdo->nto", (3, 4, 2, 5), (2, 5, 3), 3, axis=(-1, -2), use_bias=False),
    _general("over separate axes", "nitj,ijo->nto", (3, 2, 4, 5), (2, 5, 3), 3, axis=(1, 3)),
    _general("over the first axis", "in,io->no", (5, 6), (5, 3), 3, axis=0),
    _general("with a batch dimension", "hni,hio->hno", (2, 6, 5), (2, 5, 3), 3, batch_dims=0),
    _general(
        "with two batch dimensions",
        "ghnti,ghiop->ghntop",
        (2, 3, 4, 2, 5),
        (2, 3, 5, 2, 3),
        (2, 3),
        batch_dims=(0, 1),
        use_bias=False,
    ),
    _general(
        "with a batch dimension and two axes",
        "hinj,hijo->hno",
        (2, 3, 6, 4),
        (2, 3, 4, 5),
        5,
        batch_dims=0,
        axis=(1, 3),
    ),
    _einsum("nti,io->nto", "nti,io->nto", (3, 4, 5), (5, 2)),
    _einsum("...i,io->...o", "nti,io->nto", (3, 4, 5), (5, 2)),
    _einsum("... i, i o -> ... o", "nti,io->nto", (3, 4, 5), (5, 2), use_bias=False),
    _einsum("...hi,hio->...ho", "nthi,hio->ntho", (3, 4, 2, 5), (2, 5, 3)),
    _einsum("...i,...io->...o", "nhi,hio->nho", (6, 2, 5), (2, 5, 3)),
    _einsum("nhi,hio->hno", "nhi,hio->hno", (6, 2, 5), (2, 5, 3), use_bias=False),
    _einsum("nhi,hio->hno", "nhi,hio->hno", (6, 2, 5), (2, 5, 3)),
    _einsum("nti,io->no", "nti,io->no", (3, 4, 5), (5, 2)),
    _einsum("nti,io->o", "nti,io->o", (3, 4, 5), (5, 2)),
    _einsum("nti,ijo->nto", "nti,ijo->nto", (3, 4, 5), (5, 2, 3)),
    _einsum("nti,oi->nto", "nti,oi->nto", (3, 4, 5), (2, 5)),
    _einsum("nti,ioh->ntho", "nti,ioh->ntho", (3, 4, 5), (5, 2, 3), use_bias=False),
    _einsum("nti,ioh->ntho", "nti,ioh->ntho", (3, 4, 5), (5, 2, 3)),
    _einsum("i,io->o", "i,io->o", (5,), (5, 2)),
    contraction(
        "Einsum with the equation of the call",
        nn.Einsum((5, 2)),
        "nti,io->nto",
        (3, 4, 5),
        (5, 2),
        einsum_str="nti,io->nto",
    ),
    convolution("1D", (3, 7, 2), 3),
    convolution("1D without bias", (3, 7, 2), 3, use_bias=False, padding="VALID"),
    convolution("1D stride 2", (3, 8, 2), 3, strides=2),
    convolution("1D stride beyond the window", (3, 11, 2), 2, strides=3, padding="VALID"),
    convolution("1D kernel dilation", (3, 9, 2), 3, kernel_dilation=2),
    convolution("1D input dilation", (3, 5, 2), 3, input_dilation=2, padding=1),
    convolution("1D causal", (3, 7, 2), 3, padding="CAUSAL", kernel_dilation=2),
    convolution("1D circular", (3, 7, 2), 3, padding="CIRCULAR"),
    convolution("1D circular, even window, stride 2", (3, 7, 2), 4, padding="CIRCULAR", strides=2),
    convolution("1D circular, wrapped twice", (3, 3, 2), 6, padding="CIRCULAR", kernel_dilation=2),
    convolution("1D reflect", (3, 7, 2), 4, padding="REFLECT"),
    convolution("1D reflect and dilated", (3, 5, 2), 3, padding="REFLECT", kernel_dilation=2),
    convolution("1D window beyond the input", (3, 3, 2), 7),
    convolution("1D int padding", (3, 7, 2), 3, padding=2),
    convolution("1D of one position", (3, 1, 2), 1),
    convolution("1D cropped by negative padding", (3, 9, 2), 3, padding=[(-2, -1)]),
    convolution("2D", (2, 6, 5, 3), (3, 3)),
    convolution("2D valid", (2, 5, 6, 3), (2, 3), padding="VALID"),
    convolution("2D stride 2", (2, 7, 6, 3), (3, 2), strides=(2, 1), use_bias=False),
    convolution(
        "2D everything",
        (2, 5, 6, 2),
        (3, 2),
        strides=(2, 3),
        padding=((1, 2), (-1, 3)),
        input_dilation=2,
        kernel_dilation=(1, 2),
    ),
    convolution("2D lowercase padding", (2, 5, 6, 2), (3, 2), padding="same"),
    convolution("2D padding below", (2, 5, 6, 2), (2, 4), padding="SAME_LOWER"),
    convolution("2D one int a side", (2, 5, 6, 2), (3, 3), padding=(2, 1)),
    convolution("2D pairs", (2, 5, 6, 2), (3, 3), padding=((2, 0), (1, 3))),
    convolution("2D circular", (2, 5, 6, 2), (3, 4), padding="CIRCULAR"),
    convolution("2D 1x1", (2, 5, 6, 3), (1, 1), use_bias=False),
    convolution("2D groups", (2, 5, 5, 6), (3, 3), features=4, feature_group_count=2, padding="VALID"),
    convolution(
        "2D three groups", (2, 5, 5, 6), (2, 2), features=6, feature_group_count=3, padding="SAME", use_bias=False
    ),
    convolution("2D depthwise", (2, 5, 5, 3), (3, 3), features=3, feature_group_count=3, padding="CIRCULAR"),
    convolution("2D depthwise, two features a channel", (2, 5, 5, 3), (3, 3), features=6, feature_group_count=3),
    convolution("2D wide", (1, 16, 12, 2), (3, 3)),
    convolution("2D without batch axis", (5, 6, 2), (3, 3)),
    convolution("2D with two batch axes", (2, 3, 5, 4, 2), (3, 3), padding="VALID"),
    convolution("3D", (2, 4, 3, 5, 2), (2, 3, 2), strides=(1, 2, 1)),
    convolution("1D", (3, 7, 2), 3, local=True, padding="VALID"),
    convolution("1D stride 2, without bias", (3, 7, 2), (3,), local=True, strides=2, use_bias=False),
    convolution("1D circular", (3, 5, 2), 4, local=True, padding="CIRCULAR"),
    convolution("1D reflect", (3, 5, 2), 4, local=True, padding="REFLECT"),
    convolution("1D causal", (3, 5, 2), 3, local=True, padding="CAUSAL", kernel_dilation=2),
    convolution("2D", (2, 4, 5, 2), (3, 2), local=True),
    convolution(
        "2D pairs and dilation",
        (2, 3, 4, 2),
        (2, 2),
        local=True,
        padding=((1, 0), (0, 2)),
        input_dilation=2,
        kernel_dilation=2,
    ),
    convolution("2D without batch axis", (4, 5, 2), (3, 3), local=True, padding="VALID"),
    transposed("1D", (3, 5, 2), 3),
    transposed("1D stride 2", (3, 5, 2), 3, strides=2),
    transposed("1D stride beyond the window", (3, 4, 2), 2, strides=3, padding="VALID"),
    transposed("1D valid, without bias", (3, 5, 2), (4,), strides=(2,), padding="VALID", use_bias=False),
    transposed("1D circular", (3, 5, 2), 3, padding="CIRCULAR"),
    transposed("1D circular, even window, flipped", (3, 5, 2), (4,), padding="CIRCULAR", transpose_kernel=True),
    transposed("1D circular stride 2", (3, 5, 2), (3,), strides=2, padding="CIRCULAR"),
    transposed("1D kernel dilation", (3, 5, 2), (3,), strides=2, kernel_dilation=2),
    transposed("1D one int", (3, 5, 2), (3,), strides=2, padding=1),
    transposed("2D pairs", (2, 3, 4, 2), (3, 2), strides=(2, 1), padding=((1, 2), (0, 1))),
    transposed("2D flipped", (2, 3, 4, 2), (3, 3), features=3, strides=(2, 2), transpose_kernel=True),
    transposed("2D flipped and valid", (2, 3, 4, 2), (2, 3), features=3, padding="VALID", transpose_kernel=True),
    transposed("2D without batch axis", (3, 4, 2), (3, 3)),
    transposed("2D with two batch axes", (2, 2, 3, 4, 2), (3, 3), strides=(2, 2)),
    _embed("over a batch", (12,), 5, 3),
    _embed("over batch and time", (3, 6), 7, 2),
    _embed("of one token for all", (6,), 1, 3, ids=4),
]


class Unrolled(nn.Module):
    """What `nn.RNN` computes, as a plain loop."""

    cell: nn.Module

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        carry = self.cell.initialize_carry(jax.random.key(0), x[:, 0].shape)
        ys = []
        for t in range(x.shape[1]):
            carry, y = self.cell(carry, x[:, t])
            ys.append(y)
        return jnp.stack(ys, 1)


@dataclass(frozen=True, eq=False)
class CellCase:
    """A recurrent cell; `plain` computes the same from the same parameters, with a Dense or Conv for each gate."""

    name: str
    cell: nn.Module
    plain: nn.Module
    x: Shape = (3, 4, 5)
    maps: int = 0

    def __str__(self) -> str:
        return self.name

    def inputs(self) -> np.ndarray:
        """(batch, time, *space, features)"""
        return np.random.default_rng(1).normal(0.5, 1, self.x).astype(np.float32)


def _cell(cell: nn.Module, plain: nn.Module | None = None, **options: Any) -> CellCase:
    return CellCase(type(cell).__name__, cell, cell if plain is None else plain, **options)


CELLS = [
    _cell(nn.LSTMCell(2)),
    _cell(nn.OptimizedLSTMCell(2), nn.LSTMCell(2)),
    _cell(nn.GRUCell(2)),
    _cell(nn.MGUCell(2)),
    _cell(nn.SimpleCell(2)),
    _cell(nn.ConvLSTMCell(2, (3, 2), padding="CIRCULAR"), x=(2, 3, 3, 4, 2), maps=2),
]


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
