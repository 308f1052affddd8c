"""Any text data set of TensorFlow Datasets (TFDS), read as ArrayRecord files without TensorFlow."""

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Iterator, Sequence

import numpy as np

from engrax.data.config import DATASETS, SPLITS, Splits, SplitSize, require
from engrax.data.text import TextConfig
from engrax.errors import UserError
from engrax.files import short

# data set[/config][:version] or /version; a namespace (huggingface:NAME) would reach the network, arguments need code
_NAME = re.compile(r"[a-zA-Z]\w*(/[\w.+-]+)?(:(\d+|\*)\.(\d+|\*)\.(\d+|\*))?")
_CLASSES = "tensorflow_datasets."  # a prepared folder may name only classes of this package
_DIGEST_SAMPLES = 64  # records of each split in the digest


@DATASETS.register("tfds_text")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TfdsText(TextConfig):
    """A TFDS text data set by name, for example "lm1b" or "my_books/1.0.0"; a document is an example.

    Prepare it in advance with `file_format="array_record"`; nothing is downloaded. The two splits must not share an
    example; duplicate texts inside the data set are not checked. Every epoch has a new order of the whole split.
    `buffer_tokens` tokens are read, packed and shuffled together, so the start-up time does not depend on the data set.
    """

    name: str = ""  # TFDS name: data set[/config][:version]
    data_dir: str | None = None  # its folder; None = TFDS's default (~/tensorflow_datasets)
    train_split: str = "train"  # TFDS split, slices allowed: "train[:99%]"
    validation_split: str = "validation"  # TFDS split; if it is missing, "test" or "train[99%:]"
    text_key: str | None = None  # feature with the text; None = the only Text feature, or the one named "text"
    buffer_tokens: int = 1 << 20  # tokens packed and shuffled together

    def __post_init__(self):
        super().__post_init__()
        require(self.name != "", "tfds_text needs the name of a TFDS data set (--data.name lm1b).")
        require(
            _NAME.fullmatch(self.name) is not None,
            f"TFDS cannot open the data set {short(self.name)}: its name must be DATA_SET[/CONFIG][:VERSION], such as "
            "lm1b; namespaces, which reach the network, and arguments are not read.",
        )
        require(
            self.train_split != self.validation_split,
            f"train_split and validation_split are both {self.train_split!r}: the splits may not share an example.",
        )
        require(self.buffer_tokens >= 1, f"buffer_tokens must be at least 1, not {self.buffer_tokens}.")

    def digest(self) -> str:
        """Returns the SHA-256 of name, version, split sizes, 64 evenly spread records of each split and the tokenizer.

        Hashing all of a large data set would take hours.
        """
        builder = self._builder()
        manifest = hashlib.sha256(f"{builder.info.full_name}\n{self.tokenizer.manifest}\n".encode())
        for split in SPLITS:
            records = self._records(builder, split)
            manifest.update(f"{split} {len(records)}\n".encode())
            for index in sorted(set(np.linspace(0, len(records) - 1, _DIGEST_SAMPLES).astype(int).tolist())):
                text = records[index]
                manifest.update(hashlib.sha256(text.encode() if isinstance(text, str) else text).digest())
        return manifest.hexdigest()

    def splits(self) -> Splits:
        """Returns the number of documents of both splits. Their bytes would be known only after a full read."""
        builder = self._builder()
        return Splits(*(SplitSize(len(self._records(builder, split))) for split in SPLITS))

    def _texts(self, split):
        return self._records(self._builder(), split)

    def _source(self, split):
        return self._texts(split), self.tokenizer.encode_with_bytes, self.buffer_tokens

    def _builder(self):
        """Returns the TFDS builder, from its code or only from its prepared files."""
        import tensorflow_datasets as tfds

        try:
            with _own_classes_only():
                return tfds.builder(self.name, data_dir=self.data_dir)
        except tfds.core.DatasetNotFoundError:
            raise UserError(
                f"TFDS data set {self.name!r} was not found, neither prepared in {self._where()} nor among the data "
                "sets that TFDS can build."
            ) from None
        except Exception as error:  # TFDS raises many types for a bad name, config or version
            raise UserError(f"TFDS cannot open the data set {self.name!r}: {_first_line(error)}") from error

    def _records(self, builder, split: str) -> "_Texts":
        """Returns the texts of a split; raises UserError if they are not prepared or the splits overlap."""
        wanted = self.train_split if split == "train" else self.validation_split
        self._check_splits(builder)
        try:
            records = builder.as_data_source(split=wanted)
        except (NotImplementedError, AssertionError) as error:
            raise UserError(
                f"TFDS data set {self.name!r} is not prepared as ArrayRecord in {self._where()}: run "
                f"tfds.builder({self.name!r}, data_dir={self.data_dir!r}, file_format='array_record')"
                ".download_and_prepare() once."
            ) from error
        except Exception as error:
            raise UserError(f"TFDS cannot read split {wanted!r} of {self.name!r}: {_first_line(error)}") from error
        require(len(records) > 0, f"split {wanted!r} of the TFDS data set {self.name!r} is empty.")
        return _Texts(records, self._text_key(builder))

    def _check_splits(self, builder) -> None:
        """Raises UserError for an unknown split, or if the splits overlap."""
        import tensorflow_datasets as tfds

        sizes = {name: info.num_examples for name, info in builder.info.splits.items()}
        if not sizes:  # not prepared (as_data_source says so), or mocked
            return
        parts: list[tuple[str, int, int, str]] = []
        for wanted in (self.train_split, self.validation_split):
            try:
                instructions = tfds.core.ReadInstruction.from_spec(wanted).to_absolute(builder.info.splits)
            except Exception as error:
                raise UserError(
                    f"TFDS cannot read split {wanted!r} of {self.name!r} (it has {', '.join(sorted(sizes))}); set "
                    "train_split and validation_split, for example to 'train[:99%]' and 'train[99%:]'."
                ) from error
            for part in instructions:
                stop = sizes[part.splitname] if part.to is None else part.to
                parts.append((part.splitname, part.from_ or 0, stop, wanted))
        for name, start, stop, wanted in parts:
            for other, other_start, other_stop, other_wanted in parts:
                if wanted != other_wanted and name == other and max(start, other_start) < min(stop, other_stop):
                    raise UserError(f"train_split {wanted!r} and validation_split {other_wanted!r} overlap.")

    def _text_key(self, builder) -> str:
        import tensorflow_datasets as tfds

        features = builder.info.features
        texts = [key for key, feature in features.items() if isinstance(feature, tfds.features.Text)]
        if self.text_key is not None:
            require(
                self.text_key in texts,
                f"{self.text_key!r} is not a text feature of {self.name!r} (which has: {', '.join(texts) or 'none'}).",
            )
            return self.text_key
        require(bool(texts), f"TFDS data set {self.name!r} has no text feature (its features: {', '.join(features)}).")
        if len(texts) > 1 and "text" not in texts:
            raise UserError(f"{self.name!r} has several text features: set text_key to one of {', '.join(texts)}.")
        return "text" if "text" in texts else texts[0]

    def _where(self) -> str:
        return self.data_dir or "TFDS's default folder"


class _Texts:
    """A random-access source of the texts (bytes; str from a mocked data set)."""

    def __init__(self, records: Sequence[dict], key: str):
        self._records, self._key = records, key
        try:
            records.__getitems__([0])
            self._batched = True
        except TypeError:  # a data set mocked by tfds.testing.mock_data: its batched read has the wrong signature
            self._batched = False

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> bytes | str:
        return self._records[index][self._key]

    def __getitems__(self, indices: Sequence[int]) -> list[bytes | str]:
        if not self._batched:
            return [self[index] for index in indices]
        return [record[self._key] for record in self._records.__getitems__(indices)]


@contextlib.contextmanager
def _own_classes_only() -> Iterator[None]:
    """Refuses other classes: TFDS would import the module of any Python class that a prepared folder names."""
    import tensorflow_datasets as tfds

    connector = tfds.features.FeatureConnector
    find = connector.__dict__["cls_from_name"]

    def find_own(cls, name):
        if not (isinstance(name, str) and name.startswith(_CLASSES)):
            raise UserError(f"its description names the Python class {short(name)}; only {_CLASSES}* is run.")
        return find.__func__(cls, name)

    connector.cls_from_name = classmethod(find_own)
    try:
        yield
    finally:
        connector.cls_from_name = find


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
