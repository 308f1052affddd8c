"""`engrax completion`: a script with which a shell completes commands, their flags, configs and files."""

import contextlib
import io
import re

from engrax.commands.common import parser_of

EXAMPLE = 'eval "$(engrax completion bash)"'
SHELLS = ("bash", "zsh", "fish")
BASH = """\
_engrax() {
  local words="%(commands)s"
  if [ "$COMP_CWORD" -gt 1 ]; then
    case "${COMP_WORDS[1]}" in
%(cases)s
      *) words="" ;;
    esac
  fi
  COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))
}
complete -o default -F _engrax engrax
"""
ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


def run(args: list[str]) -> int:
    """Runs the command and returns its exit code."""
    parser = parser_of("completion", EXAMPLE, "Prints a script that makes a shell complete `engrax`.")
    parser.add_argument("shell", choices=SHELLS, help="the shell; add the script to its startup file")
    print(script(parser.parse_args(args).shell), end="")
    return 0


def script(shell: str) -> str:
    """The script for a shell."""
    words = vocabulary()
    if shell == "fish":
        first = f"complete -c engrax -n __fish_use_subcommand -f -a '{' '.join(words)}'"
        rest = [
            f"complete -c engrax -n '__fish_seen_subcommand_from {command}' -a '{' '.join(found)}'"
            for command, found in words.items()
        ]
        return "\n".join([first, *rest]) + "\n"
    cases = "\n".join(f'      {command}) words="{" ".join(found)}" ;;' for command, found in words.items())
    bash = BASH % {"commands": " ".join(words), "cases": cases}
    return bash if shell == "bash" else ZSH + bash


def vocabulary() -> dict[str, list[str]]:
    """{command: its flags, and the registered configs where it takes one}."""
    from engrax import configs
    from engrax.commands import COMMANDS

    found = {}
    for command, run_command in COMMANDS.items():
        text = io.StringIO()
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(text):
            run_command(["--help"])
        usage = text.getvalue().split("\n\n")[0]
        flags = sorted({*re.findall(r"(?<![\w-])--[a-z][a-z-]*", usage), "--help"})
        names = list(configs.names()) if re.search(r"^\s+config\b", text.getvalue(), re.M) else []
        found[command] = names + flags
    return found | {"completion": [*SHELLS, "--help"]}
