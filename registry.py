"""Named registries: how a JSON file, a flag or a test finds a class by its published name.

A registry maps a name to a frozen config dataclass; the config builds the thing. Configs travel as JSON through
these names alone, never through pickle or an import path.
"""

import difflib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from engrax.errors import UnknownName, UserError


class Registry(Mapping[str, type]):
    """A mapping from a name to a config class, filled by decoration.

    `kind` is the word for what is registered ("mixer", "model", "data set"), used in error messages.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self._classes: dict[str, type] = {}

    def register(self, name: str) -> Callable[[type], type]:
        """Returns a class decorator that enters a config class under `name` and writes `cls.registered_name`.

        Registering the same class again (a module executed twice, a notebook cell run again) replaces it; a different
        class under a taken name raises UserError.
        """

        def add(cls: type) -> type:
            taken = self._classes.get(name)
            if taken is not None and (_source(taken), taken.__qualname__) != (_source(cls), cls.__qualname__):
                raise UserError(
                    f"{self.kind} {name!r} is already registered by {taken.__module__}.{taken.__qualname__}; "
                    "choose another name."
                )
            cls.registered_name = name
            self._classes[name] = cls
            return cls

        return add

    def __getitem__(self, name: str) -> type:
        try:
            return self._classes[name]
        except KeyError:
            raise UnknownName(
                f"unknown {self.kind} {name!r}{did_you_mean(name, self._classes)} (known: {', '.join(self)})."
            ) from None

    def __contains__(self, name: object) -> bool:
        return name in self._classes

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._classes))

    def __len__(self) -> int:
        return len(self._classes)


def _source(cls: type) -> str:
    """The file that defines a class, or its module's name: a user's file may be run as a module and as a plugin."""
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    return str(Path(file).resolve()) if file else cls.__module__


def did_you_mean(name: str, known) -> str:
    """Returns `; did you mean 'x'?` for the nearest known name, or an empty string where none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
