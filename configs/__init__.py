"""Experiments: one typed Python file each, whose docstring is a lab note and whose `config()` returns the Experiment.

`comparisons/` holds comparisons of experiments, whose `comparison()` returns the Comparison. A user's own file outside
the package works the same way: `engrax train path/to/config.py`, `engrax compare path/to/comparison.py`.
"""

import ast
import dataclasses
import importlib
import pkgutil
from pathlib import Path
from typing import Any

from engrax import evals, plugins
from engrax.errors import UserError
from engrax.registry import did_you_mean
from engrax.train import Experiment


@dataclasses.dataclass(frozen=True)
class Source:
    """A found config: its experiment, its name, and where it comes from if it is not engrax's own."""

    experiment: Experiment
    name: str
    path: Path | None = None
    run_dir: str | None = None  # the run folder that it was read from


def names() -> list[str]:
    """The configs that come with engrax."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.ispkg and not m.name.startswith("_"))


def comparison_names() -> list[str]:
    """The comparisons that come with engrax."""
    return sorted(m.name for m in pkgutil.iter_modules([str(Path(__path__[0]) / "comparisons")]))


def summary(name: str) -> str:
    """The first line of a config's or a comparison's docstring."""
    folder = Path(__path__[0]) / ("comparisons" if name in comparison_names() else "")
    text = (folder / f"{name}.py").read_text()
    return (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]


def find(name: str) -> Source:
    """A config by name or by the path of a Python file. Raises UserError where there is none."""
    path, experiment = _call(name, "config", Experiment, names(), "engrax.configs")
    return Source(experiment, path.stem if path else name, path)


def find_comparison(name: str) -> "tuple[evals.Comparison, str]":
    """A comparison by name or by the path of a Python file, and its name. Raises UserError where there is none."""
    path, found = _call(name, "comparison", evals.Comparison, comparison_names(), "engrax.configs.comparisons")
    return found, path.stem if path else name


def _call(name: str, function: str, wanted: type, known: list[str], package: str) -> tuple[Path | None, Any]:
    """(the user's file or None, what `function()` of the module returns), an instance of `wanted`."""
    if name.endswith(".py"):
        path = Path(name)
        module = plugins.load(path)
    elif name in known:
        path, module = None, importlib.import_module(f"{package}.{name}")
    else:
        raise UserError(
            f"unknown {function} {name!r}{did_you_mean(name, known)} (known: {', '.join(known)}; or give a .py file)."
        )
    must = f"it must return an engrax.{wanted.__module__.split('.')[1]}.{wanted.__name__}."
    if not callable(getattr(module, function, None)):
        raise UserError(f"{name} defines no function {function}(); {must}")
    found = plugins.run(path, getattr(module, function)) if path else getattr(module, function)()
    if not isinstance(found, wanted):
        raise UserError(f"{function}() of {name} returned {type(found).__name__}; {must}")
    return path, found
