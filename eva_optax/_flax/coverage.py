"""Which parameters of a model are tapped, which are not, and why."""

import math
import sys
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import numpy as np

from eva_optax._flax.linen import Interceptor
from eva_optax._flax.tapped_module import TappedModule
from eva_optax._flax.verify import Errors, collect, perturbed, random_key, verifying
from eva_optax._probes.layers import Layer, take_apart
from eva_optax._probes.probe import Path, is_probe
from eva_optax._probes.statistics import DIAGONAL, INPUTS, MOMENT, OUTPUTS, TRACE

if TYPE_CHECKING:
    from rich.table import Table

# Precisions of matrix units and half precision stay far below, other functions far above.
_TOLERANCE = 0.05

_ELEMENTWISE = (nn.BatchNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm)


class CoverageRow(NamedTuple):
    """One parameter: its path, shape, whether it is tapped, and if not, why; and whether its layer can be centred.

    After `coverage(..., verify=True)` also how far the layer's output is from its equation's, None where not compared.
    Of a kernel also which second moments its tap collects: "rank 16 of 64", "A 64×64, B 32×32".
    """

    path: str
    shape: tuple[int, ...]
    tapped: bool
    reason: str
    centered: bool
    error: float | None = None
    moments: str = ""

    @property
    def size(self) -> int:
        """The number of entries."""
        return int(np.prod(self.shape))


@dataclass(frozen=True)
class Coverage:
    """The coverage report of a model; its string form is a table, and rich prints it as one.

    Attributes:
      rows: one `CoverageRow` for each parameter, probes apart, in the order of the tree.
    """

    rows: tuple[CoverageRow, ...]

    @property
    def tapped(self) -> int:
        """The number of entries in tapped parameters."""
        return sum(row.size for row in self.rows if row.tapped)

    @property
    def total(self) -> int:
        """The number of entries in all parameters."""
        return sum(row.size for row in self.rows)

    @property
    def share(self) -> float:
        """The share of the parameters that is tapped, between 0 and 1."""
        return self.tapped / self.total if self.total else 0.0

    @property
    def untapped(self) -> dict[str, str]:
        """The reason for each parameter that is not tapped, by path."""
        return {row.path: row.reason for row in self.rows if not row.tapped}

    @property
    def uncentered(self) -> tuple[str, ...]:
        """The paths of tapped parameters that `center` passes as they are, because their layer has no bias."""
        return tuple(row.path for row in self.rows if row.tapped and not row.centered)

    @property
    def mismatched(self) -> dict[str, float]:
        """The relative error of each tapped kernel whose layer computes something else than its equation, by path."""
        return {row.path: row.error for row in self.rows if row.error is not None and not row.error <= _TOLERANCE}

    def __rich__(self) -> "Table":
        from rich.table import Table

        table = Table(caption=f"{self.tapped:,} of {self.total:,} parameters tapped ({self.share:.1%})")
        for column in ("parameter", "shape", "entries", "tapped"):
            table.add_column(column, justify="right" if column == "entries" else "left", overflow="fold")
        for row in self.rows:
            shape = "×".join(map(str, row.shape)) or "scalar"
            answer = "yes" if row.centered else "yes (without bias: not centred)" if row.tapped else f"no: {row.reason}"
            answer += f"; {row.moments}" if row.moments else ""
            if row.path in self.mismatched:
                answer += f", but the output is not the equation's: {row.error:.0%} off"
            table.add_row(row.path, shape, f"{row.size:,}", answer)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=120, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get().rstrip()


Coverage.__module__ = CoverageRow.__module__ = "eva_optax"


