"""The peer of `benchmarks/neural_memory.py`: titans-pytorch, run by its own Python, one timed call per line of input.

Reads JSON lines on stdin, answers JSON lines on stdout:
    {"build": {...NeuralMemory keywords...}, "seq": 512, "threads": 2, "seed": 0}  ->  {"versions": {...}}
    {"run": true}   ->  {"ms": milliseconds of one forward and backward pass, "rss_mb": peak resident memory}
Needs torch and titans-pytorch only; it must not import engrax or jax.
"""

import importlib.metadata
import json
import resource
import sys
import time

import torch
from titans_pytorch import NeuralMemory


def main() -> None:
    memory = x = None
    for line in sys.stdin:
        request = json.loads(line)
        if "build" in request:
            torch.set_num_threads(request["threads"])
            torch.manual_seed(request["seed"])
            memory = NeuralMemory(**request["build"])
            x = torch.randn(1, request["seq"], request["build"]["dim"])
            versions = {name: importlib.metadata.version(name) for name in ("torch", "titans-pytorch")}
            answer = {"versions": versions}
        else:
            memory.zero_grad(set_to_none=True)
            start = time.perf_counter()
            out, _ = memory(x)
            out.square().mean().backward()
            ms = (time.perf_counter() - start) * 1e3
            answer = {"ms": ms, "rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
