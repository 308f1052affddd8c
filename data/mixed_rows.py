"""One stream of batches with the rows of several packed texts, by weight."""

from collections.abc import Sequence
from typing import Any

import grain

from engrax.data.config import Batch, Share, padding_batch
from engrax.data.pipeline import PackedText
from engrax.errors import UserError


class MixedRows(grain.DatasetIterator):
    """Batches with rows of several sources, a grain iterator (see `engrax.data.mixture`).

    The next row comes from the source i with the largest w_i (S + T) - s_i. s_i are its tokens so far, S those of all
    sources, T the tokens of a row, w_i the weights with sum 1. Every process counts the tokens of all rows and writes
    its own rows.
    """

    def __init__(
        self, sources: Sequence[PackedText], weights: Sequence[float], *, seq_len: int, share: Share, target_bytes: bool
    ):
        super().__init__()
        self._sources, self._weights = list(sources), [weight / sum(weights) for weight in weights]
        self._seq_len, self._share, self._target_bytes = seq_len, share, target_bytes
        self._tokens = [0] * len(sources)

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch: the sources' positions, and the tokens read from each."""
        return {"sources": [source.get_state() for source in self._sources], "tokens": list(self._tokens)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a position; raises UserError if it belongs to another data set."""
        if set(state) != {"sources", "tokens"} or len(state["sources"]) != len(self._sources):
            raise UserError("the saved data position does not belong to a mixture of these sources.")
        for source, position in zip(self._sources, state["sources"]):
            source.set_state(position)
        self._tokens = [int(tokens) for tokens in state["tokens"]]

    def close(self) -> None:
        """Stops reading ahead."""
        for source in self._sources:
            source.close()
        super().close()

    def __next__(self) -> Batch:
        batch = padding_batch(self._share.rows, self._seq_len, target_bytes=self._target_bytes)
        filled = 0
        while filled < self._share.batch_size:
            lengths = [source.next_length() for source in self._sources]
            total = sum(self._tokens) + self._seq_len
            wanted = {
                i: weight * total - done
                for i, (weight, done, length) in enumerate(zip(self._weights, self._tokens, lengths))
                if length is not None
            }
            if not wanted:
                break
            chosen = max(wanted, key=wanted.get)
            self._sources[chosen].write_next(batch, filled)
            self._tokens[chosen] += lengths[chosen]
            filled += 1
        if not filled:
            raise StopIteration
        return batch
