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

INDEX, SINGLE, HEADERS = "model.safetensors.index.json", "model.safetensors", "tensors.json"
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
        if (self.folder / HEADERS).is_file() and not (self.folder / SINGLE).is_file():
            self._read_saved_headers()
            return
        for file, names in self._listed().items():
            self._read_header(file, names)

    def _listed(self) -> dict[str, set[str] | None]:
        """{file: names listed in the index}, None for a file without an index."""
        index = self.folder / INDEX
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise UserError(f"{index} holds no weight_map; restore the file.")
            files: dict[str, set[str]] = {}
            for name, file in weight_map.items():
                files.setdefault(file, set()).add(name)
            return files
        if (self.folder / SINGLE).is_file():
            return {SINGLE: None}
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

            path = self.folder / file
            if not path.is_file():
                raise UserError(f"{path} is missing; {INDEX} names it.")
            try:
                self._open[file] = safetensors.safe_open(path, framework="np")
            except (safetensors.SafetensorError, OSError) as error:
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
        index = read_json(path) if path.is_file() else {"weight_map": {}}
        kept = {name: file for name, file in index["weight_map"].items() if name in written}
        if len(kept) == len(index["weight_map"]):
            return None
        index["weight_map"] = kept
        if "total_size" in (index.get("metadata") or {}):
            index["metadata"]["total_size"] = sum(self.infos[name].nbytes for name in kept)
        return index

    def save_headers(self, path: Path | epath.Path) -> None:
        """Writes the headers as JSON."""
        tensors = {name: dataclasses.asdict(info) for name, info in sorted(self.infos.items())}
        path.write_text(json.dumps({"metadata": self.metadata, "tensors": tensors}, indent=1) + "\n")

    def _read_saved_headers(self) -> None:
        saved = read_json(self.folder / HEADERS)
        self.metadata = saved["metadata"]
        for name, info in saved["tensors"].items():
            self.infos[name] = TensorInfo(info["file"], info["dtype"], tuple(info["shape"]))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises UserError if the file is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; give the folder of a checkpoint.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged (not JSON: {error}); restore the file.") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object; restore the file.")
    return found


def write_file(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes one safetensors file."""
    from safetensors.numpy import save_file

    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(tensors, path, metadata=metadata or None)
