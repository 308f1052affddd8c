"""What CONTRIBUTING.md and the shell offer: the template of a mixer, completion."""

import subprocess
from pathlib import Path

import pytest

from engrax import cli
from engrax.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.deep
def test_the_template_obeys_the_laws(capsys):
    assert cli.main(["check", str(ROOT / "docs" / "mixer_template.py")]) == 0


def complete(script, *words):
    """The completions that bash offers for the last word."""
    line = f'{script}\nCOMP_WORDS=({" ".join(words)} "")\nCOMP_CWORD={len(words)}\n_engrax\necho "${{COMPREPLY[@]}}"'
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True).stdout.split()


def test_the_shell_completes_commands_flags_and_configs(capsys):
    assert cli.main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert set(complete(script, "engrax")) == set(COMMANDS)
    assert {"--step", "--plugin"} <= set(complete(script, "engrax", "export"))
    assert {"quickstart", "--run-dir"} <= set(complete(script, "engrax", "train"))
    assert cli.main(["completion", "fish"]) == 0
    assert "complete -c engrax -n '__fish_seen_subcommand_from export' -a '" in capsys.readouterr().out
