"""Models in NNX as they are usually written, in sizes for tests."""

import jax
import jax.numpy as jnp
from flax import nnx

import eva_optax
from tests.real_models import (
    IMAGES,
    LABELS,
    NODES,
    PIXELS,
    RECEIVERS,
    SENDERS,
    TOKENS,
    RealModel,
    evidence,
)


class Bottleneck(nnx.Module):
    """The block of ResNet-50."""

    def __init__(self, inputs, filters, strides, rngs):
        self.conv1 = nnx.Conv(inputs, filters, (1, 1), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(filters, rngs=rngs)
        self.conv2 = nnx.Conv(filters, filters, (3, 3), strides=strides, use_bias=False, rngs=rngs)
        self.bn2 = nnx.BatchNorm(filters, rngs=rngs)
        self.conv3 = nnx.Conv(filters, 4 * filters, (1, 1), use_bias=False, rngs=rngs)
        self.bn3 = nnx.BatchNorm(4 * filters, rngs=rngs)
        self.shortcut = nnx.Sequential(
            nnx.Conv(inputs, 4 * filters, (1, 1), strides=strides, use_bias=False, rngs=rngs),
            nnx.BatchNorm(4 * filters, rngs=rngs),
        )

    def __call__(self, x):
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(nnx.relu(self.bn2(self.conv2(y)))))
        return nnx.relu(y + self.shortcut(x))


class ResNet(nnx.Module):
    """ResNet-50 with one block a stage."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 4, (7, 7), strides=(2, 2), use_bias=False, rngs=rngs)
        self.bn = nnx.BatchNorm(4, rngs=rngs)
        self.blocks = nnx.List([Bottleneck(4, 4, 1, rngs), Bottleneck(16, 8, 2, rngs)])
        self.head = nnx.Linear(32, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.bn(self.stem(x))), (3, 3), strides=(2, 2), padding="SAME")
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class Block(nnx.Module):
    """A pre-LN transformer block; causal on request."""

    def __init__(self, rngs, causal=True):
        self.ln1, self.ln2 = nnx.LayerNorm(8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)
        self.causal = causal

    def __call__(self, x):
        mask = nnx.make_causal_mask(jnp.ones(x.shape[:2])) if self.causal else None
        x = x + self.attention(self.ln1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.ln2(x))))


class Decoder(nnx.Module):
    """A language model: stacked, scanned and rematerialised blocks, embeddings tied to the output."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 6, 8)))
        self.blocks = nnx.split_rngs(splits=2)(nnx.vmap(Block))(rngs)
        self.norm = nnx.LayerNorm(8, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + jnp.broadcast_to(self.positions[...], (*tokens.shape, 8))
        call = nnx.remat(Block.__call__, prevent_cse=False)
        x = nnx.scan(lambda x, block: call(block, x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)
        return self.embed.attend(self.norm(x))


class ViT(nnx.Module):
    """A vision transformer with a class token."""

    def __init__(self, rngs):
        self.patches = nnx.Conv(3, 8, (8, 8), strides=(8, 8), padding="VALID", rngs=rngs)
        self.cls = nnx.Param(jnp.zeros((1, 1, 8)))
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 5, 8)))
        self.blocks = nnx.Sequential(Block(rngs, causal=False))
        self.norm, self.head = nnx.LayerNorm(8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x).reshape(x.shape[0], -1, 8)
        x = jnp.concatenate([jnp.tile(self.cls[...], (x.shape[0], 1, 1)), x], 1)
        x = self.blocks(x + jnp.broadcast_to(self.positions[...], x.shape))
        return self.head(self.norm(x)[:, 0])


class VAE(nnx.Module):
    """A variational autoencoder of fully connected layers."""

    def __init__(self, rngs):
        self.encoder = nnx.Linear(64, 12, rngs=rngs)
        self.mean, self.log_variance = nnx.Linear(12, 3, rngs=rngs), nnx.Linear(12, 3, rngs=rngs)
        self.decoder = nnx.Sequential(nnx.Linear(3, 12, rngs=rngs), nnx.relu, nnx.Linear(12, 64, rngs=rngs))
        self.rngs = rngs

    def __call__(self, x):
        y = nnx.relu(self.encoder(x.reshape(x.shape[0], -1)))
        mean, log_variance = self.mean(y), self.log_variance(y)
        z = mean + jnp.exp(log_variance / 2) * jax.random.normal(self.rngs.noise(), mean.shape)
        return self.decoder(z).reshape(x.shape), mean, log_variance


