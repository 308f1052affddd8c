"""Text available on every machine: source and documentation of the running Python's standard library."""

import dataclasses
import functools
import hashlib
import os
import sysconfig

from engrax.data.config import DATASETS, require
from engrax.data.text import Corpus, CorpusConfig
from engrax.errors import UserError

_SUFFIXES = (".py", ".txt", ".rst")
# Installed packages are not the standard library. Tests contain broken encodings on purpose, and not every
# distribution ships them.
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@DATASETS.register("stdlib_text")
@dataclasses.dataclass(frozen=True, kw_only=True)
class StdlibText(CorpusConfig):
    """Source and documentation text (.py, .txt, .rst) of the running Python's standard library, as bytes.

    A document is a file. No network is needed. The text, and so `digest()`, differs between Python versions.
    """

    max_bytes: int = 8_000_000  # maximal bytes of text; files are sampled by a hash of their paths
    sample_seed: int = 0  # seed of the sample

    def __post_init__(self):
        super().__post_init__()
        require(self.max_bytes >= 10_000, f"max_bytes must be at least 10000, not {self.max_bytes}.")

    def _corpus(self) -> Corpus:
        return _read_stdlib(sysconfig.get_path("stdlib"), self.max_bytes, self.sample_seed)


@functools.lru_cache(maxsize=2)
def _read_stdlib(root: str, max_bytes: int, sample_seed: int) -> Corpus:
    sizes: dict[str, int] = {}
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _LEFT_OUT]
        for name in names:
            # _sysconfigdata holds paths of the machine that built this Python.
            if name.endswith(_SUFFIXES) and not name.startswith("_sysconfigdata"):
                path = os.path.join(folder, name)
                sizes[os.path.relpath(path, root).replace(os.sep, "/")] = os.path.getsize(path)
    chosen, total = [], 0
    for path in sorted(sizes, key=lambda path: hashlib.sha256(f"{sample_seed}/{path}".encode()).digest()):
        if total + sizes[path] <= max_bytes:
            chosen.append(path)
            total += sizes[path]
    if not total:
        raise UserError(
            f"this Python keeps no source text of its standard library in {root}; use the data set text_folder instead."
        )
    files = []
    for path in sorted(chosen):
        with open(os.path.join(root, path), "rb") as file:
            files.append((path, file.read()))
    return Corpus(files)
