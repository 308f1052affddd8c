"""A training that cannot fit the machine's memory is refused before any array is created."""

import math
import os
from pathlib import Path

import jax
import numpy as np

from engrax.errors import UserError
from engrax.train.cost import size
from engrax.train.sharding import splits
from engrax.train.train_step import resolve_dtype
from engrax.train.trainer import Trainer

BATCH_BYTES = 12  # per token: its id, its target and its segment id, int32 each
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # memory limits of a container


def refuse_what_does_not_fit(trainer: Trainer) -> None:
    """Raises UserError, with needed and available bytes, if a training cannot fit the devices' or the host's memory.

    The count is below the need of a step, so no training that could run is refused.
    """
    experiment = trainer.experiment
    host = experiment.batch_size // jax.process_count() * experiment.data.seq_len * BATCH_BYTES
    device, limit = needed(trainer), device_memory()
    if limit is None:  # the devices are the host's CPUs
        host += device * jax.local_device_count()
    elif device > limit:
        raise _too_large(trainer, device, limit, "each device")
    if host > host_memory():
        raise _too_large(trainer, host, host_memory(), "this machine")


def _too_large(trainer: Trainer, count: int, limit: int, where: str) -> UserError:
    experiment = trainer.experiment
    return UserError(
        f"the training needs at least {size(count)} of memory, and {where} has {size(limit)}: choose a smaller model, "
        f"batch_size (now {experiment.batch_size:,}) or data.seq_len (now {experiment.data.seq_len:,})."
    )


def needed(trainer: Trainer) -> int:
    """The minimal bytes of one device for a step: the training state, and the inputs of the repeats of the model's
    blocks, which every remat policy keeps for the backward pass."""
    experiment, model = trainer.experiment, trainer.experiment.model
    micro = experiment.batch_size // splits(trainer.mesh) // experiment.optimizer.accumulate
    values = micro * experiment.data.seq_len * getattr(model, "dim", 0) * getattr(model, "repeat", 1)
    state = sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(trainer.abstract_state())
    )
    return state + values * np.dtype(resolve_dtype(experiment.compute_dtype)).itemsize


def device_memory() -> int | None:
    """Bytes of a device's own memory; None if it has none or does not report it."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def host_memory() -> int:
    """Bytes of this machine's memory, or of the container's limit."""
    known = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in map(Path, LIMITS):
        try:
            known.append(int(path.read_text()))
        except (OSError, ValueError):  # the file does not exist, or says max
            continue
    return min(known)