class Seq2Seq(nnx.Module):
    """An LSTM encoder whose last state starts an LSTM decoder."""

    def __init__(self, rngs):
        self.source, self.target = nnx.Embed(11, 5, rngs=rngs), nnx.Embed(11, 5, rngs=rngs)
        self.encoder = nnx.RNN(nnx.OptimizedLSTMCell(5, 6, rngs=rngs), return_carry=True, rngs=rngs)
        self.decoder = nnx.RNN(nnx.OptimizedLSTMCell(5, 6, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(6, 11, rngs=rngs)

    def __call__(self, source, target):
        carry, _ = self.encoder(self.source(source))
        return self.head(self.decoder(self.target(target), initial_carry=carry))


class GraphNetwork(nnx.Module):
    """A graph network that classifies nodes."""

    def __init__(self, rngs):
        self.encoder, self.head = nnx.Linear(5, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)
        self.edges, self.nodes = nnx.Linear(12, 6, rngs=rngs), nnx.Linear(12, 6, rngs=rngs)

    def __call__(self, nodes, senders, receivers):
        nodes = self.encoder(nodes)
        for _ in range(2):  # the same layers in both rounds
            edges = nnx.relu(self.edges(jnp.concatenate([nodes[senders], nodes[receivers]], -1)))
            messages = jax.ops.segment_sum(edges, receivers, nodes.shape[0])
            nodes = nodes + nnx.relu(self.nodes(jnp.concatenate([nodes, messages], -1)))
        return self.head(nodes)


class Mixer(nnx.Module):
    """An MLP-Mixer of one block: layers across tokens, then across channels."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(3, 8, (4, 4), strides=(4, 4), rngs=rngs)
        self.ln1, self.ln2 = nnx.LayerNorm(8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)
        self.tokens = nnx.Sequential(nnx.Linear(16, 6, rngs=rngs), nnx.gelu, nnx.Linear(6, 16, rngs=rngs))
        self.channels = nnx.Sequential(nnx.Linear(8, 12, rngs=rngs), nnx.gelu, nnx.Linear(12, 8, rngs=rngs))
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x).reshape(x.shape[0], -1, 8)
        x = x + jnp.swapaxes(self.tokens(jnp.swapaxes(self.ln1(x), 1, 2)), 1, 2)
        return self.head((x + self.channels(self.ln2(x))).mean(1))


class Experts(nnx.Module):
    """Experts without a capacity: tokens sorted by expert, and ragged products."""

    def __init__(self, rngs, experts=3):
        self.router = nnx.Linear(8, experts, use_bias=False, rngs=rngs)
        init = nnx.initializers.lecun_normal(batch_axis=0)
        self.w_in = nnx.Param(init(rngs.params(), (experts, 8, 16)))
        self.w_out = nnx.Param(init(rngs.params(), (experts, 16, 8)))

    def __call__(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        gates = nnx.softmax(self.router(tokens))
        chosen = gates.argmax(-1)
        order = jnp.argsort(chosen)
        sizes = jnp.bincount(chosen, length=gates.shape[-1])
        tokens = tokens[order]
        y = jax.lax.ragged_dot(tokens, self.w_in[...], sizes)
        hidden = nnx.gelu(eva_optax.tap_ragged_dot(self, "w_in", tokens, y, sizes))
        y = jax.lax.ragged_dot(hidden, self.w_out[...], sizes)
        y = eva_optax.tap_ragged_dot(self, "w_out", hidden, y, sizes)
        return (y[jnp.argsort(order)] * gates.max(-1, keepdims=True)).reshape(x.shape)


class MixtureOfExperts(nnx.Module):
    """A language model with experts in the place of the MLP."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(11, 8, rngs=rngs)
        self.ln1, self.ln2 = nnx.LayerNorm(8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.experts, self.head = Experts(rngs), nnx.Linear(8, 11, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        x = x + self.attention(self.ln1(x))
        return self.head(x + self.experts(self.ln2(x)))


NNX = [
    RealModel("ResNet-50", ResNet, (IMAGES,), LABELS),
    RealModel("decoder", Decoder, (TOKENS,), TOKENS, additive=("positions",)),
    RealModel("ViT", ViT, (IMAGES,), LABELS, additive=("positions", "cls")),
    RealModel("VAE", VAE, (PIXELS,), PIXELS, evidence),
    RealModel("seq2seq LSTM", Seq2Seq, (TOKENS, TOKENS), TOKENS),
    RealModel("graph network", GraphNetwork, (NODES, SENDERS, RECEIVERS), [0, 1, 2, 0, 1, 2, 0]),
    RealModel("MLP-Mixer", Mixer, (IMAGES,), LABELS),
    RealModel("mixture of experts", MixtureOfExperts, (TOKENS,), TOKENS),
]
