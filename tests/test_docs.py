"""The commands and code that README and docs show work."""

import re
import shlex
from pathlib import Path

import pytest

from engrax import cli, configs, flags

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
IS = re.compile(r"(\$ )?engrax ")
COMMAND = "import sys; from engrax import cli; sys.exit(cli.main(sys.argv[1:]))"


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands():
    """The arguments of every command line of the pages."""
    lines = [(page, line) for page in PAGES for line in "".join(blocks(page, "")).splitlines()]
    found = [(page, shlex.split(line.removeprefix("$ "), comments=True)[1:]) for page, line in lines if IS.match(line)]
    return [pytest.param(words, id=f"{page.stem}: {' '.join(words)}") for page, words in found]


class Parsed(Exception):
    """The command line was understood."""


@pytest.mark.parametrize("words", commands())
def test_a_command_of_the_pages_is_understood(words, monkeypatch):
    def parse(parser, args=None, namespace=None):
        known, rest = original(parser, args, namespace)
        if rest and parser.prog != "engrax harness":  # whose other flags are the harness's
            experiment = configs.find(known.config if hasattr(known, "config") else "mqar_titans").experiment
            flags.override(experiment, rest, parser.prog)
        raise Parsed

    original = flags.Parser.parse_known_args
    monkeypatch.setattr(flags.Parser, "parse_known_args", parse)
    with pytest.raises(Parsed):
        cli.COMMANDS[words[0]](words[1:])


def test_the_memory_of_the_docs_obeys_the_laws_and_trains(tmp_path, run_python):
    (source,) = [block for block in blocks(ROOT / "docs" / "adding.md", "python") if "@engrax.register" in block]
    path = tmp_path / "leaky.py"
    path.write_text(source)
    laws = [word for law in ("state", "causality", "independence", "packing") for word in ("--law", law)]
    assert "all laws hold" in run_python(COMMAND, devices=1, args=["check", path, *laws])
    small = ["--steps", "2", "--data.seq-len", "32", "--batch-size", "4", "--eval.batches", "1"]
    out = run_python(COMMAND, devices=1, args=["train", path, "--run-dir", tmp_path / "run", *small])
    assert "finished step 2" in out
