"""Safetensors files of a folder: their contents, read from the headers, and slices of tensors."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from engrax.errors import UserError
from engrax.files import expect, expect_texts, plain_name, read_json, short

INDEX, SINGLE, HEADERS = "model.safetensors.index.json", "model.safetensors", "tensors.json"
SUFFIX = ".safetensors"
MOST_SIZE = 1 << 40  # of one axis of a tensor
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # others are refused: float32 cannot represent them


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry in a header."""

    file: str
    dtype: str  # the format's name: F32, BF16, ...
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values, for the dtypes in DTYPES."""
        return math.prod(self.shape) * jnp.dtype(DTYPES[self.dtype]).itemsize


class TensorFiles:
    """The tensors of a folder. `infos` maps names to header entries; values are read from memory-mapped files.

    A folder with HEADERS instead of tensor files (written by `save_headers`) has infos only.
    """

    def __init__(self, folder: str | Path):
        """Raises UserError if the folder holds no tensors, or if files are missing, damaged or misplaced."""
        self.folder = Path(folder)
        self._open: dict[str, Any] = {}
        self.metadata: dict[str, dict[str, str]] = {}  # {file: {key: text}}
        self.infos: dict[str, TensorInfo] = {}
        if not self.folder.is_dir():
            raise UserError(f"there is no folder {self.folder}; give the folder of a checkpoint.")
        if (self.folder / HEADERS).is_file() and not (self.folder / SINGLE).is_file():
            self._read_saved_headers()
            return
        for file, names in self._listed().items():
            self._read_header(file, names)

    def _listed(self) -> dict[str, set[str] | None]:
        """{file: names listed in the index}, None for a file without an index."""
        if (self.folder / SINGLE).is_file():  # it comes first where a folder has both layouts, as in transformers
            return {SINGLE: None}
        index = refuse_link(self.folder / INDEX)
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise UserError(f"{index} holds no weight_map; restore the file.")
            files: dict[str, set[str]] = {}
            for name, file in weight_map.items():
                files.setdefault(_tensor_file(file, f"{index}: weight_map"), set()).add(name)
            return files
        raise UserError(
            f"{self.folder} holds neither {SINGLE} nor {INDEX}; give the folder of a checkpoint saved as safetensors."
        )

    def _read_header(self, file: str, names: set[str] | None) -> None:
        opened = self._file(file)
        self.metadata[file] = dict(opened.metadata() or {})
        held = set(opened.keys())
        for name in sorted((names or held) - held):
            raise UserError(f"tensor {name} is missing: {self.folder / INDEX} places it in {file}, which lacks it.")
        for name in held:
            tensor = opened.get_slice(name)
            self.infos[name] = TensorInfo(file, tensor.get_dtype(), tuple(tensor.get_shape()))

    def _file(self, file: str) -> Any:
        if file not in self._open:
            import safetensors

            path = inside(self.folder, file, str(self.folder / INDEX))
            if not path.is_file():
                raise UserError(f"{path} is missing; {INDEX} names it.")
            try:
                self._open[file] = safetensors.safe_open(path, framework="np")
            except (safetensors.SafetensorError, OSError, ValueError) as error:
                raise UserError(f"{path} is damaged ({error}); fetch it again.") from error
        return self._open[file]

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A slice of a tensor in the file's dtype; nothing else is copied."""
        info = self.infos[name]
        index = (*index, *(slice(None) for _ in info.shape[len(index) :]))
        bounds = [slice(*part.indices(size)[:2]) for part, size in zip(index, info.shape)]
        return self._file(info.file).get_slice(name)[tuple(bounds)]

    def index_of(self, written: set[str]) -> dict[str, Any] | None:
        """The folder's index restricted to the tensors `written`; None if there is no index, or it lists no others."""
        path = self.folder / INDEX
        index = read_json(refuse_link(path)) if path.is_file() else {"weight_map": {}}
        listed = expect_texts(index.get("weight_map"), f"{path}: weight_map")
        kept = {name: file for name, file in listed.items() if name in written}
        if len(kept) == len(listed):
            return None
        index["weight_map"] = kept
        if "total_size" in (expect(index.get("metadata") or {}, dict, f"{path}: metadata")):
            index["metadata"]["total_size"] = sum(self.infos[name].nbytes for name in kept)
        return index

    def save_headers(self, path: Path | epath.Path) -> None:
        """Writes the headers as JSON."""
        tensors = {name: dataclasses.asdict(info) for name, info in sorted(self.infos.items())}
        path.write_text(json.dumps({"metadata": self.metadata, "tensors": tensors}, indent=1) + "\n")

    def _read_saved_headers(self) -> None:
        path = refuse_link(self.folder / HEADERS)
        saved = read_json(path)
        for file, metadata in expect(saved.get("metadata"), dict, f"{path}: metadata").items():
            self.metadata[_tensor_file(file, f"{path}: metadata")] = expect_texts(metadata, f"{path}: metadata.{file}")
        for name, info in expect(saved.get("tensors"), dict, f"{path}: tensors").items():
            where = f"{path}: tensors.{short(name)}"
            shape = expect(expect(info, dict, where).get("shape"), list, f"{where}.shape")
            if not all(type(size) is int and 0 <= size < MOST_SIZE for size in shape):
                raise UserError(f"{where}.shape is {short(shape)}, not a list of sizes; restore the file.")
            dtype = expect(info.get("dtype"), str, f"{where}.dtype")
            self.infos[name] = TensorInfo(_tensor_file(info.get("file"), where), dtype, tuple(shape))


def _tensor_file(name: Any, where: str) -> str:
    """The name of a tensor file. Raises UserError unless it is a plain name and ends in .safetensors."""
    if not plain_name(name, where).endswith(SUFFIX):
        raise UserError(f"{where} names the file {short(name)}; files of tensors end in {SUFFIX}.")
    return name


def inside(folder: Path, name: str, where: str) -> Path:
    """The path of a file that another file of `folder` names (`where` says which).

    Raises UserError unless it is a plain name and no link. A link of the Hugging Face cache
    (snapshots/REVISION/NAME -> ../../blobs/DIGEST) is followed: that cache has nothing else.
    """
    path = folder / plain_name(name, where)
    return refuse_link(path)


def refuse_link(path: Path) -> Path:
    """The path. Raises UserError if it is a symbolic link, except for links of the Hugging Face cache."""
    if path.is_symlink():
        snapshot = path.parent.resolve()
        if snapshot.parent.name != "snapshots" or path.resolve().parent != snapshot.parent.parent / "blobs":
            raise UserError(f"{path} is a symbolic link, which engrax does not follow; put a copy in its place.")
    return path


def write_file(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes one safetensors file."""
    from safetensors.numpy import save_file

    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(tensors, path, metadata=metadata or None)
