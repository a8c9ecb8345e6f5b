"""The functions that need Flax: `tap`, `tapping`, `coverage`; Flax itself is imported at their first call."""

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from eva_optax._probes.collection import check_statistics
from eva_optax._probes.statistics import VECTORS
from eva_optax._probes.switch import Flag, check_flag, forming_factors

if TYPE_CHECKING:
    from eva_optax._flax.coverage import Coverage


def tap(
    model: Any,
    *args: Any,
    embeddings: bool = False,
    statistics: Sequence[str] = VECTORS,
    partial: bool = False,
    rank: int | None = None,
    factors: str | None = None,
    max_dim: int = 8192,
    sharing: str = "expand",
    factor_rows: int | None = None,
    skip_padding: bool = False,
    **kwargs: Any,
) -> Any:
    """Returns an object to use in the place of `model`, whose gradients carry the Kronecker vectors.

    Beside each kernel that it taps stands a small probe of zeros, a part of the parameters. The gradient of a probe is
    (a, b), the mean input and the summed output cotangent of the layer; see `vectors`. Outputs, initial values, random
    streams and the gradients of real parameters are those of `model`.

    Where to start: ``tap(model, rank=16)`` and `eva_adamw`.

    An `nnx.Module` is changed in place, as by `model.train()`, and returned: its layers get tapped subclasses of their
    classes, and probes, which are `nnx.Param`. Tap it before its optimizer is made. Tapping it again taps what is new.

    Args:
      model: a `flax.linen.Module`, the outermost one: tap what you call `init` and `apply` on; or a `flax.nnx.Module`.
      *args: for an NNX model whose modules call `tap_einsum` or its like: what the model is called with. Only
        shapes and dtypes are looked at. A Linen model takes none.
      embeddings: also tap the lookups of `Embed`; a is then the frequency of each token.
      statistics: what the probes collect: ("a", "b"), or ("a",) for optimizers that need the mean input alone
        (`scale_by_eva_f`, `conjugate`, `center`, `eva_adamw`, `eva_muon`), which saves the sum of the cotangents.
        Layers with batch axes of their own collect both.
      rank: also collect a sketch of the second moment of each layer's input, of so many vectors (16, say), and its
        trace: `conjugate`, `eva_adamw` and `eva_muon` then whiten so many directions, and `scale_by_eva_f` takes the
        inverse of so many, see `sketches`; 0 for the trace alone, which tells them how to damp their one direction. A
        layer of fewer inputs collects its full moment.
      factors: also collect the second moment of each layer's inputs ("input"), for `scale_by_foof` and for `conjugate`
        and its kin, or that of the cotangents of its outputs too ("both"), for `scale_by_kfac` and the same; see
        `factors`.
      max_dim: a side of more inputs, or outputs, than this keeps its vector instead of a matrix.
      sharing: what the rows of matrices are where a kernel is used at several positions: "expand", each position is
        one; "reduce", the mean of a sample's inputs, and the sum of its cotangents, are one. Samples are the first
        axis.
      factor_rows: make second moments of about so many rows, those of every so many positions or examples: by default
        factors of all, sketches of 512.
      skip_padding: whether rows whose cotangents are all zero, as those of padded tokens that a loss leaves out, do not
        count in factors. A of convolutions, lookups and experts counts all.
      partial: for a Linen model: whether some of its layers may stay without a probe while others have one, as those of
        a frozen part whose parameters were loaded. In NNX tap the parts that are to be tapped.
      **kwargs: likewise.

    Returns:
      The NNX model, or for a Linen module a `TappedModule`: `init`, `init_with_output`, `lazy_init`, `apply`, `bind`
      and `clone` are those of `model`, tapped; other attributes pass through, and `tabulate` shows no probes. It
      compares and hashes like the model.

    Raises:
      TypeError: if `model` is no Flax module, or a Linen module is given a call's arguments.
      ValueError: for unknown statistics or a negative rank; if the model has no layer that can be tapped, for a Linen
        model from `init`; if something in it is called "kronecker"; if an NNX model lacks the example input.
        From `apply`, also under `jit`, if some layers have no probe while others have one, unless `partial`.

    Every derivative of a tapped model is that of `model`: forward and reverse mode, of any order, inside the loss too.

    Source: Zhang, Shi and Li, ICLR 2023 (the vectors); that they are the gradient of a probe is this library's.

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp
      >>> model = eva_optax.tap(nn.Dense(2))
      >>> params = model.init(jax.random.key(0), jnp.ones((4, 3)))["params"]
      >>> sorted(params)
      ['bias', 'kernel', 'kronecker']
      >>> from flax import nnx
      >>> model = eva_optax.tap(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
      >>> sorted(nnx.state(model, nnx.Param))
      ['bias', 'kernel', 'kronecker']
    """
    collected = check_statistics("tap", statistics, rank, factors, max_dim, sharing, factor_rows, skip_padding)
    if is_nnx_module(model):
        from eva_optax._flax.nnx import tap_module

        if partial:
            raise TypeError(
                "eva_optax.tap: partial is for Linen models. Tap the parts of an NNX model: tap(model.head)."
            )
        return tap_module("tap", model, embeddings, collected, args, kwargs)
    import flax.linen as nn

    from eva_optax._flax.tapped_module import TappedModule

    if args or kwargs:
        raise TypeError(
            f"eva_optax.tap: a Linen model takes no example input, got {len(args) + len(kwargs)} more arguments. "
            "Its probes are made by model.init, or by eva_optax.attach(model, params, x)."
        )
    if isinstance(model, TappedModule):
        return TappedModule(model.module, embeddings or model.embeddings, collected, partial or model.partial)
    if not isinstance(model, nn.Module):
        raise TypeError(
            "eva_optax.tap: model must be an instance of flax.linen.Module or flax.nnx.Module, "
            f"got {model!r} of {type(model)}."
        )
    return TappedModule(model, embeddings, collected, partial)


