"""Reading documents far longer than training rows, in pieces, through the carried memory.

It measures whether the loss falls, or at least does not rise, beyond the training length, and whether state and time
per token stay constant. Some parts of a document are easier than others. Each document is therefore also read with a
memory that is reset before every piece; the difference of the two losses cancels this difficulty.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from engrax.data.encoded import Encoded
from engrax.errors import UserError
from engrax.evals import statistics as stats
from engrax.models.parameters import cast
from engrax.train import sharding, train_step
from engrax.train.experiment import Experiment
from engrax.train.objective import score

PIECE = 256  # tokens of one call
LENGTH_UNIT = 4 * PIECE  # lengths are multiples of it: quarters are read in pieces
DOCUMENTS = 64  # documents read, at most
SIDE_BY_SIDE = 16  # documents in one call, at most
TURNS = 15  # timed calls at the beginning and at the end, alternating


def long_documents(experiment: Experiment, length: int) -> Encoded:
    """The first length + 1 tokens of up to DOCUMENTS validation documents that are long enough: arrays [N, length + 1].

    Raises UserError if the data is not text, or if no validation document is long enough.
    """
    if length < LENGTH_UNIT or length % LENGTH_UNIT:
        raise UserError(f"stream={length} tokens must be a multiple of {LENGTH_UNIT}: quarters are read in pieces.")
    if not hasattr(experiment.data, "token_documents"):
        raise UserError("only text has documents to stream; leave out --stream for a generated task.")
    found, longest = [], 0
    for document in experiment.data.token_documents("validation"):
        longest = max(longest, len(document))
        if len(document) > length:
            found.append((document.tokens[: length + 1], document.bytes[: length + 1]))
        if len(found) == DOCUMENTS:
            break
    if not found:
        raise UserError(f"no validation document has more than {length} tokens (the longest: {longest}); stream fewer.")
    return Encoded(*(np.stack(arrays).astype(np.int32) for arrays in zip(*found)))


def longest(experiment: Experiment, at_most: int) -> int:
    """The length of the longest validation document, at most `at_most`, as a multiple of LENGTH_UNIT.

    Raises UserError as `long_documents` does.
    """
    length = 0
    if hasattr(experiment.data, "token_documents"):
        for document in experiment.data.token_documents("validation"):
            length = max(length, min(at_most, len(document) - 1) // LENGTH_UNIT * LENGTH_UNIT)
            if length == at_most:
                break
    return max(length, LENGTH_UNIT)


class Stream:
    """A model's compiled call on a piece of every document: (nats of the next tokens, the memory after it)."""

    def __init__(self, experiment: Experiment, model: nnx.Module):
        graphdef, params = nnx.split(model, nnx.Param)
        dtype = train_step.resolve_dtype(experiment.compute_dtype)
        self.params = jax.jit(lambda p: cast(p, dtype))(params)

        self._read = self.read(graphdef)
        self.start = jax.jit(lambda p, rows: nnx.merge(graphdef, p).init_memory(rows), static_argnums=1)

    @staticmethod
    def read(graphdef: nnx.GraphDef) -> Callable:
        """The compiled call(params, tokens, targets, memory) -> (nats [B, T], memory)."""

        def read(params, tokens_BT, targets_BT, memory):
            batch = {"tokens": tokens_BT, "targets": targets_BT}
            scored = score(nnx.merge(graphdef, params), batch, memory)
            return scored.nats, scored.memory

        return jax.jit(read)

    def __call__(self, tokens_BT, targets_BT, memory: Any) -> tuple[jax.Array, Any]:
        return self._read(self.params, tokens_BT, targets_BT, memory)


def stream(
    experiment: Experiment,
    model: nnx.Module,
    documents: Encoded,
    *,
    mesh: Mesh | None = None,
    tick: Callable[[int], Any] = lambda n: None,
) -> dict[str, Any]:
    """Reads `documents` [N, L], L - 1 tokens of each (`long_documents`), in pieces; a JSON-able dict.

    Returns:
      unit: bits per byte.
      curve: the loss by position, as in results.json, through the carried memory and through one that is reset.
      by_length: {"model", "reset"}: the loss of the documents' first tokens (`by_length`).
      quarters: the loss in each quarter; drift: fourth - second quarter, paired by document, with its 95 % interval.
      gain_over_reset: the same two, of the loss with the memory reset before every piece minus the carried memory's.
      state_bytes: of one document's memory, after the first piece and after the last.
      time: per token, {"piece", "token"}: calls of PIECE tokens and of one, at the end against at the beginning.

    With a `mesh`, the documents of a call are split over its devices. `tick(1)` is called after every piece,
    calls(documents) times.
    """
    tokens, targets = documents.tokens[:, :-1], documents.tokens[:, 1:]
    length = tokens.shape[1]
    reader = Stream(experiment, model)
    groups = range(0, len(tokens), SIDE_BY_SIDE)
    losses, memories = [], []
    for at in groups:
        group = tokens[at : at + SIDE_BY_SIDE], targets[at : at + SIDE_BY_SIDE]
        *found, early, late = _read(reader, *group, mesh, tick)
        losses.append(found)
        memories = memories or [early, late]  # only the first group is timed, so the others are not kept
    bits, reset = (np.concatenate(found) / np.log(2) for found in zip(*losses))
    early, late = memories
    few = len(_placed(tokens[:SIDE_BY_SIDE, :1], mesh))
    timed = [_placed(array[:SIDE_BY_SIDE, :PIECE], mesh) for array in (tokens, targets)]
    if not np.isfinite(bits + reset).all():
        first = int(np.argwhere(~np.isfinite(bits + reset))[:, 1].min())
        raise UserError(f"the model's outputs are not numbers from token {first} on: a cache of declared capacity?")
    size = documents.bytes[:, 1:].astype(float)
    positions = np.broadcast_to(np.arange(length), bits.shape)
    return {
        "length": length,
        "documents": len(documents),
        "trained_length": experiment.data.seq_len,
        "unit": "bits per byte",
        "curve": {
            "axis": "position in the document, tokens",
            "curves": [
                {"name": name, "kind": kind, "bins": stats.by_position(values, size, positions, stats.log_bins(length))}
                for name, kind, values in (
                    ("model", "model", bits),
                    (f"memory reset every {PIECE} tokens", "baseline", reset),
                )
            ],
        },
        "by_length": {
            name: by_length(values, size, experiment.data.seq_len)
            for name, values in (("model", bits), ("reset", reset))
        },
        **quarters(bits, size),
        "gain_over_reset": quarters(reset - bits, size),
        "state_bytes": {"first": _bytes(early, few), "last": _bytes(late, few)},
        "time": {
            "piece": _times(reader, *timed, early, late),
            "token": _times(reader, *(array[:, :1] for array in timed), early, late),
        },
    }


