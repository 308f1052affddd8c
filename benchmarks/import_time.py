"""Times what importing engrax and `engrax list` cost above `import flax.nnx`, which both need.

    python benchmarks/import_time.py [--rounds 7] [--output benchmarks/results/import_time.json]

Every command runs in a new process, from the start of the process to its end. The commands take turns, ROUNDS times
each, after one round that does not count (it may write compiled modules). The figures are medians: wall-clock seconds,
and seconds of CPU time, which other programs on the machine disturb less.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

FLAX = "import flax.nnx"
COMMANDS = {  # name: Python, and the most seconds it may take above flax.nnx
    "import engrax": ("import engrax; engrax.MixerConfig", 0.15),
    "engrax list": ("import sys; from engrax import cli; sys.exit(cli.main(['list']))", 0.6),
}


def run(code: str) -> tuple[float, float]:
    """(wall-clock, CPU) seconds of a new Python process that runs `code`."""
    before, begun = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - begun, os.times()
    cpu = (after.children_user + after.children_system) - (before.children_user + before.children_system)
    return wall, cpu


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """{command: seconds}; the commands take turns."""
    codes = {FLAX: FLAX} | {name: code for name, (code, _) in COMMANDS.items()}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in codes}
    for i in range(rounds + 1):
        for name, code in codes.items():
            seconds = run(code)
            if i:
                taken[name].append(seconds)
    medians = {name: [statistics.median(column) for column in zip(*rows)] for name, rows in taken.items()}
    found = {}
    for name, (wall, cpu) in medians.items():
        found[name] = {"wall_seconds": wall, "cpu_seconds": cpu}
        if name in COMMANDS:
            above = {"wall_seconds_above": wall - medians[FLAX][0], "cpu_seconds_above": cpu - medians[FLAX][1]}
            found[name] |= above | {"target_seconds_above": COMMANDS[name][1]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="write the result as JSON to this file")
    arguments = parser.parse_args()
    import flax
    import jax

    found = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "flax": flax.__version__,
        "cpus": os.cpu_count(),
        "rounds": arguments.rounds,
        "commands": measure(arguments.rounds),
    }
    print(json.dumps(found, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
