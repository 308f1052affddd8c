"""The cost of an experiment, computed before step 0: parameters, FLOPs, bytes of sequence state and optimizer state.

No arrays are allocated and no devices are needed: shapes are traced on an abstract mesh.
"""

import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, PartitionSpec

from engrax import models
from engrax.layers.common.branched import BranchedConfig
from engrax.models.layer_change import mixers_of
from engrax.models.parameters import cast
from engrax.pallas_kernels import devices
from engrax.train import sharding, temporaries
from engrax.train.experiment import Experiment, ParallelConfig
from engrax.train.kernel_report import compute_dtype
from engrax.train.optimizers import base as optimizers
from engrax.train.train_step import resolve_dtype


def costs(experiment: Experiment, devices: int = 1) -> dict[str, Any]:
    """Returns the costs of an experiment as a JSON-able dict.

    Args:
      experiment: any experiment.
      devices: number of devices for the optimizer state, if the config does not fix it.

    Returns:
      parameters: {"total": n, "by_part": {part: n}}, numbers.
      flops_per_token: {"forward", "training"} for rows of data.seq_len tokens, memory updates included. Training is 3
        times forward (two backward matrix products per forward product, without recomputation). None if the model
        does not declare its FLOPs.
      training_flops: of all steps, or None.
      state_bytes_per_sequence: {"total", "by_mixer"}: state of one sequence, caches included, in the compute dtype of
        the default device. For a wrapped backbone, by_mixer also has "memory", the memory between segments; the
        position inside a segment counts in the total only.
      memory_per_device: {"devices", "zero", "parameter_bytes", "optimizer_bytes", "optimizer_bytes_unsharded"} under
        the config's ZeRO stage. A config that fixes parallel.data fixes the number of devices.
    """
    model = nnx.eval_shape(lambda: models.build(experiment.model, rngs=nnx.Rngs(0)))
    params = nnx.state(model, nnx.Param)
    seq_len = experiment.data.seq_len
    tokens = experiment.steps * experiment.batch_size * seq_len
    try:
        forward = float(experiment.model.flops_per_token(seq_len))
    except NotImplementedError:  # a user's model need not declare it
        forward = None
    return {
        "seq_len": seq_len,
        "compute_dtype": np.dtype(resolve_dtype(experiment.compute_dtype)).name,
        "parameters": {"total": _count(params), "by_part": _parts(experiment.model, nnx.to_pure_dict(params))},
        "flops_per_token": None if forward is None else {"forward": forward, "training": 3 * forward},
        "training_tokens": tokens,
        "training_flops": None if forward is None else 3 * forward * tokens,
        "state_bytes_per_sequence": state_bytes(experiment, model),
        "memory_per_device": _device_bytes(experiment, params, devices),
    }


