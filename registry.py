"""Named registries: how a JSON file, a flag or a test finds a class by its published name.

There is one registry per kind of thing. It maps a name to a frozen config dataclass; the config builds the thing.
Configs travel as JSON through these names alone, never through pickle or an import path.

A new part is one file: a class that derives from the kind's base (KINDS), decorated with `@engrax.register("name")`. A
registry knows the package that holds its kind. It imports the files of that package when it is first asked for a name,
so a file dropped into the package is found without an edit anywhere else.
"""

import difflib
import importlib
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from engrax.errors import UnknownName, UserError

# Every kind: its word in a saved config ("type": "mixer:titans"), the module of its base class, and that class.
# The module is imported only when the kind is needed, so importing engrax stays light.
KINDS = {
    "mixer": ("engrax.layers.mixer", "MixerConfig"),
    "model": ("engrax.models.model", "ModelConfig"),
    "data": ("engrax.data.config", "DataConfig"),
    "optimizer": ("engrax.train.optimizers.base", "OptimizerConfig"),
    "schedule": ("engrax.train.schedules.base", "ScheduleConfig"),
    "evaluator": ("engrax.evals.evaluator", "EvaluatorConfig"),
}


class Registry(Mapping[str, type]):
    """A mapping from a name to a config class, filled by decoration.

    `kind` is the word of KINDS for what is registered, and `word` the one for people where it differs ("data set").
    `package` is the dotted name of the package whose files register themselves; None where there is no such package.
    """

    def __init__(self, kind: str, package: str | None = None, *, word: str | None = None):
        self.kind = kind
        self.word = word or kind
        self._package = package
        self._classes: dict[str, type] = {}

    def register(self, name: str) -> Callable[[type], type]:
        """Returns a class decorator that enters a config class under `name` and writes `cls.registered_name`.

        Registering the same class again (a module executed twice, a notebook cell run again) replaces it; a different
        class under a taken name raises UserError.
        """

        def add(cls: type) -> type:
            if not cls.__module__.startswith(f"{self._package}."):
                self._walk()  # the package's own names come first: a taken one is refused here, in the user's file
            taken = self._classes.get(name)
            if taken is not None and (_source(taken), taken.__qualname__) != (_source(cls), cls.__qualname__):
                raise UserError(
                    f"{self.word} {name!r} is already registered by {taken.__module__}.{taken.__qualname__}; "
                    "choose another name."
                )
            cls.registered_name = name
            self._classes[name] = cls
            return cls

        return add

    def __getitem__(self, name: str) -> type:
        if name not in self._classes:
            self._walk()
        try:
            return self._classes[name]
        except KeyError:
            raise UnknownName(
                f"unknown {self.word} {name!r}{did_you_mean(name, self._classes)} (known: {', '.join(self)})."
            ) from None

    def __contains__(self, name: object) -> bool:
        self._walk()
        return name in self._classes

    def __iter__(self) -> Iterator[str]:
        self._walk()
        return iter(sorted(self._classes))

    def __len__(self) -> int:
        self._walk()
        return len(self._classes)

    def _walk(self) -> None:
        """Imports the package's files that register something, once."""
        package, self._package = self._package, None  # what is imported may itself ask for a name
        if package is None:
            return
        try:
            for module in _registering_modules(importlib.import_module(package)):
                importlib.import_module(module)
        except BaseException:
            self._package = package
            raise


def register(name: str) -> Callable[[type], type]:
    """Class decorator that makes a config class known under `name`, in the registry of its base class.

    The base says the kind: a subclass of `engrax.MixerConfig` is a mixer. The command line, saved runs, the laws and
    the reports then find it. Raises UserError where the name is taken, or where the class has none of the bases.
    """

    def add(cls: type) -> type:
        registry = getattr(cls, "registry", None)
        if not isinstance(registry, Registry):
            bases = ", ".join(f"engrax.{base}" for _, base in KINDS.values())
            raise UserError(f"{cls.__name__} cannot be registered as {name!r}: derive it from one of {bases}.")
        return registry.register(name)(cls)

    return add


def find_registry(kind: str) -> Registry:
    """The registry of a kind, by its word in KINDS."""
    module, base = KINDS[kind]
    return getattr(importlib.import_module(module), base).registry


def _registering_modules(package) -> list[str]:
    """The dotted names of a package's modules, at any depth, whose text speaks of registering.

    The others are not imported: helpers load when used, and some need optional packages.
    """

    def fail(name):  # inside the handler: without it, a package that does not import would be left out silently
        raise

    found = []
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.", onerror=fail):
        if module.ispkg:
            continue
        file = Path(module.module_finder.path) / f"{module.name.rpartition('.')[2]}.py"
        if re.search(r"\bregister\b", file.read_text(encoding="utf-8")):
            found.append(module.name)
    return found


def _source(cls: type) -> str:
    """The file that defines a class, or its module's name: a user's file may be run as a module and as a plugin."""
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    return str(Path(file).resolve()) if file else cls.__module__


def did_you_mean(name: str, known) -> str:
    """Returns `; did you mean 'x'?` for the nearest known name, or an empty string where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
