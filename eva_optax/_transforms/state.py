"""What the transformations keep, as a user sees it in their states."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jax import Array


class ScaleByEvaState(NamedTuple):
    """State of `scale_by_eva` and its kin.

    Attributes:
      count: steps taken, int32 scalar.
      vectors: the running averages, shaped like the parameters. `scale_by_eva`: each probe holds `a` and `b`;
        `scale_by_eva_f`: only `a`; `scale_by_eva_s`: in the place of each parameter its means, one a row. Everything
        else is an `optax.MaskedNode`. Layers that are several at once have two scalars each in the place of `n`.
      scalars: for each other layer whether it has an average, then for each its last cosine; see `diagnostics`.
      skipped: how many times a layer was skipped because its vectors or their squares were not finite, or no longer
        those that its tap gave, int32 scalar.
      untapped: how many steps had gradients of tapped layers and no vectors of any, int32 scalar; see `check`.
      nu: the last step-size factor ν, float scalar.
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    vectors: Any
    scalars: Array
    skipped: Array
    untapped: Array
    nu: Array


class CenterState(NamedTuple):
    """State of `center`.

    Attributes:
      vectors: the running mean inputs `a`, as in `ScaleByEvaState`.
      scalars: as in `ScaleByEvaState`, without cosines.
      skipped: how many times a layer's mean input was not finite, int32 scalar.
      untapped: as in `ScaleByEvaState`.
      inner: the state of the inner transformation, of the tree without probes, in the new coordinates.
    """

    vectors: Any
    scalars: Array
    skipped: Array
    untapped: Array
    inner: Any


class ConjugateState(NamedTuple):
    """State of `conjugate`.

    Attributes:
      vectors: the running averages: `a`, and of second moments, where the model is tapped with a `rank` or for
        `factors`, the sketches `y` and the traces `s`, or all of `A`.
      scalars: as in `ScaleByEvaState`; for a layer with a second moment the first number is the weight of its averages,
        the second the share of its inputs' mean square that lies in the directions of its sketch, 1 for all of `A`.
      skipped: how many times a layer's averages were not finite, int32 scalar.
      untapped: as in `ScaleByEvaState`.
      inner: the state of the inner transformation, of the tree without probes, in the new coordinates.
      count: steps taken, int32 scalar.
      bases: R of each layer with a second moment, by its name.
    """

    vectors: Any
    scalars: Array
    skipped: Array
    untapped: Array
    inner: Any
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    bases: dict[str, Any]


class ScaleByKfacState(NamedTuple):
    """State of `scale_by_foof` and `scale_by_kfac`, and of `scale_by_eva_f` for a model that is tapped with a `rank`.

    Attributes:
      count: steps taken, int32 scalar.
      vectors: the running averages, shaped like the parameters: each probe holds `A` and `B` as its tap collects them,
        the mean input `a`, sketches `y` and traces `s` where there is no `A`, and `b` where there is no `B`. Everything
        else is an `optax.MaskedNode`.
      scalars: as in `ScaleByEvaState`; the first number of a layer is the weight of its averages, the second the cosine
        of its gradient and its update.
      skipped: how many times a layer's statistics were not finite, or its inverse could not be made anew, int32 scalar.
      untapped: as in `ScaleByEvaState`.
      nu: the last step-size factor ν, float scalar.
      inverses: what each layer's gradient is multiplied by, by its name, with its condition number, residual and age.
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    vectors: Any
    scalars: Array
    skipped: Array
    untapped: Array
    nu: Array
    inverses: dict[str, Any]


class ShampooState(NamedTuple):
    """State of `scale_by_shampoo`.

    Attributes:
      count: steps taken, int32 scalar.
      observed: how many gradients of each parameter were taken in, int32. This and the next two are by name; parameters
        of one shape whose names differ in numbers alone are stacked, under the name of the first.
      statistics: for each kind of block the sums or averages L of each axis, (parameters, blocks, n, n).
      roots: for each kind of block its R of each axis, `matrices`, the largest `condition` number of the matrices that
        these are roots of, and the `step` in which they were made.
      second_moments: averages of squared gradients, shaped like the parameters; () unless "rms" or "adam" is grafted.
      means: averages of gradients, shaped like the parameters; () for b1 = 0.
      skipped: how many gradients and roots were not finite, int32 scalar.
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    observed: Any
    statistics: Any
    roots: Any
    second_moments: Any
    means: Any
    skipped: Array


for _state in (ScaleByEvaState, ConjugateState, CenterState, ScaleByKfacState, ShampooState):
    _state.__module__ = "eva_optax"


def check_state(caller: str, state: Any, wanted: type) -> None:
    """Refuses a state that is not one of `wanted`, a NamedTuple.

    Raises:
      ValueError: naming the function, what the state is, and how to go on.
    """
    if isinstance(state, wanted):
        return
    held = tuple(state) if isinstance(state, Mapping) else getattr(state, "_fields", None)
    fields: Any = getattr(wanted, "_fields", ())
    raise ValueError(
        f"eva_optax.{caller}: state must be a {wanted.__name__} with the fields {fields}, got a "
        f"{type(state).__name__}" + (f" with {held}" if held else "") + ". Restore a checkpoint with tx.init(params) "
        "as its template. A state of another optimizer, or of a version with other fields, cannot be converted: keep "
        "the parameters and go on with tx.init(params), whose averages the next step fills."
    )
