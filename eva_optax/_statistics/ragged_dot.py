"""Kronecker vectors of `jax.lax.ragged_dot`: rows sorted by expert, one matrix for each expert."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from eva_optax._probes.probe import Probe, accumulator
from eva_optax._probes.tap import tap
from eva_optax._statistics.einsum import Contraction


@dataclass(frozen=True)
class RaggedDot:
    """Experts are a batch axis of the kernel (experts, inputs, outputs).

    This is no `Rule`: how the vectors are computed depends on the groups' sizes, see `tap_ragged`.
    """

    kernel_shape: tuple[int, ...]

    @property
    def probe_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        experts, inputs, outputs = self.kernel_shape
        return (experts, inputs, 1), (experts, 1, outputs)


def tap_ragged(has_bias: bool, probe: Probe, x: Array, y: Array, group_sizes: Array) -> Array:
    """Returns `y`; differentiated, gives `probe` for each expert the mean of its rows and the sum of their cotangents.

    Args:
      has_bias: whether a bias is added.
      probe: the probe; its counters have one entry for each expert.
      x: the input, (rows, inputs).
      y: the output, (rows, outputs).
      group_sizes: the number of rows of each expert, (experts,).

    Returns:
      `y`, unchanged.

    Raises:
      ValueError: if the batch is empty.
    """
    if x.size == 0 or y.size == 0:
        raise ValueError(
            f"eva_optax: a tapped layer got an empty batch (input of shape {x.shape}): its mean input is not defined. "
            "Drop empty batches before the training step."
        )
    (experts,) = group_sizes.shape
    dtype = accumulator(x.dtype)
    # The expert of each row; beyond the last group a number that no expert has.
    expert = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(x.shape[0]), side="right")
    sums = jax.ops.segment_sum(jax.lax.stop_gradient(x).astype(dtype), expert, experts, indices_are_sorted=True)
    means = sums / jnp.maximum(group_sizes, 1).astype(dtype)[:, None]
    # An expert without rows counts as not used. The probe's values do not matter, its cotangent is what is scaled.
    used = group_sizes > 0
    probe = {name: leaf * used.astype(leaf.dtype).reshape(-1, *(1,) * (leaf.ndim - 1)) for name, leaf in probe.items()}
    # Zeros added to the rows of each expert: their cotangent is the sum over these rows.
    added = jnp.zeros((experts, y.shape[1]), accumulator(y.dtype))
    rule = Contraction((x.shape[1], y.shape[1]), "i", "io", "o", positions="")
    added = jax.vmap(partial(tap, rule, has_bias))(probe, means, added)
    return y + jnp.take(added, expert, axis=0, mode="fill", fill_value=0).astype(y.dtype)