def _count(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _parts(config: Any, params: dict[str, Any], prefix: str = "") -> dict[str, int]:
    """Parameter counts by top-level part; blocks, also those of a wrapped backbone, are split by mixer."""
    mixers = mixers_of(config)
    parts: dict[str, int] = {}
    for name, part in params.items():
        if name == "backbone" and hasattr(config, name):
            parts |= _parts(config.backbone, part, f"{prefix}{name}.")
        elif name == "blocks" and len(part) == len(mixers):
            for place, block in sorted(part.items()):
                where = f"{prefix}{name}.{place} ({mixers[int(place)].registered_name})"
                for inner, leaves in sorted(block.items()):
                    kind = "norms" if inner.endswith("norm") else inner
                    parts[f"{where} {kind}"] = parts.get(f"{where} {kind}", 0) + _count(leaves)
        else:
            parts[f"{prefix}{name}"] = _count(part)
    return parts


def state_bytes(experiment: Experiment, model: nnx.Module, dtype: Any = None) -> dict[str, Any]:
    """Bytes of `init_memory(1)`, in a dtype or in the compute dtype of the default device."""
    graphdef, params = nnx.split(model, nnx.Param)
    dtype = resolve_dtype(experiment.compute_dtype) if dtype is None else dtype
    memory = jax.eval_shape(lambda p: nnx.merge(graphdef, cast(p, dtype)).init_memory(1), params)
    return {"total": _bytes(memory), "by_mixer": _by_mixer(experiment.model, memory)}


def _by_mixer(config: Any, memory: Any) -> dict[str, int]:
    """Bytes by mixer; for a wrapped backbone, whose mixers hold one segment, "memory" is that between segments."""
    if hasattr(config, "backbone") and hasattr(memory, "backbone"):
        return {"memory": _bytes(memory.memory)} | _by_mixer(config.backbone, memory.backbone)
    mixers = mixers_of(config)
    found: dict[str, int] = {}
    if isinstance(memory, tuple) and len(memory) == len(mixers):
        pairs = list(zip(mixers, memory))
        while pairs:
            mixer, state = pairs.pop(0)
            if isinstance(mixer, BranchedConfig):
                pairs = [(mixer.main, state.main), (mixer.branch, state.branch), *pairs]
            else:
                found[mixer.registered_name] = found.get(mixer.registered_name, 0) + _bytes(state)
    return found


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _device_bytes(experiment: Experiment, params: nnx.State, devices: int) -> dict[str, int]:
    """Bytes of the training state on one device, with the trainer's sharding of every leaf."""
    mesh = _mesh(experiment.parallel, devices)
    tx = optimizers.build(experiment.optimizer, experiment.steps, params)
    specs = sharding.state_specs(tx, params, experiment.parallel, mesh)
    opt_state = jax.eval_shape(tx.init, params)
    return {
        "devices": mesh.size,
        "zero": experiment.parallel.zero,
        "parameter_bytes": _sharded_bytes(params, specs["params"], mesh),
        "optimizer_bytes": _sharded_bytes(opt_state, specs["opt_state"], mesh),
        "optimizer_bytes_unsharded": _bytes(opt_state),
    }


def step_memory(experiment: Experiment, device: devices.Device, count: int = 1) -> dict[str, int | None]:
    """Returns {"devices", "argument_bytes", "temporary_bytes"}: bytes of a training step on one of `count` devices.

    Arguments are parameters, optimizer state, carried memory and batch. Temporaries are an estimate
    (`train.temporaries`), None for sharded parameters: how much of them is gathered at once is the compiler's.
    """
    model = nnx.eval_shape(lambda: models.build(experiment.model, rngs=nnx.Rngs(0)))
    params, dtype = nnx.state(model, nnx.Param), compute_dtype(experiment, device)
    held = _device_bytes(experiment, params, count)
    shape = experiment.parallel.mesh_shape(count)
    rows, sharded = -(-experiment.batch_size // (shape[0] * shape[1])), held["devices"] > 1 and held["zero"] == 3
    arguments = held["parameter_bytes"] + held["optimizer_bytes"] + 4 + 3 * 4 * rows * experiment.data.seq_len
    if experiment.carry_memory:
        arguments += rows * state_bytes(experiment, model, dtype)["total"]
    temporary = None if sharded else temporaries.estimate(experiment, rows, dtype, device)
    return {"devices": held["devices"], "argument_bytes": arguments, "temporary_bytes": temporary}


def _mesh(config: ParallelConfig, devices: int) -> AbstractMesh:
    """The config's mesh; if `data` is open, a mesh over `devices` devices, but at least those of the other axes."""
    return AbstractMesh(config.mesh_shape(devices), sharding.AXES, axis_types=sharding.AUTO)


def _sharded_bytes(tree: Any, specs: Any, mesh: AbstractMesh) -> int:
    leaves = jax.tree.leaves(tree)
    flat = jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
    total = 0
    for leaf, spec in zip(leaves, flat, strict=True):
        axes = [axis for entry in spec if entry is not None for axis in ((entry,) if isinstance(entry, str) else entry)]
        total += _bytes(leaf) // math.prod(mesh.shape[axis] for axis in axes)
    return total


def format_costs(found: dict[str, Any]) -> str:
    """The costs as a plain-text table for a terminal."""
    rows = cost_rows(found)
    left, right = (max(len(row[i]) for row in rows) for i in (0, 1))
    return "\n".join(f"{name:<{left}}  {value:>{right}}" for name, value in rows)


def cost_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The costs as (name, value with unit), for `format_costs` and the evaluation report."""
    rows = [("parameters", f"{found['parameters']['total']:,}")]
    rows += [(f"  {part}", f"{count:,}") for part, count in found["parameters"]["by_part"].items()]
    flops = found["flops_per_token"]
    if flops is None:
        rows.append(("FLOPs per token", "not declared"))
    else:
        rows.append((f"FLOPs per token, forward (rows of {found['seq_len']})", quantity(flops["forward"], "FLOP")))
        rows.append(("FLOPs per token, training", quantity(flops["training"], "FLOP")))
        rows.append(
            (
                f"FLOPs of training ({quantity(found['training_tokens'], 'tokens')})",
                quantity(found["training_flops"], "FLOP"),
            )
        )
    state = found["state_bytes_per_sequence"]
    if state is not None:
        rows.append((f"recurrent state per sequence ({found['compute_dtype']})", size(state["total"])))
        rows += [(f"  {mixer}", size(count)) for mixer, count in state["by_mixer"].items()]
    device = found["memory_per_device"]
    where = f"per device, {device['devices']} device{'s' * (device['devices'] > 1)}, ZeRO {device['zero']}"
    rows.append((f"parameters ({where})", size(device["parameter_bytes"])))
    rows.append((f"optimizer state ({where})", size(device["optimizer_bytes"])))
    return rows


def quantity(value: float | int, unit: str) -> str:
    """A number with an SI prefix: 1234567, "FLOP" -> "1.23 MFLOP"; for counts, "1.23 M tokens"."""
    for factor, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            gap = "" if unit.isupper() else " "
            return f"{value / factor:.3g} {prefix}{gap}{unit}"
    return f"{value:.3g} {unit}"


def size(count: int) -> str:
    """Bytes with a binary prefix."""
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"
