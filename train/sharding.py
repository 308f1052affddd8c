"""Placement of arrays: the mesh, and one PartitionSpec per leaf of the training state.

The batch is split over `data` and `fsdp`; heads, hidden channels and vocabulary over `tensor` (`models.shares`). ZeRO
(arXiv 1910.02054) is a setting: 0 keeps parameters and optimizer state whole along all other axes, 1 shards the
optimizer state over them, 2 also the gradients, 3 also the parameters, over the batch's axes. A leaf is sharded along
its first axis that the number of devices divides, never along the axis of stacked layers; otherwise it stays whole.
"""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from engrax.errors import UserError
from engrax.layers.common.sequence import SEQUENCE
from engrax.models.contract import BATCH_AXES
from engrax.models.parameters import axes_of, held_axis, sharded_axis
from engrax.train.experiment import Experiment, ParallelConfig

AXES = ("data", "fsdp", "tensor", "sequence")
BATCH = BATCH_AXES  # the mesh axes that split the batch
ZERO = ("data", "fsdp", "sequence")  # the mesh axes over which ZeRO shards, parameters over BATCH alone
HOST = "pinned_host"  # the kind of memory of the host that devices can read
AUTO = (AxisType.Auto,) * len(AXES)


def make_mesh(
    config: ParallelConfig, batch_size: int, accumulate: int = 1, chosen: Sequence[jax.Device] | None = None
) -> Mesh:
    """The mesh of all devices, or of those `chosen`. Raises UserError if devices or batch do not divide."""
    devices = jax.device_count() if chosen is None else len(chosen)
    shape = config.mesh_shape(devices)
    for name in AXES[1:]:
        if devices % getattr(config, name):
            raise UserError(
                f"parallel.{name}={getattr(config, name)} does not divide the {devices} devices here; set "
                f"--parallel.{name} to a divisor of {devices}."
            )
    if math.prod(shape) != devices:
        named = " x ".join(f"{name}={size}" for name, size in sizes(config, devices).items())
        raise UserError(
            f"a mesh of {named} needs {math.prod(shape)} devices, but {devices} are here; change "
            f"{', '.join(f'--parallel.{name}' for name in AXES)} so that their product is the number of devices."
        )
    parts = shape[0] * shape[1]
    if batch_size % (parts * accumulate):
        raise UserError(
            f"batch_size={batch_size} does not divide over {parts} devices x {accumulate} microbatches; "
            f"choose a multiple of {parts * accumulate}, or for a run begun elsewhere another number of devices."
        )
    if chosen is None:
        return jax.make_mesh(shape, AXES, axis_types=AUTO)
    return Mesh(np.asarray(chosen, object).reshape(shape), AXES, axis_types=AUTO)


def sizes(config: ParallelConfig, devices: int) -> dict[str, int]:
    """{mesh axis: devices}, without `tensor` and `sequence` of one device."""
    shape = zip(AXES, config.mesh_shape(devices))
    return {name: size for name, size in shape if size > 1 or name in BATCH}


def fitting(config: ParallelConfig, devices: int) -> ParallelConfig:
    """The config, if its mesh has this number of devices; else one that has: `tensor`, `sequence` and `fsdp`, in this
    order, become their largest divisors that divide what the former leave, and `data` takes the rest."""
    if math.prod(config.mesh_shape(devices)) == devices:
        return config
    left, found = devices, {}
    for name in ("tensor", "sequence", "fsdp"):
        found[name] = math.gcd(getattr(config, name), left)
        left //= found[name]
    return dataclasses.replace(config, data=-1, **found)


def evaluation_mesh(config: ParallelConfig) -> Mesh | None:
    """A mesh like the training's on this process's devices, of any number; None if there is only one.

    `fitting` tells its sizes. It splits no row, since one token at a time cannot be split.
    """
    devices = jax.local_devices()
    if len(devices) == 1:
        return None
    config = fitting(dataclasses.replace(config, data=-1, sequence=1), len(devices))
    return jax.make_mesh(config.mesh_shape(len(devices)), AXES, axis_types=AUTO, devices=devices)


def splits(mesh: Mesh | AbstractMesh) -> int:
    """The number of parts into which the mesh splits a batch's rows."""
    return math.prod(mesh.shape[name] for name in BATCH)


