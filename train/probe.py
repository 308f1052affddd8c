"""The probe before a fresh training, on the run's own model and data: a model that sees the future is refused."""

from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from engrax.errors import UserError
from engrax.laws.probe import LENGTH, probe
from engrax.train import sharding
from engrax.train.trainer import Trainer


def refuse_leaks(trainer: Trainer, params: Any, batch: dict[str, np.ndarray], source: epath.PathLike | None) -> None:
    """Raises UserError where the model sees tokens that it should predict, or other rows of its batch.

    Nothing is refused with `allow_future`. `batch` is this process's first; all processes decide alike.
    """
    if trainer.experiment.allow_future:
        return
    tokens, ids = _rows(trainer, batch)
    spread = NamedSharding(trainer.mesh, PartitionSpec(sharding.BATCH))

    def put(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(array.shape, spread, lambda index: array[index])

    experiment, model = trainer.experiment, trainer.experiment.model
    vocab_size = getattr(model, "vocab_size", experiment.data.vocab_size)
    with jax.set_mesh(trainer.mesh):
        leak = probe(trainer.graphdef, params, tokens, ids, vocab_size=vocab_size, put=put)
    if leak is not None:
        raise UserError(
            f"the model sees what it must not: its output at token {leak.token} of a row changes by {leak.size:.2g} "
            f"when {leak.cause}, so that its next-token loss means nothing; `engrax check "
            f"{source or model.registered_name}` says more, and --allow-future trains it all the same."
        )


def _rows(trainer: Trainer, batch: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and segment ids [R, T] for the probe, the same on every process: R divides over the devices, R >= 2, and
    row 0 has the most tokens."""
    count = sharding.splits(trainer.mesh)
    count *= -(-2 // count)
    tokens, ids = batch["tokens"][:, :LENGTH], batch["segment_ids"][:, :LENGTH]
    order = np.argsort(-np.sum(ids >= 0, axis=1), kind="stable")
    order = np.resize(order, count)
    tokens, ids = tokens[order], ids[order]
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        tokens, ids = (np.asarray(array) for array in multihost_utils.broadcast_one_to_all((tokens, ids)))
    return tokens, ids
