"""Products of small matrices with kernels along their input or output axes, wherever these lie."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from eva_optax._curvature.inverses import EXACT
from eva_optax._probes.fusion import as_parameters_lie, on_gpu
from eva_optax._probes.sketch_axes import SketchAxes

_COLUMNS = "z"  # as in `SketchAxes`


class Along:
    """Products along the input axes of one kernel, placed as it is where shardings are part of the types.

    What is multiplied is small: matrices (*batch, n, m), n for all input axes. Their columns get an axis of their own.
    """

    def __init__(self, axes: SketchAxes, kernel: Array) -> None:
        self.axes = axes
        self.sizes = dict(zip(axes.kernel, kernel.shape, strict=True))
        spec = jax.typeof(kernel).sharding.spec
        self.names = dict(zip(axes.kernel, spec, strict=True)) if any(spec) else {}

    def to_columns(self, matrix: Array, kernel: Array, bias: Array | None = None, row: Array | None = None) -> Array:
        """The products of each column, and of the row (*batch, 1, m) with the bias: (*batch, m, *outputs)."""
        axes = self.axes
        rows = self._product(axes.inputs, axes.kernel, axes.rows, matrix, kernel)
        if bias is None or row is None:
            return rows
        return rows + self._product("", axes.bias, axes.rows, row, self._flat(bias))

    def from_columns(self, matrix: Array, rows: Array) -> Array:
        """A kernel of the columns, each as often as such rows say."""
        return as_parameters_lie(self._product(self.axes.inputs, self.axes.rows, self.axes.kernel, matrix, rows))

    def from_few_columns(self, matrix: Array, rows: Array) -> Array:
        """The same of so few that a GPU computes them along with what the kernel is added to.

        A product is a kernel of its own there, whose result is written to memory and read again.
        """

        def summed(matrix: Array, rows: Array) -> Array:
            columns = self._against_kernel(*self._split(self.axes.inputs, matrix))
            return jnp.sum(columns * self._against_kernel(self.axes.rows, rows), 0)

        return on_gpu(summed, self.from_columns, matrix, rows)

    def to_bias(self, row: Array, rows: Array, like: Array) -> Array:
        """A bias of the entries of the row (*batch, 1, m), each as often as such rows say."""
        return self._product("", self.axes.rows, self.axes.bias, row, rows).reshape(like.shape)

    def to_kernel(self, rows: Array) -> Array:
        """Rows, one for each input, as a kernel."""
        letters = self.axes.batch + self.axes.inputs + self.axes.outputs
        split = rows.reshape([self.sizes[letter] for letter in letters])
        return jnp.transpose(split, [letters.index(letter) for letter in self.axes.kernel])

    def each(self, numbers: Array) -> Array:
        """Numbers (*batch, n, 1) laid out against the kernel."""
        known = self.axes.batch + self.axes.inputs
        ordered = [letter for letter in self.axes.kernel if letter in known]
        split = jnp.transpose(numbers.reshape(self.axes.sizes(known)), [known.index(letter) for letter in ordered])
        return split.reshape([size if letter in known else 1 for letter, size in self.sizes.items()])

    def scale(self, numbers: Array) -> Array:
        """Numbers (*batch, 1, 1) laid out against the kernel."""
        return numbers.reshape([self.sizes[c] if c in self.axes.batch else 1 for c in self.axes.kernel])

    def _against_kernel(self, letters: str, array: Array) -> Array:
        """An array whose axes have these letters laid out against the kernel, the columns first."""
        wanted = _COLUMNS + self.axes.kernel
        ordered = jnp.transpose(array, [letters.index(letter) for letter in wanted if letter in letters])
        return jnp.expand_dims(ordered, [axis for axis, letter in enumerate(wanted) if letter not in letters])

    def _flat(self, bias: Array) -> Array:
        sizes = zip(self.axes.kernel, bias.shape, strict=True)
        return bias.reshape([size for letter, size in sizes if letter in self.axes.bias])

    def _product(self, inputs: str, given: str, wanted: str, matrix: Array, array: Array) -> Array:
        letters, split = self._split(inputs, matrix)
        equation = f"{letters},{given}->{wanted}"
        return jnp.einsum(equation, split, array, precision=EXACT, out_sharding=self._place(wanted))

    def _split(self, inputs: str, matrix: Array) -> tuple[str, Array]:
        """The matrix with an axis for each of the input axes, and the letters of its axes."""
        letters = f"{self.axes.batch}{inputs}{_COLUMNS}"
        split = matrix.reshape(*self.axes.sizes(letters[:-1]), matrix.shape[-1])
        return letters, jax.sharding.reshard(split, self._place(letters)) if self.names else split

    def _place(self, letters: str) -> PartitionSpec | None:
        """Along the kernel's axes as the kernel."""
        return PartitionSpec(*map(self.names.get, letters)) if self.names else None
