"""Compiles the training step of an experiment for a device that need not be here, and says what the program takes.

The step is the trainer's: its model, optimizer, shardings and donated state, on abstract arrays over a mesh of a
described topology. Nothing is run. What a compiler does not tell is None in the result, with a reason.
"""

import dataclasses
import datetime
import hashlib
import json
import math
import re
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from engrax.errors import UserError
from engrax.files import cache_folder
from engrax.pallas_kernels import dispatch, topologies
from engrax.pallas_kernels.topologies import Target
from engrax.train import kernel_report, program_cost, program_text, roofline, sharding
from engrax.train.experiment import Experiment, ParallelConfig, to_dict
from engrax.train.trainer import Trainer

FORMAT = 1  # of the result
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")
NEEDS_ITS_DEVICE = (
    "cudnn_attention",
    "cudnn_or_xla",
)  # implementations that are not compiled without the device: another serves in their place
SOURCES = ("pallas_kernels", "layers", "models", "train")


def parse_mesh(text: str | None, parallel: ParallelConfig) -> ParallelConfig:
    """Returns the config with the mesh of a text like "data=2,fsdp=4"; for None its own, on one device if `data` is
    open. Raises UserError for another text."""
    if text is None:
        return dataclasses.replace(parallel, data=1 if parallel.data == -1 else parallel.data)
    sizes = dict.fromkeys(sharding.AXES, 1)
    for part in text.split(","):
        found = re.fullmatch(r"\s*(data|fsdp|tensor|sequence)=([1-9]\d{0,4})\s*", part)
        if not found:
            raise UserError(f"--mesh {text!r} is no mesh; write axes and their devices, such as data=2,fsdp=4.")
        sizes[found[1]] = int(found[2])
    return dataclasses.replace(parallel, **sizes)


def compile_step(
    experiment: Experiment, name: str, mesh: str | None = None, *, config: str | None = None
) -> dict[str, Any]:
    """Returns the result of compiling an experiment's step for the device of this name, JSON-able.

    mesh: as for `parse_mesh`. config: the experiment's name, for the reader. The process must be prepared for it
    (`topologies.prepare`). Raises UserError for an unknown device, one whose compiler is not installed, and a mesh that
    the batch or a topology does not fit.
    """
    target = topologies.find(name)
    parallel = parse_mesh(mesh, experiment.parallel)
    experiment = for_target(dataclasses.replace(experiment, parallel=parallel), target)
    found = topologies.topology_devices(target, math.prod(parallel.mesh_shape(1)))
    trainer = Trainer(experiment, tuple(found))
    begin = time.perf_counter()
    calls, traced = _trace(trainer, trainer.mesh)
    served = [kernel_report.OperationRow(call, dispatch.explain(call, target.device)) for call in calls]
    lowered = traced.lower(lowering_platforms=(target.device.platform,))
    middle = time.perf_counter()
    result = _head(experiment, name, config) | {
        "operations": [_operation(row) for row in served],
        "notes": _notes(served),
    }
    seconds = {"trace": middle - begin}
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return result | {"seconds": seconds, "memory": {"fits": False, "compiler": _sentence(error)}}
    seconds["compile"] = time.perf_counter() - middle
    program = program_text.read(compiled.as_text())
    kernels = program_cost.kernels(program)
    counted = roofline.count(experiment, program, kernels, calls)
    return _clean(
        result
        | {
            "seconds": {part: round(value, 1) for part, value in seconds.items()},
            "memory": _memory(compiled.memory_analysis(), target),
            "largest": program_cost.largest(program),
            "kernels": _kernel_rows(kernels),
            "collectives": program_cost.collectives(program),
            **counted,
            "time": roofline.estimate(counted, experiment, target, program_cost.collectives(program)),
        }
    )


def for_target(experiment: Experiment, target: Target) -> Experiment:
    """Returns the experiment with the compute dtype of the target, where the config leaves it open."""
    return dataclasses.replace(experiment, compute_dtype=kernel_report.compute_dtype(experiment, target.device).name)


def _trace(trainer: Trainer, mesh: Mesh) -> tuple[list[dispatch.Call], Any]:
    """The operations that the step calls, each set of sizes once, and the traced step."""
    e = trainer.experiment
    state, step = trainer.abstract_state(), trainer.train_step  # before the mesh is set: this may compute
    rows = NamedSharding(mesh, PartitionSpec(sharding.BATCH))
    tokens = jax.ShapeDtypeStruct((e.batch_size, e.data.seq_len), jnp.int32, sharding=rows)
    batch = dict(tokens=tokens, targets=tokens, segment_ids=tokens)
    with jax.set_mesh(mesh), dispatch.recorded_calls() as calls, dispatch.without(*NEEDS_ITS_DEVICE):
        traced = step.trace(state, batch)
    return list(dict.fromkeys(calls)), traced


