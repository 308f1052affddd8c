"""Loading a checkpoint's tensors into parameters piece by piece, and writing parameters as the same tensors."""

import contextlib
import dataclasses
import hashlib
import json
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from engrax.errors import UserError
from engrax.layers import AttentionConfig
from engrax.layers.common import lora
from engrax.layers.common.lora import LoraConfig
from engrax.models import handover
from engrax.models.imported.architectures import Architecture, Fields, architecture, read_config
from engrax.models.imported.files import DTYPES, HEADERS, INDEX, TensorFiles, refuse_link, write_file
from engrax.models.language_model import LanguageModel, LanguageModelConfig
from engrax.models.model import ModelConfig

ParamPath = tuple[Any, ...]  # of a parameter in a model: ("blocks", 0, "mixer", "q", "kernel")
SUMS = "SHA256SUMS"  # in an exported folder
ROWS = 4096  # rows of an embedding that are compared at a time
FREE_FIELDS = ("remat",)  # beside those of `handover.plain`: model fields that change no tensors
FREE_MIXER_FIELDS = ("capacity", "window")  # mixer fields that do not change tensors


@dataclasses.dataclass(frozen=True)
class Piece:
    """Maps one tensor to parameters."""

    tensor: str
    layer: int | None  # index into the parameters' leading axis
    params: tuple[str, ...]  # concatenated along their last axis
    outputs_first: bool  # the tensor is [out, in], the parameter [in, out]


class Plan:
    """Maps the tensors of a folder to parts of a model's parameters. `shapes` maps parameter names to shapes.

    Raises UserError naming tensors that are missing, unknown, of the wrong shape, or not floats of at most 32 bits.
    """

    def __init__(self, files: TensorFiles, arch: Architecture, shapes: dict[str, tuple[int, ...]]):
        self.files, self.shapes = files, shapes
        layers = max((shape[0] for name, shape in shapes.items() if name.startswith("blocks.")), default=0)
        if layers > len(files.infos):  # each layer has its own tensors; a huge number would fill the memory
            raise UserError(f"{files.folder}: config.json asks for {layers} layers of {len(files.infos)} tensors.")
        prefix = next((p for p in arch.prefixes if any(name.startswith(p) for name in files.infos)), "")
        self.pieces = {piece.tensor: piece for piece in _pieces(arch, prefix, shapes)}
        self.tied = [f"{p}lm_head.weight" for p in ("", prefix) if "output_embedding" not in shapes]
        self._check(arch)

    def _check(self, arch: Architecture) -> None:
        infos, folder = self.files.infos, self.files.folder
        missing = [name for name in self.pieces if name not in infos]
        if missing:
            raise UserError(f"{folder} lacks the tensor{_several(missing)} that its config.json asks for.")
        known = {*self.pieces, *self.tied}
        unknown = [name for name in infos if name not in known and not name.endswith(arch.buffers or ("\0",))]
        if unknown:
            raise UserError(f"{folder} holds the tensor{_several(unknown)} unknown to the model of its config.json.")
        for name in (*self.pieces, *(tied for tied in self.tied if tied in infos)):
            shape = self.wanted_shape(self.pieces[name]) if name in self.pieces else self.shapes["embedding"]
            if infos[name].shape != shape:
                raise UserError(
                    f"{folder}: tensor {name} has shape {list(infos[name].shape)}, config.json asks for {list(shape)}."
                )
            if infos[name].dtype not in DTYPES:
                raise UserError(
                    f"{folder}: tensor {name} is of dtype {infos[name].dtype}, which is not supported "
                    f"(known: {', '.join(DTYPES)})."
                )

    def core(self, param: str, layer: int | None) -> tuple[int, ...]:
        """The shape of one layer's part of a parameter."""
        return self.shapes[param] if layer is None else self.shapes[param][1:]

    def wanted_shape(self, piece: Piece) -> tuple[int, ...]:
        """The shape of a tensor."""
        cores = [self.core(param, piece.layer) for param in piece.params]
        shape = (*cores[0][:-1], sum(core[-1] for core in cores))
        return shape[::-1] if piece.outputs_first else shape

    def check_tied(self) -> None:
        """Raises UserError if the head stored with a tied embedding is a different matrix."""
        table = next(p.tensor for p in self.pieces.values() if p.params == ("embedding",))
        for name in self.tied:
            rows = range(0, self.shapes["embedding"][0] if name in self.files.infos else 0, ROWS)
            parts = [(slice(start, start + ROWS),) for start in rows]
            if not all(np.array_equal(self.files.read(name, part), self.files.read(table, part)) for part in parts):
                raise UserError(
                    f"{self.files.folder}: config.json ties the head to the embedding, but {name} is not {table}."
                )

    def read(self, param: str, index: tuple[slice, ...], dtype: Any) -> np.ndarray:
        """A slice of a parameter, read from its tensors."""
        pieces = [piece for piece in self.pieces.values() if param in piece.params]
        if pieces[0].layer is None:
            return self._read_core(pieces[0], param, index).astype(dtype, copy=False)
        layers = range(*index[0].indices(len(pieces)))
        return np.stack([self._read_core(pieces[i], param, index[1:]).astype(dtype, copy=False) for i in layers])

    def _read_core(self, piece: Piece, param: str, index: tuple[slice, ...]) -> np.ndarray:
        widths = [self.core(name, piece.layer)[-1] for name in piece.params]
        at = piece.params.index(param)
        start, stop, _ = index[-1].indices(widths[at])
        index = (*index[:-1], slice(start + sum(widths[:at]), stop + sum(widths[:at])))
        value = self.files.read(piece.tensor, index[::-1] if piece.outputs_first else index)
        return value.T if piece.outputs_first else value


