"""The forward passes of an evaluation: the model's prediction of every labelled token of the validation rows.

One compiled program per set of muted memories, at one static shape. It runs on the default device or, given a mesh
(`engrax.train.sharding.evaluation_mesh`), with the batch split over the devices. The numbers are the same.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from engrax.data.config import check_rows
from engrax.errors import UserError
from engrax.models import contract
from engrax.models.parameters import cast, map_parameters
from engrax.train import sharding, train_step
from engrax.train.experiment import Experiment
from engrax.train.objective import score
from engrax.train.trainer import NO_LABELS, Trainer

# Tokens of one forward pass: the training's batch may have been spread over many devices, or be tiny.
LEAST_BATCH_TOKENS, BATCH_TOKENS = 4_096, 16_384
DEFAULT_TOKENS = 131_072  # validation tokens scored unless the caller asks for more
REPORT_TOKENS = 16_384  # validation tokens whose memory diagnostics are taken
SEEN_TOKENS = 32_000_000  # training tokens that the n-gram baselines count at most


UNITS = {"text": "bits per byte", "task": "accuracy", "tokens": "bits per token"}  # of the score, by kind_of
_PADDING = {"tokens": 0, "targets": -1, "segment_ids": -1}  # the arrays that a model reads
_FIELDS = (*_PADDING, "target_bytes")


@dataclasses.dataclass(frozen=True)
class Rows:
    """N packed rows of T tokens from the loader."""

    tokens: Int[np.ndarray, "N T"]
    targets: Int[np.ndarray, "N T"]
    segment_ids: Int[np.ndarray, "N T"]
    target_bytes: Int[np.ndarray, "N T"] | None  # source bytes, 0 without a target; None if the data is not text
    complete: bool  # whether these are all rows

    def __len__(self) -> int:
        return len(self.tokens)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that a model reads, by their names in a batch."""
        return {name: getattr(self, name) for name in _PADDING}

    def take(self, chosen: slice | Int[np.ndarray, "M"], complete: bool) -> "Rows":
        """The chosen rows."""
        size = None if self.target_bytes is None else self.target_bytes[chosen]
        return Rows(*(array[chosen] for array in self.arrays().values()), target_bytes=size, complete=complete)

    @property
    def labelled(self) -> Bool[np.ndarray, "N T"]:
        """True where a prediction is scored."""
        return self.targets >= 0


@dataclasses.dataclass(frozen=True)
class Scores:
    """The results of one pass, per token."""

    nats: Float[np.ndarray, "N T"]  # negative log-likelihood of the target, 0 without a target
    right: Bool[np.ndarray, "N T"]  # the target had the highest logit
    tokens_per_second: float  # speed of the compiled forward pass, without compilation and loading


def kind_of(experiment: Experiment) -> str:
    """The kind of score, one of UNITS: for text, for a generated task with known answers, or for other tokens."""
    if hasattr(experiment.data, "solve") and hasattr(experiment.data, "chance"):
        return "task"
    return "text" if experiment.data.counts_bytes else "tokens"


def divisors(rows: Rows, kind: str) -> Float[np.ndarray, "N T"]:
    """The divisor of the score, per token: the target's bytes for text, else 1; 0 if the token is not scored."""
    return (rows.target_bytes if kind == "text" else rows.labelled).astype(float)