def is_nnx_module(value: Any) -> bool:
    """Whether `value` is an NNX module; imports nothing."""
    nnx = sys.modules.get("flax.nnx")
    return nnx is not None and isinstance(value, nnx.Module)


def tapping(
    *,
    embeddings: bool = False,
    statistics: Sequence[str] = VECTORS,
    rank: int | None = None,
    factors: str | Flag | None = None,
    max_dim: int = 8192,
    sharing: str = "expand",
    factor_rows: int | None = None,
    skip_padding: bool = False,
    partial: bool = False,
) -> AbstractContextManager[Any]:
    """A context manager in which every Linen `init` and `apply` is tapped, for code that calls them itself.

    The context is no part of the cache key of `jax.jit`: enter it inside the function that is jitted, as the example
    does. A function that was jitted and run before, and is called inside the context, stays untapped, which
    `check` finds.

    With `factors=flag`, a bool or a traced scalar of one, it says instead whether the taps inside form the second
    moments that they have probes for, of a Linen or NNX model that is tapped by `tap(model, factors=...)` or
    `tap(model, rank=...)`. A step without has the matrix products of the untapped program; `scale_by_foof` and its kin
    then go on with their averages.

    Args:
      embeddings: as for `tap`.
      statistics: as for `tap`.
      rank: as for `tap`.
      factors: as for `tap`; or a flag, see above.
      max_dim: as for `tap`.
      sharing: as for `tap`.
      factor_rows: as for `tap`.
      skip_padding: as for `tap`.
      partial: as for `tap`.

    Returns:
      The context manager. ValueError when an `apply` inside ends, as for `tap`.

    Source: as `tap`.

    Example:
      >>> import eva_optax, flax.linen as nn, jax, jax.numpy as jnp
      >>> model, x = nn.Dense(2), jnp.ones((4, 3))
      >>> with eva_optax.tapping():
      ...   params = model.init(jax.random.key(0), x)["params"]
      >>> @jax.jit
      ... def gradient(params):
      ...   with eva_optax.tapping():
      ...     return jax.grad(lambda p: model.apply({"params": p}, x).sum())(params)
      >>> sorted(eva_optax.vectors(gradient(params)))
      ['']
      >>> model = eva_optax.tap(nn.Dense(2), factors="input")
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> @jax.jit
      ... def gradient(params, step):
      ...   with eva_optax.tapping(factors=step % 10 == 0):
      ...     return jax.grad(lambda p: model.apply({"params": p}, x).sum())(params)
      >>> [float(eva_optax.factors(gradient(params, step))[""].A.sum()) for step in (10, 11)]
      [9.0, 0.0]
    """
    if factors is not None and not isinstance(factors, str):
        return forming_factors(check_flag(factors))
    from eva_optax._flax.linen import linen_tapping

    collected = check_statistics("tapping", statistics, rank, factors, max_dim, sharing, factor_rows, skip_padding)
    return linen_tapping(embeddings, collected, partial=partial, caller="tapping")


def coverage(model: Any, *args: Any, verify: bool = False, **kwargs: Any) -> "Coverage":
    """Reports which parameters of a model are tapped, which are not, and why.

    Args:
      model: the model, tapped (then with the options of `tap`) or not.
      *args: what a Linen model is called with, after the random key, as in `model.init(key, *args, **kwargs)`; for an
        NNX model what `tap` is given. Only shapes and dtypes are looked at: nothing is computed, and nothing changed.
      verify: also run a copy of the model on these arguments, with random numbers added to its parameters, and compare
        the output of every tapped layer with what its equation says, up to a constant factor. An NNX model needs the
        arguments of a call then. Convolutions, lookups and experts are not compared.
      **kwargs: likewise.

    Returns:
      A `Coverage`: `rows` (path, shape, tapped, reason, which second moments), `tapped` and `total` (numbers of
      entries), `share`, `untapped` (reasons by path), `mismatched` (relative errors by path, after `verify`). `print`
      shows it as a table. A class that has no rule is tapped once `register` makes it known, or, where one can edit it,
      by `tap_einsum` inside.

    Raises:
      TypeError: if `model` is no Flax module, or a Linen model is given no example of its input.
      ValueError: if the equation of a registered layer does not fit its call, or an NNX model is to be verified without
        the arguments of a call.

    Source: as `tap`.

    Example:
      >>> import eva_optax, flax.linen as nn, jax.numpy as jnp
      >>> report = eva_optax.coverage(nn.Sequential([nn.Dense(2), nn.LayerNorm()]), jnp.ones((4, 3)))
      >>> report.untapped["layers_1/scale"]
      'LayerNorm: scales or shifts element by element'
    """
    if is_nnx_module(model):
        from eva_optax._flax.nnx_coverage import nnx_coverage

        return nnx_coverage(model, *args, verify=verify, **kwargs)
    from eva_optax._flax.coverage import linen_coverage
    from eva_optax._flax.tapped_module import TappedModule

    tapped = model if isinstance(model, TappedModule) else tap(model)
    return linen_coverage(tapped, verify, args, kwargs)
