"""The result of `engrax compile` as plain text, for a terminal."""

import math
import shlex
from collections.abc import Sequence
from typing import Any

from engrax.pallas_kernels import topologies
from engrax.train import compile as compiling
from engrax.train.cost import quantity, size
from engrax.train.experiment import Experiment

MISSING = "not available"
STAGES = ("forward", "recomputed", "backward")


def format_result(result: dict[str, Any]) -> str:
    """Returns what a compiled step takes: memory, operations, kernels, collectives, FLOPs, bytes and least time."""
    lines = [_headline(result), "memory of one device:", *_memory(result["memory"])]
    lines += ["operations:", *_operations(result["operations"])]
    if "kernels" in result:
        lines += ["largest arrays in the program:", *_largest(result["largest"][:4])]
        lines += ["kernels in the program, runs per step:", *_kernels(result["kernels"])]
        lines += ["collectives, per step and device:", *_collectives(result["collectives"])]
        lines += ["work of one device, per step:", *_work(result), *_time(result["time"])]
    lines += [f"note: {note}" for note in result["notes"]]
    lines += [f"{name} is {MISSING}: {reason}" for name, reason in result.get("not_available", {}).items()]
    return "\n".join(lines)


def format_estimate(memory: dict[str, int | None]) -> str:
    """Returns the bytes of a step before it is compiled, in two lines."""
    where = f"{memory['devices']} device{'s' * (memory['devices'] > 1)}"
    lines = [f"arguments of the step on each of {where}", "temporaries, estimated without compiling"]
    values = [_size(memory["argument_bytes"]), _size(memory["temporary_bytes"])]
    return "\n".join(f"{line:<44} {value:>13}" for line, value in zip(lines, values))


def run(experiment: Experiment, device: str, mesh: str | None, *, config: str, output: str | None) -> str:
    """Compiles the step (`compile.compile_step`), saves the result and returns it as text."""
    result = compiling.compile_step(experiment, device, mesh, config=config)
    return f"{format_result(result)}\nsaved in {compiling.save(result, output)}"


def saved_or_command(words: Sequence[str], experiment: Experiment, device: str | None) -> str:
    """Returns the newest saved result of an experiment, or the command that makes one, as a paragraph of text; nothing
    for a device that cannot be compiled for. words: the config and its flags."""
    if device is not None and device not in topologies.TARGETS:
        return ""
    result = compiling.newest(experiment, device)
    if result is None:
        return f"\nnot compiled yet: {command(words, device or 'h200')}\n"
    told = f"\n{format_result(result)}\n"
    if result["source_digest"] == compiling.source_digest():
        return told
    return (
        f"{told}note: engrax has changed since; compile it again: {command(words, result['device'], result['mesh'])}\n"
    )


def command(words: Sequence[str], device: str, mesh: dict[str, int] | None = None) -> str:
    """Returns the command that compiles a config, given as its name and flags."""
    axes = [] if mesh is None else ["--mesh", ",".join(f"{axis}={count}" for axis, count in mesh.items())]
    return shlex.join(["engrax", "compile", *words, "--device", device, *axes])


def _headline(result: dict[str, Any]) -> str:
    mesh = result["mesh"]
    count = math.prod(mesh.values())
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.items())
    devices = f"{count} device{'s' * (count > 1)} ({axes}, ZeRO {result['zero']})"
    rows = f"{result['rows']:,} rows of {result['seq_len']:,} tokens, {result['compute_dtype']}"
    seconds = ", ".join(f"{part} {value:.1f} s" for part, value in result["seconds"].items())
    return f"training step compiled for {result['device']}, {devices}: {rows}; {result['date']}; {seconds}"


def _memory(memory: dict[str, Any]) -> list[str]:
    if "compiler" in memory:
        return [f"  it does not fit: {memory['compiler']}"]
    kinds = ("arguments", "outputs", "aliased", "temporaries", "generated_code")
    lines = [f"  {name.replace('_', ' '):<15} {_size(memory[name]):>13}" for name in kinds]
    verdict = {True: "it fits", False: "it does not fit", None: "whether it fits is not known"}[memory["fits"]]
    held = f"{_size(memory['total'])} of {_size(memory['device'])}"
    return [*lines, f"  {'together':<15} {held}: {verdict} (outputs in the place of arguments count once)"]


def _size(count: int | None) -> str:
    return MISSING if count is None else size(count)


def _operations(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        lines.append(f"  {row['op']}  {row['sizes']}: {row['served_by']}")
        first = row["served_by"] in ("xla", "reference")
        lines += [f"    {name:<11} {reason}" for name, reason in row["others"].items() if first and name != "reference"]
    return lines or ["  none of engrax.pallas_kernels"]


def _largest(rows: list[dict[str, Any]]) -> list[str]:
    return [f"  {row['dtype']}[{','.join(map(str, row['dims']))}]  {size(row['bytes'])}" for row in rows]


def _kernels(rows: list[dict[str, Any]]) -> list[str]:
    return [f"  {row['name']:<34} {row['stage']:<10} {_times(row['times'])}" for row in rows] or ["  none"]


def _times(times: float | None) -> str:
    return MISSING if times is None else f"{times:,.0f}"


def _collectives(kinds: dict[str, dict[str, Any]]) -> list[str]:
    return [f"  {kind:<20} {_times(row['count']):>7}  {_size(row['bytes'])}" for kind, row in kinds.items()] or [
        "  none"
    ]


def _work(result: dict[str, Any]) -> list[str]:
    flops = result["flops"]
    total, needed = flops["program"], flops["needed"]
    ratio = f", {total / needed:.2f} of the needed" if total and needed else ""
    lines = [f"  {'FLOPs needed':<22} {_flops(needed)}  (3 x forward, as the model declares it)"]
    lines.append(f"  {'FLOPs of the program':<22} {_flops(total)}{ratio}")
    for stage in STAGES:
        kernels = None if flops["kernels"] is None else flops["kernels"][stage]
        lines.append(f"    {stage:<20} {_flops(flops['products'][stage])} in XLA, {_flops(kernels)} in kernels")
    moved = MISSING if result["bytes"] is None else quantity(result["bytes"], "B")
    return [*lines, f"  {'bytes moved':<22} {moved}  (operands and results of every instruction)"]


def _flops(value: float | None) -> str:
    return MISSING if value is None else quantity(value, "FLOP")


def _time(time: dict[str, Any]) -> list[str]:
    def told(name):
        return MISSING if time[name] is None else f"{1e3 * time[name]:.1f} ms"

    parts = ", ".join(f"{name} {told(name)}" for name in ("compute", "memory", "links"))
    binds = f"{time['binds']} binds" if time["binds"] else "what binds is not known"
    return [f"  {'least time':<22} {told('seconds')}: {binds} ({parts}; figures of the data sheet)"]
