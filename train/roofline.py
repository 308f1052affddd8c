"""FLOPs and bytes of a compiled training step, and the least time that they take on a device.

FLOPs of kernels are those of the operations' own cost functions, since no compiler sees into them. Products of XLA are
counted in the program. "Needed" FLOPs are three times those of the forward pass that the model declares, without
recomputation.
"""

import math
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import jax.numpy as jnp

from engrax.pallas_kernels import dispatch
from engrax.pallas_kernels.bench.bench import FLOAT32_SHARE, PEAKS
from engrax.pallas_kernels.topologies import Target
from engrax.train import program_cost
from engrax.train.experiment import Experiment
from engrax.train.program_text import Program


def count(
    experiment: Experiment, program: Program, kernels: Sequence[program_cost.Kernel], calls: Sequence[dispatch.Call]
) -> dict[str, Any]:
    """Returns {"flops": {...}, "bytes": ..., "not_available": {figure: reason}} of one step on one device."""
    p = experiment.parallel
    # A per-device program calls with its own rows; devices that share heads (`models.shares`) with their own heads.
    devices = math.prod(p.mesh_shape(1)) // p.tensor if p.strategy == "pjit" else 1
    products, missing = program_cost.products(program), {}
    try:
        in_kernels = kernel_flops(kernels, calls, devices)
    except LookupError as error:
        in_kernels, missing["flops.kernels"] = None, str(error)
    needed = needed_flops(experiment)
    if needed is None:
        missing["flops.needed"] = "the model does not declare its FLOPs"
    total = None if in_kernels is None else sum(products.values()) + sum(in_kernels.values())
    flops = {"needed": needed, "products": products, "kernels": in_kernels, "program": _finite(total)}
    if total is not None and flops["program"] is None:
        missing["flops.program"] = "a loop of the program has no fixed length"
    moved = _finite(program_cost.traffic(program))
    if moved is None:
        missing["bytes"] = "a loop of the program has no fixed length"
    return {"flops": flops, "bytes": moved, "not_available": missing}


def _finite(value: float | None) -> float | None:
    return value if value is not None and value == value else None


def needed_flops(experiment: Experiment) -> float | None:
    """Returns the FLOPs that a step needs on one device, or None if the model does not declare them."""
    try:
        forward = float(experiment.model.flops_per_token(experiment.data.seq_len))
    except NotImplementedError:
        return None
    devices = math.prod(experiment.parallel.mesh_shape(1))
    return 3 * forward * experiment.batch_size * experiment.data.seq_len / devices


def kernel_flops(
    kernels: Sequence[program_cost.Kernel], calls: Sequence[dispatch.Call], devices: int
) -> dict[str, float]:
    """Returns {stage: FLOPs} of the kernels on one device, from the operations' cost functions.

    A pass of an operation runs one kernel or several; the one that runs most often counts the passes.
    Raises LookupError where the operation is called with several sizes, and a kernel's arrays tell no single one.
    """
    passes: dict[tuple[dispatch.Call, str], dict[str, float]] = {}
    for kernel in kernels:
        call = _call_of(kernel, calls, devices)
        times = passes.setdefault((call, kernel.stage), {})
        times[kernel.name] = times.get(kernel.name, 0) + kernel.times
    total = {"forward": 0.0, "recomputed": 0.0, "backward": 0.0}
    for (call, stage), times in passes.items():
        cost = import_module(f"engrax.pallas_kernels.{call.op}.cost").flops(**sizes(call))
        total[stage] += max(times.values()) * (cost.backward if stage == "backward" else cost.forward) / devices
    return total


def _call_of(kernel: program_cost.Kernel, calls: Sequence[dispatch.Call], devices: int) -> dispatch.Call:
    own = [call for call in calls if kernel.name.startswith(call.op)]
    distinct = list({tuple(sizes(call).items()): call for call in own}.values())
    if len(distinct) > 1:
        distinct = [call for call in distinct if _values(call) // devices in kernel.arrays]
    if len(distinct) != 1:
        raise LookupError(f"{kernel.name} cannot be told apart between the sizes at which its operation is called")
    return distinct[0]


def _values(call: dispatch.Call) -> int:
    """Elements of a call's values, or of its results."""
    s = sizes(call)
    return s["batch"] * s["seq"] * s["heads"] * s["value"]


def sizes(call: dispatch.Call) -> dict[str, Any]:
    """Returns a recorded call's arguments of its operation's `cost.flops`. Raises LookupError for another operation."""
    s = call.shapes
    if call.op in ("linear_attention", "gated_delta_rule"):
        names = dict(seq=s.length, chunk_size=s.chunk, query_heads=s.query_heads)
        return dict(batch=s.batch, heads=s.heads, key=s.key, value=s.value, **names)
    if call.op == "neural_memory":
        inner = dict(key=s.layers[0][0], value=s.layers[-1][1], hidden=s.layers[0][1], depth=len(s.layers))
        rows = dict(batch=s.batch, seq=s.blocks * s.slots, heads=s.heads, chunk_size=s.slots)
        return rows | inner | dict(segments=s.segments)
    if call.op == "hopfield_retrieval" and s.steps:
        return dict(
            batch=s.batch, seq=s.states, patterns=s.patterns, heads=s.heads, key=s.key, value=s.value, steps=s.steps
        )
    raise LookupError(f"the FLOPs of {call.op} do not follow from its sizes")


def estimate(
    counted: dict[str, Any], experiment: Experiment, target: Target, collectives: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Returns the seconds that FLOPs, bytes and collectives take at the device's limits, the largest of them, and what
    it is of: "compute", "memory" or "links". None: not available."""
    found: dict[str, float | None] = {"compute": None, "memory": None, "links": None}
    if target.device.kind in PEAKS:
        compute, memory = PEAKS[target.device.kind]
        if jnp.dtype(experiment.compute_dtype).itemsize > 2:
            compute *= FLOAT32_SHARE["gpu" if target.device.platform == "cuda" else target.device.platform]
        flops = counted["flops"]["program"]
        found["compute"] = None if flops is None else flops / compute
        found["memory"] = None if counted["bytes"] is None else counted["bytes"] / memory
    if target.link_bytes_per_second is not None:
        moved = _finite(sum(row["bytes"] for row in collectives.values()))
        found["links"] = None if moved is None else moved / target.link_bytes_per_second
    known = {name: value for name, value in found.items() if value is not None}
    binds = max(known, key=known.get) if len(known) == len(found) else None
    return found | {"seconds": known[binds] if binds else None, "binds": binds}
