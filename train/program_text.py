"""Reads the text of a compiled program (XLA's HLO): its computations, its instructions and how often each runs."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

ITEM_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "c64": 8, "c128": 16}
_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+|f8\w+)\[([\d,]*)\](\{[^}]*\})?")
_NAME = re.compile(r"%([\w.-]+)")
_HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_START = re.compile(r"\s+(ROOT )?%?([\w.-]+) = ")
_OPCODE = re.compile(r" *([\w-]+)\(")
_CALLED = re.compile(r"\b(?:calls|body|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


class Shape(NamedTuple):
    """An array of an instruction's result."""

    dtype: str
    dims: tuple[int, ...]
    on_chip: bool  # in the chip's own memory (a TPU's VMEM or SMEM): no traffic of the main memory

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes of the array."""
        digits = re.match(r"[sufc](\d+)", self.dtype)
        return self.size * (ITEM_BYTES.get(self.dtype) or max(int(digits[1]) // 8, 1))


class Instruction(NamedTuple):
    """One instruction; `rest` is the text behind its operands."""

    name: str
    opcode: str
    results: tuple[Shape, ...]  # of a tuple all its arrays
    operands: tuple[str, ...]  # names
    rest: str
    root: bool

    @property
    def place(self) -> str:
        """Where in the traced function it comes from: "jit(step)/transpose(jvp())/while/body/dot_general"."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def stage(self) -> str:
        """The part of the training step: "forward", "recomputed" (forward again, in the backward pass), "backward"."""
        if "rematted_computation" in self.place:
            return "recomputed"
        return "backward" if "transpose(" in self.place else "forward"

    @property
    def target(self) -> str:
        """The target of a custom call."""
        return re.search(r'custom_call_target="([^"]*)"', self.rest)[1]


class Program(NamedTuple):
    """The computations of a program by name; `entry` is the name of the first to run."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def running(self) -> Iterator[tuple[Instruction, dict[str, Instruction], float]]:
        """Yields (instruction, its computation, times it runs) in the entry, in loops and in branches. The number is
        NaN inside a loop without a fixed length; every branch counts as taken."""
        waiting = [(self.entry, 1.0)]
        while waiting:
            name, times = waiting.pop()
            for instruction in self.computations[name].values():
                yield instruction, self.computations[name], times
                if instruction.opcode in ("while", "call", "conditional", "async-start"):
                    turns = self._length(instruction, self.computations[name]) if instruction.opcode == "while" else 1
                    again = times * turns
                    waiting += [(inner, again) for inner in called(instruction)]

    def _length(self, loop: Instruction, around: dict[str, Instruction]) -> float:
        """The number of turns of a loop: as the compiler says, or where it counts from a constant to a constant."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
            return float(known[1])
        condition, body = (
            self.computations[re.search(rf"\b{part}=%?([\w.-]+)", loop.rest)[1]] for part in ("condition", "body")
        )
        test = _root(condition)
        if test.opcode != "compare" or "direction=LT" not in test.rest:
            return math.nan
        counter = condition[test.operands[0]]
        if counter.opcode != "get-tuple-element":
            return math.nan
        place = int(re.search(r"index=(\d+)", counter.rest)[1])
        after, start = body[_root(body).operands[place]], around[loop.operands[0]]
        if after.opcode != "add" or start.opcode != "tuple":
            return math.nan
        limit, step = _constant(condition, test.operands[1]), _constant(body, after.operands[1])
        turns = (limit - _constant(around, start.operands[place])) / step
        return turns if math.isnan(turns) else float(math.ceil(turns))


def _root(computation: dict[str, Instruction]) -> Instruction:
    return next(i for i in computation.values() if i.root)


def _constant(computation: dict[str, Instruction], name: str) -> float:
    """The number that a value is, through copies; NaN if it is none."""
    while computation[name].opcode in ("copy", "bitcast", "copy-start", "copy-done"):
        name = computation[name].operands[0]
    found = computation[name]
    return float(re.match(r"-?\d+", found.rest)[0]) if found.opcode == "constant" else math.nan


def called(instruction: Instruction) -> list[str]:
    """The names of the computations that an instruction runs."""
    branches = _BRANCHES.search(instruction.rest)
    return _CALLED.findall(instruction.rest) + (re.findall(r"[\w.-]+", branches[1]) if branches else [])


def read(text: str) -> Program:
    """Reads a program. Raises ValueError where the text is none."""
    computations, entry, current = {}, None, None
    for line in re.sub(r"/\*index=\d+\*/", "", text).splitlines():
        if head := _HEAD.match(line):
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif current is not None and (start := _START.match(line)):
            instruction = _instruction(line[start.end() :], start[2], bool(start[1]))
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError("the text holds no entry computation: it is not the text of a compiled program.")
    return Program(computations, entry)


def _instruction(text: str, name: str, root: bool) -> Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    opcode = _OPCODE.match(text, end)
    close = _closing(text, opcode.end() - 1)
    inside, rest = text[opcode.end() : close], text[close + 1 :]
    if opcode[1] in ("constant", "parameter"):
        rest = inside + rest
    return Instruction(name, opcode[1], _shapes(text[:end]), tuple(_NAME.findall(inside)), rest, root)


def _shapes(text: str) -> tuple[Shape, ...]:
    """The arrays in the text of a type."""
    return tuple(
        Shape(dtype, tuple(int(d) for d in dims.split(",") if d), bool(re.search(r"S\([1-9]\)", layout)))
        for dtype, dims, layout in _ARRAY.findall(text)
    )


def _closing(text: str, start: int) -> int:
    """The index of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"a parenthesis is not closed: {text[:80]}")
