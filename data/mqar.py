"""Multi-query associative recall (MQAR): a context of key-value pairs, then every key asked once.

Arora et al., "Zoology: Measuring and Improving Recall in Efficient Language Models", arXiv 2312.04927, and its
published generator. One row of T tokens, N pairs, vocabulary V, h = V // 2:

    k_1 v_1 k_2 v_2 ... k_N v_N  (the context, `num_passes` times)  then the queries among filler tokens

Keys are N distinct tokens of [1, h), values N distinct tokens of [h, V). After the context of C = 2 N num_passes tokens
lie S = (T - C) // 2 slots of two tokens; key j stands at slot g_j (position C + 2 g_j), the slots drawn without
replacement with probability proportional to a i^(a - 1) for the i-th slot, i = 1..S (a = 1 is uniform, a = 0.01 puts
the queries early). The target AT THE KEY'S OWN POSITION is its value; everywhere else it is -1. The value itself is not
shown there: the other tokens are uniform in [0, V), or 0.
"""

import dataclasses
import hashlib
import json

import numpy as np
from jaxtyping import Int32, Int64

from engrax.data import hashing
from engrax.data.config import (
    DATASETS,
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

_KEYS, _VALUES, _SLOTS, _FILLER = range(4)  # the independent random streams of one example


@DATASETS.register("mqar")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MQAR(DataConfig):
    """Multi-query associative recall, generated: example i of a split is a pure function of (seed, split, i).

    The two splits draw from separate key spaces of the random number generator. `train_examples` is the size of an
    epoch; examples past it do not exist.
    """

    seq_len: int = 64  # tokens per row
    num_pairs: int = 4  # key-value pairs per row
    vocab_size: int = 128  # tokens; the lower half are keys, the upper half values
    power_a: float = 0.01  # exponent of the query slots' distribution; 1 is uniform, near 0 is early
    random_non_queries: bool = True  # fill the places between queries with uniform tokens instead of 0
    num_passes: int = 1  # times the context is shown
    train_examples: int = 100_000  # rows of the train split
    validation_examples: int = 1_000  # rows of the validation split
    seed: int = 0  # of the examples themselves (the loader's seed only orders them)

    def __post_init__(self):
        super().__post_init__()
        half = self.vocab_size // 2
        require(self.num_pairs >= 1, f"num_pairs must be at least 1, not {self.num_pairs}.")
        require(self.num_passes >= 1, f"num_passes must be at least 1, not {self.num_passes}.")
        require(self.seq_len % 2 == 0, f"seq_len of MQAR must be even, not {self.seq_len}.")
        require(
            self.num_pairs <= half - 1,
            f"vocab_size {self.vocab_size} has {max(half - 1, 0)} keys, too few for num_pairs {self.num_pairs}; "
            f"choose a vocab_size of at least {2 * self.num_pairs + 2}.",
        )
        needed = 2 * self.num_pairs * (self.num_passes + 1)
        require(
            needed <= self.seq_len,
            f"seq_len {self.seq_len} is too short for {self.num_pairs} pairs shown {self.num_passes} time(s) and asked "
            f"once; it needs at least {needed} tokens.",
        )
        require(self.power_a > 0, f"power_a must be positive, not {self.power_a}.")
        for name in ("train_examples", "validation_examples"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}.")
        require(self.seed >= 0, f"seed must not be negative, not {self.seed}.")

    @property
    def chance(self) -> float:
        """Expected accuracy of guessing uniformly among the value tokens: 1 / (vocab_size - vocab_size // 2)."""
        return 1.0 / (self.vocab_size - self.vocab_size // 2)

    @property
    def chance_in_context(self) -> float:
        """Expected accuracy of guessing uniformly among the values shown in the row: 1 / num_pairs.

        A model between `chance` and this has learnt which tokens are answers, but binds no key to its value.
        """
        return 1.0 / self.num_pairs

    def num_examples(self, split: str) -> int:
        """Returns the rows of a split."""
        require(split in SPLITS, f"unknown split {split!r} (known: {', '.join(SPLITS)}).")
        return self.train_examples if split == "train" else self.validation_examples

    def generate(
        self, split: str, indices: Int64[np.ndarray, "N"]
    ) -> tuple[Int32[np.ndarray, "N T"], Int32[np.ndarray, "N T"]]:
        """Returns tokens and targets of the examples `indices` of a split; any order, any subset, no state."""
        require(split in SPLITS, f"unknown split {split!r} (known: {', '.join(SPLITS)}).")
        row = np.asarray(indices, np.int64)[:, None]
        key = (self.seed, SPLITS.index(split))
        half, context = self.vocab_size // 2, 2 * self.num_pairs * self.num_passes
        keys = 1 + _choose(hashing.bits(*key, row, _KEYS, np.arange(half - 1)), self.num_pairs)
        values = half + _choose(hashing.bits(*key, row, _VALUES, np.arange(self.vocab_size - half)), self.num_pairs)
        slots = self._slots(key, row)
        shape = (len(row), self.seq_len)
        if self.random_non_queries:
            filler = hashing.bits(*key, row, _FILLER, np.arange(self.seq_len))
            tokens = (filler % np.uint64(self.vocab_size)).astype(np.int32)
        else:
            tokens = np.zeros(shape, np.int32)
        pairs = np.stack([keys, values], axis=-1).reshape(len(row), 2 * self.num_pairs)
        tokens[:, :context] = np.tile(pairs, self.num_passes)
        targets = np.full(shape, IGNORE, np.int32)
        np.put_along_axis(tokens, context + 2 * slots, keys.astype(np.int32), axis=1)
        np.put_along_axis(targets, context + 2 * slots, values.astype(np.int32), axis=1)
        return tokens, targets

    def _slots(self, key: tuple[int, int], row: Int64[np.ndarray, "N 1"]) -> Int64[np.ndarray, "N pairs"]:
        """Draws each key's slot without replacement: exponential arrival times with rates p, the earliest first."""
        count = (self.seq_len - 2 * self.num_pairs * self.num_passes) // 2
        weights = self.power_a * np.arange(1, count + 1) ** (self.power_a - 1.0)
        arrival = -np.log(hashing.uniform(*key, row, _SLOTS, np.arange(count))) / weights
        return _choose(arrival, self.num_pairs)

    def solve(self, tokens: Int32[np.ndarray, "B T"]) -> Int32[np.ndarray, "B T"]:
        """The oracle: for every position the value that the context binds to the token there, or -1 where none is.

        It reads the tokens alone and scores 100 % on the labelled positions.
        """
        rows = np.arange(len(tokens))[:, None]
        table = np.full((len(tokens), self.vocab_size), IGNORE, np.int32)
        table[rows, tokens[:, 0 : 2 * self.num_pairs : 2]] = tokens[:, 1 : 2 * self.num_pairs : 2]
        return table[rows, tokens]

    def digest(self) -> str:
        """Returns the SHA-256 of the fields that determine the examples and of the first examples themselves."""
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
            order = order.shuffle(seed=hashing.seed32(seed))  # grain adds the epoch to the seed: keep seeds far apart
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


def _choose(scores: np.ndarray, count: int) -> Int64[np.ndarray, "N count"]:
    """Returns the places of the `count` smallest scores of each row, in rising order of score."""
    if count < scores.shape[1]:
        places = np.argpartition(scores, count - 1, axis=1)[:, :count]
    else:
        places = np.broadcast_to(np.arange(count), scores.shape)
    order = np.argsort(np.take_along_axis(scores, places, axis=1), axis=1)
    return np.take_along_axis(places, order, axis=1)
