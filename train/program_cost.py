"""What a compiled program does, counted in its text: kernels, collectives, products and memory traffic.

An instruction in a loop counts once per turn. XLA's own cost analysis counts a loop's body once.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from engrax.pallas_kernels.dispatch import OPERATIONS
from engrax.train.program_text import Instruction, Program, called

KERNELS = ("tpu_custom_call", "mosaic_gpu", "mosaic_gpu_v2")  # targets of custom calls
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
# They move nothing themselves: what they hold is counted inside, or where it is used.
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast while conditional call after-all partition-id replica-id "
    "opt-barrier domain async-start async-update async-done".split()
)


class Kernel(NamedTuple):
    """A kernel of this package in the program; `times` it runs per step on a device."""

    name: str  # "gated_delta_rule_forward"
    stage: str  # forward | recomputed | backward
    times: float
    arrays: tuple[int, ...]  # sizes of its operands and results, in elements


def kernels(program: Program) -> list[Kernel]:
    """Returns the calls of kernels. XLA puts some into fusions, with the slice of an array that they read or write."""
    found = []
    for instruction, around, times in _everywhere(program):
        if instruction.opcode == "custom-call" and instruction.target in KERNELS:
            shapes = [*instruction.results, *(s for name in instruction.operands for s in around[name].results)]
            sizes = tuple(shape.size for shape in shapes)
            found.append(Kernel(_kernel_name(instruction), instruction.stage, times, sizes))
    return found


def _kernel_name(instruction: Instruction) -> str:
    """The name that the kernel was given: the part of its place before the primitive. Kernels of libraries have the
    name of the scope in which an operation calls them."""
    parts = [part for part in instruction.place.split("/") if part not in ("pallas_call", "mpmd_map")]
    own = [part for part in parts if part.startswith(OPERATIONS)]
    return (own or parts or [instruction.name])[-1]


def collectives(program: Program) -> dict[str, dict[str, float]]:
    """Returns {kind: {"count", "bytes"}} per step: bytes of the larger of operand and result, on one device.

    A TPU spreads one collective over several fusions, which share its channel: it counts once.
    """
    found: dict[tuple[str, str], tuple[float, float]] = {}
    for instruction, around, times in _everywhere(program):
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            operands = sum(s.bytes for name in instruction.operands for s in around[name].results)
            results = sum(s.bytes for s in instruction.results)
            if instruction.opcode.endswith("-start"):  # its results hold the operands too
                results -= operands
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            found[kind, channel[1] if channel else instruction.name] = times, times * max(operands, results)
    total: dict[str, dict[str, float]] = {}
    for (kind, _), (times, size) in sorted(found.items()):
        row = total.setdefault(kind, {"count": 0.0, "bytes": 0.0})
        row["count"], row["bytes"] = row["count"] + times, row["bytes"] + size
    return total


def products(program: Program) -> dict[str, float]:
    """Returns {stage: FLOPs} of XLA's matrix products and convolutions on one device; kernels are left out.

    A multiply and an add are two operations. Products with padding, as TPUs write batched products, do not count.
    """
    total = {"forward": 0.0, "recomputed": 0.0, "backward": 0.0}
    for instruction, around, times in _everywhere(program):
        if count := _FLOPS.get(instruction.opcode):
            total[instruction.stage] += times * count(instruction, around)
    return total


def _everywhere(program: Program) -> Iterator[tuple[Instruction, dict[str, Instruction], float]]:
    """Like `Program.running`, with the insides of fusions."""
    for instruction, around, times in program.running():
        waiting = [(instruction, around)]
        while waiting:
            inner, around = waiting.pop()
            yield inner, around, times
            if inner.opcode in ("fusion", "fusion-start"):
                for name in called(inner):
                    inside = program.computations[name]
                    waiting += [(i, inside) for i in inside.values()]


def _dot(instruction: Instruction, around: dict[str, Instruction]) -> float:
    dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.rest)[1]
    lhs = around[instruction.operands[0]].results[0].dims
    return 2.0 * instruction.results[0].size * math.prod(lhs[int(d)] for d in dims.split(",") if d)


def _library_product(instruction: Instruction, around: dict[str, Instruction]) -> float:
    """A product by cuBLAS; other custom calls count nothing."""
    if not instruction.target.startswith("__cublas"):
        return 0.0
    dims = re.search(r'"lhs_contracting_dimensions":(\[[^\]]*\])', instruction.rest)[1]
    lhs = around[instruction.operands[0]].results[0].dims
    return 2.0 * instruction.results[0].size * math.prod(lhs[int(d)] for d in json.loads(dims))


def _convolution(instruction: Instruction, around: dict[str, Instruction]) -> float:
    """2 x results' batch and features x inputs of a result x pairs of positions of the image and the kernel that meet;
    TPUs write products so."""
    lhs, rhs = (around[name].results[0].dims for name in instruction.operands[:2])
    image, kernel, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.rest).groups()
    window = dict(re.findall(r"(\w+)=([\dx_-]+)", (re.search(r"window=\{([^}]*)\}", instruction.rest) or [""])[0]))
    out = instruction.results[0].dims
    flops = 2.0 * out[result.index("b")] * out[result.index("f")] * rhs[kernel.index("i")]
    for place in sorted(set(image) - {"b", "f"}):
        at, sizes = int(place), (out[result.index(place)], rhs[kernel.index(place)], lhs[image.index(place)])
        flops *= _meeting(*sizes, {name: value.split("x")[at] for name, value in window.items()})
    return flops


def _meeting(results: int, taps: int, length: int, window: dict[str, str]) -> int:
    """The number of pairs (result, tap) that read an element of the image and not its padding."""
    stride, spread, image = (int(window.get(name, 1)) for name in ("stride", "rhs_dilate", "lhs_dilate"))
    before = int(window.get("pad", "0_0").split("_")[0])
    read = (result * stride + tap * spread - before for result in range(results) for tap in range(taps))
    return sum(at % image == 0 and 0 <= at // image < length for at in read)


_FLOPS: dict[str, Callable[[Instruction, dict[str, Instruction]], float]] = {
    "dot": _dot,
    "convolution": _convolution,
    "custom-call": _library_product,
}


def largest(program: Program, count: int = 8) -> list[dict[str, Any]]:
    """Returns the largest arrays that instructions make, each type once: {"dtype", "dims", "bytes"}."""
    found = {shape._replace(on_chip=False) for instruction, *_ in program.running() for shape in instruction.results}
    ordered = sorted(found, key=lambda shape: (-shape.bytes, shape.dims))[:count]
    return [{"dtype": shape.dtype, "dims": list(shape.dims), "bytes": shape.bytes} for shape in ordered]


def traffic(program: Program) -> float:
    """Returns the bytes that the program's instructions read and write in main memory on one device: every operand and
    result once, of a slice only the slice. What is in the chip's own memory counts nothing."""
    total = 0.0
    for instruction, around, times in program.running():
        if instruction.opcode not in FREE and not instruction.opcode.endswith("-done"):
            total += times * _moved(instruction, around, program)
    return total


