"""Safetensors files of a folder: what they hold, known from their headers, and slices of it."""

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
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # every other is refused: float32 would not hold it


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor."""

    file: str
    dtype: str  # as the format spells it: F32, BF16, ...
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values; of the dtypes in DTYPES."""
        return math.prod(self.shape) * jnp.dtype(DTYPES[self.dtype]).itemsize


class TensorFiles:
    """The tensors of a folder. `infos` maps their names to what the headers say; values are read from mapped files.

    A folder with HEADERS instead of tensor files (what `save_headers` wrote) has infos only.
    """

    def __init__(self, folder: str | Path):
        """Raises UserError where the folder holds no tensors, or files are missing, damaged or misplaced."""
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
        """{file: names that the index says it holds}, None for a file without an index."""
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
        """A rectangle of a tensor, in the dtype of the file; nothing else of it is copied."""
        info = self.infos[name]
        index = (*index, *(slice(None) for _ in info.shape[len(index) :]))
        bounds = [slice(*part.indices(size)[:2]) for part, size in zip(index, info.shape)]
        return self._file(info.file).get_slice(name)[tuple(bounds)]

    def index_of(self, written: set[str]) -> dict[str, Any] | None:
        """The folder's index for the tensors `written` alone; None where there is no index or it names no others."""
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
        """Writes what the headers say as JSON."""
        tensors = {name: dataclasses.asdict(info) for name, info in sorted(self.infos.items())}
        path.write_text(json.dumps({"metadata": self.metadata, "tensors": tensors}, indent=1) + "\n")

    def _read_saved_headers(self) -> None:
        saved = read_json(self.folder / HEADERS)
        self.metadata = saved["metadata"]
        for name, info in saved["tensors"].items():
            self.infos[name] = TensorInfo(info["file"], info["dtype"], tuple(info["shape"]))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises UserError where it is missing or damaged."""
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