def calls(documents: Encoded) -> int:
    """Pieces that `stream` reads."""
    return -(-len(documents) // SIDE_BY_SIDE) * ((documents.tokens.shape[1] - 1) // PIECE)


def _placed(rows_NL: Int[np.ndarray, "N L"], mesh: Mesh | None) -> Any:
    """The rows on the devices: unchanged on one device, padded with the last row and split over several."""
    if mesh is None:
        return rows_NL
    padded = np.pad(rows_NL, ((0, -len(rows_NL) % sharding.splits(mesh)), (0, 0)), mode="edge")
    return jax.device_put(padded, NamedSharding(mesh, PartitionSpec(sharding.BATCH)))


def _read(reader: Stream, tokens_NL, targets_NL, mesh: Mesh | None, tick: Callable[[int], Any]) -> tuple:
    """(nats through the carried memory, nats with the memory reset before every piece, the memory after the first
    piece, the memory after the last)."""
    rows = len(tokens_NL)
    fresh = memory = reader.start(reader.params, len(_placed(tokens_NL[:, :1], mesh)))
    nats, reset, early = [], [], None
    for at in range(0, tokens_NL.shape[1], PIECE):
        piece = [_placed(array[:, at : at + PIECE], mesh) for array in (tokens_NL, targets_NL)]
        found, memory = reader(*piece, memory)
        early = memory if early is None else early
        nats.append(np.asarray(found)[:rows])
        reset.append(np.asarray(reader(*piece, fresh)[0])[:rows])
        tick(1)
    return np.concatenate(nats, axis=1), np.concatenate(reset, axis=1), early, memory


def by_length(bits: Float[np.ndarray, "N L"], size: Float[np.ndarray, "N L"], trained: int) -> list[dict[str, Any]]:
    """The loss of the first tokens of the documents, of the training's length times 1, 2, 4, ... and of all: bits per
    byte with an interval over documents, and perplexity per token."""
    lengths = [trained << i for i in range(64) if trained << i < bits.shape[1]] + [bits.shape[1]]
    return [
        {"tokens": n, "multiple": n / trained, "perplexity": float(2 ** bits[:, :n].mean())}
        | stats.mean(bits[:, :n], size[:, :n]).to_dict()
        for n in lengths
    ]


def quarters(bits: Float[np.ndarray, "N L"], size: Float[np.ndarray, "N L"]) -> dict[str, Any]:
    """The loss of each quarter of the documents, and the drift: each document's fourth quarter minus its second."""
    sums, counts = (x.reshape(len(x), 4, -1).sum(axis=2) for x in (bits, size))
    by_document = sums / counts
    drift = by_document[:, 3] - by_document[:, 1]
    return {
        "quarters": [stats.mean(sums[:, i : i + 1], counts[:, i : i + 1]).to_dict() for i in range(4)],
        "drift": stats.mean_of_few(drift).to_dict(),
    }


def _bytes(memory: Any, rows: int) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(memory)) // rows


def _times(reader: Stream, tokens_BT, targets_BT, early: Any, late: Any) -> dict[str, Any]:
    """Milliseconds per token of the same call from two states, taking turns, and the ratio late / early."""
    seconds: dict[str, list[float]] = {"first": [], "last": []}
    tokens_BT, targets_BT = jnp.asarray(tokens_BT), jnp.asarray(targets_BT)
    for turn in range(-2, TURNS):
        for name, memory in (("first", early), ("last", late)):
            begun = time.perf_counter()
            jax.block_until_ready(reader(tokens_BT, targets_BT, memory))
            if turn >= 0:
                seconds[name].append(time.perf_counter() - begun)
    ratios = [b / a for a, b in zip(seconds["first"], seconds["last"])]
    tokens = tokens_BT.shape[1]
    return {name: 1e3 * statistics.median(found) / tokens for name, found in seconds.items()} | {
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }
