"""The shared part of generated tasks: examples as a pure function of (seed, split, index), and their loader."""

import abc
import dataclasses
import hashlib
import json
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Int, Int32, Int64

from engrax.data import hashing
from engrax.data.config import (
    IGNORE,
    SPLITS,
    Batch,
    DataConfig,
    Loader,
    Share,
    check_loader_arguments,
    padding_batch,
    require,
)
from engrax.data.token_types import TokenTypes


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig(DataConfig):
    """Base of the generated tasks. A subclass has `vocab_size`, `chance`, `_examples` and `solve`.

    The two splits use separate key spaces of the random number generator. `train_examples` is the size of an epoch.
    `axes` names the fields that make the task harder, which an evaluation may vary. Where `whole_rows` is true, a row
    counts as right only if all its labelled positions are.
    """

    axes: ClassVar[tuple[str, ...]] = ("seq_len",)
    whole_rows: ClassVar[bool] = False

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

    def slices(self, batch: Batch) -> TokenTypes:
        """Returns the types of the labelled positions, for accuracies by slice; -1 elsewhere."""
        names, index = self.token_types(batch)
        return TokenTypes(names, np.where(batch["targets"] != IGNORE, index, -1))

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
        order = (self._shuffled(order, seed) if epochs is None else order).repeat(epochs)
        batches = order.batch(batch_size, drop_remainder=epochs is None)
        batches = batches.map(lambda indices: self._batch(split, indices, share))
        return iter(batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))

    def _shuffled(self, order, seed: int):
        """The grain data set of an endless loader's indices: all in a new order in every epoch."""
        return order.shuffle(seed=hashing.seed32(seed))  # grain adds the epoch to the seed: keep seeds distinct

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


def earlier(codes: Int[np.ndarray, "N T"], known: Bool[np.ndarray, "N T"] | None = None) -> Int64[np.ndarray, "N T"]:
    """Returns for every position the nearest earlier one of its row with the same code, or -1 without one.

    Only positions where `known` is true are found (default: all).
    """
    order = np.argsort(codes, axis=1, kind="stable")  # equal codes stand together, in the order of the row
    place = np.arange(codes.shape[1])
    grouped = np.take_along_axis(codes, order, axis=1)
    begins = np.ones(codes.shape, bool)
    begins[:, 1:] = grouped[:, 1:] != grouped[:, :-1]
    usable = np.broadcast_to(place, codes.shape)
    if known is not None:
        usable = np.where(np.take_along_axis(known, order, axis=1), place, -1)
    last = np.full(codes.shape, -1)
    last[:, 1:] = np.maximum.accumulate(usable, axis=1)[:, :-1]
    inside = last >= np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    found = np.empty(codes.shape, np.int64)
    np.put_along_axis(found, order, np.where(inside, np.take_along_axis(order, last, axis=1), -1), axis=1)
    return found


def followers(tokens: Int[np.ndarray, "N T"], places: Int[np.ndarray, "N T"]) -> Int32[np.ndarray, "N T"]:
    """Returns the token after each of the places, or -1 where a place is -1."""
    after = np.take_along_axis(tokens, np.minimum(places + 1, tokens.shape[1] - 1), axis=1)
    return np.where(places >= 0, after, IGNORE).astype(np.int32)


def query_slots(count: int, queries: int, power_a: float, *keys) -> Int64[np.ndarray, "N queries"]:
    """Returns a slot of [0, count) for each query of a row, drawn without replacement.

    The i-th slot, i = 1..count, has probability proportional to a i^(a - 1): a = 1 is uniform, a near 0 is early.
    """
    weights = power_a * np.arange(1, count + 1) ** (power_a - 1.0)
    arrival = -np.log(hashing.uniform(*keys, np.arange(count))) / weights  # the earliest arrivals at these rates
    return choose(arrival, queries)