def linen_coverage(model: TappedModule, verify: bool, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Coverage:
    """`coverage` of a Linen module, from the shapes of its variables and what was noted of its layers."""
    variables, interceptor = model.init_shapes("coverage", *args, **kwargs)

    def run(errors: Errors, key: Any, *args: Any, **kwargs: Any) -> None:
        variables = model.init(key, *args, **kwargs)
        variables = {**variables, "params": perturbed(variables.get("params", {}))}
        with verifying(errors):
            model.apply(variables, *args, **{"rngs": {"params": key}, "mutable": True} | kwargs)

    return linen_report(variables, interceptor, collect(run, random_key(0), args, kwargs) if verify else {})


def linen_report(variables: Any, interceptor: Interceptor, errors: Errors) -> Coverage:
    """The report on a Linen module from what was noted of it."""
    found, params = interceptor.findings, variables.get("params", {})
    return report(params, interceptor.reasons, found.classes, _ELEMENTWISE, errors, found.ranks)


def report(
    params: Any,
    reasons: dict[Path, str],
    classes: dict[Path, type],
    elementwise: tuple[type, ...],
    errors: Errors,
    ranks: dict[Path, int],
) -> Coverage:
    """The report on a tree of parameters with probes.

    Args:
      params: the tree; only shapes are looked at.
      reasons: why a parameter is not tapped, as far as known, by path.
      classes: the classes of the modules, by path, and of the owner of a parameter by its path where it is another.
      elementwise: classes of modules that hold no matrices.
      errors: how far outputs are from their rules', as far as compared, by the path of the kernel.
      ranks: the rank of a parameter without stacked axes, by path, where it is known.
    """
    tree = take_apart(params)
    layers = {
        tree.paths[place]: layer for layer in tree.layers for place in (layer.kernel, layer.bias) if place is not None
    }

    def row(path: Path, leaf: Any) -> CoverageRow:
        shape, layer = tuple(leaf.shape), layers.get(path)
        reason = "" if layer else reasons.get(path)
        if reason is None:
            owner = classes.get(path, classes.get(path[:-1]))
            reason = _reason(owner, ranks.get(path, len(shape)), elementwise)
        centered = layer is not None and layer.bias is not None
        error = errors.get(path) if layer else None
        moments = _moments(layer) if layer is not None and layer.path == path else ""
        return CoverageRow("/".join(path), shape, layer is not None, reason, centered, error, moments)

    pairs = zip(tree.paths, tree.leaves, strict=True)
    return Coverage(tuple(row(path, leaf) for path, leaf in pairs if not is_probe(path)))


def _moments(layer: Layer) -> str:
    """Which second moments the probe of a layer collects."""
    held, layout = layer.shapes, layer.layout
    sizes = list(zip(layout.a, layout.b, strict=True))
    inputs = math.prod(i for i, o in sizes if o == 1)
    outputs = math.prod(o // i for i, o in sizes if o > 1)
    found = []
    if TRACE in held:
        rank = math.prod(held[MOMENT]) // math.prod(layout.a) if MOMENT in held else 0
        found.append(f"rank {rank} of {inputs}")
    if DIAGONAL in held:
        found.append("diagonal of A")
    if INPUTS in held:
        found.append(f"A {inputs}×{inputs}")
    if OUTPUTS in held:
        found.append(f"B {outputs}×{outputs}")
    return ", ".join(found)


def _reason(owner: type | None, rank: int, elementwise: tuple[type, ...]) -> str:
    """Why a parameter is not tapped of which nothing is known but the class of its module."""
    if owner is not None and issubclass(owner, elementwise):
        return f"{owner.__name__}: scales or shifts element by element"
    if rank < 2:
        return "a vector, not a matrix"
    if owner is not None and owner.__module__.startswith("flax."):
        return f"its parameter is used otherwise than by a call of {owner.__name__}"
    name = "its module" if owner is None else _full_name(owner)
    return f"{name} has no rule: its parameter is used directly (eva_optax.register)"


def _full_name(cls: type) -> str:
    """The name of a class; with its module's where Flax has a class of this name too."""
    flax = (sys.modules.get(name) for name in ("flax.linen", "flax.nnx"))
    theirs = not cls.__module__.startswith("flax.") and any(hasattr(module, cls.__name__) for module in flax)
    return f"{cls.__module__}.{cls.__name__}" if theirs else cls.__name__


def largest_untapped(coverage: Coverage, classes: dict[Path, type]) -> str:
    """The two classes whose modules hold most of what is not tapped, with its size and the reason."""
    sizes: Counter[type] = Counter()
    reasons: dict[type, str] = {}
    for row in sorted(coverage.rows, key=lambda row: -row.size):
        path = tuple(row.path.split("/"))
        owner = classes.get(path, classes.get(path[:-1]))
        if not row.tapped and owner is not None:
            sizes[owner] += row.size
            reasons.setdefault(owner, row.reason)
    return "; ".join(
        f"{_full_name(owner)} ({size:,} entries: {reasons[owner]})" for owner, size in sizes.most_common(2)
    )
