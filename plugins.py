"""A user's own Python files: mixers, models and configs outside the package."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from engrax.errors import UserError


def load(path: Path | str) -> ModuleType:
    """Runs a Python file as a module of its own; its registrations stay. The file's folder is importable meanwhile.

    Raises UserError where the file is missing or does not run, naming the line.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file {path}; give the path of a Python file.")
    spec = importlib.util.spec_from_file_location(f"engrax_plugin_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.parent.resolve()))
    try:
        run(path, lambda: spec.loader.exec_module(module))
    finally:
        sys.path.remove(str(path.parent.resolve()))
    return module


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
    """`, line N` of the innermost frame that lies in the file."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    number, frame = None, error.__traceback__
    while frame is not None:
        if Path(frame.tb_frame.f_code.co_filename).resolve() == Path(path).resolve():
            number = frame.tb_lineno
        frame = frame.tb_next
    return f", line {number}" if number else ""
