"""The shared part of generated tasks: examples as a pure function of (seed, split, index), and their loader."""

import abc
import dataclasses
import hashlib
import json

import numpy as np
from jaxtyping import Int32, Int64

from engrax.data import hashing
from engrax.data.config import SPLITS, Batch, DataConfig, Loader, Share, check_loader_arguments, padding_batch, require


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig(DataConfig):
    """Base of the generated tasks. A subclass has `vocab_size`, `chance`, `_examples` and `solve`.

    The two splits use separate key spaces of the random number generator. `train_examples` is the size of an epoch.
    """

    train_examples: int = 100_000  # rows of the train split
    validation_examples: int = 1_000  # rows of the validation split
    seed: int = 0  # of the examples (the loader's seed only orders them)

    def __post_init__(self):
        super().__post_init__()
        for name in ("train_examples", "validation_examples"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}.")
        require(self.seed >= 0, f"seed must not be negative, not {self.seed}.")

    @property
    @abc.abstractmethod
    def chance(self) -> float:
        """Expected accuracy of guessing uniformly among all possible answers."""

    @abc.abstractmethod
    def _examples(
        self, key: tuple[int, int], row: Int64[np.ndarray, "N 1"]
    ) -> tuple[Int32[np.ndarray, "N T"], Int32[np.ndarray, "N T"]]:
        """Tokens and targets (-1 = no question) of the examples `row` in the key space `key`."""

    @abc.abstractmethod
    def solve(self, tokens: Int32[np.ndarray, "B T"]) -> Int32[np.ndarray, "B T"]:
        """The oracle: the answer at every position, computed from the tokens; it scores 100 %."""

    def num_examples(self, split: str) -> int:
        """Returns the number of rows of a split."""
        require(split in SPLITS, f"unknown split {split!r} (known: {', '.join(SPLITS)}).")
        return self.train_examples if split == "train" else self.validation_examples

    def generate(
        self, split: str, indices: Int64[np.ndarray, "N"]
    ) -> tuple[Int32[np.ndarray, "N T"], Int32[np.ndarray, "N T"]]:
        """Returns tokens and targets of the examples `indices` of a split, any subset in any order, without state."""
        require(split in SPLITS, f"unknown split {split!r} (known: {', '.join(SPLITS)}).")
        return self._examples((self.seed, SPLITS.index(split)), np.asarray(indices, np.int64)[:, None])

    def digest(self) -> str:
        """Returns the SHA-256 of the fields that determine the examples, and of the first examples."""
        manifest = hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode())
        for split in SPLITS:
            tokens, targets = self.generate(split, np.arange(min(16, self.num_examples(split))))
            manifest.update(tokens.astype("<i4").tobytes() + targets.astype("<i4").tobytes())
        return manifest.hexdigest()

    def loader(
        self,
        split: str,
        *,
        batch_size: int,
        seed: int = 0,
        process_index: int = 0,
        process_count: int = 1,
        epochs: int | None = None,
        align: int = 1,
    ) -> Loader:
        """See `DataConfig.loader`. The position counts global batches."""
        import grain

        check_loader_arguments(self, split, seed, epochs, align)
        share = Share.of(batch_size, process_index, process_count)
        order = grain.MapDataset.range(self.num_examples(split))
        if epochs is None:
            order = order.shuffle(seed=hashing.seed32(seed))  # grain adds the epoch to the seed: keep seeds distinct
        order = order.repeat(epochs)
        batches = order.batch(batch_size, drop_remainder=epochs is None)
        batches = batches.map(lambda indices: self._batch(split, indices, share))
        return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))

    def _batch(self, split: str, indices: Int64[np.ndarray, "N"], share: Share) -> Batch:
        mine = indices[share.start : share.start + share.rows]
        batch = padding_batch(share.rows, self.seq_len)
        batch["tokens"][: len(mine)], batch["targets"][: len(mine)] = self.generate(split, mine)
        batch["segment_ids"][: len(mine)] = 0
        return batch


def choose(scores: np.ndarray, count: int) -> Int64[np.ndarray, "N count"]:
    """Returns the indices of the `count` smallest scores of each row, in ascending order of score."""
    if count < scores.shape[1]:
        places = np.argpartition(scores, count - 1, axis=1)[:, :count]
    else:
        places = np.broadcast_to(np.arange(count), scores.shape)
    order = np.argsort(np.take_along_axis(scores, places, axis=1), axis=1)
    return np.take_along_axis(places, order, axis=1)
