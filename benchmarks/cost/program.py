"""Memory traffic and collectives of a compiled program, read from its optimized HLO.

The convention: every instruction of the entry computation reads each operand and writes each result once, from and to
HBM unless the layout places it on the chip, `S(1)`. A fusion is one instruction. The bodies of loops count as often as
they run, once where the data decide, as in an iteration that converges. Bytes are those that a buffer occupies,
tile padding included. Of a buffer that is only sliced, gathered from or updated in place, the part that is touched
counts. What an instruction reads twice from within is not seen.

The payload of a collective is what it hands to the network: its operand, or for an all-gather its result.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks.cost.hlo import Computation, Instruction, Shape, parse_program

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# Instructions that move nothing: names for buffers, and control flow, whose computations are walked instead.
CONTROL = ("while", "conditional", "call")
NAMES = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "domain")
FREE = frozenset((*CONTROL, *NAMES, "partition-id", "replica-id", "opt-barrier", "optimization-barrier"))
SLICES = ("slice", "dynamic-slice", "gather")
UPDATE = "dynamic-update-slice"  # writes its second operand into its first
# Calls of cuBLAS and cuDNN, whose last result is scratch space.
LIBRARY_CALL = re.compile(r'custom_call_target="__cu')
NO_TRAFFIC_CALL = re.compile(
    '"(AllocateBuffer|Sharding|SPMDFullToShardShape|SPMDShardToFullShape|AssumeGatherIndices)"'
)


class Run(NamedTuple):
    """An instruction that runs, the computation that it stands in, and how often it runs."""

    home: Computation
    one: Instruction
    times: float


class Program:
    """A compiled program, from what `compiled.as_text()` gives.

    Of the branches of a conditional one runs: the one that moves most, or with `rare=False` the one that moves least,
    as in a step that renews nothing.
    """

    def __init__(self, text: str, rare: bool = True) -> None:
        self.computations, self.entry = parse_program(text)
        self.choose = max if rare else min

    def walk(self) -> Iterator[Run]:
        """Every instruction that runs; fusions are not entered."""
        yield from self._walk(self.entry, 1.0)

    def _walk(self, name: str, times: float) -> Iterator[Run]:
        home = self.computations[name]
        for one in home.values():
            yield Run(home, one, times)
            if one.opcode == "while":
                for body in one.called("body"):
                    yield from self._walk(body, times * self.trip_count(one))
            elif one.opcode == "conditional":
                branches = one.called("branch_computations", "true_computation", "false_computation")
                chosen = self.choose(branches, key=lambda branch: sum(map(self._traffic, self._walk(branch, 1.0))))
                yield from self._walk(chosen, times)
            elif one.opcode == "call":
                for called in one.called("to_apply"):
                    yield from self._walk(called, times)

    def trip_count(self, loop: Instruction) -> int:
        """How often a loop runs: as the compiler notes it, else the constant that its condition compares with, or 1."""
        condition = self.computations[loop.called("condition")[0]].values()
        limits = " ".join(one.attributes for one in condition if one.opcode == "constant")
        known = re.findall(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)', loop.attributes)
        known = known or re.findall(r"\((\d+)\)", limits)
        return int(known[0]) if len(known) == 1 else 1

    def hbm_bytes(self) -> float:
        """Bytes that the program reads from and writes to HBM."""
        return sum(map(self._traffic, self.walk()))

    def launches(self) -> float:
        """How many instructions run; on a GPU each is a kernel, or a call of a library."""
        return sum(run.times for run in self.walk() if not _moves_nothing(run.one.opcode))

    def entry_instructions(self) -> int:
        """Instructions of the entry computation: a loop and a fusion are one each, names of buffers none."""
        return sum(one.opcode not in NAMES for one in self.computations[self.entry].values())

    def collectives(self) -> dict[str, tuple[float, float]]:
        """For each kind of collective how many run, and their payload in bytes."""
        found: dict[str, tuple[float, float]] = {}
        for home, one, times in self.walk():
            inside = self._inside(one)
            for place, inner in ((home, one), *((inside, inner) for inner in inside.values())):
                kind = inner.opcode.removesuffix("-start")
                if kind in COLLECTIVES:
                    operands = [shape for name in inner.operands for shape in place[name].shapes]
                    shapes = _results(inner, len(operands)) if kind == "all-gather" else operands
                    count, total = found.get(kind, (0.0, 0.0))
                    found[kind] = count + times, total + times * sum(shape.payload for shape in shapes)
        return found

    def _inside(self, one: Instruction) -> Computation:
        """What a fusion, or an asynchronous wrapper, holds."""
        return self.computations[one.called("calls")[0]] if one.opcode in ("fusion", "async-start") else {}

    def _traffic(self, run: Run) -> float:
        home, one, times = run
        if _moves_nothing(one.opcode) or NO_TRAFFIC_CALL.search(one.attributes):
            return 0
        operands = [home[name].shapes for name in one.operands]
        values, users, names, written = home, [one], one.operands, (one.name,)
        if inside := self._inside(one):  # where parameters stand for the operands
            values, users = inside, list(inside.values())
            parameters = [inner for inner in users if inner.opcode == "parameter"]
            names = [inner.name for inner in sorted(parameters, key=lambda inner: int(inner.attributes.strip("()")))]
            root = next(inner for inner in users if inner.root)
            written = root.operands if root.opcode == "tuple" else (root.name,)
        full = [sum(shape.hbm for shape in shapes) for shapes in operands]
        moved = sum(_touched(users, *pair) for pair in zip(names, full, strict=True) if pair[1])
        results = _results(one, sum(map(len, operands)), len(written))
        if len(written) == len(results):
            return times * (moved + sum(_written(values, *pair) for pair in zip(written, results, strict=True)))
        return times * (moved + sum(shape.hbm for shape in results))


def _moves_nothing(opcode: str) -> bool:
    return opcode in FREE or opcode.endswith(("-done", "-update"))


def _results(one: Instruction, operands: int, results: int = 0) -> tuple[Shape, ...]:
    """The shapes that an instruction writes: the type of one that starts something holds more."""
    if one.opcode == "copy-start":  # (destination, source, context)
        return one.shapes[:1]
    if one.opcode == "async-start":  # ((operands), results, context)
        return one.shapes[operands:][:results]
    if one.opcode.endswith("-start") and len(one.shapes) > operands:  # also (operands, results, context)
        return one.shapes[operands : 2 * operands]
    if one.opcode == "custom-call" and LIBRARY_CALL.search(one.attributes) and len(one.shapes) > 1:
        return one.shapes[:-1]
    return one.shapes


def _touched(users: list[Instruction], name: str, full: float) -> float:
    """Bytes that are read of a value, all of whose bytes are `full`."""
    total = 0.0
    for user in users:
        opcode = user.opcode.removesuffix("-start")
        if name in user.operands[1:] or (name in user.operands and opcode not in (*SLICES, UPDATE, "bitcast")):
            total += full
        elif name in user.operands and opcode in SLICES:
            total += _results(user, len(user.operands))[0].bytes
        elif name in user.operands and opcode == "bitcast":
            total += _touched(users, user.name, full)
    return min(total, full)


def _written(values: Computation, name: str, shape: Shape) -> float:
    """Bytes that a result writes: an update in place only what it updates."""
    one = values[name]
    while one.opcode == "bitcast":
        one = values[one.operands[0]]
    return min(values[one.operands[1]].shapes[0].bytes, shape.hbm) if one.opcode == UPDATE else shape.hbm
