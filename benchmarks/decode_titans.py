"""Times decoding of Titans memories, also with another checkout of engrax if its folder is given.

    python benchmarks/decode_titans.py
    python benchmarks/decode_titans.py --old PARENT_OF_CHECKOUT --output benchmarks/results/decode_titans.json

Two layers of `titans`, width 256, 4 heads of 64, memory 64 -> 256 -> 64, the default MLPs; prompts of 64 tokens, then
greedy decoding; batch 64 and batch 1. Each engine runs in its own process. They alternate run by run, and ratios are
between neighbouring runs. A run decodes a short and a long text; the time per token comes from their difference, so it
excludes compilation and the reading of the prompt. XLA counts the bytes that one step moves in the compiled program of
one token. The bytes of settling the rows' waiting writes, once in WAITING tokens, are added. The unit is reading and
writing the weights and the momentum once.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

DIM, HEADS, HEAD_DIM, HIDDEN, DEPTH, REPEAT = 256, 4, 64, 256, 2, 2
PROMPT, SHORT, LONG = 64, 16, 80
BATCHES = (64, 1)


def build():
    """The model, with seeded parameters."""
    from flax import nnx

    from engrax.layers import TitansConfig
    from engrax.models import LanguageModelConfig

    titans = TitansConfig(heads=HEADS, head_dim=HEAD_DIM, hidden=HIDDEN, depth=DEPTH)
    return LanguageModelConfig(dim=DIM, mixers=(titans,), repeat=REPEAT).build(rngs=nnx.Rngs(0))


def serve_old(model):
    """The decoding loop of commit 5ae0971: a scan over tokens, compiled once here."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    graphdef, params = nnx.split(model, nnx.Param)

    def read(params, tokens, memory):
        model = nnx.merge(graphdef, params)
        hidden, memory = model(tokens, memory)
        return model.logits(hidden[:, -1:])[:, 0], memory

    def write(params, logits, memory, tokens):
        def step(carry, _):
            logits, memory = carry
            token = jnp.argmax(logits, axis=-1).astype(jnp.int32)
            return read(params, token[:, None], memory), token

        carry, new = jax.lax.scan(step, (logits, memory), None, length=tokens)
        return carry[0], new.T

    start = jax.jit(lambda p, rows: nnx.merge(graphdef, p).init_memory(rows), static_argnums=1)
    read, write = jax.jit(read), jax.jit(write, static_argnums=3)

    def run(prompts, tokens):
        return write(params, *read(params, prompts, start(params, len(prompts))), tokens)[1]

    return run


def serve_new(model):
    """`engrax.models.generate.sample`."""
    from engrax.models.generate import sample

    return lambda prompts, tokens: sample(model, prompts, tokens=tokens, temperature=0)


def serve() -> None:
    """Answers JSON lines: {"batch": n} gives seconds per step and the first tokens."""
    import importlib.util

    import jax
    import numpy as np

    jax.config.update("jax_cpu_enable_async_dispatch", False)  # as the training loop does, see train/host.py
    model = build()
    new = importlib.util.find_spec("engrax.models.session") is not None
    run = (serve_new if new else serve_old)(model)
    for line in sys.stdin:
        rows = json.loads(line)["batch"]
        prompts = np.random.default_rng(0).integers(0, 256, (rows, PROMPT)).astype(np.int32)
        seconds = []
        for tokens in (SHORT, LONG):
            begun = time.perf_counter()
            found = np.asarray(jax.block_until_ready(run(prompts, tokens)))
            seconds.append(time.perf_counter() - begun)
        answer = {"seconds": (seconds[1] - seconds[0]) / (LONG - SHORT), "tokens": found[0].tolist()}
        print(json.dumps(answer), flush=True)


def bytes_moved(rows: int) -> dict:
    """Bytes per step of one memory in the compiled program, in units of reading and writing weights and momentum."""
    import jax
    import jax.numpy as jnp

    from engrax.pallas_kernels import NeuralMemoryState
    from engrax.pallas_kernels.neural_memory import decode

    shapes = [(HEADS, HEAD_DIM, HIDDEN), (HEADS, HIDDEN, HEAD_DIM)]
    state = NeuralMemoryState.start(tuple(jnp.zeros(shape) for shape in shapes), rows)
    memory = decode.open_memory(state, 16)
    qkv, gate = jnp.zeros((rows, 1, HEADS, HEAD_DIM)), jnp.zeros((rows, 1, HEADS))

    def step(memory):
        return decode.decode(qkv, qkv, qkv, lr=gate, momentum=gate, forget=gate, memory=memory, chunk_size=16)

    def settle(memory):
        return decode._settle(memory, memory.phase == 0)

    counted, once = (jax.jit(f).lower(memory).compile().cost_analysis()["bytes accessed"] for f in (step, settle))
    matrices = sum(a * b * c for a, b, c in shapes) * 4 * rows
    settling = 5 * matrices / decode.WAITING  # reads weights and momentum, writes both and the anchor
    unit = 4 * matrices
    return {"token": (counted - once) / unit, "settling": settling / unit, "sum": (counted - once + settling) / unit}


class Engine:
    """A child process that decodes with one checkout."""

    def __init__(self, parent: Path):
        environment = os.environ | {"PYTHONPATH": str(parent)}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.process = subprocess.Popen([sys.executable, str(Path(__file__).resolve()), "--serve"], cwd="/", **pipes)

    def ask(self, rows: int) -> dict:
        print(json.dumps({"batch": rows}), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def quartiles(values: list[float]) -> dict[str, float]:
    values = sorted(values)
    n = len(values)
    return {"low": values[n // 4], "median": values[n // 2], "high": values[(3 * n) // 4]}


def commit(folder: Path) -> str:
    return subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, help="the folder that holds another checkout, named engrax")
    parser.add_argument("--runs", type=int, default=7, help="turns, after one that compiles (default 7)")
    parser.add_argument("--output", type=Path, help="write the result as JSON to this file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve()
    here = Path(__file__).resolve().parent.parent
    engines = {"new": Engine(here.parent)} | ({"old": Engine(args.old.resolve())} if args.old else {})
    found = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "commit": {"new": commit(here)} | ({"old": commit(args.old.resolve() / "engrax")} if args.old else {}),
        "command": "python benchmarks/decode_titans.py" + (" --old OLD" if args.old else "") + f" --runs {args.runs}",
        "load": [os.getloadavg()],
        "bytes_per_step": bytes_moved(BATCHES[0]),
        "batches": {},
    }
    for rows in BATCHES:
        seconds: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(args.runs + 1):
            answers = {name: engine.ask(rows) for name, engine in engines.items()}
            for name, answer in answers.items():
                seconds[name] += [answer["seconds"]] if turn else []
        result = {
            name: {"tokens_per_second": quartiles([rows / s for s in values])} for name, values in seconds.items()
        }
        if args.old:
            result["ratio"] = quartiles([old / new for new, old in zip(seconds["new"], seconds["old"])])
            result["same_tokens"] = answers["new"]["tokens"] == answers["old"]["tokens"]
        found["batches"][rows] = result
        print(rows, json.dumps(result, indent=1), flush=True)
    found["load"].append(os.getloadavg())
    for engine in engines.values():
        engine.close()
    print(json.dumps(found["bytes_per_step"]))
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
