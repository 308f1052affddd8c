"""Any folder of text files, or a single text file."""

import dataclasses
import functools

from etils import epath

from engrax.data.config import DATASETS, require
from engrax.data.files import stamp
from engrax.data.text import Corpus, CorpusConfig
from engrax.errors import UserError


@DATASETS.register("text_folder")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TextFolder(CorpusConfig):
    """A folder of text files in memory, one document per file; `gs://` and other paths of etils.epath work.

    Files are found at any depth; hidden files and folders are skipped. A single file (or distinct content) is cut: its
    head is the train split, its tail the validation split. For text larger than memory use `tfds_text`.
    """

    path: str = ""  # folder, or one file
    suffixes: tuple[str, ...] = (".txt", ".md", ".rst")  # file name endings; () = all files

    def __post_init__(self):
        super().__post_init__()
        require(self.path != "", "text_folder needs a path: the folder of text files (--data.path FOLDER).")

    def _corpus(self) -> Corpus:
        root = epath.Path(self.path)
        if not root.exists():
            raise UserError(f"text folder {self.path} does not exist.")
        listing = tuple((name, str(file), stamp(file)) for name, file in _list_files(root, self.suffixes))
        if sum(size for _, _, (size, _) in listing) < 2:
            endings = f" ending in {', '.join(self.suffixes)}" if self.suffixes and root.is_dir() else ""
            raise UserError(f"text folder {self.path} holds no text: no non-empty file{endings} was found.")
        return _read_files(listing)


def _list_files(root: epath.Path, suffixes: tuple[str, ...]) -> list[tuple[str, epath.Path]]:
    """Returns the sorted (relative path, path) of the files to read; a single file may have any ending."""
    if not root.is_dir():
        return [(root.name, root)]
    found, folders = [], [("", root)]
    while folders:
        prefix, folder = folders.pop()
        for entry in folder.iterdir():
            name = prefix + entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append((f"{name}/", entry))
            elif not suffixes or entry.name.endswith(tuple(suffixes)):
                found.append((name, entry))
    return sorted(found, key=lambda file: file[0])


@functools.lru_cache(maxsize=2)
def _read_files(listing: tuple[tuple[str, str, tuple[int, int]], ...]) -> Corpus:
    """Reads files. Size and time of change are part of the cache key, so a changed file is read again."""
    return Corpus([(name, epath.Path(path).read_bytes()) for name, path, _ in listing])
