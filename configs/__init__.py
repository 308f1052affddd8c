"""Experiments: one typed Python file each, whose docstring is a lab note and whose `config()` returns the Experiment.

`claims/` holds what papers claim, one file each: `card()` returns the Card and, where the claim is about a comparison
of experiments, `comparison()` the Comparison of its full preset. A user's own file outside the package works the same
way: `engrax train path/to/config.py`, `engrax compare path/to/comparison.py`, `engrax reproduce path/to/card.py`.
"""

import ast
import dataclasses
import importlib
import pkgutil
from pathlib import Path
from typing import Any

from engrax import evals, plugins
from engrax.errors import UserError
from engrax.evals.claims import Card
from engrax.registry import did_you_mean
from engrax.train import Experiment

_CLAIMS = Path(__file__).parent / "claims"


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


def card_names() -> list[str]:
    """The cards that come with engrax."""
    return sorted(m.name for m in pkgutil.iter_modules([str(_CLAIMS)]))


def comparison_names() -> list[str]:
    """The comparisons that come with engrax: those of cards."""
    return [name for name in card_names() if "def comparison(" in (_CLAIMS / f"{name}.py").read_text()]


def summary(name: str) -> str:
    """The first line of a config's or a card's docstring."""
    return _title((_CLAIMS if name in card_names() else _CLAIMS.parent) / f"{name}.py")


def _title(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text())) or "").strip().partition("\n")[0]


def find(name: str) -> Source:
    """A config by name or by the path of a Python file. Raises UserError where there is none."""
    path, experiment = _call(name, "config", Experiment, names(), "engrax.configs")
    return Source(experiment, path.stem if path else name, path)


def find_comparison(name: str) -> "tuple[evals.Comparison, str]":
    """A comparison by name or by the path of a Python file, and its name. Raises UserError where there is none."""
    path, found = _call(name, "comparison", evals.Comparison, comparison_names(), "engrax.configs.claims")
    return found, path.stem if path else name


def find_card(name: str) -> "tuple[Card, str, str]":
    """(a card by name or by the path of a Python file, its name, its title). Raises UserError where there is none."""
    path, found = _call(name, "card", Card, card_names(), "engrax.configs.claims")
    return found, path.stem if path else name, _title(path or _CLAIMS / f"{name}.py")


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
