"""A stand-in for a causal language model of Hugging Face: names, arguments and shapes that a page of the site uses."""

from types import ModuleType, SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from tests.flax.foreign_layers import FlaxConv1D


class Output(struct.PyTreeNode):
    logits: jax.Array


class CausalLM(nn.Module):
    @nn.compact
    def __call__(self, tokens: Any, attention_mask: Any, position_ids: Any, deterministic: bool = True) -> Output:
        words = nn.Embed(11, 6, name="wte")
        x = (words(tokens) + nn.Embed(16, 6, name="wpe")(position_ids)) * attention_mask[..., None]
        x = x + FlaxConv1D(6, name="c_proj")(nn.gelu(FlaxConv1D(8, name="c_fc")(x)))
        return Output(words.attend(nn.Dropout(0.1, deterministic=deterministic)(x)))


def from_pretrained(name: str) -> Any:
    assert name == "gpt2"
    tokens = jnp.ones((1, 2), jnp.int32)
    params = CausalLM().init(jax.random.key(0), tokens, tokens, tokens)["params"]
    return SimpleNamespace(module=CausalLM(), params=params)


def modules() -> dict[str, ModuleType]:
    """What the page imports, by name."""
    names = ["transformers", "transformers.models", "transformers.models.gpt2"]
    made = {name: ModuleType(name) for name in [*names, "transformers.models.gpt2.modeling_flax_gpt2"]}
    made["transformers"].FlaxAutoModelForCausalLM = SimpleNamespace(from_pretrained=from_pretrained)  # pyright: ignore
    made["transformers.models.gpt2.modeling_flax_gpt2"].FlaxConv1D = FlaxConv1D  # pyright: ignore
    return made
