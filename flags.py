"""The fields of a config as dotted, typed flags (--optimizer.learning-rate 1e-3), and the types of other arguments."""

import argparse
import ast
import contextlib
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engrax.errors import UserError
from engrax.registry import did_you_mean


def filled(text: str) -> str:
    """The type of arguments that are names or paths."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty; give a name or a path")
    return text


def positive(text: str) -> int:
    """The type of arguments that count something."""
    number = int(text)
    if not 1 <= number < 1 << 31:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1 and below {1 << 31:,}")
    return number


def minutes(text: str) -> float:
    """The type of arguments that are a time."""
    number = float(text)
    if not 0 <= number < 1e6:
        raise argparse.ArgumentTypeError(f"{text} must be a number of minutes, 0 or more")
    return number


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are UserErrors."""

    def error(self, message: str):
        raise UserError(f"{message}; see `{self.prog} --help`.")


def check_output(output: str | None) -> None:
    """Raises UserError, before anything is timed, if the file cannot be written."""
    if output and Path(output).is_dir():
        raise UserError(f"--output {output} is a folder; give the name of a file.")
    for folder in Path(output).parents if output else ():
        if folder.is_file():
            raise UserError(f"--output {output}: {folder} is a file, not a folder.")


def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """The type of arguments that are lists with commas between."""

    def read(text: str) -> list[Any]:
        try:
            return [kind(part.strip()) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no list such as 64,128,256") from None

    return read


def value(text: str) -> Any:
    """A field's value as a number, true or false, None or a text."""
    with contextlib.suppress(ValueError, SyntaxError):
        found = ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
        if isinstance(found, (int, float, bool, type(None))):
            return found
    return text


def split_flags(args: list[str], prefix: str) -> tuple[list[str], list[str]]:
    """(the flags with this prefix and their values, the other arguments)."""
    given, rest = [], list(args)
    while (at := next((i for i, arg in enumerate(rest) if arg.startswith(prefix)), None)) is not None:
        length = 1 if "=" in rest[at] or at + 1 == len(rest) or rest[at + 1].startswith("--") else 2
        given += rest[at : at + length]
        del rest[at : at + length]
    return given, rest


def fields_of(given: list[str], prefix: str) -> dict[str, list[Any]]:
    """{field: its values} of flags --PREFIX.FIELD VALUE,VALUE. Raises UserError for a flag without a value."""
    found, rest = {}, list(given)
    while rest:
        name, equals, text = rest.pop(0).partition("=")
        if not equals and not rest or not equals and rest[0].startswith(prefix):
            raise UserError(f"{name} needs a value, or several with commas between.")
        text = text if equals else rest.pop(0)
        found[name.removeprefix(prefix).replace("-", "_")] = [value(part.strip()) for part in text.split(",")]
    return found


def split_data(parser: argparse.ArgumentParser, args: list[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Parses the arguments of a command on a run. The second value has the fields that `--data.FIELD VALUE`
    replaces."""
    given, rest = split_flags(args, "--data.")
    known = parser.parse_args(rest)
    if not given:
        return known, {}
    from engrax import plugins
    from engrax.train import runs

    for path in known.plugin:
        plugins.load(path)
    old = runs.read_experiment(known.run)
    new = override(old, given, parser.prog)
    names = [field.name for field in dataclasses.fields(new.data) if field.init]
    changed = {name: getattr(new.data, name) for name in names if getattr(new.data, name) != getattr(old.data, name)}
    return known, changed


def override(experiment: Any, args: list[str], prog: str) -> Any:
    """The experiment with fields replaced by dotted flags. Raises UserError in one sentence."""
    if not args:
        return experiment
    import tyro

    known = _field_names(experiment)
    for arg in args:
        name = arg.split("=")[0].removeprefix("--").replace("_", "-")
        if arg.startswith("--") and name != "help" and name not in known and name.replace(".no-", ".") not in known:
            raise UserError(f"{prog.split()[-1]} has no field --{name}{did_you_mean(name, known) or '.'}")
        inside = [field for field in known if field.startswith(f"{name}.")]
        if arg.startswith("--") and inside:
            raise UserError(
                f"--{name} is a group of fields: flags change its fields, such as --{inside[0]}; "
                "what stands there is chosen in a config file."
            )
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                type(experiment), default=experiment, args=args, prog=prog, config=(tyro.conf.AvoidSubcommands,)
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UserError(_one_line(errors.getvalue())) from None


def _one_line(box: str) -> str:
    """The first sentence inside the frame that tyro draws around a mistake."""
    inside = [line.strip("│╭╮╰╯─ ").strip() for line in box.splitlines()]
    told = []
    for line in inside[1:]:
        if not line and told:
            break
        if line:
            told.append(line)
    return " ".join(told) or "a flag could not be read; see --help."


def _field_names(config: Any, prefix: str = "") -> list[str]:
    """Dotted flag names of all fields, as tyro spells them."""
    names = []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), prefix + field.name.replace("_", "-")
        names.append(name)
        if dataclasses.is_dataclass(value):
            names += _field_names(value, name + ".")
        elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):  # plain values are one flag
            for i, item in enumerate(value):
                names += _field_names(item, f"{name}.{i}.") if dataclasses.is_dataclass(item) else [f"{name}.{i}"]
    return names
