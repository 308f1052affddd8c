"""Times the generation of every registered task: rows per second, on rows of 128 tokens.

    python benchmarks/tasks.py [--rounds 5] [--output benchmarks/results/tasks.json]

Every task generates ROUNDS blocks of 4,096 train rows in one thread, after a block that does not count. A figure is the
median over blocks, by CPU time, which other programs on the machine disturb less than the wall clock. The target is
20,000 rows/s.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np

from engrax.data import DATASETS, MQAR
from engrax.data.task import TaskConfig
from engrax.data.text_task import TextTask

BLOCK, TARGET = 4096, 20_000  # rows; rows per second
SETTINGS = {  # fields that fill 128 tokens, where seq_len=128 alone does not
    "associative_retrieval": dict(num_pairs=31),
    "compositional_mqar": dict(num_pairs=16),
    "continual": dict(tasks=(MQAR(seq_len=128, num_pairs=16),) * 3),
    "forgetting_mqar": dict(num_pairs=16, num_updates=8),
    "knights_and_knaves": dict(people=8),  # 56 tokens and filler: more people have too many worlds
    "mqar": dict(num_pairs=16),
    "set_disjointness": dict(small=26, large=100, vocab_size=256),
}


def tasks() -> dict[str, TaskConfig]:
    """Every registered task, at 128 tokens, but those in words, whose questions alone are longer."""
    found = {name: cls for name, cls in DATASETS.items() if issubclass(cls, TaskConfig)}
    tokens = {name: cls for name, cls in found.items() if not issubclass(cls, TextTask)}
    return {name: cls(seq_len=128, **SETTINGS.get(name, {})) for name, cls in tokens.items()}


def rows_per_second(task: TaskConfig, rounds: int, block: int = BLOCK) -> float:
    """The median rate over blocks, in rows per second of CPU time."""
    seconds = []
    for i in range(rounds + 1):
        begun = time.process_time()
        task.generate("train", np.arange(i * block, (i + 1) * block))
        seconds.append(time.process_time() - begun)
    return block / max(statistics.median(seconds[1:]), 1e-9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the result as JSON to this file")
    arguments = parser.parse_args()
    report = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cpus": os.cpu_count(),
        "rows": BLOCK,
        "rounds": arguments.rounds,
        "target_rows_per_second": TARGET,
        "rows_per_second": {},
    }
    for name, task in tasks().items():
        rate = report["rows_per_second"][name] = round(rows_per_second(task, arguments.rounds))
        print(f"{name:26} {rate:12,} rows/s{'' if rate >= TARGET else '  (below the target)'}", flush=True)
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
