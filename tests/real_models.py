"""Models in Linen as they are usually written, in sizes for tests."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import eva_optax


def cross_entropy(logits: Any, labels: Any) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@dataclass(frozen=True, eq=False)
class RealModel:
    """A model, a batch and a loss.

    Attributes:
      make: makes the model; in NNX from `nnx.Rngs`.
      inputs: what it is called with.
      loss: from its outputs and the targets.
      targets: what the loss compares with.
      additive: the names of parameters that are added or concatenated, not multiplied: no matrices.
    """

    name: str
    make: Callable[..., Any]
    inputs: tuple[Any, ...]
    targets: Any
    loss: Callable[[Any, Any], jax.Array] = cross_entropy
    additive: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name


RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.normal(size=(4, 16, 16, 3)).astype(np.float32)
PIXELS = RANDOM.uniform(size=(4, 8, 8, 1)).astype(np.float32)
LABELS = np.arange(4) % 3
TOKENS = RANDOM.integers(11, size=(3, 6))
NODES = RANDOM.normal(size=(7, 5)).astype(np.float32)
SENDERS, RECEIVERS = RANDOM.integers(7, size=(2, 12))


class Bottleneck(nn.Module):
    """The block of ResNet-50."""

    filters: int
    strides: int

    @nn.compact
    def __call__(self, x):
        conv, norm = partial(nn.Conv, use_bias=False), partial(nn.BatchNorm, use_running_average=False, momentum=0.9)
        y = nn.relu(norm()(conv(self.filters, (1, 1))(x)))
        y = nn.relu(norm()(conv(self.filters, (3, 3), strides=self.strides)(y)))
        y = norm(scale_init=nn.initializers.zeros)(conv(4 * self.filters, (1, 1))(y))
        if x.shape != y.shape:
            x = norm(name="norm_proj")(conv(4 * self.filters, (1, 1), strides=self.strides, name="conv_proj")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet-50 with two stages of one block."""

    stages: tuple[int, ...] = (1, 1)

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], use_bias=False, name="conv_init")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False, name="bn_init")(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for stage, blocks in enumerate(self.stages):
            for block in range(blocks):
                x = Bottleneck(4 * 2**stage, 2 if stage > 0 and block == 0 else 1)(x)
        return nn.Dense(3)(x.mean((1, 2)))


class DecoderBlock(nn.Module):
    """A pre-LN transformer block, with the signature that `nn.scan` wants."""

    @nn.compact
    def __call__(self, x, _):
        y = nn.LayerNorm(use_bias=False)(x)
        query, key, value = (nn.DenseGeneral((2, 4), use_bias=False, name=name)(y) for name in ("q", "k", "v"))
        mask = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))[None, None]
        y = nn.dot_product_attention(query, key, value, mask=mask)
        x = x + nn.DenseGeneral(8, axis=(-2, -1), use_bias=False, name="o")(y)
        y = nn.LayerNorm(use_bias=False)(x)
        return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(y))), None


class Decoder(nn.Module):
    """A language model: scanned and rematerialised blocks, embeddings tied to the output."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(11, 8)
        x = embed(tokens) + self.param("positions", nn.initializers.normal(0.02), (1, tokens.shape[1], 8))
        block = nn.remat(DecoderBlock, prevent_cse=False)
        blocks = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        x, _ = blocks()(x, None)
        return embed.attend(nn.LayerNorm(use_bias=False)(x))


class EncoderBlock(nn.Module):
    """A block of a vision transformer."""

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2)(y, y)
        y = nn.LayerNorm()(x)
        return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(y)))


class ViT(nn.Module):
    """A vision transformer with a class token."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (8, 8), strides=(8, 8), padding="VALID", name="patches")(x)
        x = x.reshape(x.shape[0], -1, 8)
        cls = self.param("cls", nn.initializers.zeros, (1, 1, 8))
        x = jnp.concatenate([jnp.tile(cls, (x.shape[0], 1, 1)), x], 1)
        x = x + jnp.broadcast_to(self.param("positions", nn.initializers.normal(0.02), (1, x.shape[1], 8)), x.shape)
        x = EncoderBlock()(x)
        return nn.Dense(3, name="head")(nn.LayerNorm()(x)[:, 0])


class VAE(nn.Module):
    """A variational autoencoder of convolutions."""

    @nn.compact
    def __call__(self, x):
        y = nn.relu(nn.Conv(4, (3, 3), strides=(2, 2))(x))
        y = nn.relu(nn.Conv(8, (3, 3), strides=(2, 2))(y)).reshape(x.shape[0], -1)
        mean, log_variance = nn.Dense(3, name="mean")(y), nn.Dense(3, name="log_variance")(y)
        z = mean + jnp.exp(log_variance / 2) * jax.random.normal(self.make_rng("noise"), mean.shape)
        y = nn.relu(nn.Dense(32)(z)).reshape(-1, 2, 2, 8)
        y = nn.relu(nn.ConvTranspose(4, (3, 3), strides=(2, 2))(y))
        return nn.ConvTranspose(1, (3, 3), strides=(2, 2))(y), mean, log_variance


