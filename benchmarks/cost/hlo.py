"""The text of optimized HLO: computations, their instructions, and the shapes that these read and write."""

import math
import re
from typing import NamedTuple


class Shape(NamedTuple):
    """An array type with its layout, such as f32[12,768]{1,0:T(8,128)S(1)}.

    Attributes:
      payload: bytes of the values.
      bytes: those in memory, where the minor axes are padded to whole tiles.
      hbm: the same, or 0 for memory on the chip.
    """

    payload: float
    bytes: float
    hbm: float


class Instruction(NamedTuple):
    """One line of HLO; `shapes` are the leaves of its type."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    def called(self, *attributes: str) -> list[str]:
        """The computations that these attributes name."""
        found = re.findall(rf"\b(?:{'|'.join(attributes)})=(%?[\w.\-]+|\{{[^}}]*\}})", self.attributes)
        return [name for names in found for name in re.findall(r"[\w.\-]+", names)]


Computation = dict[str, Instruction]
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
# Name, type, opcode, operands, attributes.
_LINE = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*?)\)(?:, (.*))?$")
_ARRAY = re.compile(r"([a-z]\w*)\[([^\]]*)\](?:\{([^{}]*)\})?")


def parse_program(text: str) -> tuple[dict[str, Computation], str]:
    """The computations by name, and the name of the one that the program starts with.

    Raises:
      ValueError: if the text holds no entry computation.
    """
    computations: dict[str, Computation] = {}
    current, entry = {}, ""
    for line in text.splitlines():
        if (header := _HEADER.match(line)) and not line.startswith("HloModule"):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif found := _LINE.match(line):
            root, name, kind, opcode, operands, attributes = found.groups(default="")
            if opcode in ("constant", "parameter"):  # a value, or a number, stands where operands do
                operands, attributes = "", f"({operands})"
            names = tuple(re.findall(r"%([\w.\-]+)", operands))
            current[name] = Instruction(name, opcode, parse_shapes(kind), names, attributes, bool(root))
    if not entry:
        raise ValueError("benchmarks.cost.hlo: the text holds no ENTRY computation; give it compiled.as_text().")
    return computations, entry


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """The array types in `text`, a type or a tuple of types."""
    shapes = []
    for dtype, dims, layout in _ARRAY.findall(text):
        order, _, rest = layout.partition(":")
        sizes, axes = (list(map(int, re.findall(r"\d+", numbers))) for numbers in (dims, order))
        tile = re.match(r"T\(([\d,]+)\)", rest)
        tiles = [int(size) for size in tile[1].split(",")][::-1] if tile else []
        minor = [sizes[axis] for axis in axes] if len(axes) == len(sizes) else sizes[::-1]
        minor += [1] * (len(tiles) - len(minor))
        padded = [-(-size // tile) * tile for size, tile in zip(minor, tiles, strict=False)] + minor[len(tiles) :]
        bits = re.search(r"\d+", dtype)
        entry = 1 if dtype == "pred" else int(bits[0]) / 8 if bits else 0  # tokens have none
        occupied, on_chip = math.prod(padded) * entry, re.search(r"S\([1-9]", rest)
        shapes.append(Shape(math.prod(sizes) * entry, occupied, 0 if on_chip else occupied))
    return tuple(shapes)
