"""Writing a model as a published format: weights, config.json and the other files of a folder that others load."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from engrax.errors import UserError
from engrax.layers.common.gates import LARGEST_LOG_RATE
from engrax.models.imported.checkpoint import check_export, merge, new_folder, tensor_of, write_sums
from engrax.models.imported.files import INDEX, SINGLE, write_file
from engrax.models.language_model import LanguageModel, LanguageModelConfig
from engrax.models.model import ModelConfig
from engrax.models.published import FORMATS, Format, fit
from engrax.registry import did_you_mean

OWN = "safetensors"  # the format of any model: engrax's own names and settings
OWN_TYPE = "engrax"  # its model_type
SHARD = 4 << 30  # most bytes of a file; no more than one file's tensors are in memory beside the model
DTYPES = ("float32", "bfloat16", "float16")


class Extras(NamedTuple):
    """What a folder holds beside the weights."""

    files: dict[str, str]  # name -> text
    ids: dict[str, int | None]  # bos_token_id, eos_token_id and pad_token_id; None = there is none


NO_EXTRAS = Extras({}, dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")))


def find(name: str) -> Format | None:
    """The format of `engrax export --to`, None for engrax's own. Raises UserError for an unknown name."""
    if name == OWN:
        return None
    if name not in FORMATS:
        known = [*FORMATS, OWN]
        raise UserError(f"unknown format {name!r}{did_you_mean(name, known)} (known: {', '.join(known)}).")
    return FORMATS[name]


def check_fit(config: LanguageModelConfig, form: Format) -> list[str]:
    """What the format writes in another way. Raises UserError naming what it cannot express."""
    found = fit(config, form)
    if found.misfits:
        raise UserError(f"{form.name} cannot express this model: {'; '.join(found.misfits)}.")
    return found.notes + ([form.caveat] if form.caveat else [])


def publish(
    model: LanguageModel, folder: str | Path, form: Format, extras: Extras = NO_EXTRAS, dtype: str = "float32"
) -> None:
    """Writes a language model in a published format: weights, config.json, generation_config.json, what `extras` names
    and SHA256SUMS. Adapters are merged first. `folder` is complete or absent.

    Raises UserError if it is not empty or if the format cannot express the model.
    """
    check_export(folder)
    check_fit(model.config, form)
    model = merge(model) if model.config.lora.rank else model
    fields = {"use_cache": True} | fit(model.config, form).fields | extras.ids | {"dtype": dtype}
    params = _params(model)
    pieces = form.pieces(model.config, {name: value.shape for name, value in params.items()})
    sizes = {name: int(np.prod(piece.shape)) for name, piece in pieces.items()}
    generation = {"generation_config.json": _json(extras.ids | {"use_cache": fields["use_cache"]})}
    _write(folder, sizes, lambda name: tensor_of(pieces[name], params), dtype, fields, extras.files | generation)


def write_own(
    model: nnx.Module, folder: str | Path, settings: dict[str, Any], extras: Extras = NO_EXTRAS, dtype: str = "float32"
) -> None:
    """Writes any model with engrax's own names of parameters; settings: its config as JSON carries it."""
    check_export(folder)
    params = _params(model)
    fields = {"architectures": [type(model).__name__], "model_type": OWN_TYPE, "dtype": dtype} | extras.ids
    sizes = {name: value.size for name, value in params.items()}
    fields |= {"model": settings}
    _write(folder, sizes, lambda name: np.asarray(params[name]), dtype, fields, extras.files)


def read_own(folder: str | Path, config: ModelConfig, dtype: Any = jnp.float32) -> nnx.Module:
    """The model of a folder that `write_own` wrote, tensor by tensor. Raises UserError if a tensor is missing."""
    from engrax.models import build
    from engrax.models.imported.files import TensorFiles

    files, model = TensorFiles(folder), nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    state = nnx.state(model, nnx.Param)
    for path, leaf in nnx.to_flat_state(state):
        name = ".".join(str(part) for part in path)
        if name not in files.infos or files.infos[name].shape != leaf.shape:
            shape = list(leaf.shape)
            raise UserError(f"{folder} lacks the tensor {name} of shape {shape} that its config.json asks for.")
        leaf.set_value(jnp.asarray(files.read(name), dtype))
    nnx.update(model, state)
    return model


def _params(model: nnx.Module) -> dict[str, jax.Array]:
    found = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = leaf.get_value()
        if path[-1] == "log_rate":  # engrax's own limit, which no other library has
            value = jnp.minimum(value, LARGEST_LOG_RATE)
        found[".".join(str(part) for part in path)] = value
    return found


def _write(folder, sizes: dict[str, int], tensor, dtype: str, fields: dict[str, Any], texts: dict[str, str]) -> None:
    """The files of a folder; tensor(name) gives a tensor, `sizes` has their numbers of values."""
    width, metadata = jnp.dtype(dtype).itemsize, {"format": "pt"}
    shards = list(_shards(sizes, SHARD // width))
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        index = {name: file for file, shard in zip(names, shards) for name in shard}
        total = {"total_size": sum(sizes.values()) * width}
        texts = texts | {INDEX: _json({"metadata": total, "weight_map": index})}
    with new_folder(Path(folder)) as written:
        for file, shard in zip(names, shards):
            write_file(written / file, {name: tensor(name).astype(jnp.dtype(dtype)) for name in shard}, metadata)
        for name, text in (texts | {"config.json": _json(fields)}).items():
            (written / name).write_text(text, encoding="utf-8")
        write_sums(written)


def _shards(sizes: dict[str, int], most: int) -> Iterator[list[str]]:
    """The names in groups of at most `most` values, or of one tensor."""
    group: list[str] = []
    held = 0
    for name, size in sizes.items():
        if group and held + size > most:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    yield group


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