def batch_spec(mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """The spec of arrays [B, T]: rows over the batch axes, and tokens over `sequence` if it has several devices."""
    return PartitionSpec(BATCH, SEQUENCE) if mesh.shape[SEQUENCE] > 1 else PartitionSpec(BATCH)


def check_split(experiment: Experiment) -> None:
    """Raises UserError if the model or the data cannot split rows over devices."""
    pieces, model, length = experiment.parallel.sequence, experiment.model, experiment.data.seq_len
    if not model.splits_rows:
        raise UserError(
            f"parallel.sequence={pieces} splits rows over devices, and {model.registered_name} reads them in order, "
            "segment by segment; set --parallel.sequence 1."
        )
    if "state_carry" in model.exempt_from:
        raise UserError(
            f"parallel.sequence={pieces} cuts rows, and the model forbids that ({model.exempt_from['state_carry']}); "
            "set --parallel.sequence 1."
        )
    if length % pieces:
        raise UserError(
            f"data.seq_len={length} does not divide over parallel.sequence={pieces} devices; choose a multiple."
        )
    if experiment.parallel.tensor > 1:
        raise UserError(
            f"parallel.sequence={pieces} and parallel.tensor={experiment.parallel.tensor} cannot be combined: XLA "
            "aborts on nested programs of both; set one of them to 1."
        )
    if experiment.parallel.strategy == "pmap":
        raise UserError(f"parallel.sequence={pieces} needs parallel.strategy='pjit'; 'pmap' splits the batch alone.")
    if jax.process_count() > 1 and jax.local_device_count() % pieces:
        raise UserError(
            f"parallel.sequence={pieces} does not divide the {jax.local_device_count()} devices of a process, and each "
            "process reads whole rows; choose a divisor."
        )


def use_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager:
    """Sets the mesh for a `with` block, as kernels need it; does nothing without a mesh."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def param_specs(params: Any, config: ParallelConfig, mesh: Mesh | AbstractMesh, *, stage: int) -> Any:
    """One spec per array of parameters or optimizer state. Heads, hidden channels and vocabulary are split over
    `tensor`; ZeRO shards another axis if `config.zero >= stage` (1: state, 2: gradients, 3: parameters).

    State of any shape that an optimizer keeps for a parameter, as a moment, projector or scale, lies in the parameter's
    variable and is sharded by its own shape. Other arrays are counters, and frozen parameters have no state.
    """
    over = BATCH if stage == 3 else ZERO
    devices = math.prod(mesh.shape[name] for name in over) if config.zero >= stage else 1
    shares = mesh.shape["tensor"]

    def spec(leaf):
        if not isinstance(leaf, nnx.Variable):
            return PartitionSpec()
        if not jax.tree.leaves(leaf):
            return leaf
        same = len(axes_of(leaf)) == leaf.ndim  # else state of fewer axes than the parameter
        held = held_axis(leaf, shares) if shares > 1 and same else None
        axis = sharded_axis(leaf, devices, taken=held)
        entries = ["tensor" if i == held else over if i == axis else None for i in range(leaf.ndim)]
        if devices > 1 and axis is None and held is not None and leaf.shape[held] % (shares * devices) == 0:
            entries[held] = ("tensor", *over)
        while entries and entries[-1] is None:
            entries.pop()
        return leaf.replace(PartitionSpec(*entries))

    return jax.tree.map(spec, params, is_leaf=lambda x: isinstance(x, nnx.Variable))


def zero_axis(spec: PartitionSpec) -> int | None:
    """The axis that ZeRO shards."""
    return next((i for i, entry in enumerate(spec) if isinstance(entry, tuple) and ZERO[0] in entry), None)


def without_zero(spec: PartitionSpec) -> PartitionSpec:
    """The spec of an array gathered over ZeRO's devices."""
    return PartitionSpec(*(("tensor" if "tensor" in (entry or ()) else None) for entry in spec))


def state_specs(
    tx: optax.GradientTransformation, params: Any, config: ParallelConfig, mesh: Mesh | AbstractMesh
) -> dict[str, Any]:
    """Specs of all leaves of the training state {"params", "opt_state", "step"}, and "moments": the spec of each
    parameter's optimizer state, "grads": that of its gradient."""
    opt_state = jax.eval_shape(tx.init, params)
    return {
        "params": param_specs(params, config, mesh, stage=3),
        "opt_state": param_specs(opt_state, config, mesh, stage=1),
        "moments": param_specs(params, config, mesh, stage=1),
        "grads": param_specs(params, config, mesh, stage=2),
        "step": PartitionSpec(),
    }


def memory_specs(memory: Any, axes: Any) -> Any:
    """One spec per leaf of a carried memory: the batch axis, declared by the model, is split over the devices."""
    return jax.tree.map(lambda _, axis: PartitionSpec(*[None] * axis, BATCH), memory, axes)


def named(specs: Any, mesh: Mesh) -> Any:
    """The NamedShardings of a tree of specs."""
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, PartitionSpec))


def state_places(specs: dict[str, Any], shapes: dict[str, Any], mesh: Mesh, config: ParallelConfig) -> dict[str, Any]:
    """The NamedShardings of a training state of these shapes; with `config.offload` the optimizer's arrays are in the
    host's memory.

    Raises UserError if the devices do not share that memory.
    """
    found = named({name: specs[name] for name in shapes}, mesh)
    if config.offload == "none":
        return found
    device = mesh.devices.flat[0]
    if HOST not in {memory.kind for memory in device.addressable_memories()}:
        raise UserError(
            f"parallel.offload={config.offload!r} needs devices that read the host's memory, and {device.device_kind} "
            "does not; set parallel.offload none."
        )

    def move(place, array):  # counters stay
        return place.with_memory_kind(HOST) if array.ndim else place

    return found | {"opt_state": jax.tree.map(move, found["opt_state"], shapes["opt_state"])}


def fetched(tree: Any, places: Any) -> Any:
    """Arrays in a program, those in the host's memory moved to the devices'."""

    def one(x, place):
        return jax.device_put(x, place.with_memory_kind("device")) if place.memory_kind == HOST else x

    return jax.tree.map(one, tree, places)


def returned(tree: Any, places: Any) -> Any:
    """The inverse of `fetched`."""
    return jax.tree.map(lambda x, place: jax.device_put(x, place) if place.memory_kind == HOST else x, tree, places)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh, rows: int) -> dict[str, jax.Array]:
    """This process's rows of a batch as global arrays with `rows` rows, split as `batch_spec` says."""
    sharding = NamedSharding(mesh, batch_spec(mesh))
    return {k: jax.make_array_from_process_local_data(sharding, v, (rows, *v.shape[1:])) for k, v in batch.items()}


def bytes_per_device(tree: Any) -> int:
    """Bytes of a tree of committed arrays on the first addressable device."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))