def evidence(outputs: Any, images: Any) -> jax.Array:
    logits, mean, log_variance = outputs
    divergence = -0.5 * jnp.sum(1 + log_variance - mean**2 - jnp.exp(log_variance), -1).mean()
    return optax.sigmoid_binary_cross_entropy(logits, images).sum((1, 2, 3)).mean() + divergence


class Seq2Seq(nn.Module):
    """An LSTM encoder whose last state starts an LSTM decoder."""

    @nn.compact
    def __call__(self, source, target):
        carry, _ = nn.RNN(nn.OptimizedLSTMCell(6), return_carry=True, name="encoder")(nn.Embed(11, 5)(source))
        y = nn.RNN(nn.OptimizedLSTMCell(6), name="decoder")(nn.Embed(11, 5)(target), initial_carry=carry)
        return nn.Dense(11)(y)


class MessagePassing(nn.Module):
    """One round of messages along the edges of a graph."""

    @nn.compact
    def __call__(self, nodes, senders, receivers):
        edges = nn.relu(nn.Dense(6)(jnp.concatenate([nodes[senders], nodes[receivers]], -1)))
        messages = jax.ops.segment_sum(edges, receivers, nodes.shape[0])
        return nn.LayerNorm()(nn.relu(nn.Dense(6)(jnp.concatenate([nodes, messages], -1))))


class GraphNetwork(nn.Module):
    """A graph network that classifies nodes."""

    @nn.compact
    def __call__(self, nodes, senders, receivers):
        nodes = nn.Dense(6)(nodes)
        for _ in range(2):
            nodes = nodes + MessagePassing()(nodes, senders, receivers)
        return nn.Dense(3)(nodes)


class MlpBlock(nn.Module):
    """Two layers back to the width of the input."""

    hidden: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(self.hidden)(x)))


class Mixer(nn.Module):
    """An MLP-Mixer: layers across tokens, then across channels."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (4, 4), strides=(4, 4), name="stem")(x).reshape(x.shape[0], -1, 8)
        for _ in range(2):
            y = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
            x = x + jnp.swapaxes(MlpBlock(6)(y), 1, 2)
            x = x + MlpBlock(12)(nn.LayerNorm()(x))
        return nn.Dense(3)(nn.LayerNorm()(x).mean(1))


class Experts(nn.Module):
    """A switch layer: each token goes to one expert, with room for a fixed number of them; raw matrices."""

    experts: int = 3
    capacity: int = 8

    @nn.compact
    def __call__(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        gates = nn.softmax(nn.Dense(self.experts, use_bias=False, name="router")(tokens))
        chosen = nn.one_hot(gates.argmax(-1), self.experts, dtype=int)
        slot = jnp.cumsum(chosen, 0) * chosen - 1
        dispatch = jax.nn.one_hot(slot, self.capacity)
        w_in = self.param("w_in", nn.initializers.lecun_normal(batch_axis=0), (self.experts, x.shape[-1], 16))
        w_out = self.param("w_out", nn.initializers.lecun_normal(batch_axis=0), (self.experts, 16, x.shape[-1]))
        slots = jnp.einsum("tec,td->ecd", dispatch, tokens)
        hidden = jnp.einsum("ecd,edf->ecf", slots, w_in)
        hidden = nn.gelu(eva_optax.tap_einsum(self, "w_in", "ecd,edf->ecf", slots, hidden))
        y = jnp.einsum("ecf,efd->ecd", hidden, w_out)
        y = eva_optax.tap_einsum(self, "w_out", "ecf,efd->ecd", hidden, y)
        y = jnp.einsum("tec,ecd->td", dispatch, y) * jnp.sum(gates * chosen, -1, keepdims=True)
        return y.reshape(x.shape)


class MixtureOfExperts(nn.Module):
    """A language model with a switch layer in the place of the MLP."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8)(tokens)
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2)(y, y)
        x = x + Experts()(nn.LayerNorm()(x))
        return nn.Dense(11)(x)


LINEN = [
    RealModel("ResNet-50", ResNet, (IMAGES,), LABELS),
    RealModel("decoder", Decoder, (TOKENS,), TOKENS, additive=("positions",)),
    RealModel("ViT", ViT, (IMAGES,), LABELS, additive=("positions", "cls")),
    RealModel("VAE", VAE, (PIXELS,), PIXELS, evidence),
    RealModel("seq2seq LSTM", Seq2Seq, (TOKENS, TOKENS), TOKENS),
    RealModel("graph network", GraphNetwork, (NODES, SENDERS, RECEIVERS), np.arange(7) % 3),
    RealModel("MLP-Mixer", Mixer, (IMAGES,), LABELS),
    RealModel("mixture of experts", MixtureOfExperts, (TOKENS,), TOKENS),
]
