"""A user's own Python files: mixers, models and configs outside the package."""

import ast
import hashlib
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from engrax.errors import UserError


def load(path: Path | str) -> ModuleType:
    """Runs a Python file as its own module; its registrations stay. During the run the file's folder is importable.

    The standard library comes first, so a file random.py in the folder does not replace it for others. Raises UserError
    with the line if the file is missing or does not run.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file {path}; give the path of a Python file.")
    place = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]  # files of one name are modules of their own
    spec = importlib.util.spec_from_file_location(f"engrax_plugin_{path.stem}_{place}", path)
    if spec is None:
        raise UserError(f"{path} is no Python file; its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    folder = str(path.parent.resolve())
    sys.path.insert(_after_standard_library(), folder)
    try:
        run(path, lambda: spec.loader.exec_module(module))
    finally:
        sys.path.remove(folder)
    return module


def _after_standard_library() -> int:
    """The index in sys.path after the standard library and its compiled modules, before installed packages."""
    folders = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")]
    folders += [folder / "lib-dynload" for folder in folders]
    return max((i + 1 for i, entry in enumerate(sys.path) if entry and Path(entry) in folders), default=len(sys.path))


def run(path: Path, call: Callable[[], Any]) -> Any:
    """Calls into a user's file; an exception becomes a UserError that names the file and the line."""
    try:
        return call()
    except UserError:
        raise
    except Exception as error:
        line = _line_in(path, error)
        raise UserError(f"{path}{line} does not run: {type(error).__name__}: {error}.") from error


def _line_in(path: Path, error: BaseException) -> str:
    """`, line N` of the innermost frame in the file."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    number, frame = None, error.__traceback__
    while frame is not None:
        if Path(frame.tb_frame.f_code.co_filename).resolve() == Path(path).resolve():
            number = frame.tb_lineno
        frame = frame.tb_next
    return f", line {number}" if number else ""


def files_of(path: Path) -> list[Path]:
    """A user's file and the files of its folder that it imports, directly or through others, at any depth.

    Imports are read from the text, also inside functions, and from the modules imported now. Installed packages and the
    standard library are left out.
    """
    path = path.resolve()
    root = path.parent
    if any(root == Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")):
        return [path]
    waiting, found = [path, *_imported_now(root)], []
    while waiting:
        file = waiting.pop(0)
        if file not in found:
            found.append(file)
            waiting += [place for name in _imported_names(file, root) for place in _places(root, name)]
    return found


def _imported_names(file: Path, root: Path) -> Iterator[str]:
    """The absolute dotted names that a file imports; for `from a import b` both a and a.b, as b may be a module."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # not valid Python; a try may have imported it
        return
    package = file.relative_to(root).parent.parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += [node.module] if node.module else []
            yield from (".".join([*base, *extra]) for extra in ([], *([alias.name] for alias in node.names)))


def _places(root: Path, name: str) -> Iterator[Path]:
    """The files below `root` that importing a dotted name runs: the packages around the module, and the module."""
    parts = name.split(".")
    if parts[0] in sys.stdlib_module_names or parts[0] == "engrax":
        return
    for length in range(1, len(parts) + 1):
        inner = root.joinpath(*parts[:length])
        yield from (file for file in (inner / "__init__.py", inner.with_suffix(".py")) if file.is_file())


def _imported_now(root: Path) -> Iterator[Path]:
    """The files below `root` of imported modules whose names match their paths there."""
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        inside = file and file.startswith(f"{root}{os.sep}") and name.split(".")[0] != "engrax"
        if inside and Path(file) in set(_places(root, name)):
            yield Path(file)