def _head(experiment: Experiment, name: str, config: str | None) -> dict[str, Any]:
    """What the result is about."""
    p = experiment.parallel
    return {
        "format": FORMAT,
        "config": config,
        "device": name,
        "mesh": sharding.sizes(p, 1),
        "zero": p.zero,
        "strategy": p.strategy,
        "rows": experiment.batch_size,
        "seq_len": experiment.data.seq_len,
        "compute_dtype": experiment.compute_dtype,
        "config_digest": config_digest(experiment),
        "source_digest": source_digest(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def config_digest(experiment: Experiment) -> str:
    """Returns the digest of what makes the step's program, apart from rows, mesh and compute dtype."""
    parts = {
        "model": to_dict(experiment.model),
        "optimizer": to_dict(experiment.optimizer),
        "seq_len": experiment.data.seq_len,
        "carry_memory": experiment.carry_memory,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def source_digest() -> str:
    """Returns the digest of the package's code that a training step consists of."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(path for part in SOURCES for path in (root / part).rglob("*.py")):
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _operation(row: kernel_report.OperationRow) -> dict[str, Any]:
    found = {"op": row.call.op, "sizes": row.sizes, "served_by": row.served.by}
    return found | {"others": row.served.others}


def _notes(served: list[kernel_report.OperationRow]) -> list[str]:
    """What the program has otherwise than the training on the device."""
    return [
        f"{row.call.op} is compiled in XLA: {row.served.by!r}, which serves it on the device, cannot be compiled "
        "without the device"
        for row in served
        if row.served.by in NEEDS_ITS_DEVICE
    ]


def _memory(found: Any, target: Target) -> dict[str, Any]:
    """Bytes on one device by kind."""
    kinds = {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "aliased": found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
        "generated_code": found.generated_code_size_in_bytes or None,  # XLA reports 0 where it does not count
    }
    total = sum(kinds[name] or 0 for name in ("arguments", "outputs", "temporaries", "generated_code"))
    total -= kinds["aliased"]
    fits = None if target.memory_bytes is None else total <= target.memory_bytes
    return kinds | {"total": total, "device": target.memory_bytes, "fits": fits}


def _clean(tree: Any) -> Any:
    """The tree with None for NaN, which JSON does not have: a number that the program does not tell."""
    if isinstance(tree, dict):
        return {name: _clean(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_clean(value) for value in tree]
    return None if tree != tree else tree


def _kernel_rows(kernels: list[program_cost.Kernel]) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str], float] = {}
    for kernel in kernels:
        rows[kernel.name, kernel.stage] = rows.get((kernel.name, kernel.stage), 0) + kernel.times
    return [{"name": name, "stage": stage, "times": times} for (name, stage), times in sorted(rows.items())]


def _sentence(error: Exception) -> str:
    """The compiler's first sentence, on one line."""
    return re.split(r"\.\s|\n", str(error).strip())[0][:300]


def folder() -> Path:
    """Returns the folder of saved results."""
    return cache_folder() / "compiled"


def save(result: dict[str, Any], output: str | Path | None = None) -> Path:
    """Writes a result to `output`, and into the folder of saved results; returns the latter's path."""
    key = {name: result[name] for name in IDENTITY}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    for path in [folder() / f"{name}.json", *([Path(output)] if output else [])]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    return folder() / f"{name}.json"


# What must be equal for a result to hold for another call; with `source_digest` and `versions`, for it to be new.
IDENTITY = ("config_digest", "device", "mesh", "zero", "strategy", "rows", "compute_dtype")


def is_current(result: dict[str, Any], experiment: Experiment, name: str) -> bool:
    """Whether an earlier result is what `compile_step` would find now."""
    now = _head(for_target(experiment, topologies.TARGETS[name]), name, None)
    return all(result.get(key) == now[key] for key in (*IDENTITY, "source_digest", "versions", "format"))


def newest(experiment: Experiment, name: str | None = None) -> dict[str, Any] | None:
    """Returns the newest saved result of an experiment, whatever its rows and mesh, for a device or for any; None if
    there is none."""
    wanted, found = config_digest(experiment), []
    for path in folder().glob("*.json"):
        try:
            result = json.loads(path.read_text())
        except (OSError, ValueError):  # being written by another process, or damaged
            continue
        if isinstance(result, dict) and result.get("config_digest") == wanted and name in (None, result.get("device")):
            found.append(result)
    return max(found, key=lambda result: result["date"], default=None)
