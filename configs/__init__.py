"""Experiments: one typed Python file each, whose docstring is a lab note and whose `config()` returns the Experiment.

A user's own file outside the package works the same way: `engrax train path/to/config.py`.
"""

import ast
import dataclasses
import importlib
import pkgutil
from pathlib import Path

from engrax import plugins
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
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def summary(name: str) -> str:
    """The first line of a config's docstring."""
    text = (Path(__path__[0]) / f"{name}.py").read_text()
    return (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]


def find(name: str) -> Source:
    """A config by name or by the path of a Python file. Raises UserError where there is none."""
    if name.endswith(".py"):
        path = Path(name)
        module = plugins.load(path)
        found = path.stem
    elif name in names():
        path, module, found = None, importlib.import_module(f"engrax.configs.{name}"), name
    else:
        raise UserError(
            f"unknown config {name!r}{did_you_mean(name, names())} (known: {', '.join(names())}; or give a .py file)."
        )
    if not callable(getattr(module, "config", None)):
        raise UserError(f"{name} defines no function config(); it must return an engrax.train.Experiment.")
    experiment = plugins.run(path, module.config) if path else module.config()
    if not isinstance(experiment, Experiment):
        raise UserError(
            f"config() of {name} returned {type(experiment).__name__}; it must return an engrax.train.Experiment."
        )
    return Source(experiment, found, path)
