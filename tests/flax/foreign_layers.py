"""Stand-ins for layers of other libraries: the same names, arguments, parameters and shapes, and nothing else of them.

The models around them all take an input of shape (batch, time, WIDTH). A model is known by the heading under which
docs/layers.md has its recipe; PATHS says where the recipe imports the classes from. A name is that of a model which the
recipe itself defines.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

WIDTH = 6


def draw(shape: tuple[int, ...]) -> Any:
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


class FlaxConv1D(nn.Module):
    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, inputs: Any) -> Any:
        y = inputs @ self.param("kernel", nn.initializers.normal(), (self.features, inputs.shape[-1])).T
        return y + self.param("bias", nn.initializers.zeros, (self.features,)).reshape(1, 1, -1) if self.use_bias else y


class GPT2(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return FlaxConv1D(3, use_bias=False, name="c_proj")(nn.gelu(FlaxConv1D(8, name="c_fc")(x)))


class Einsum(nn.Module):
    shape: tuple[int, ...]
    weight_name: str = "w"

    @nn.compact
    def __call__(self, eqn: str, x: Any) -> Any:
        return jnp.einsum(eqn, x, self.param(self.weight_name, nn.initializers.zeros, self.shape))


class GemmaFeedForward(nn.Module):
    """Two layers that share the parameters' scope of the module around them."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        gating = Einsum((2, 4, WIDTH), weight_name="gating_einsum")
        nn.share_scope(self, gating)
        gate, up = jnp.moveaxis(gating("...F,NHF->...NH", x), -2, 0)
        linear = Einsum((4, WIDTH), weight_name="linear")
        nn.share_scope(self, linear)
        return linear("...H,HF->...F", nn.gelu(gate) * up)


