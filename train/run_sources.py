"""The content of RUN/source: the user's files with everything they import, and the run's tokenizers.

manifest.json lists every file with its SHA-256, and the origin of each tokenizer. Nothing there runs unasked.
"""

import hashlib
import json
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from etils import epath

from engrax import files, plugins
from engrax.errors import UserError
from engrax.train.experiment import Experiment, map_fields, nested_configs

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer_file"  # the field with a tokenizer's path, in any config of the data


def copy(directory: epath.Path, experiment: Experiment, source: epath.PathLike | None) -> None:
    """Copies the user's config file, the files of all user-defined configs, what these import, and the tokenizers."""
    manifest = read(directory)
    contents = _user_files(experiment, source) | _tokenizers(experiment)
    if not contents:
        return
    folder = directory / "source"
    for name, (content, about) in contents.items():
        digest = hashlib.sha256(content).hexdigest()
        if manifest.get(name, {}).get("sha256") == digest and (folder / name).exists():
            continue
        if name in manifest:
            print(f"warning: {name} has changed since it was copied to {folder}", file=sys.stderr)
        manifest[name] = {"sha256": digest} | about
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(content)
    files.write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def digest(experiment: Experiment, source: epath.PathLike | None) -> str:
    """SHA-256 of the names and contents that `copy` would copy."""
    contents = _user_files(experiment, source) | _tokenizers(experiment)
    total = hashlib.sha256()
    for name in sorted(contents):
        total.update(f"{name} {hashlib.sha256(contents[name][0]).hexdigest()}\n".encode())
    return total.hexdigest()


def _user_files(experiment: Experiment, source: epath.PathLike | None) -> dict[str, tuple[bytes, dict[str, str]]]:
    """{name in RUN/source: (content, what it is)} of the Python files."""
    roles = {Path(source).resolve(): "config"} if source else {}
    roles |= {Path(file).resolve(): "plugin" for file in own_modules(experiment).values()}
    found: dict[str, tuple[bytes, dict[str, str]]] = {}
    for path in roles:
        for file in plugins.files_of(path):
            name, content = file.relative_to(path.parent).as_posix(), file.read_bytes()
            if name in found and found[name][0] != content:  # another folder has a file of the same name
                name = f"{path.parent.name}_{hashlib.sha256(str(path.parent).encode()).hexdigest()[:8]}/{name}"
            found[name] = content, {"role": roles.get(file, "module")}
    return found


def own_modules(experiment: Experiment) -> dict[str, str]:
    """{name: file} of the modules outside engrax that define the experiment's configs."""
    names = dict.fromkeys(type(config).__module__ for config in nested_configs(experiment))
    found = {name: getattr(sys.modules.get(name), "__file__", None) for name in names}
    return {name: file for name, file in found.items() if file and not name.startswith("engrax.")}


def _tokenizers(experiment: Experiment) -> dict[str, tuple[bytes, dict[str, str]]]:
    """{name in RUN/source: (content, what it is)} of the data's tokenizers."""
    found = {}
    for path in tokenizer_files(experiment):
        content = epath.Path(path).read_bytes()
        found[_tokenizer_name(content)] = content, {"role": "tokenizer", "from": path}
    return found


def _tokenizer_name(content: bytes) -> str:
    return f"tokenizer_{hashlib.sha256(content).hexdigest()[:12]}.json"


def tokenizer_files(experiment: Experiment) -> list[str]:
    """The paths of the data's tokenizers."""
    named = [getattr(config, TOKENIZER, None) for config in nested_configs(experiment.data)]
    return list(dict.fromkeys(path for path in named if isinstance(path, str)))


def read(directory: epath.Path) -> dict[str, dict[str, str]]:
    """The manifest: {name: {"sha256", "role", ...}}; {} in a run without one. Raises UserError if it is damaged."""
    path = directory / "source" / MANIFEST
    found = files.read_json(path) if path.exists() else {}
    for name, entry in found.items():
        for part in name.split("/"):
            files.plain_name(part, str(path))
        files.expect(files.expect_texts(entry, f"{path}: {files.short(name)}").get("sha256"), str, f"{path}: sha256")
    return found


def with_own_tokenizers(directory: epath.Path, experiment: Experiment) -> Experiment:
    """The experiment, with the run's copy for every missing tokenizer file.

    Raises UserError if a tokenizer is not the one used in training.
    """
    manifest = read(directory)
    kept = {name: entry for name, entry in manifest.items() if entry.get("role") == "tokenizer"}
    if not kept:  # a run on bytes, or older than the copies of tokenizers
        return experiment

    def own(name: str, value: Any) -> Any:
        return _own_tokenizer(directory, kept, value) if name == TOKENIZER and isinstance(value, str) else value

    return map_fields(experiment, "data", own)


def _own_tokenizer(directory: epath.Path, kept: dict[str, dict[str, str]], path: str) -> str:
    """The path, or the path of the run's copy of the file."""
    file = epath.Path(path)
    if not file.exists():
        names = [name for name, entry in kept.items() if path == entry.get("from") or file.name == name]
        if not names:
            raise UserError(f"tokenizer file {path} does not exist, and the run brought no copy of it.")
        file = directory / "source" / names[0]
    content = file.read_bytes() if file.is_file() else b""
    if hashlib.sha256(content).hexdigest() not in {entry["sha256"] for entry in kept.values()}:
        own = directory / "source" / next(iter(kept))
        raise UserError(
            f"{file} is not the tokenizer that this run was trained with (its SHA-256 differs); restore it, or pass "
            f"the run's own: --data.tokenizer-file {shlex.quote(str(own))}."
        )
    return str(file)


def plugin_hint(directory: epath.Path) -> str:
    """The flags that load the run's own files, for a message; "" if it has none."""
    folder = directory / "source"
    named = [name for name, entry in read(directory).items() if entry.get("role") == "plugin"]
    paths = [folder / name for name in named] or (sorted(folder.glob("*.py")) if folder.exists() else [])
    return " ".join(f"--plugin {shlex.quote(str(path))}" for path in paths)


def warn_of_changes(directory: epath.Path, loaded: Iterable[Any]) -> None:
    """Warns of files loaded from RUN/source that have changed since the run copied them."""
    manifest = read(directory)
    for path in map(Path, loaded):
        for name, entry in manifest.items():
            if path.resolve() == Path(directory / "source" / name):
                if hashlib.sha256(path.read_bytes()).hexdigest() != entry["sha256"]:
                    print(f"warning: {path} was changed after the run copied it", file=sys.stderr)
