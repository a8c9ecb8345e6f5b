"""Which statistics the probes of a model collect: options as a tuple of names, and what they say for one layer.

Names are those of statistics, and "rank=16" and the like: hashable, and a part of the names of tapped classes.
"""

from collections.abc import Sequence

from eva_optax._probes.linear_map import ROWS, SKIP_PADDING, KernelShapes, Moments, PairsRows, statistic_of
from eva_optax._probes.probe import COUNTER, NUMBERS, Shape
from eva_optax._probes.statistics import (
    DIAGONAL,
    INPUTS,
    OUTPUTS,
    SKETCH,
    STATISTICS,
    VECTORS,
    inputs_of,
    outputs_of,
)

_RANK, _FACTORS, _LARGEST, _SHARING = "rank=", "factors=", "max_dim=", "sharing="


def check_statistics(
    caller: str,
    statistics: Sequence[str],
    rank: int | None,
    factors: str | None = None,
    max_dim: int = 8192,
    sharing: str = "expand",
    factor_rows: int | None = None,
    skip_padding: bool = False,
) -> tuple[str, ...]:
    """The names of statistics in their order, and of what else says how they are collected.

    Raises:
      ValueError: unless "a" is among them, and all are vectors; if another option is out of its range.
    """
    if isinstance(statistics, str) or "a" not in statistics or not set(statistics) <= set(VECTORS):
        raise ValueError(
            f'eva_optax.{caller}: statistics must be ("a", "b") or ("a",), got {statistics!r}. "a" is the mean input, '
            'which every member of the family needs; "b" is the summed cotangent, which scale_by_eva and eva need.'
        )
    names = tuple(name for name in VECTORS if name in statistics)
    if rank is not None and not _is_integer(rank, 0):
        raise ValueError(
            f"eva_optax.{caller}: rank must be an integer, the number of vectors in the sketch of each layer's inputs "
            f"(16, say; 0 for their mean square alone), or None for no sketch; got {rank!r}."
        )
    names = names if rank is None else (*names, f"{_RANK}{rank}")
    if factors not in (None, "input", "both"):
        raise ValueError(
            f'eva_optax.{caller}: factors must be "input" (the second moment of each layer\'s inputs, for FOOF), '
            f'"both" (that of the cotangents of its outputs too, for K-FAC), or None; got {factors!r}.'
        )
    if factors and rank is not None:
        raise ValueError(
            f"eva_optax.{caller}: rank={rank} asks for a sketch of the second moments that factors={factors!r} "
            "collects whole. Leave one of them out."
        )
    if sharing not in ("expand", "reduce"):
        raise ValueError(
            f'eva_optax.{caller}: sharing must be "expand" (each position of a sequence or an image is a row) or '
            f'"reduce" (each sample is one), got {sharing!r}.'
        )
    for name, value in (("max_dim", max_dim), ("factor_rows", factor_rows)):
        if not (_is_integer(value, 1) or (name == "factor_rows" and value is None)):
            raise ValueError(f"eva_optax.{caller}: {name} must be a positive integer, got {value!r}.")
    if factor_rows is not None and sharing == "reduce":
        raise ValueError(
            f'eva_optax.{caller}: factor_rows={factor_rows} looks at some of the positions, sharing="reduce" sums over '
            "all of a sample. Leave one of them out."
        )
    if sharing == "reduce" and not factors:
        raise ValueError(
            f'eva_optax.{caller}: sharing="reduce" says what the rows of factors are; add factors="input" or "both".'
        )
    if skip_padding and (not factors or factor_rows is not None):
        raise ValueError(
            f"eva_optax.{caller}: skip_padding=True says which rows count in whole factors; add "
            'factors="input" or "both", and leave out factor_rows, which looks at some of the rows.'
        )
    rows = () if factor_rows is None else (f"{ROWS}{factor_rows}",)
    rows = (*rows, SKIP_PADDING) if skip_padding else rows
    if factors:
        names = (*names, f"{_FACTORS}{factors}", f"{_LARGEST}{max_dim}", f"{_SHARING}{sharing}")
    return (*names, *rows) if factors or rank is not None else names


def _is_integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def probe_shapes(shapes: KernelShapes, statistics: Sequence[str], counter: Shape) -> dict[str, Shape]:
    """The shapes of a probe's leaves; `counter` is all 1 but for the axes that are counted each for itself.

    b is left out only where the axes of the kernel are clear without it: not beside a kernel with batch axes. Layers
    without an output axis have no sketch. A side that is too large for a matrix keeps its vector.
    """
    a, b = shapes.probe_shapes
    batched = any(i > 1 and o > 1 for i, o in zip(a, b, strict=True))
    factors = _factors(shapes, statistics)
    large = _option(statistics, _FACTORS) == "both" and OUTPUTS not in map(statistic_of, factors)
    wanted = VECTORS if batched or large else [name for name in VECTORS if name in statistics]
    rank = _option(statistics, _RANK)
    if rank is not None and shapes.last_output_axis is not None:
        rows = _moments(statistics)
        wanted = [*wanted, *(rows.name(name) for name in (SKETCH if int(rank) else SKETCH[1:]))]
    leaves = {name: STATISTICS[statistic_of(name)].shape(shapes, int(rank or 0)) for name in (*wanted, *factors)}
    return leaves | {COUNTER: (*counter[:-1], NUMBERS)}


def _factors(shapes: KernelShapes, statistics: Sequence[str]) -> list[str]:
    """The names of a probe's matrices."""
    wanted, largest = _option(statistics, _FACTORS), int(_option(statistics, _LARGEST) or 0)
    if wanted is None:
        return []
    moments, found = _moments(statistics), []
    if shapes.is_lookup:
        found.append(DIAGONAL)
    elif shapes.last_output_axis is not None and inputs_of(shapes) <= largest:
        paired = isinstance(shapes, PairsRows) and shapes.last_input_axis is not None
        found.append(moments._replace(skip_padding=moments.skip_padding and paired).name(INPUTS))
    if wanted == "both" and shapes.last_input_axis is not None and outputs_of(shapes) <= largest:
        found.append(moments.name(OUTPUTS))
    return found


def _moments(statistics: Sequence[str]) -> Moments:
    rows = _option(statistics, ROWS)
    sharing = _option(statistics, _SHARING) or "expand"
    return Moments(sharing, None if rows is None else int(rows), SKIP_PADDING in statistics)


def _option(statistics: Sequence[str], prefix: str) -> str | None:
    """What stands behind `prefix` among what is to be collected."""
    return next((name.removeprefix(prefix) for name in statistics if name.startswith(prefix)), None)