def batch_rows(experiment: Experiment) -> int:
    """Rows of one forward pass: a microbatch of the training, within LEAST_BATCH_TOKENS and BATCH_TOKENS tokens."""
    micro = experiment.batch_size // experiment.optimizer.accumulate
    least, most = (tokens // experiment.data.seq_len for tokens in (LEAST_BATCH_TOKENS, BATCH_TOKENS))
    return max(1, min(max(micro, least), most))


def _loader(experiment: Experiment, split: str, rows: int) -> Iterator[dict[str, np.ndarray]]:
    """The training's loader of a split. Its rows come in the same order at any batch size."""
    optimizer = dataclasses.replace(experiment.optimizer, accumulate=1)
    same = dataclasses.replace(experiment, batch_size=rows, optimizer=optimizer)
    return Trainer(same).loader(split, target_bytes=experiment.data.counts_bytes)


def _stack(batches: list[dict[str, np.ndarray]], complete: bool) -> Rows:
    arrays = {name: np.concatenate([batch[name] for batch in batches]) for name in _FIELDS if name in batches[0]}
    rows = Rows(**{"target_bytes": None} | arrays, complete=complete)
    check_rows(rows.segment_ids)
    return rows


def validation_rows(experiment: Experiment, batches: int | None) -> Rows:
    """The first `batches` validation batches of `batch_rows` rows; None takes up to DEFAULT_TOKENS tokens.

    Raises UserError if `batches` is less than 1 or the split has no labelled token.
    """
    rows = batch_rows(experiment)
    if batches is None:
        batches = max(1, DEFAULT_TOKENS // (rows * experiment.data.seq_len))
    if batches < 1:
        raise UserError(f"batches={batches} must be at least 1 (or left out for the default).")
    loader = _loader(experiment, "validation", rows)
    taken = list(itertools.islice(loader, batches))
    complete = next(loader, None) is None
    _close(loader)
    if not any((batch["targets"] >= 0).any() for batch in taken):
        raise UserError(NO_LABELS)
    return _stack(taken, complete)


def seen_rows(experiment: Experiment, step: int) -> tuple[Rows, float]:
    """(the distinct training rows of the first `step` steps, epochs seen); `complete` is False if SEEN_TOKENS cut them.

    Only the first epoch is counted: later epochs repeat the same tokens. A run with a carried memory was trained on
    streams, so streams are counted.
    """
    if experiment.carry_memory:
        return _seen_streams(experiment, step)
    wanted = step * experiment.batch_size
    limit = min(wanted, max(1, SEEN_TOKENS // experiment.data.seq_len))
    seen = _first_rows(experiment, "train", limit)
    whole = _whole_epoch(experiment, int(seen.labelled.sum()))
    if whole is None:
        return dataclasses.replace(seen, complete=limit == wanted), float("nan")
    # Every labelled token occurs once in an epoch, for any packing, so the epoch ends where the count is reached.
    reached = int(np.searchsorted(np.cumsum(seen.labelled.sum(axis=1)), whole)) + 1
    return seen.take(slice(reached), complete=True), wanted / reached


def _seen_streams(experiment: Experiment, step: int) -> tuple[Rows, float]:
    """`seen_rows` of a training on streams. Rows depend on the batch size, so the training's batches are read.

    A token that was read before has no target.
    """
    rows = experiment.batch_size
    steps = min(step, max(1, SEEN_TOKENS // (rows * experiment.data.seq_len)))
    loader = Trainer(experiment).loader("train", target_bytes=experiment.data.counts_bytes)
    seen = _stack(list(itertools.islice(loader, steps)), complete=steps == step)
    # Row r of B reads the documents r, r + B, ... of the shuffled order, which repeats.
    place = seen.segment_ids * rows + np.tile(np.arange(rows), steps)[:, None]
    again = (seen.segment_ids >= 0) & (place >= loader.document_count)
    once = {"targets": np.where(again, -1, seen.targets), "target_bytes": np.where(again, 0, seen.target_bytes)}
    first = dataclasses.replace(seen, **once)
    epochs = float(seen.labelled.sum() / first.labelled.sum()) if again.any() else float("nan")
    return first, epochs


def _first_rows(experiment: Experiment, split: str, count: int) -> Rows:
    rows = min(count, 256)
    loader = _loader(experiment, split, rows)
    taken = list(itertools.islice(loader, -(-count // rows)))
    _close(loader)
    return _stack(taken, True).take(slice(count), complete=True)


def _whole_epoch(experiment: Experiment, seen: int) -> int | None:
    """Labelled tokens of the whole training split, or None if they are more than `seen` or epochs are uneven."""
    if not experiment.data.even_epochs:
        return None
    loader = experiment.data.loader("train", batch_size=256, epochs=1)
    total = 0
    for batch in loader:
        total += int((batch["targets"] >= 0).sum())
        if total > seen:
            _close(loader)
            return None
    return total


def reported_rows(rows: Rows) -> Rows:
    """The first rows with labels, of about REPORT_TOKENS tokens together."""
    real = np.flatnonzero(rows.labelled.any(axis=1))[: max(1, REPORT_TOKENS // rows.tokens.shape[1])]
    return rows.take(real, complete=False)


def _close(loader: Any) -> None:
    """Stops a loader's read-ahead."""
    if hasattr(loader, "close"):
        loader.close()


class Scorer:
    """A model's compiled passes over rows; with a `mesh` the rows of a batch are split over its devices."""

    def __init__(self, experiment: Experiment, model: nnx.Module, mesh: Mesh | None = None):
        self.mesh = mesh
        self.graphdef, self.params = nnx.split(model, nnx.Param)
        self.rows = batch_rows(experiment)
        self.dtype = train_step.resolve_dtype(experiment.compute_dtype)
        self._place = None
        if mesh is not None:  # if parameters are sharded, each layer gathers its own
            specs = map_parameters(lambda variable: variable.get_value().sharding.spec, self.params)
            self._place = train_step.compiler_placement(specs, mesh)
        self._score = jax.jit(self._forward, static_argnames="mute")
        self._report = jax.jit(self._diagnose)

    def score(self, rows: Rows, *, mute: tuple[str, ...] = (), tick: Callable[[int], Any] = lambda n: None) -> Scores:
        """Scores every labelled token, without the memory reads of the mixers named in `mute`.

        `tick(1)` is called after every batch.
        """
        batches = [self._put(batch) for batch in self._batches(rows)]
        jax.block_until_ready(self._score(self.params, batches[0], mute=mute))  # compiles
        nats, right, seconds = [], [], 0.0
        for batch in batches:
            started = time.perf_counter()
            loss, correct = jax.device_get(self._score(self.params, batch, mute=mute))
            seconds += time.perf_counter() - started
            nats.append(loss[: self.rows])
            right.append(correct[: self.rows])
            tick(1)
        size = len(batches) * self.rows * rows.tokens.shape[1]
        joined = np.concatenate(nats)[: len(rows)], np.concatenate(right)[: len(rows)]
        return Scores(*joined, tokens_per_second=size / max(seconds, 1e-9))

    def peak_bytes(self, rows: Rows) -> int:
        """Bytes that the compiled pass over a batch holds on one device: parameters, batch, results and temporaries."""
        batch = self._put(next(self._batches(rows)))
        found = self._score.lower(self.params, batch, mute=()).compile().memory_analysis()
        held = found.argument_size_in_bytes + found.output_size_in_bytes + found.temp_size_in_bytes
        return int(held - found.alias_size_in_bytes)

    def report(self, rows: Rows) -> dict[str, np.ndarray]:
        """The mixers' diagnostics of `reported_rows(rows)`, one row at a time: {"titans.lr_mean": [rows, repeat]}.

        Rows are reported one by one, because a batch mean hides a memory that diverges on one row in a hundred. A
        diagnostic per token is [rows, repeat, T] or, with a value per memory, [rows, repeat, T, M], NaN at padding.
        """
        rows = reported_rows(rows)
        # Every device computes the same row, as kernels need one.
        copies = 1 if self.mesh is None else sharding.splits(self.mesh)
        taken = {name: np.repeat(array[:, None], copies, axis=1) for name, array in rows.arrays().items()}
        found = jax.device_get(self._report(self.params, taken))
        padding = rows.segment_ids < 0
        return {name: _squeeze(np.asarray(values, np.float64), padding, copies) for name, values in found.items()}

    def _batches(self, rows: Rows) -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, len(rows), self.rows):
            yield {name: array[start : start + self.rows] for name, array in rows.arrays().items()}

    def _put(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """The batch on the devices: unchanged on one device, padded to whole rows per device on several."""
        if self.mesh is None:
            return batch
        rows = len(batch["tokens"])
        missing = -rows % sharding.splits(self.mesh)
        fill = ((0, missing), (0, 0))
        batch = {name: np.pad(array, fill, constant_values=_PADDING[name]) for name, array in batch.items()}
        return sharding.put_batch(batch, self.mesh, rows + missing)

    def _forward(self, params, batch, mute=()):
        model, gather = train_step.assemble(self.graphdef, cast(params, self.dtype), self._place)
        with contract.gathering(gather):
            scored = score(model, batch, mute=mute)
        return scored.nats, scored.correct

    def _diagnose(self, params, rows):
        model, gather = train_step.assemble(self.graphdef, cast(params, self.dtype), self._place)

        def one(row):
            with contract.gathering(gather):
                return model(row["tokens"], segment_ids=row["segment_ids"], collect=("*",)).collected

        return jax.lax.map(one, rows)


def _squeeze(values: np.ndarray, padding: np.ndarray, copies: int) -> np.ndarray:
    """[rows, repeat, copies, T, ...] diagnostics of tokens without their copies and padding; others do not change."""
    if values.shape[2:4] != (copies, padding.shape[1]):
        return values
    padding = padding[:, None].reshape(len(padding), 1, -1, *(1,) * (values.ndim - 4))
    return np.where(padding, np.nan, values[:, :, 0])
