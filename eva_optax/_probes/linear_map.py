"""What a kind of layer tells a tap: which shapes stand beside its kernel, and how its statistics are computed."""

from typing import NamedTuple, Protocol, runtime_checkable

from jax import Array

from eva_optax._probes.probe import Shape

ROWS, SKIP_PADDING = "rows=", "skip_padding"


class Moments(NamedTuple):
    """What a second moment is made of, as it stands in its name behind a comma: "A", "A,reduce", "B,rows=512".

    Attributes:
      sharing: "expand", each position is a row; "reduce", the mean of a sample's inputs and the sum of its cotangents
        are one row.
      rows: about so many rows are looked at; None for all, for sketches 512.
      skip_padding: whether rows whose cotangents are all zero do not count.
    """

    sharing: str = "expand"
    rows: int | None = None
    skip_padding: bool = False

    @classmethod
    def of(cls, leaf: str) -> "Moments":
        """Reads the name of a leaf."""
        words = leaf.split(",")[1:]
        rows = next((int(word.removeprefix(ROWS)) for word in words if word.startswith(ROWS)), None)
        return cls("reduce" if "reduce" in words else "expand", rows, SKIP_PADDING in words)

    def name(self, statistic: str) -> str:
        """The name of the leaf of a statistic."""
        words = [statistic]
        words += [] if self.sharing == "expand" else [self.sharing]
        words += [] if self.rows is None else [f"{ROWS}{self.rows}"]
        return ",".join([*words, SKIP_PADDING] if self.skip_padding else words)


def statistic_of(leaf: str) -> str:
    """The statistic that a leaf of this name receives."""
    return leaf.partition(",")[0]


class KernelShapes(Protocol):
    """What stands beside one kind of kernel."""

    @property
    def kernel_shape(self) -> Shape: ...

    @property
    def probe_shapes(self) -> tuple[Shape, Shape]:
        """Shapes of a and of b."""
        ...

    @property
    def last_output_axis(self) -> int | None:
        """The kernel's axis that has the vectors of a sketch instead, counted from the end; None without one."""
        ...

    @property
    def last_input_axis(self) -> int | None:
        """The kernel's axis that has the columns of B instead, counted from the end; None without B."""
        ...

    @property
    def is_lookup(self) -> bool:
        """Whether its inputs are one-hot, so that A is diagonal."""
        ...


class LinearMap(KernelShapes, Protocol):
    """How one kind of layer computes its statistics; hashable, because it is static under `jit`."""

    def mean_input(self, x: Array) -> Array:
        """a: the layer's input averaged over batch and positions, at least float32."""
        ...

    def sum_cotangent(self, dy: Array) -> Array:
        """b: the cotangent of the layer's output summed over batch and positions, at least float32."""
        ...

    def sketch(self, x: Array, rank: int, rows: int) -> Array:
        """y: XᵀXΩ / rows, with the rows of X the inputs of about so many positions, and Ω of `rank` columns."""
        ...

    def mean_square(self, x: Array, rows: int) -> Array:
        """s: ‖X‖² / rows, over the same rows."""
        ...

    def input_moment(self, x: Array, moments: Moments) -> Array:
        """A: XᵀX / rows."""
        ...

    def output_moment(self, dy: Array, moments: Moments) -> Array:
        """B: samples · dYᵀdY, with the rows of dY the cotangents of the layer's output."""
        ...


@runtime_checkable
class PairsRows(Protocol):
    """A layer whose rows of inputs have rows of cotangents of their own, so that padding is known by these."""

    def without_padding(self, x: Array, dy: Array, sharing: str) -> Array:
        """The input, weighted so that rows whose cotangents are zero do not count in its second moment."""
        ...
