"""Docstrings as they are written, with Sphinx's mathematics and tables, in the Markdown that the site is made of."""

import re
from collections.abc import Iterator
from typing import Any

import griffe

MATH = re.compile(r"^( *)\.\. math::(.*)$")
ROLE = re.compile(r":math:`([^`]*)`")


class Docstrings(griffe.Extension):
    """Rewrites each docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called for each object of the package."""
        if obj.docstring:
            exports = {str(name) for name in obj.package.exports or ()}
            lines = (ROLE.sub(r"$\1$", line) for line in rewritten(obj.docstring.value))
            obj.docstring.value = "\n".join(linked(line, exports) for line in lines)


def linked(line: str, exports: set[str]) -> str:
    """A line in which public names in backticks lead to their sections."""
    if line.lstrip().startswith((">>>", "...")):
        return line
    return re.sub(
        r"(?<![`\[])`(\w+)`(?!`)",
        lambda name: f"[{name[0]}][eva_optax.{name[1]}]" if name[1] in exports else name[0],
        line,
    )


def rewritten(text: str) -> Iterator[str]:
    """The lines of a docstring in Markdown."""
    lines = text.splitlines()
    while lines:
        line = lines.pop(0)
        if found := MATH.match(line):
            indent, first = found.groups()
            body = [first.strip()]
            while lines and (not lines[0].strip() or lines[0].startswith(indent + " ")):
                body.append(lines.pop(0).strip())
            yield from ("", f"{indent}$$", *(f"{indent}{part}" for part in body if part), f"{indent}$$", "")
        elif re.fullmatch(r"=+( +=+)+", line):
            rows = [lines.pop(0) for _ in range(last_rule(lines) + 1)]
            yield from table([line, *rows])
        else:
            yield re.sub(r"^Example:", "Examples:", re.sub(r"^Source:", "**Source:**", line))


def last_rule(lines: list[str]) -> int:
    """Where a table ends: its second rule, or the third where one ends its header."""
    end = next((place for place, line in enumerate(lines) if not line.strip()), len(lines))
    return max(place for place, line in enumerate(lines[:end]) if line.startswith("=="))


def table(lines: list[str]) -> Iterator[str]:
    """A table of reStructuredText's simple form; a row without a first cell goes on with the one before."""
    width = len(lines[0].split())
    rules = [place for place, line in enumerate(lines) if line.startswith("==")]
    rows: list[list[str]] = []
    for line in (line for place, line in enumerate(lines) if place not in rules):
        cells = [in_cell(cell) for cell in re.split(" {2,}", line)]
        cells += [""] * (width - len(cells))
        if cells[0]:
            rows.append(cells)
        else:
            rows[-1] = [f"{before} {cell}".strip() for before, cell in zip(rows[-1], cells, strict=True)]
    header, body = (rows[0], rows[1:]) if len(rules) == 3 else ([""] * width, rows)
    for cells in (header, ["---"] * width, *body):
        yield f"| {' | '.join(cells)} |"
    yield ""


def in_cell(text: str) -> str:
    """A cell's text: in mathematics ‖ is written as a bar, which would end the cell, and <layer> would be a tag."""
    text = ROLE.sub(lambda role: role[0].replace(r"\|", r"\Vert ").replace(" `", "`"), text)
    return text.replace("<", "&lt;")
