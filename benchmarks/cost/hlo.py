"""The text of optimized HLO: computations, their instructions, and the shapes that these read and write."""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple


class Shape(NamedTuple):
    """An array type with its layout, such as f32[12,768]{1,0:T(8,128)S(1)}."""

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...]  # axes, the minor one first
    tile: tuple[int, ...]
    space: int  # 0 is HBM

    @property
    def entry_bytes(self) -> float:
        """Bytes of one entry."""
        if self.dtype == "pred":
            return 1
        bits = re.search(r"\d+", self.dtype)
        return int(bits[0]) / 8 if bits else 0  # tokens have none

    @property
    def payload(self) -> float:
        """Bytes of the values."""
        return math.prod(self.dims) * self.entry_bytes

    @property
    def bytes(self) -> float:
        """Bytes in memory: the minor axes are padded to whole tiles."""
        sizes = [self.dims[axis] for axis in self.order]
        tile = self.tile[::-1]
        sizes += [1] * (len(tile) - len(sizes))
        padded = [-(-size // tile[i]) * tile[i] if i < len(tile) else size for i, size in enumerate(sizes)]
        return math.prod(padded) * self.entry_bytes

    @property
    def hbm(self) -> float:
        return 0 if self.space else self.bytes


@dataclass(frozen=True)
class Instruction:
    """One line of HLO; `shapes` are the leaves of its type."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def called(self, *attributes: str) -> list[str]:
        """The computations that these attributes name."""
        found = []
        for attribute in attributes:
            match = re.search(rf"\b{attribute}=(?:%?([\w.\-]+)|\{{([^}}]*)\}})", self.attributes)
            if match:
                found += [match[1]] if match[1] else re.findall(r"[\w.\-]+", match[2])
        return found


Computation = dict[str, Instruction]


def parse_program(text: str) -> tuple[dict[str, Computation], str]:
    """The computations by name, and the name of the one that the program starts with.

    Raises:
      ValueError: if the text holds no entry computation.
    """
    computations: dict[str, Computation] = {}
    current, entry = None, ""
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$", line)
        if header and not line.startswith("HloModule"):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and " = " in line:
            instruction = _parse_line(line)
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("benchmarks.cost.hlo: the text holds no ENTRY computation; give it compiled.as_text().")
    return computations, entry


_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^{}]*)\})?")


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """The array types in `text`, a type or a tuple of types."""
    shapes = []
    for dtype, dims, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", text)):
        order, _, rest = layout.partition(":")
        sizes = tuple(int(size.removeprefix("<=")) for size in dims.split(",") if size)
        axes = tuple(int(axis) for axis in order.split(",") if axis)
        tile = re.match(r"T\(([\d,]+)\)", rest)
        space = re.search(r"S\((\d+)\)", rest)
        shapes.append(
            Shape(
                dtype,
                sizes,
                axes if len(axes) == len(sizes) else tuple(reversed(range(len(sizes)))),
                tuple(int(size) for size in tile[1].split(",")) if tile else (),
                int(space[1]) if space else 0,
            )
        )
    return tuple(shapes)


def _parse_line(line: str) -> Instruction:
    name, _, rest = line.strip().partition(" = ")
    root = name.startswith("ROOT ")
    type_end = _matching(rest, 0) if rest.startswith("(") else rest.index(" ")
    shapes, rest = parse_shapes(rest[:type_end]), rest[type_end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _matching(rest, len(opcode))
    operands = re.findall(r"%([\w.\-]+)", rest[len(opcode) : end])
    # A constant's value and a parameter's number stand where operands do.
    attributes = rest if opcode in ("constant", "parameter") else rest[end:]
    return Instruction(name.removeprefix("ROOT ").lstrip("%"), opcode, shapes, tuple(operands), attributes, root)


def _matching(text: str, start: int) -> int:
    """The position behind the bracket that closes the one at `start`."""
    depth = 0
    for position in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[position], 0)
        if depth == 0:
            return position + 1
    raise ValueError(f"benchmarks.cost.hlo: a bracket is not closed in {text[:200]!r}.")
