"""Measures the time before the first step and the memory of a large vocabulary.

    python benchmarks/training_start.py [--rounds 5] [--output benchmarks/results/training_start.json]

probe: seconds of the probe for leaks before the quickstart's first step (its programs are compiled, too), and of the
whole command to the end of step 1. vocabulary: the largest memory (GB) of a process that trains 4 steps of 16 x 512
tokens at a vocabulary of 128,256 and width 32, with two blocks of attention. Every round is a new process; figures are
medians, with the smallest and the largest value.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

PROBE = """
import json, tempfile, time
start = time.perf_counter()
import dataclasses
from engrax import configs, train
from engrax.train import loop
original, seconds = loop.refuse_leaks, []
def timed(*args):
    begun = time.perf_counter()
    original(*args)
    seconds.append(time.perf_counter() - begun)
loop.refuse_leaks = timed
with tempfile.TemporaryDirectory() as folder:
    train(dataclasses.replace(configs.find("quickstart").experiment, steps=1), folder + "/run")
print(json.dumps({"probe_seconds": seconds[0], "whole_seconds": time.perf_counter() - start}))
"""
VOCABULARY = """
import json, resource, tempfile
from engrax import train
from engrax.data import StdlibText
from engrax.layers import AttentionConfig
from engrax.models import LanguageModelConfig
from engrax.train import Experiment
mixer = AttentionConfig(heads=2, head_dim=16, window=64)
model = LanguageModelConfig(vocab_size=128_256, dim=32, mixers=(mixer,), repeat=2)
with tempfile.TemporaryDirectory() as folder:
    train(Experiment(model=model, data=StdlibText(seq_len=512), batch_size=16, steps=4), folder + "/run")
print(json.dumps({"process_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}))
"""
TARGETS = {"probe_seconds": 3.0, "process_gb": 1.1}  # at most


def measure(code: str, rounds: int) -> dict[str, dict[str, float]]:
    """{figure: its median, least and largest} over new Python processes that run `code`."""
    rows = []
    for _ in range(rounds):
        done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    found = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        found[name] = {"median": statistics.median(values), "least": min(values), "largest": max(values)}
        if name in TARGETS:
            found[name]["target"] = TARGETS[name]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
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
        "probe": measure(PROBE, arguments.rounds),
        "vocabulary": measure(VOCABULARY, arguments.rounds),
    }
    print(json.dumps(found, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
