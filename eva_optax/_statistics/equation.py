"""Equations "input,kernel->output" in einsum's notation, with einops' parentheses around axes that a layer merges."""

import math
import re
import string
from functools import lru_cache

from eva_optax._probes.probe import Shape
from eva_optax._statistics.einsum import Contraction
from eva_optax._statistics.grouped import GroupedContraction

Term = tuple[str, ...]  # for each axis its letters, several where they are merged, or "..."

_AXIS = re.compile(r"\.\.\.|\(\w+\)|\w")


@lru_cache(maxsize=256)
def split_terms(equation: str) -> tuple[Term, Term, Term] | None:
    """The axes of input, kernel and output, or None if the equation does not have this form."""
    sides = equation.replace(" ", "").split("->")
    terms = [*sides[0].split(","), *sides[1:]]
    axes = [tuple(_AXIS.findall(term)) for term in terms]
    written = ["".join(term) for term in axes] == terms
    if len(sides) != 2 or len(terms) != 3 or not written or any(term.count("...") > 1 for term in axes):
        return None
    x, kernel, y = (tuple(axis.strip("()") for axis in term) for term in axes)
    return x, kernel, y


def parse_equation(
    equation: str, x_shape: Shape, kernel_shape: Shape, y_shape: Shape | None = None
) -> Contraction | GroupedContraction | None:
    """The linear map of an equation between arrays of these shapes, or None if there is none.

    An ellipsis stands for as many axes as the input has left, aligned at the right in all three terms. An equation that
    repeats a letter within one term takes a diagonal, one whose axes of size 1 meet larger ones broadcasts: neither is
    a contraction. Nor is there a layout for a kernel's axis that merges inputs with anything else, or outputs with
    batch axes behind them. Without the output's shape, axes that only the output tells apart are taken as one.
    """
    terms = split_terms(equation)
    if terms is None:
        return None
    unused = [letter for letter in string.ascii_letters if letter not in equation]
    hidden = [len(shape) + 1 - len(term) for term, shape in zip(terms, (x_shape, kernel_shape), strict=False)]
    ellipsis = tuple(unused[: hidden[0]]) if "..." in terms[0] else ()
    aligned = ellipsis[max(len(ellipsis) - hidden[1], 0) :]
    x, kernel, y = (_expand(*pair) for pair in zip(terms, (ellipsis, aligned, ellipsis), strict=True))
    shapes = [(x, x_shape), (kernel, kernel_shape), *([] if y_shape is None else [(y, y_shape)])]
    if any(len(term) != len(shape) for term, shape in shapes):
        return None
    in_x, in_kernel, in_y = letters = ["".join(term) for term in (x, kernel, y)]
    if any(len(set(term)) < len(term) for term in letters) or not set(in_y) <= set(in_x + in_kernel):
        return None
    sizes = _sizes([axis for pair in shapes for axis in zip(*pair, strict=True)], guess=y_shape is None)
    if sizes is None or not all(_has_layout(axis, in_x, in_y) for axis in kernel):
        return None
    positions = "".join(c for c in in_x if c in in_y and c not in in_kernel)
    split = Contraction(tuple(sizes[c] for c in in_kernel), in_x, in_kernel, in_y, positions)
    if all(len(axis) == 1 for term in (x, kernel, y) for axis in term):
        return split
    x_axes, kernel_axes, y_axes = (
        tuple(tuple(sizes[c] for c in axis) if len(axis) > 1 else None for axis in term) for term in (x, kernel, y)
    )
    return GroupedContraction(kernel_shape, split, x_axes, kernel_axes, y_axes)


def example_input(equation: str, kernel_shape: Shape) -> Shape:
    """The shape of an input that a layer of this equation takes, with as few axes as can be."""
    x, kernel, _ = split_terms(equation) or ((), (), ())
    # Of no alphabet: an equation has none of these.
    hidden = tuple(chr(ord("Z") + 1 + index) for index in range(len(kernel_shape) + 1 - len(kernel)))
    kernel = _expand(kernel, hidden)
    pairs = list(zip(kernel, kernel_shape, strict=True))
    sizes = _sizes(pairs, guess=True) or {}
    return tuple(math.prod(sizes.get(c, 1) for c in axis) for axis in _expand(x, hidden))


def needs_input(equation: str) -> bool:
    """Whether shapes beside the kernel's are needed for its layout: one of its axes is several layers side by side."""
    x, kernel, y = split_terms(equation) or ((), (), ())
    x, y = "".join(x), "".join(y)
    return any(any(c in x for c in axis) and any(c not in x for c in axis) for axis in kernel if set(axis) <= set(y))


def _expand(term: Term, ellipsis: tuple[str, ...]) -> Term:
    return tuple(letter for axis in term for letter in (ellipsis if axis == "..." else (axis,)))


def _sizes(axes: list[tuple[str, int]], guess: bool) -> dict[str, int] | None:
    """The size of each letter, from sizes of axes of one letter or several; None if they contradict each other.

    With `guess`, what no axis tells belongs to the first letter of its axis; without, there are no sizes then.
    """
    sizes: dict[str, int] = {}
    axes = sorted(axes, key=lambda axis: len(axis[0]))
    while True:
        count = len(sizes)
        for letters, size in axes:
            known = math.prod(sizes[c] for c in letters if c in sizes)
            unknown = [c for c in letters if c not in sizes]
            if not unknown and known != size:
                return None
            if len(unknown) == 1:
                if known != 1 and (known == 0 or size % known != 0):
                    return None
                sizes[unknown[0]] = size if known == 1 else size // known
        if len(sizes) > count:
            continue
        open_letters = next((c for letters, _ in axes for c in letters[1:] if c not in sizes), None)
        if open_letters is None:
            return sizes
        if not guess:
            return None
        sizes[open_letters] = 1


def _has_layout(axis: str, x: str, y: str) -> bool:
    """Whether a kernel's axis is one of inputs, one of batch axes, or one of outputs with batch axes before them."""
    outputs = [c in y for c in axis]
    batch = [c in x for c in axis]
    return not any(outputs) or (all(outputs) and batch == sorted(batch, reverse=True))
