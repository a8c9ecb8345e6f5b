"""Memory traffic and collectives of a compiled program, read from its optimized HLO.

The convention: every instruction of the entry computation reads each operand and writes each result once, from and to
HBM unless the layout places it on the chip, `S(1)`. A fusion is one instruction. The bodies of loops count as often as
they run. Bytes are those that a buffer occupies, tile padding included. Of a buffer that is only sliced, gathered from
or updated in place, the part that is touched counts. What an instruction reads twice from within is not seen.

The payload of a collective is what it hands to the network: its operand, or for an all-gather its result.
"""

import re
from collections.abc import Iterator

from benchmarks.cost.hlo import Instruction, Shape, parse_program

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# Instructions that move nothing: names for buffers, and control flow, whose computations are walked instead.
CONTROL = ("while", "conditional", "call")
NAMES = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "domain")
FREE = frozenset((*CONTROL, *NAMES, "partition-id", "replica-id", "opt-barrier", "optimization-barrier"))
SLICES = ("slice", "dynamic-slice", "gather")
# Calls of cuBLAS and cuDNN, whose last result is scratch space.
LIBRARY_CALL = re.compile(r'custom_call_target="__cu')
NO_TRAFFIC_CALLS = ("AllocateBuffer", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape", "AssumeGatherIndices")


class Program:
    """A compiled program, from what `compiled.as_text()` gives."""

    def __init__(self, text: str) -> None:
        self.computations, self.entry = parse_program(text)

    def walk(self) -> Iterator[tuple[str, Instruction, float]]:
        """Every instruction that runs, with its computation and how often it runs; fusions are not entered."""
        yield from self._walk(self.entry, 1.0)

    def _walk(self, name: str, times: float) -> Iterator[tuple[str, Instruction, float]]:
        for instruction in self.computations[name].values():
            yield name, instruction, times
            if instruction.opcode == "while":
                count = self.trip_count(instruction)
                for body in instruction.called("body"):
                    yield from self._walk(body, times * count)
            elif instruction.opcode == "conditional":  # only one branch runs: the dearest counts
                branches = instruction.called("branch_computations", "true_computation", "false_computation")
                yield from self._walk(max(branches, key=self._cost), times)
            elif instruction.opcode == "call":
                for called in instruction.called("to_apply"):
                    yield from self._walk(called, times)

    def _cost(self, name: str) -> float:
        return sum(times * self._traffic(where, one) for where, one, times in self._walk(name, 1.0))

    def trip_count(self, loop: Instruction) -> int:
        """How often a loop runs: as the compiler notes it, else the constant that its condition compares with.

        Raises:
          ValueError: if neither tells.
        """
        known = re.search(r'known_trip_count\\?":\{\\?"n\\?":\\?"(\d+)', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[loop.called("condition")[0]].values()
        constants = [one for one in condition if one.opcode == "constant" and one.shapes[0].dims == ()]
        values = [re.match(r"constant\((\d+)\)", one.attributes) for one in constants]
        numbers = [int(value[1]) for value in values if value]
        if len(numbers) != 1:
            raise ValueError(f"benchmarks.cost.program: cannot tell how often loop {loop.name} runs.")
        return numbers[0]

    def hbm_bytes(self) -> float:
        """Bytes that the program reads from and writes to HBM."""
        return sum(bytes for _, bytes in self.by_instruction())

    def by_instruction(self) -> list[tuple[Instruction, float]]:
        """Each instruction with the bytes that it moves in all its runs, the dearest first."""
        found = [(one, times * self._traffic(where, one)) for where, one, times in self.walk()]
        return sorted((item for item in found if item[1]), key=lambda item: -item[1])

    def launches(self) -> float:
        """How many instructions run; on a GPU each is a kernel, or a call of a library."""
        idle = ("-done", "-update")
        return sum(times for _, one, times in self.walk() if one.opcode not in FREE and not one.opcode.endswith(idle))

    def entry_instructions(self) -> int:
        """Instructions of the entry computation: a loop and a fusion are one each, names of buffers none."""
        return sum(one.opcode not in NAMES for one in self.computations[self.entry].values())

    def collectives(self) -> dict[str, tuple[float, float]]:
        """For each kind of collective how many run, and their payload in bytes."""
        found: dict[str, tuple[float, float]] = {}
        for where, one, times in self.walk():
            for inner in (one, *self._inside(one)):
                kind = inner.opcode.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                home = where if inner is one else self._home(one)
                payload = sum(shape.payload for shape in self._operand_shapes(home, inner))
                if kind == "all-gather":
                    # The start form's type is (operands, results).
                    shapes = inner.shapes[len(inner.operands) :] if inner.opcode != kind else inner.shapes
                    payload = sum(shape.payload for shape in shapes)
                count, total = found.get(kind, (0.0, 0.0))
                found[kind] = count + times, total + times * payload
        return found

    def _home(self, one: Instruction) -> str:
        return one.called("calls")[0]

    def _inside(self, one: Instruction) -> list[Instruction]:
        """What a fusion, or an asynchronous wrapper, holds."""
        if one.opcode not in ("fusion", "async-start"):
            return []
        return list(self.computations[self._home(one)].values())

    def _operand_shapes(self, where: str, one: Instruction) -> list[Shape]:
        computation = self.computations[where]
        return [shape for name in one.operands if name in computation for shape in computation[name].shapes]

    def _traffic(self, where: str, one: Instruction) -> float:
        opcode = one.opcode
        if opcode in FREE or opcode.endswith(("-done", "-update")):
            return 0
        if opcode == "custom-call" and any(f'"{name}"' in one.attributes for name in NO_TRAFFIC_CALLS):
            return 0
        operands = self._operand_shapes(where, one)
        if opcode in ("fusion", "async-start"):
            return self._fusion_traffic(where, one)
        if opcode == "copy-start":  # its type is (destination, source, context)
            return one.shapes[0].hbm + operands[0].hbm
        results = one.shapes
        if opcode.endswith("-start"):
            # (operands, results, context) or, for an all-reduce, the results alone
            many = len(operands)
            results = one.shapes[many : 2 * many] if len(one.shapes) > many else one.shapes
            opcode = opcode.removesuffix("-start")
        if opcode == "custom-call" and LIBRARY_CALL.search(one.attributes):
            return sum(shape.hbm for shape in (*results[: max(len(results) - 1, 1)], *operands))
        written = sum(shape.hbm for shape in results)
        if opcode in SLICES:
            touched = 0 if operands[0].space else sum(shape.bytes for shape in results)
            return written + touched + sum(shape.hbm for shape in operands[1:])
        if opcode == "dynamic-update-slice":
            return operands[1].hbm + (0 if results[0].space else operands[1].bytes)
        if opcode == "scatter":  # reads and writes the rows that it updates
            updates = operands[-1]
            return sum(shape.hbm for shape in operands[1:]) + (0 if results[0].space else 2 * updates.bytes)
        return written + sum(shape.hbm for shape in operands)

    def _fusion_traffic(self, where: str, one: Instruction) -> float:
        inner = self.computations[self._home(one)]
        outer = self.computations[where]
        users: dict[str, list[Instruction]] = {}
        for instruction in inner.values():
            for name in instruction.operands:
                users.setdefault(name, []).append(instruction)

        def touched(name: str, full: float) -> float:
            """Bytes that the users of a value read of it."""
            total = 0.0
            for user in users.get(name, []):
                if user.opcode in SLICES and user.operands[0] == name and name not in user.operands[1:]:
                    total += user.shapes[0].bytes
                elif user.opcode == "bitcast":
                    total += touched(user.name, full)
                elif user.opcode != "dynamic-update-slice" or user.operands[0] != name:
                    total += full
            return min(total, full)

        def written(name: str, shape: Shape) -> float:
            """Bytes that a result writes: an update in place only what it updates."""
            instruction = inner[name]
            while instruction.opcode == "bitcast":
                instruction = inner[instruction.operands[0]]
            if instruction.opcode == "dynamic-update-slice":
                return min(inner[instruction.operands[1]].shapes[0].bytes, shape.hbm)
            return shape.hbm

        total = 0.0
        for instruction in inner.values():
            if instruction.opcode == "parameter":
                match = re.match(r"parameter\((\d+)\)", instruction.attributes)
                source = outer[one.operands[int(match[1])]] if match else instruction
                hbm = sum(shape.hbm for shape in source.shapes)
                total += touched(instruction.name, hbm) if hbm else 0
        root = next(instruction for instruction in inner.values() if instruction.root)
        names = list(root.operands) if root.opcode == "tuple" else [root.name]
        results = one.shapes
        if one.opcode == "async-start":  # ((operands), results, context)
            results = one.shapes[len(one.operands) :][: len(names)]
        if len(names) != len(results):
            return total + sum(shape.hbm for shape in results)
        return total + sum(written(name, shape) for name, shape in zip(names, results, strict=True))
