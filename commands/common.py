"""What the commands share: their parser, and how they find a config."""

import argparse
import sys
from typing import Any

from engrax.errors import UserError
from engrax.flags import Parser, minutes, positive


def parser_of(command: str, example: str, description: str) -> Parser:
    """The parser of a command, with an example below its help."""
    return Parser(
        prog=f"engrax {command}",
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def find_config(name: str) -> Any:
    """A config by name or file, or the config of a run folder."""
    from engrax import configs
    from engrax.train import runs

    if (runs.folder(name) / "config.json").exists():
        run = runs.open_run(name)
        return configs.Source(run.experiment, run.directory.name, run_dir=str(run.directory))
    return configs.find(name)


def split_help(parser: Parser, args: list[str], example: str) -> tuple[argparse.Namespace, list[str]]:
    """Parses the parser's own arguments; the rest are a config's fields. --help after a config lists its fields."""
    wants_help = [a for a in args if a in ("-h", "--help")]
    plain = [a for a in args if a not in ("-h", "--help")]
    if wants_help and (not plain or plain[0].startswith("-")):
        parser.parse_args(["--help"])
    if not plain or plain[0].startswith("-"):
        raise UserError(f"{parser.prog} needs a CONFIG first; for example: {example}")
    known, rest = parser.parse_known_args(plain)
    return known, rest + wants_help


def add_running(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that runs trials."""
    parser.add_argument("--processes", type=positive, default=1, help="trials at the same time (default: 1)")
    parser.add_argument("--minutes", type=minutes, help="begin no trial that would end later; run again to continue")
    parser.add_argument("--plugin", action="append", default=[], help="a .py file that registers mixers or data sets")


def load_plugins(paths: list[str]) -> None:
    """Runs the user's files, whose registrations stay."""
    from engrax import plugins

    for path in paths:
        plugins.load(path)


def tell_missing(missing: dict[str, str]) -> int:
    """Says what is missing and returns the exit code."""
    for name, why in missing.items():
        print(f"engrax: missing: {name}: {why}", file=sys.stderr)
    return 1 if missing else 0


def is_main() -> bool:
    """Whether this process is the one that prints."""
    import jax

    return jax.process_index() == 0