class Gemma(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        q = Einsum((2, WIDTH, 3), name="q_einsum")("BTD,NDH->BTNH", x)
        k, v = Einsum((2, 2, WIDTH, 3), name="kv_einsum")("BSD,CKDH->CBSKH", x)
        y = Einsum((2, 3, WIDTH), name="attn_vec_einsum")(eqn="BTNH,NHD->BTD", x=q * k + v)
        scale = self.param("scale", nn.initializers.ones, (WIDTH,))
        return GemmaFeedForward(name="mlp")(y * scale.reshape(1, 1, -1))


def typed(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator, as that which checks types at run time."""

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return checked


class RecurrentEinsum(nn.Module):
    w_shape: tuple[int, ...]
    b_shape: tuple[int, ...]
    eqn: str

    def setup(self) -> None:
        self.w = self.param("w", nn.initializers.normal(), self.w_shape)
        self.b = self.param("b", nn.initializers.zeros, self.b_shape)

    @typed
    def __call__(self, x: Any) -> Any:
        y = jnp.einsum(self.eqn, x, self.w)
        return y + jnp.broadcast_to(self.b, y.shape)


class BlockDiagonalLinear(nn.Module):
    width: int
    num_blocks: int

    def setup(self) -> None:
        size = self.width // self.num_blocks
        self.w = self.param("w", nn.initializers.normal(), [self.num_blocks, size, size])
        self.b = self.param("b", nn.initializers.zeros, [self.num_blocks, size])

    @typed
    def __call__(self, x: Any) -> Any:
        blocks = x.reshape(*x.shape[:-1], self.num_blocks, -1)
        y = jnp.einsum("... h i, h i j -> ... h j", blocks, self.w)
        return (y + jnp.broadcast_to(self.b, y.shape)).reshape(x.shape)


class RecurrentGemma(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        gate, up = RecurrentEinsum((2, WIDTH, 4), (2, 1, 1, 4), "...td,cdD->c...tD")(x)
        return BlockDiagonalLinear(4, 2)(jnp.tanh(gate) * up)


class LinearHeadwiseExpand(nn.Module):
    num_heads: int
    out_features: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        shape = self.num_heads, self.out_features // self.num_heads, x.shape[-1] // self.num_heads
        kernel = self.param("kernel", nn.initializers.normal(), shape)
        y = jnp.einsum("...hd,hod->...ho", x.reshape(*x.shape[:-1], self.num_heads, -1), kernel)
        y = y.reshape(*x.shape[:-1], -1)
        return y + self.param("bias", nn.initializers.zeros, (self.out_features,)).reshape(1, 1, -1)


class T5DenseGeneral(nn.Module):
    features: Any
    axis: Any = -1

    @nn.compact
    def __call__(self, inputs: Any) -> Any:
        features, axes = np.atleast_1d(self.features), [axis % inputs.ndim for axis in np.atleast_1d(self.axis)]
        sizes = [inputs.shape[axis] for axis in axes]
        kernel = self.param("kernel", nn.initializers.normal(), (np.prod(sizes), np.prod(features)))
        return jnp.tensordot(inputs, kernel.reshape(*sizes, *features), (axes, list(range(len(axes)))))


class T5(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        y = jnp.tanh(T5DenseGeneral((2, 4), name="query")(x))
        return T5DenseGeneral(3, name="wi")(T5DenseGeneral(WIDTH, axis=(-2, -1), name="out")(y))


class MaxTextDenseGeneral(nnx.Module):
    def __init__(self, inputs: Any, outputs: Any, axis: Any = -1, use_bias: bool = False, *, rngs: nnx.Rngs):
        self.in_features_shape, self.out_features_shape, self.axis = (
            tuple(int(value) for value in np.atleast_1d(values)) for values in (inputs, outputs, axis)
        )
        shape = self.in_features_shape + self.out_features_shape
        self.kernel = nnx.Param(draw(shape))
        self.bias = nnx.Param(jnp.zeros(self.out_features_shape)) if use_bias else None

    def __call__(self, inputs: Any, _initializing: bool = False, out_sharding: Any = None) -> Any:
        axes = [axis % inputs.ndim for axis in self.axis]
        y = jnp.tensordot(inputs, self.kernel[...], (axes, list(range(len(axes)))))
        return y if self.bias is None else y + jnp.broadcast_to(self.bias[...], y.shape)


class MaxText(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.query = MaxTextDenseGeneral(WIDTH, (2, 4), use_bias=True, rngs=rngs)
        self.out = MaxTextDenseGeneral((2, 4), 3, (-2, -1), rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.out(jnp.tanh(self.query(inputs=x)), out_sharding=None)


class TunixEinsum(nnx.Module):
    def __init__(self, einsum_str: str, shape: tuple[int, ...], w_scale: float | None = None, *, rngs: nnx.Rngs):
        self.einsum_str, self.shape, self.w_scale = einsum_str, shape, w_scale
        self.w = nnx.Param(draw(shape))

    @jax.named_scope("einsum")
    def __call__(self, x: Any) -> Any:
        return jnp.einsum(self.einsum_str, x, self.w[...] * (self.w_scale or 1))


class Tunix(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.q_proj = TunixEinsum("BTD,NDH->BTNH", (2, WIDTH, 3), rngs=rngs)
        self.kv_proj = TunixEinsum("BSD,CKDH->CBSKH", (2, 2, WIDTH, 3), rngs=rngs)
        self.o_proj = TunixEinsum("BTNH,NHD->BTD", (2, 3, WIDTH), rngs=rngs)
        self.scaled = TunixEinsum("...tm,md->...td", (WIDTH, 3), 0.25, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        k, v = self.kv_proj(x)
        return self.scaled(self.o_proj(self.q_proj(x) * jnp.tanh(k) + v))


class ShardedLinear(nnx.Module):
    def __init__(self, in_dim: int, out_dim: int, *, use_bias: bool = True, rngs: nnx.Rngs):
        self.kernel = nnx.Param(draw((in_dim, out_dim)))
        self.bias = nnx.Param(jnp.zeros(out_dim)) if use_bias else nnx.data(jnp.zeros(out_dim))

    def __call__(self, x: Any, *, out_sharding: Any) -> Any:
        y = jnp.matmul(x, self.kernel[...])
        return y + jnp.broadcast_to(self.bias[...], y.shape)


class Bonsai(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up, self.down = ShardedLinear(WIDTH, 4, rngs=rngs), ShardedLinear(4, 3, use_bias=False, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.down(jnp.tanh(self.up(x, out_sharding=None)), out_sharding=None)


class Routed(nnx.Module):
    """Each token goes to the expert of its largest entry; the modules are those of the recipe."""

    def __init__(self, ragged: Callable[..., Any], dense: Callable[..., Any], rngs: nnx.Rngs):
        self.ragged, self.dense = ragged(2, WIDTH, 4, rngs), dense(2, WIDTH, 3, rngs)

    def __call__(self, x: Any) -> Any:
        expert = jnp.argmax(x, -1) % 2
        rows, order = x.reshape(-1, WIDTH), jnp.argsort(expert.ravel())
        sizes = jnp.bincount(expert.ravel(), length=2)
        y = self.ragged(rows[order], sizes)[jnp.argsort(order)].reshape(x.shape)
        return self.dense(y, jax.nn.one_hot(expert, 2))


LINEN = {
    "Hugging Face `FlaxConv1D`": GPT2,
    "Gemma `Einsum`": Gemma,
    "recurrentgemma `Einsum` and `BlockDiagonalLinear`": RecurrentGemma,
    "xLSTM `LinearHeadwiseExpand`": functools.partial(LinearHeadwiseExpand, 2, 8),
    "t5x `DenseGeneral`": T5,
    "Raw convolution kernels": "Convolutions",
}
NNX = {
    "MaxText `DenseGeneral`": MaxText,
    "tunix `Einsum`": Tunix,
    "bonsai `ShardedLinear`": Bonsai,
    "Routed experts": Routed,
}
PATHS = {
    "transformers.models.gpt2.modeling_flax_gpt2.FlaxConv1D": FlaxConv1D,
    "gemma.gm.nn._layers.Einsum": Einsum,
    "recurrentgemma.jax.layers.Einsum": RecurrentEinsum,
    "recurrentgemma.jax.layers.BlockDiagonalLinear": BlockDiagonalLinear,
    "xlstm_jax.models.xlstm_parallel.components.linear_headwise.LinearHeadwiseExpand": LinearHeadwiseExpand,
    "t5x.examples.scalable_t5.layers.DenseGeneral": T5DenseGeneral,
    "MaxText.layers.linears.DenseGeneral": MaxTextDenseGeneral,
    "tunix.models.qwen3.model.Einsum": TunixEinsum,
    "bonsai.models.gemma3.modeling.ShardedLinear": ShardedLinear,
}
