"""The command line: thin parsing over the functions of `engrax`.

A user's mistake ends with exit code 2 and one line on stderr; a traceback is a bug.
"""

import os
import signal
import sys

if (
    __name__ == "__main__" or os.path.basename((sys.argv or [""])[0]) == "engrax"
):  # until `main` runs, Ctrl-C ends the process

    def _leave(number, frame):
        os.write(2, b"engrax: interrupted\n")
        os._exit(130)

    signal.signal(signal.SIGINT, _leave)

# ruff: noqa: E402
import argparse
from collections.abc import Sequence

from engrax import interrupts
from engrax.commands import COMMANDS, EXAMPLES
from engrax.errors import Exit, UserError
from engrax.registry import did_you_mean


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code (`engrax.errors.Exit`)."""
    args = list(sys.argv[1:] if args is None else args)
    with interrupts.handled() as interrupted:
        try:
            return _run(args)
        except KeyboardInterrupt as error:
            return _fail(error, Exit.INTERRUPTED)
        except BrokenPipeError:  # the reader of the output, for example `head`, has stopped
            sys.stdout = None
            return 0
        except Exception as error:
            if interrupted:  # inside an import, a library may turn Ctrl-C into its own error
                return _fail(KeyboardInterrupt(), Exit.INTERRUPTED)
            # OSError: a full disk, a folder without write permission, a file in place of a folder
            if isinstance(error, (UserError, OSError)):
                return _fail(error, getattr(error, "exit_code", Exit.REFUSED))
            raise


def _fail(error: BaseException, code: int) -> int:
    """Prints the error as one line without control characters: names from others' files may have some."""
    line = " ".join(str(error).split()) or ("interrupted" if code == Exit.INTERRUPTED else type(error).__name__)
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    print(f"engrax: {line}".encode(errors="backslashreplace").decode(), file=sys.stderr)
    return code


def _run(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="engrax", description="Train, evaluate and sample memory-augmented sequence models.", add_help=True
    )
    parser.add_argument("command", choices=None, help=f"one of: {', '.join(COMMANDS)}; each has --help", nargs="?")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    if not args or args[0] in ("-h", "--help"):
        parser.print_help()
        print("\nexamples:\n" + "\n".join(f"  {example}" for example in EXAMPLES))
        return 0 if args else 2
    command, rest = args[0], args[1:]
    if command not in COMMANDS:
        raise UserError(f"unknown command {command!r}{did_you_mean(command, COMMANDS)} (known: {', '.join(COMMANDS)}).")
    return COMMANDS[command](rest)


if __name__ == "__main__":
    sys.exit(main())