def _moved(instruction: Instruction, around: dict[str, Instruction], program: Program) -> float:
    operands = [_bytes(around[name]) for name in instruction.operands]
    results = _bytes(instruction)
    if instruction.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * results
    if instruction.opcode == "dynamic-update-slice":
        return 2 * operands[1]
    if instruction.opcode in ("fusion", "fusion-start"):
        inside = program.computations[called(instruction)[0]]
        return _read(operands, inside) + _written(inside)
    if instruction.opcode.endswith("-start"):  # asynchronous: its results hold the operands too
        results = max(results - sum(operands), 0)
        return 2 * results if instruction.opcode == "slice-start" else sum(operands) + results
    return sum(operands) + results


def _bytes(instruction: Instruction) -> float:
    return float(sum(shape.bytes for shape in instruction.results if not shape.on_chip))


def _read(operands: list[float], inside: dict[str, Instruction]) -> float:
    """Bytes that a fusion reads: of an operand used only in slices the slices, of one updated in place nothing."""
    total = 0.0
    for i in inside.values():
        if i.opcode == "parameter":
            whole = operands[int(re.match(r"\d+", i.rest)[0])]
            total += min(whole, sum(_part(use, name, whole) for use, name in _uses(i.name, inside)))
    return total


def _uses(name: str, inside: dict[str, Instruction]) -> Iterator[tuple[Instruction, str]]:
    """Yields (instruction, the operand's name) for all uses of a value, bitcasts passed."""
    for use in inside.values():
        if name in use.operands:
            yield from _uses(use.name, inside) if use.opcode == "bitcast" else [(use, name)]


def _part(use: Instruction, name: str, whole: float) -> float:
    if use.opcode in ("dynamic-slice", "slice", "gather") and use.operands[0] == name:
        return float(sum(shape.bytes for shape in use.results))
    return 0.0 if use.opcode == "dynamic-update-slice" and use.operands[0] == name else whole


def _written(inside: dict[str, Instruction]) -> float:
    """Bytes that a fusion writes: of an update in place the update."""
    root = next(i for i in inside.values() if i.root)
    total = 0.0
    for last in [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]:
        while last.opcode == "bitcast":
            last = inside[last.operands[0]]
        total += _bytes(inside[last.operands[1]] if last.opcode == "dynamic-update-slice" else last)
    return total
