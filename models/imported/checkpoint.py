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
from engrax.files import read_json
from engrax.layers import AttentionConfig
from engrax.layers.common import lora
from engrax.layers.common.lora import LoraConfig
from engrax.models import handover, published
from engrax.models.imported.files import DTYPES, HEADERS, INDEX, TensorFiles, refuse_link, write_file
from engrax.models.imported.plan import Plan
from engrax.models.language_model import LanguageModel, LanguageModelConfig
from engrax.models.model import ModelConfig
from engrax.models.published import Fields, Piece
from engrax.models.published.fit import differences

ParamPath = tuple[Any, ...]  # of a parameter in a model: ("blocks", 0, "mixer", "q", "kernel")
SUMS = "SHA256SUMS"  # in an exported folder
FREE_MIXER_FIELDS = ("capacity", "window")  # fields of attention that do not change tensors


def read_fields(folder: str | Path) -> Fields:
    """The fields of a folder's config.json."""
    path = refuse_link(Path(folder) / "config.json")
    return Fields(read_json(path, "give the folder of a checkpoint"), path)


def read_config(folder: str | Path) -> LanguageModelConfig:
    """The language model described by the config.json of a folder.

    Raises UserError naming a field that is missing or has an unsupported value.
    """
    return published.read(read_fields(folder))


def _plan(folder: str | Path, shapes: dict[str, tuple[int, ...]]) -> Plan:
    """The plan of a folder for a model with parameters of these shapes."""
    return Plan(TensorFiles(folder), published.find_format(read_fields(folder)), read_config(folder), shapes)


def read_params(folder: str | Path, like: nnx.State, *, at: ParamPath = ()) -> dict[ParamPath, jax.Array]:
    """Returns {path: array} for the parameters stored in a folder.

    `like` is a model's state of ShapeDtypeStructs, with dtypes and optional shardings; `at` is the path of the imported
    model in it. Each device's part is read separately from the memory-mapped files: no device or host holds more.
    Parameters that are not in the checkpoint (adapters, parts around a backbone) are omitted.
    """
    flat = {path: leaf for path, leaf in nnx.to_flat_state(like) if path[: len(at)] == at}
    named = {_name(path[len(at) :]): (path, leaf.get_value()) for path, leaf in flat.items()}
    plan = _plan(folder, {name: value.shape for name, (_, value) in named.items()})
    plan.check_values()
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    found = {}
    for name in plan.params:
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
    if difference := next(differences(_freed(config), _freed(wanted)), None):
        path, given, other, _ = difference
        raise UserError(
            f"{folder} holds another model: its {path} is {other!r}, not {given!r}; start from read_config."
        )
    state = nnx.state(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))), nnx.Param)
    _plan(folder, {_name(path): leaf.shape for path, leaf in nnx.to_flat_state(state)})


def _freed(config: LanguageModelConfig) -> LanguageModelConfig:
    """The config with the same value everywhere of settings that a model may change."""
    free = {field.name: field.default for field in dataclasses.fields(AttentionConfig)}
    free = {name: free[name] for name in FREE_MIXER_FIELDS}
    mixers = (dataclasses.replace(m, **free) if isinstance(m, AttentionConfig) else m for m in config.mixers)
    return dataclasses.replace(config, mixers=tuple(mixers))


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
    plan = _plan(like, {name: value.shape for name, value in params.items()})
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
        write_sums(written)


def write_sums(folder: Path) -> None:
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
    return tensor_of(plan.pieces[name], params).astype(dtype)


def tensor_of(piece: Piece, params: dict[str, jax.Array]) -> np.ndarray:
    """A tensor, in the parameters' dtype."""
    parts = []
    for part in piece.tensor.parts:
        if part.param is None:
            parts.append(np.zeros(piece.core(part), np.float32))
            continue
        value = params[part.param]
        for at in piece.lead(part):
            value = jax.lax.dynamic_index_in_dim(value, np.int32(at), keepdims=False)  # compiled once for all layers
        value = np.asarray(value)
        parts.append(value if part.columns is None else value[..., slice(*part.columns)])
    return piece.tensor.pack(parts)


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
