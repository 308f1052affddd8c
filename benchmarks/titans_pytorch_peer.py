"""The peer of the Titans benchmarks: titans-pytorch, run by its own Python, one timed call per line of input.

Reads JSON lines on stdin, answers JSON lines on stdout:
    {"build": {...keywords...}, "seq": 512, "threads": 2, "seed": 0}  ->  {"versions": {...}}
    {"run": true}   ->  {"ms": milliseconds of one forward and backward pass, "rss_mb": peak memory, "parameters": ...}
Keywords with `num_tokens` build a MemoryAsContextTransformer, whose loss is the next token's, others a NeuralMemory,
whose loss is the mean squared output. Needs torch and titans-pytorch only; it must not import engrax or jax.
"""

import importlib.metadata
import json
import resource
import sys
import time

import torch
from titans_pytorch import MemoryAsContextTransformer, NeuralMemory


def build(request):
    """Returns the module and a function that computes its loss."""
    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])
    keywords, length = request["build"], request["seq"]
    if "num_tokens" in keywords:
        model = MemoryAsContextTransformer(**keywords)
        tokens = torch.randint(0, keywords["num_tokens"], (1, length))
        return model, lambda: model(tokens, return_loss=True)
    memory = NeuralMemory(**keywords)
    x = torch.randn(1, length, keywords["dim"])
    return memory, lambda: memory(x)[0].square().mean()


def main() -> None:
    model = loss = None
    for line in sys.stdin:
        request = json.loads(line)
        if "build" in request:
            model, loss = build(request)
            answer = {"versions": {name: importlib.metadata.version(name) for name in ("torch", "titans-pytorch")}}
        else:
            model.zero_grad(set_to_none=True)
            start = time.perf_counter()
            loss().backward()
            ms = (time.perf_counter() - start) * 1e3
            rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            answer = {"ms": ms, "rss_mb": rss, "parameters": sum(p.numel() for p in model.parameters())}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
