"""Which implementation serves each operation of a training on a device, and why the others do not.

The training's loss is traced with the shapes, dtypes and segment ids of its batches; nothing is computed and no device
is needed. Every call of an operation is collected and explained for the device that is asked about.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from engrax.errors import UserError
from engrax.pallas_kernels import devices, dispatch
from engrax.train import train_step
from engrax.train.experiment import Experiment


class OperationRow(NamedTuple):
    """One operation at one set of sizes, and what serves it."""

    call: dispatch.Call
    served: dispatch.Served

    @property
    def sizes(self) -> str:
        """The sizes in words: "batch=8 length=512 ..."; what is absent, False or None is left out."""
        fields = self.call.shapes._asdict()
        return " ".join(f"{name}={_word(value)}" for name, value in fields.items() if value not in (None, False))


def _word(value) -> str:
    if isinstance(value, tuple):  # the layers of a memory, ((64, 128), (128, 64))
        return ",".join("x".join(map(str, layer)) for layer in value)
    return "yes" if value is True else str(value)


def calls(experiment: Experiment, dtype) -> tuple[dispatch.Call, ...]:
    """Returns the operations that one microbatch of the training calls in its forward pass, each set of sizes once.

    dtype: the compute dtype.
    """
    graphdef, params = nnx.split(nnx.eval_shape(lambda: experiment.model.build(rngs=nnx.Rngs(0))), nnx.Param)
    rows = experiment.batch_size // experiment.optimizer.accumulate
    tokens = jax.ShapeDtypeStruct((rows, experiment.data.seq_len), jnp.int32)
    batch = dict(tokens=tokens, targets=tokens, segment_ids=tokens)

    def start(params):
        return jax.tree.map(jnp.asarray, nnx.merge(graphdef, train_step.cast(params, dtype)).init_memory(rows))

    memory = jax.eval_shape(start, params) if experiment.carry_memory else None
    with dispatch.recorded_calls() as found:
        jax.eval_shape(train_step.make_loss(graphdef, dtype), params, batch, memory)
    return tuple(dict.fromkeys(found))


def compute_dtype(experiment: Experiment, device: devices.Device):
    """Returns the compute dtype on a device: the config's, where that is `auto` bfloat16 on an accelerator."""
    if experiment.compute_dtype != "auto":
        return jnp.dtype(experiment.compute_dtype)
    return jnp.dtype(jnp.float32 if device.platform == "cpu" else jnp.bfloat16)


def find_device(name: str) -> devices.Device:
    """Returns a device by its name. Raises UserError for an unknown one."""
    try:
        return devices.find(name)
    except ValueError as error:
        raise UserError(str(error)) from None


def report(experiment: Experiment, device: devices.Device) -> list[OperationRow]:
    """Returns what serves every operation of the training on a device."""
    found = calls(experiment, compute_dtype(experiment, device))
    return [OperationRow(call, dispatch.explain(call, device)) for call in found]


def format_report(experiment: Experiment, device: devices.Device) -> str:
    """Returns the report as plain text, for a terminal: an operation, what serves it, and why the others do not."""
    rows = report(experiment, device)
    lines = [f"operations of the training on {device.kind}, {compute_dtype(experiment, device).name}:"]
    for row in rows:
        reasons = {row.served.by: "serves it"} | row.served.others
        width = max(11, *map(len, reasons))
        lines += [f"{row.call.op}  {row.sizes}", *(f"  {name:<{width}} {reason}" for name, reason in reasons.items())]
    return "\n".join(lines if rows else [*lines, "  none: the model calls no operation of engrax.pallas_kernels"])
