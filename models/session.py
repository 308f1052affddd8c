"""A session holds a model's memory: read a text once, continue from it many times, save it in a file.

session = engrax.session("runs/a")
session.feed(book)
for answer in session.branch(3).feed(questions).generate(tokens=50): ...
session.save("book.state")
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from engrax.errors import UserError
from engrax.models import sampling as draws
from engrax.models import session_file
from engrax.models.contract import as_model
from engrax.models.generate import PIECE, Compiled, Flow
from engrax.models.sampling import Sampling
from engrax.models.tokens import check_ids, is_one

LONGEST_STOP = 16  # tokens at a row's end searched for a stop text, plus the text's number of bytes


class Session:
    """The state of `rows` texts that a model reads together. Every method that reads or writes continues them.

    model: the module. tokenizer: for texts; None = token ids only. dtype: the compute dtype, None = the parameters'.
    name: name of the weights in errors.
    """

    def __init__(
        self, model: nnx.Module, *, tokenizer: Any = None, rows: int = 1, dtype: Any = None, name: str = "the model"
    ):
        if rows < 1:
            raise UserError(f"rows={rows} must be at least 1.")
        self.model, self.tokenizer, self.name = as_model(model), tokenizer, name
        self._compiled = Compiled(model, dtype)
        self.tokens_read = np.zeros(rows, np.int64)  # by row
        self._read = [hashlib.sha256().digest()] * rows  # digests of the tokens that the rows have read
        self._streams = np.arange(rows)  # numbers the rows that have read the same tokens
        self._memory = self._compiled.start(rows)
        self._logits = jnp.zeros((rows, self._compiled.vocabulary), self._compiled.logits_dtype)

    @property
    def rows(self) -> int:
        """The number of texts."""
        return len(self._read)

    @property
    def logits(self) -> Float[np.ndarray, "B V"]:
        """The logits after each row's last token. Raises UserError before the first, or if they are not numbers."""
        self._ready()
        found = np.array(self._logits)  # a copy: the next call donates the array
        if np.isnan(found).any():
            raise self._compiled.not_numbers(self.name)
        return found

    def feed(self, given: Any) -> "Session":
        """Reads one text (or its token ids) for all rows, or one per row, of any lengths; returns the session.

        Raises UserError for an empty row, an id outside the vocabulary, or a wrong number of rows.
        """
        rows = self._rows_of(given)
        piece, memory = self._compiled.piece, self._taken()
        longest = max(map(len, rows))
        tokens = np.zeros((self.rows, -(-longest // piece) * piece), np.int32)
        ids = np.full(tokens.shape, -1, np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], ids[i, : len(row)] = row, 0
        for at in range(0, tokens.shape[1], piece):
            part = slice(at, at + piece)
            self._logits, memory = self._compiled.read(tokens[:, part], ids[:, part], self._logits, memory)
        self._memory = memory
        self._note(rows)
        self._streams = np.array([self._read[:i].count(digest) for i, digest in enumerate(self._read)])
        return self

    def generate(self, tokens: int = 200, sampling: Sampling | None = None, **settings: Any) -> Any:
        """Writes up to `tokens` tokens in every row. Returns its text or, without a tokenizer, its ids; a list for
        several rows.

        `settings` are fields of `Sampling`, instead of one. The written tokens are in the state.
        """
        found = self.sample(tokens, draws.of(sampling, settings))
        kept = [row[row >= 0] for row in found]
        made = kept if self.tokenizer is None else [self.text(row) for row in kept]
        return made[0] if self.rows == 1 else made

    def sample(self, tokens: int, sampling: Sampling | None = None, **settings: Any) -> Int[np.ndarray, "B new"]:
        """The ids that `generate` writes; -1 after the end of a row that stopped before others."""
        pieces = list(self._written(tokens, draws.of(sampling, settings), PIECE))
        return np.concatenate(pieces, axis=1)

    def stream(
        self, tokens: int = 200, sampling: Sampling | None = None, **settings: Any
    ) -> Iterator[Int[np.ndarray, " B"]]:
        """Yields the ids [B] of each token as it is drawn, -1 in rows that have stopped.

        The state holds exactly the tokens that were taken from the iterator.
        """
        written = self._written(tokens, draws.of(sampling, settings), 1)
        return (piece[:, 0] for piece in written)

    def stream_text(self, tokens: int = 200, sampling: Sampling | None = None, **settings: Any) -> Iterator[str]:
        """Yields the text of one row as it is written. A character of several tokens is never split."""
        if self.rows != 1 or self.tokenizer is None:
            raise UserError(f"streaming text needs one row and a tokenizer; this session has {self.rows} rows.")
        before: list[int] = []  # of the last piece: the spelling of the next may depend on them
        ids: list[int] = []  # those after it
        for token in self.stream(tokens, sampling, **settings):
            ids.append(int(token[0]))
            piece = self.text(before + ids)[len(self.text(before)) :]
            if piece and not piece.endswith("\N{REPLACEMENT CHARACTER}"):
                yield piece
                before, ids = ids, []
        if piece := self.text(before + ids)[len(self.text(before)) :]:
            yield piece

    def text(self, ids: Sequence[int] | Int[np.ndarray, " T"]) -> str:
        """The text of ids, without an end-of-text token at its end."""
        ids = list(map(int, ids))
        return self.tokenizer.decode(ids[:-1] if ids and ids[-1] in self._end_of_text() else ids)

    def branch(self, rows: int) -> "Session":
        """A new session with `rows` copies of every row; this one does not change."""
        if rows < 1:
            raise UserError(f"branch({rows}) must make at least 1 row.")
        self._ready(feeding=True)
        new = object.__new__(Session)
        new.__dict__.update(self.__dict__)
        axes = self.model.memory_axes(self._memory)
        new._memory = jax.tree.map(lambda x, axis: _repeat(x, rows, axis), self._memory, axes)
        new._logits = _repeat(self._logits, rows, 0)
        new._read = [digest for digest in self._read for _ in range(rows)]
        new._streams = (self._streams[:, None] * rows + np.arange(rows)).ravel()
        new.tokens_read = np.repeat(self.tokens_read, rows)
        return new

    def release(self) -> tuple[Compiled, Float[jax.Array, "B V"], Any]:
        """(the compiled functions, the logits, the memory), for a caller that donates them; the session ends."""
        return self._compiled, self._logits, self._taken()

    def report(self) -> dict[str, Any]:
        """Tokens read by row, bytes of the state, and the means of the mixers' diagnostics for reading each row's most
        likely token next (the state does not change)."""
        self._ready()
        collected = jax.device_get(self._compiled.diagnose(self._logits, self._memory))
        return {
            "rows": self.rows,
            "tokens_read": self.tokens_read.tolist(),
            "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(self._memory)),
            "diagnostics": {name: float(np.nanmean(v)) for name, v in collected.items() if not np.isnan(v).all()},
        }

    def save(self, path: Any) -> None:
        """Writes the state into a file (safetensors), with the digest of the model it belongs to."""
        self._ready()
        session_file.save(path, (self._logits, self._memory), self._header())

    def restore(self, path: Any) -> "Session":
        """Continues from a saved state, with its rows; returns the session.

        Raises UserError if the file is damaged or belongs to another model; the session then does not change.
        """

        def shapes(rows: int):
            logits = jax.ShapeDtypeStruct((rows, self._compiled.vocabulary), self._compiled.logits_dtype)
            return logits, jax.eval_shape(lambda: self._compiled.start(rows))

        header, (self._logits, self._memory) = session_file.load(path, self._digest(), shapes)
        self.tokens_read = np.asarray(header["tokens_read"], np.int64)
        self._read = [bytes.fromhex(text) for text in header["read"]]
        self._streams = np.asarray(header["streams"])
        return self

    def _header(self) -> dict[str, Any]:
        return {
            "model": self._digest(),
            "tokens_read": self.tokens_read.tolist(),
            "read": [digest.hex() for digest in self._read],
            "streams": self._streams.tolist(),
        }

    def _digest(self) -> str:
        if not hasattr(self, "_model_digest"):
            self._model_digest = session_file.digest_of(self.model, self._compiled.params)
        return self._model_digest

    def _written(self, tokens: int, sampling: Sampling, piece: int) -> Iterator[Int[np.ndarray, "B new"]]:
        """Writes and yields the ids in pieces; with stop texts, one token at a time."""
        if not 1 <= tokens < 2**31:
            raise UserError(f"tokens={tokens} must be at least 1 and below 2^31.")
        self._ready()
        if sampling.stop_texts and self.tokenizer is None:
            raise UserError(f"stop={sampling.stop_texts[0]!r} is a text, and there is no tokenizer; give token ids.")
        check_ids([item for item in sampling.stop if not isinstance(item, str)], self._compiled.vocabulary)
        return self._write(tokens, sampling, 1 if sampling.stop_texts else piece)

    def _write(self, tokens: int, sampling: Sampling, piece: int) -> Iterator[Int[np.ndarray, "B new"]]:
        settings = sampling.traced(self._streams, self._end_of_text())
        position = jnp.asarray(self.tokens_read, jnp.int32)
        memory = self._compiled.open(self._taken())
        flow = Flow(self._logits, memory, jnp.ones(self.rows, bool), position, jnp.bool_(True))
        tails: list[list[int]] = [[] for _ in range(self.rows)]
        try:
            while tokens and bool(flow.alive.any()):
                flow, written, count = self._compiled.write(flow, settings, np.int32(min(tokens, piece)))
                found = np.asarray(written)[:, : int(count)]
                if not bool(flow.is_number):
                    raise self._compiled.not_numbers(self.name)
                tokens -= found.shape[1]
                self._note([row[row >= 0] for row in found])
                if sampling.stop_texts:
                    flow = flow._replace(alive=flow.alive & ~self._stopped(tails, found, sampling.stop_texts))
                yield found
        finally:
            if not any(leaf.is_deleted() for leaf in jax.tree.leaves(flow)):  # else the call was interrupted
                self._logits, self._memory = flow.logits, self._compiled.close(flow.memory)

    def _stopped(self, tails: list[list[int]], found, texts: tuple[str, ...]) -> np.ndarray:
        """Which rows contain one of the texts; `tails` are the rows' last tokens."""
        longest = LONGEST_STOP + max(len(text.encode()) for text in texts)
        for tail, row in zip(tails, found):
            tail[:] = [*tail, *(int(token) for token in row if token >= 0)][-longest:]
        return np.array([any(text in self.tokenizer.decode(tail) for text in texts) for tail in tails])

    def _end_of_text(self) -> tuple[int, ...]:
        ids = getattr(self.tokenizer, "end_of_text", ())
        return tuple(int(i) for i in ids if i < self._compiled.vocabulary)

    def _note(self, rows: list[np.ndarray]) -> None:
        """Updates the digests of the tokens that the rows have read."""
        for i, row in enumerate(rows):
            if len(row):
                self._read[i] = hashlib.sha256(self._read[i] + np.asarray(row, "<i4").tobytes()).digest()
        self.tokens_read = self.tokens_read + np.array([len(row) for row in rows])

    def _rows_of(self, given: Any) -> list[np.ndarray]:
        """The ids of every row. Raises UserError if they are invalid."""
        rows = [given] * self.rows if is_one(given) else list(given)
        if len(rows) != self.rows:
            raise UserError(
                f"{len(rows)} texts for a session of {self.rows} row(s); branch(n) or rows=n makes as many rows."
            )
        return [self._ids_of(row, i) for i, row in enumerate(rows)]

    def _ids_of(self, row: Any, place: int) -> np.ndarray:
        if isinstance(row, str | bytes):
            if self.tokenizer is None:
                raise UserError("the session has no tokenizer to read a text with; give token ids, or tokenizer=...")
            row = self.tokenizer.encode(row)
        ids = np.asarray(row)
        if not ids.size:
            raise UserError(f"row {place} of the prompt is empty; give at least one token.")
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise UserError(f"row {place} of the prompt is no sequence of token ids (shape {ids.shape}, {ids.dtype}).")
        check_ids(ids, self._compiled.vocabulary)
        return ids

    def _taken(self) -> Any:
        """The memory, which the compiled functions donate."""
        self._ready(feeding=True)
        memory, self._memory = self._memory, None
        return memory

    def _ready(self, feeding: bool = False) -> None:
        if self._memory is None:
            raise UserError("the session is in use, or was interrupted in a call; restore it, or make a new one.")
        if not feeding and not self.tokens_read.all():
            raise UserError("the session has read nothing; `feed` it a text first.")


def _repeat(x: jax.Array, count: int, axis: int) -> jax.Array:
    """Every row `count` times, in a new array, because calls donate their arrays."""
    return jnp.array(jnp.repeat(x, count, axis=axis), copy=True)
