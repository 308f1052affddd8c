"""Names of a package that load when they are first used (PEP 562), so that importing engrax stays light.

A package lists its public names once, as ordinary imports under `if TYPE_CHECKING:`, where editors and type checkers
read them, and says `__getattr__ = lazy.attach(__name__)`.
"""

import ast
import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def attach(package: str, renamed: Mapping[str, str] | None = None) -> Callable[[str], Any]:
    """Returns the `__getattr__` of a package whose names stand in its `if TYPE_CHECKING:` block.

    `renamed` maps an old name to its new one; the old name still works and warns (DeprecationWarning).
    """

    @functools.cache
    def homes() -> dict[str, str]:
        return _homes(Path(sys.modules[package].__file__).read_text(encoding="utf-8"))

    def find(name: str) -> Any:
        if renamed and name in renamed:
            warnings.warn(f"{package}.{name} is now {renamed[name]}.", DeprecationWarning, stacklevel=2)
            name = renamed[name]
        if name.startswith("__") or name not in homes():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = homes()[name]
        if home == package:  # `from engrax import train`: a package of its own
            return importlib.import_module(f"{package}.{name}")
        value = getattr(importlib.import_module(home), name)
        setattr(sys.modules[package], name, value)  # found without this function from now on
        return value

    return find


def _homes(source: str) -> dict[str, str]:
    """{name: module} of the `from module import name` lines in the source's `if TYPE_CHECKING:` blocks."""
    return {
        alias.asname or alias.name: node.module
        for block in ast.parse(source).body
        if isinstance(block, ast.If) and ast.unparse(block.test).endswith("TYPE_CHECKING")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