def _pieces(arch: Architecture, prefix: str, shapes: dict[str, tuple[int, ...]]) -> Iterator[Piece]:
    """The tensors that the parameters need."""
    for name, params in arch.tensors.items():
        if not all(param in shapes for param in params):
            continue  # for example a bias that this model does not have
        flipped = arch.outputs_first and params[0].endswith(".kernel")
        name = name if name.startswith("lm_head") else prefix + name
        layers = range(shapes[params[0]][0]) if "{}" in name else (None,)
        for layer in layers:
            yield Piece(name.format(layer), layer, params, flipped)


def _several(names: list[str]) -> str:
    """` a`, or `s a, b and 7 more`."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{'s' if len(names) > 1 else ''} {', '.join(names[:3])}{more}"


def read_params(folder: str | Path, like: nnx.State, *, at: ParamPath = ()) -> dict[ParamPath, jax.Array]:
    """Returns {path: array} for the parameters stored in a folder.

    `like` is a model's state of ShapeDtypeStructs, with dtypes and optional shardings; `at` is the path of the imported
    model in it. Each device's part is read separately from the memory-mapped files: no device or host holds more.
    Parameters that are not in the checkpoint (adapters, parts around a backbone) are omitted.
    """
    flat = {path: leaf for path, leaf in nnx.to_flat_state(like) if path[: len(at)] == at}
    named = {_name(path[len(at) :]): (path, leaf.get_value()) for path, leaf in flat.items()}
    plan = Plan(TensorFiles(folder), architecture(Fields(Path(folder))), {n: v.shape for n, (_, v) in named.items()})
    plan.check_tied()
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    found = {}
    for name in dict.fromkeys(param for piece in plan.pieces.values() for param in piece.params):
        path, value = named[name]

        def part(index, name=name, dtype=value.dtype):
            return plan.read(name, index, dtype)

        found[path] = jax.make_array_from_callback(value.shape, getattr(value, "sharding", None) or here, part)
    return found


def _name(path: ParamPath) -> str:
    return ".".join(str(entry) for entry in path)


def load(
    folder: str | Path, config: LanguageModelConfig | None = None, *, dtype: Any = jnp.float32, seed: int = 0
) -> LanguageModel:
    """The language model of a folder, with parameters in `dtype` on the first device.

    `config` is `read_config(folder)`, optionally with other values of settings that do not change tensors (window,
    capacity, remat, lora, frozen); `seed` initialises adapters. Raises UserError if folder and config do not fit.
    """
    config = read_config(folder) if config is None else config
    check(folder, config)
    model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(seed)))
    state = nnx.state(model, nnx.Param)
    like = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), state)
    source = handover.plain(config, read_config(folder).vocab_size)
    if config.layers or source.vocab_size != config.vocab_size:
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        wanted = {p: jax.ShapeDtypeStruct(v.shape, dtype, sharding=here) for p, v in nnx.to_flat_state(state)}
        held = nnx.state(nnx.eval_shape(lambda: source.build(rngs=nnx.Rngs(seed))), nnx.Param)
        held = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, dtype), held)
        found = handover.hand_over(source, config, read_params(folder, held), wanted)
    else:
        found = read_params(folder, like)
    if len(found) < len(nnx.to_flat_state(state)):

        def adapters():  # parameters that are not returned are never computed
            fresh = nnx.to_flat_state(nnx.state(config.build(rngs=nnx.Rngs(seed)), nnx.Param))
            return [leaf.get_value().astype(dtype) for path, leaf in fresh if path not in found]

        paths = [path for path, _ in nnx.to_flat_state(state) if path not in found]
        found |= zip(paths, jax.jit(adapters)())
    nnx.update(model, nnx.from_flat_state((path, leaf.replace(found[path])) for path, leaf in nnx.to_flat_state(state)))
    return model


def check(folder: str | Path, config: LanguageModelConfig) -> None:
    """Raises UserError if the folder's tensors do not fit its config.json, or if `config` computes another function;
    names the first setting that differs."""
    wanted = read_config(folder)
    config = handover.plain(config, min(config.vocab_size, wanted.vocab_size))
    config = dataclasses.replace(config, **{name: getattr(wanted, name) for name in FREE_FIELDS})
    if len(config.mixers) == 1 and isinstance(config.mixers[0], AttentionConfig):
        free = {name: getattr(wanted.mixers[0], name) for name in FREE_MIXER_FIELDS}
        config = dataclasses.replace(config, mixers=(dataclasses.replace(config.mixers[0], **free),))
    if (type(config), config) != (type(wanted), wanted):
        raise UserError(f"{folder} holds another model: its {_difference(config, wanted)}; start from read_config.")
    state = nnx.state(nnx.eval_shape(lambda: wanted.build(rngs=nnx.Rngs(0))), nnx.Param)
    shapes = {_name(path): leaf.shape for path, leaf in nnx.to_flat_state(state)}
    Plan(TensorFiles(folder), architecture(Fields(Path(folder))), shapes)


def _difference(config: Any, wanted: Any, path: str = "config") -> str:
    if type(config) is not type(wanted) or not dataclasses.is_dataclass(wanted):
        return f"{path} is {wanted!r}, not {config!r}"
    for field in dataclasses.fields(wanted):
        a, b = getattr(config, field.name), getattr(wanted, field.name)
        if a != b:
            if isinstance(b, tuple) and isinstance(a, tuple) and len(a) == len(b) == 1:
                return _difference(a[0], b[0], f"{field.name}.0")
            return _difference(a, b, field.name)
    return path


def find_backbone(config: ModelConfig) -> tuple[LanguageModelConfig, ParamPath]:
    """The language model inside a model that wraps it as `backbone`, and its path; () if it is not wrapped."""
    path: ParamPath = ()
    while not isinstance(config, LanguageModelConfig):
        if not isinstance(inner := getattr(config, "backbone", None), ModelConfig):
            raise UserError(f"{type(config).__name__} is not a language model and wraps none: nothing can be imported.")
        config, path = inner, (*path, "backbone")
    return config, path


def merge(model: LanguageModel) -> LanguageModel:
    """The model without adapters: each is added to its kernel."""
    config = dataclasses.replace(model.config, lora=LoraConfig())
    merged = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    values = lora.merged_params(model)
    state = nnx.to_flat_state(nnx.state(merged, nnx.Param))
    nnx.update(merged, nnx.from_flat_state((path, leaf.replace(values[path])) for path, leaf in state))
    return merged


def export(model: LanguageModel, folder: str | Path, *, like: str | Path) -> None:
    """Writes the parameters in the format of the folder `like`: the same files, names, dtypes and shapes, config.json
    and tokenizer included, and SHA256SUMS. Adapters are merged first. `like` may be a folder written by
    `describe_source`.

    Buffers are omitted, also from the index. Raises UserError if `folder` is not empty or `like` is another model.
    """
    folder, like = Path(folder), Path(like)
    check_export(folder)
    if model.config.layers:
        raise UserError(
            f"the model's layers differ from those of {like} (model.layers), which its format cannot express; the run "
            "folder holds the model."
        )
    check(like, model.config)
    model = merge(model) if model.config.lora.rank else model
    params = {_name(path): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    plan = Plan(TensorFiles(like), architecture(Fields(like)), {name: value.shape for name, value in params.items()})
    files: dict[str, list[str]] = {}
    for name, info in plan.files.infos.items():
        if name in plan.pieces or name in plan.tied:
            files.setdefault(info.file, []).append(name)
    index = plan.files.index_of({name for names in files.values() for name in names})
    with new_folder(folder) as written:
        for file, names in files.items():
            tensors = {name: _tensor(plan, name, params) for name in names}
            write_file(written / file, tensors, plan.files.metadata.get(file, {}))
        _copy_descriptions(like, written)
        if index:
            (written / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        _write_sums(written)


def _write_sums(folder: Path) -> None:
    """SHA-256 of the files in a folder, as `sha256sum -c` reads it."""
    lines = []
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
    (folder / SUMS).write_text("".join(lines))


def check_export(folder: str | Path) -> None:
    """Raises UserError if a checkpoint cannot be written to `folder`: it is a file, or not empty."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose a folder to export to.")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; choose another folder to export to.")


