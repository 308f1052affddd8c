"""Saved states: a safetensors file of arrays. Its header names their model. Nothing in it is executed."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from engrax.errors import UserError

FORMAT = "engrax-session-1"


def digest_of(model: nnx.Module, params: Any) -> str:
    """The digest of a model's settings and parameters."""
    config = getattr(model, "config", None)
    found = hashlib.sha256(f"{type(model).__module__}.{type(model).__qualname__} {config!r}".encode())
    for path, value in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(params)):
        found.update(f"{jax.tree_util.keystr(path)} {value.shape} {value.dtype}".encode())
        found.update(np.ascontiguousarray(jax.device_get(value)).tobytes())
    return found.hexdigest()


def save(path: Any, state: Any, header: dict[str, Any]) -> None:
    """Writes a state's arrays, one after another, and the header. An old file is kept until the new one is complete."""
    from safetensors.numpy import save as pack

    arrays = {f"{i:05d}": np.ascontiguousarray(leaf) for i, leaf in enumerate(jax.device_get(jax.tree.leaves(state)))}
    header = header | {"format": FORMAT}
    header["content"] = _content(header, arrays)
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(pack(arrays, metadata={"engrax": json.dumps(header)}))
    os.replace(temporary, path)


def load(path: Any, model: str, shapes: Callable[[int], Any]) -> tuple[dict[str, Any], Any]:
    """(header, state) of a saved state; `model` is the digest that it must have, `shapes(rows)` the state's structure.

    Raises UserError if the file is missing, damaged, or of another model.
    """
    import safetensors

    path = Path(path)
    if not path.is_file():
        raise UserError(f"no saved state at {path}.")
    damaged = UserError(f"{path} is no saved state of this version, or is damaged; save the session again.")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            header = json.loads(file.metadata()["engrax"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        if header["format"] != FORMAT or header["content"] != _content(header, arrays):
            raise damaged
        other, rows = header["model"] != model, len(header["tokens_read"])
    except (safetensors.SafetensorError, OSError, LookupError, TypeError, ValueError, AttributeError):
        raise damaged from None
    if other:
        raise UserError(
            f"{path} was saved by another model: its settings, parameters or compute dtype differ; open the run and "
            "the step that saved it."
        )
    wanted, tree = jax.tree.flatten(shapes(rows))
    held = [(leaf.shape, leaf.dtype) for _, leaf in sorted(arrays.items())]
    if held != [(leaf.shape, leaf.dtype) for leaf in wanted]:
        raise damaged
    return header, jax.tree.unflatten(tree, [jnp.asarray(leaf) for _, leaf in sorted(arrays.items())])


def _content(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
    """The digest of a file's whole content."""
    found = hashlib.sha256(json.dumps({k: v for k, v in header.items() if k != "content"}, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        found.update(f"{name} {array.shape} {array.dtype}".encode())
        found.update(array.tobytes())
    return found.hexdigest()
