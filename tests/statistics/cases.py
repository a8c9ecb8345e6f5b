"""Linear layers and recurrent cells in Linen, and what their Kronecker vectors are by definition."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.statistics import brute_force

Shape = tuple[int, ...]


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