def _tensor(plan: Plan, name: str, params: dict[str, jax.Array]) -> np.ndarray:
    """One tensor in the checkpoint's format."""
    dtype = jnp.dtype(DTYPES[plan.files.infos[name].dtype])
    if name in plan.tied:
        return np.asarray(params["embedding"]).astype(dtype)
    piece = plan.pieces[name]
    values = [params[param] for param in piece.params]
    if piece.layer is not None:
        layer = np.int32(piece.layer)  # an argument, not a constant: compiled once for all layers
        values = [jax.lax.dynamic_index_in_dim(value, layer, keepdims=False) for value in values]
    value = np.concatenate([np.asarray(value).astype(dtype) for value in values], axis=-1)
    return value.T if piece.outputs_first else value


def describe_source(folder: str | Path, target: epath.PathLike) -> None:
    """Copies the files that `export` needs from a checkpoint's folder, without values: config, tokenizer, headers.

    `target` is created complete or not at all. Raises UserError if it exists and is not empty.
    """
    target = epath.Path(target)
    if target.exists() and any(target.iterdir()):
        raise UserError(f"{target} is not empty; choose another folder for the description of {folder}.")
    with new_folder(target) as written:
        TensorFiles(folder).save_headers(written / HEADERS)
        _copy_descriptions(Path(folder), written)


@contextlib.contextmanager
def new_folder(target: Path | epath.Path) -> Iterator[Path | epath.Path]:
    """Yields a folder to write to, which takes the place of `target` (absent or empty) if no error is raised."""
    temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.replace(target)
    except BaseException:
        shutil.rmtree(temporary) if isinstance(temporary, Path) else temporary.rmtree()
        raise


def _copy_descriptions(source: Path, target: Path | epath.Path) -> None:
    """Copies JSON, text and vocabulary files."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in (".json", ".txt", ".model", ".jinja") and file.name != HEADERS:
            refuse_link(file)
            (target / file.name).write_bytes(file.read_bytes())
