"""Several texts in one training, each with its share of the tokens."""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterator
from typing import ClassVar

from engrax.data.config import (
    DATASETS,
    SPLITS,
    DataConfig,
    Loader,
    Share,
    Splits,
    SplitSize,
    check_loader_arguments,
    require,
)
from engrax.data.encoded import Document
from engrax.data.shards import Shards
from engrax.data.text import TextConfig
from engrax.data.tokenizers import Tokenizer


@DATASETS.register("mixture")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture(DataConfig):
    """Texts with weights: `Mixture(sources=(TextFolder(path="a"), StdlibText()), weights=(3, 1))`.

    Every row comes from one source: the one with the fewest tokens so far relative to its weight. So at any time the
    shares of the tokens match the weights within a few rows, without random numbers. Each source has its own order and
    epochs. The validation split mixes the sources' validation splits in the same way, until each has been read once.
    Rows have the mixture's `seq_len`. All sources share one tokenizer. Texts that occur in two sources are not
    detected.
    """

    even_epochs: ClassVar[bool] = False

    sources: tuple[DataConfig, ...] = ()  # data sets of text
    weights: tuple[float, ...] = ()  # share of each in the tokens, in any unit

    def __post_init__(self):
        super().__post_init__()
        require(len(self.sources) > 0, "mixture needs sources: data sets of text, and a weight for each.")
        require(
            len(self.sources) == len(self.weights),
            f"mixture has {len(self.sources)} sources and {len(self.weights)} weights; give each source one.",
        )
        for weight in self.weights:
            require(0 < weight < math.inf, f"a weight must be positive and finite, not {weight}; leave the source out.")
        for source in self.sources:
            name = source.registered_name or type(source).__name__
            require(
                isinstance(source, TextConfig),
                f"{name} is no data set of text, so it cannot be in a mixture; generated tasks go into a task_mixture.",
            )

    @property
    def tokenizer(self) -> Tokenizer:
        """The sources' tokenizer; raises UserError if they differ."""
        found = [source.tokenizer for source in self.sources]
        for i, other in enumerate(found):
            require(
                other.manifest == found[0].manifest,
                f"sources 0 and {i} of the mixture have different tokenizers; give all the same tokenizer_file.",
            )
        return found[0]

    @property
    def vocab_size(self) -> int:
        """The vocabulary size in tokens."""
        return self.tokenizer.vocab_size

    def digest(self) -> str:
        """Returns the SHA-256 of the sources' digests."""
        return hashlib.sha256("\n".join(source.digest() for source in self.sources).encode()).hexdigest()

    def splits(self) -> Splits:
        """Returns the sizes of all sources together, and a note on each."""
        found = [source.splits() for source in self.sources]
        sizes = []
        for split in SPLITS:
            parts = [getattr(splits, split) for splits in found]
            size = None if any(part.bytes is None for part in parts) else sum(part.bytes for part in parts)
            sizes.append(SplitSize(sum(part.documents for part in parts), size))
        notes = []
        for i, (source, weight, splits) in enumerate(zip(self.sources, self.weights, found)):
            head = f"source {i} ({source.registered_name}), {weight / sum(self.weights):.1%} of the tokens"
            notes += [f"{head}: {name}: {value}" for name, value in splits.rows()]
        return Splits(*sizes, notes=tuple(notes))

    def warnings(self) -> list[str]:
        """The warnings of the sources."""
        return list(dict.fromkeys(itertools.chain.from_iterable(source.warnings() for source in self.sources)))

    def token_documents(self, split: str) -> Iterator[Document]:
        """Yields the whole documents of a split, source by source."""
        return itertools.chain.from_iterable(source.token_documents(split) for source in self.sources)

    def tokenize(self) -> tuple[Shards, ...]:
        """Writes the token shards of the sources that are corpora."""
        corpora = (source for source in self.sources if hasattr(source, "tokenize"))
        return tuple(itertools.chain.from_iterable(source.tokenize() for source in corpora))

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
        target_bytes: bool = False,
    ) -> Loader:
        """See `DataConfig.loader`. The position has every source's position and its tokens so far."""
        from engrax.data.mixed_rows import MixedRows

        check_loader_arguments(self, split, seed, epochs, align)
        _ = self.tokenizer  # raises if the sources differ
        same = {"seq_len": self.seq_len, "share": Share.of(batch_size, process_index, process_count)}
        rows = [source.packed(split, seed=seed, epochs=epochs, align=align, **same) for source in self.sources]
        return MixedRows(rows, self.weights, target_bytes=target_bytes, **same)
