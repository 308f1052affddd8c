"""Times forward + backward of the neural memory layer on CPU, beside titans-pytorch where its Python is given.

    python benchmarks/neural_memory.py
    python benchmarks/neural_memory.py --peer-python PEER/bin/python --output benchmarks/results/neural_memory.json

One layer, projections included: batch 1, 512 tokens, width 256, 4 heads of 64, memory 64 -> 256 -> 64, mean squared
output as the loss. engrax has per-token step size, momentum and forgetting and a short convolution; titans-pytorch has
per-token step size, and momentum and forgetting per chunk. The peer's process stays alive and the two take turns, run
by run, so that whatever else the machine does falls on both; ratios are of neighbouring runs. After each run engrax's
process multiplies two large matrices: at that speed its matrix products alone take the time printed as the floor. Both
processes let glibc keep freed memory mapped, as engrax's training loop does on CPU (train/host.py). Peak memory is the
process's resident maximum, interpreter and libraries included (each engine in a process of its own), and XLA's own
count of temporary bytes.
"""

import argparse
import datetime
import json
import math
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

DIM, HEADS, HEAD_DIM, HIDDEN, SEQ, CONV = 256, 4, 64, 256, 512, 4
SETTINGS = {
    f"chunk {chunk}": dict(dim=DIM, heads=HEADS, dim_head=HEAD_DIM, chunk_size=chunk, batch_size=chunk)
    for chunk in (16, 64)
}
# The malloc settings of both engines, those of engrax/train/host.py.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
TARGETS = {"chunk 16": 8.0, "chunk 64": 2.5}
HOW_TO_ADD_PEER = (
    "titans-pytorch is not timed: make it an environment of its own (python -m venv PEER; "
    "PEER/bin/pip install torch==2.13.0 titans-pytorch==0.5.5) and pass --peer-python PEER/bin/python"
)


def init_params(key):
    """Returns the layer's parameters: projections, short convolutions, gates and the initial memory."""
    import jax

    def dense(key, rows, columns):
        return jax.random.normal(key, (rows, columns)) * rows**-0.5

    keys = iter(jax.random.split(key, 16))
    inner = HEADS * HEAD_DIM
    params = {name: dense(next(keys), DIM, inner) for name in ("q", "k", "v", "gate")}
    params |= {f"conv_{name}": jax.random.normal(next(keys), (CONV, inner)) * CONV**-0.5 for name in "qkv"}
    params["gates"] = dense(next(keys), DIM, 3 * HEADS)
    params["out"] = dense(next(keys), inner, DIM)
    sizes = (HEAD_DIM, HIDDEN, HEAD_DIM)
    params["memory"] = tuple(jax.random.normal(next(keys), (HEADS, i, o)) * i**-0.5 for i, o in zip(sizes, sizes[1:]))
    return params


def layer(params, x, chunk_size: int, save_every: int):
    """The memory layer: norm, projections, convolution, SiLU, unit q, k and v, memory, norm and gate, projection."""
    import jax
    import jax.numpy as jnp

    from engrax.pallas_kernels import NeuralMemoryState, neural_memory

    def rms_norm(x):
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)

    def project(name):
        y = x @ params[name]
        padded = jnp.pad(y, ((0, 0), (CONV - 1, 0), (0, 0)))
        y = sum(padded[:, i : i + y.shape[1]] * params[f"conv_{name}"][i] for i in range(CONV))
        return jax.nn.silu(y).reshape(*x.shape[:2], HEADS, HEAD_DIM)

    def unit(x):
        return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)

    x = rms_norm(x)
    q, k, v = (unit(project(name)) for name in "qkv")
    bias = jnp.repeat(jnp.array([0.0, 1.0, -4.0]), HEADS)
    lr, momentum, forget = jnp.split(jax.nn.sigmoid(x @ params["gates"] + bias), 3, axis=-1)
    lr = lr * (1 - momentum) * 0.5 / chunk_size  # as the mixer bounds it, so that the memory stays finite
    state = NeuralMemoryState.start(params["memory"], x.shape[0])
    options = dict(lr=lr, momentum=momentum, forget=forget, chunk_size=chunk_size, save_every=save_every)
    y, _ = neural_memory(q, k, v, state=state, **options)
    y = rms_norm(y).reshape(*x.shape[:2], -1) * jax.nn.silu(x @ params["gate"])
    return y @ params["out"]


def mean_square(params, x, chunk_size: int, save_every: int):
    """The loss that is timed: the mean squared output of the layer."""
    return (layer(params, x, chunk_size, save_every) ** 2).mean()


class Peer:
    """A child process that answers JSON lines."""

    def __init__(self, command, environment=KEEP_FREED_MEMORY, **build):
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.process = subprocess.Popen(command, **pipes, text=True, env=os.environ | environment)
        self.versions = self.ask(**build)["versions"]

    def ask(self, **request):
        print(json.dumps(request), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args[0]} ended with code {self.process.wait()}; is it the right Python?")
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def product_timer():
    """Returns a function that multiplies two large matrices and says at how many GFLOP/s."""
    import jax
    import jax.numpy as jnp

    a = b = jnp.ones((1024, 1024))
    multiply = jax.jit(jnp.matmul).lower(a, b).compile()

    def speed() -> float:
        start = time.perf_counter()
        multiply(a, b).block_until_ready()
        return 2e-9 * 1024**3 / (time.perf_counter() - start)

    return speed


def floor(answers: list[dict]) -> dict:
    """The milliseconds that engrax's matrix products take at the speed of the fastest large one."""
    gflop, speeds = answers[0]["gflop"], [answer["gflop_per_s"] for answer in answers]
    return {"gflop": gflop, "gflop_per_s": quantiles(speeds), "ms": 1e3 * gflop / max(speeds)}


def products_gflop(function, *args) -> float:
    """The matrix products of a call, in GFLOP: those of its jaxpr, of a scan as often as it steps."""
    import jax

    def count(jaxpr) -> float:
        total = 0.0
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                (contracted, _), _ = eqn.params["dimension_numbers"]
                shape = eqn.invars[0].aval.shape
                total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
            inner = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
            counts = [count(getattr(x, "jaxpr", x)) for x in inner if hasattr(x, "eqns")]
            if counts:  # the branches of a condition (here: the platform's) are the same products
                total += (max if eqn.primitive.name == "cond" else sum)(counts) * eqn.params.get("length", 1)
        return total

    return 1e-9 * count(jax.make_jaxpr(function)(*args).jaxpr)


def serve_engrax() -> None:
    """Answers the peer protocol (see titans_pytorch_peer.py) for engrax."""
    import jax
    import jaxlib

    jax.config.update("jax_cpu_enable_async_dispatch", False)  # as the training loop does, see train/host.py
    speed = product_timer()
    compiled = params = x = temp_mb = gflop = None
    for line in sys.stdin:
        request = json.loads(line)
        if "build" in request:
            chunk, save_every = request["build"]["chunk_size"], request["build"]["save_every"]
            params = init_params(jax.random.key(request["seed"]))
            x = jax.random.normal(jax.random.key(request["seed"] + 1), (1, request["seq"], DIM))
            loss = jax.value_and_grad(partial(mean_square, chunk_size=chunk, save_every=save_every))
            compiled, gflop = jax.jit(loss).lower(params, x).compile(), products_gflop(loss, params, x)
            value, grads = compiled(params, x)
            assert all(bool(jax.numpy.isfinite(g).all()) for g in (value, *jax.tree.leaves(grads))), "not finite"
            temp_mb = compiled.memory_analysis().temp_size_in_bytes / 2**20
            answer = {"versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__}}
        else:
            start = time.perf_counter()
            jax.block_until_ready(compiled(params, x))
            ms = (time.perf_counter() - start) * 1e3
            rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            answer = {"ms": ms, "rss_mb": rss, "temp_mb": temp_mb, "gflop": gflop, "gflop_per_s": speed()}
        print(json.dumps(answer), flush=True)


def quantiles(values) -> dict[str, float]:
    values = sorted(values)
    return {"min": values[0], "median": values[len(values) // 2], "max": values[-1]}


def compare(name: str, args) -> dict:
    """Runs one setting, turn by turn; returns medians, ratios and memory."""
    kwargs = SETTINGS[name]
    build = dict(seq=SEQ, threads=args.threads, seed=args.seed)
    ours = Peer([sys.executable, __file__, "--serve"], build=kwargs | dict(save_every=args.save_every), **build)
    theirs = None
    if args.peer_python:
        theirs = Peer(
            [args.peer_python, str(Path(__file__).with_name("titans_pytorch_peer.py"))], build=kwargs, **build
        )
    engines = {"engrax": ours} | ({"titans-pytorch": theirs} if theirs else {})
    times: dict[str, list[float]] = {engine: [] for engine in engines}
    answers = []
    for turn in range(args.warmup + args.runs):
        for engine, process in engines.items():
            answer = process.ask(run=True)
            if turn >= args.warmup:
                times[engine].append(answer["ms"])
                answers += [answer] if engine == "engrax" else []
    result = {"setting": kwargs, "versions": {}, "floor": floor(answers)}
    for engine, process in engines.items():
        last = process.ask(run=True)
        memory = {key: last[key] for key in ("rss_mb", "temp_mb") if key in last}
        result[engine] = {"ms": quantiles(times[engine]), **memory}
        result["versions"] |= process.versions
        process.close()
    if theirs:
        ratios = [b / a for a, b in zip(times["engrax"], times["titans-pytorch"])]
        result["ratio"] = quantiles(ratios) | {"target": TARGETS[name]}
    return result


def describe_hardware() -> dict:
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        lines = [l for l in Path("/proc/cpuinfo").read_text().splitlines() if l.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    return {"cpu": model, "cores": os.cpu_count(), "system": platform.platform(), "load": os.getloadavg()}


def report_head(script: str, args) -> dict:
    """Returns what every report begins with: when, on what, by which command."""
    words = ["PEER/bin/python" if word == args.peer_python else word for word in sys.argv[1:]]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": describe_hardware(),
        "command": shlex.join(["python", f"benchmarks/{script}", *words]),
        "seed": args.seed,
        "runs": args.runs,
    }


def show(name: str, result: dict) -> None:
    for engine in ("engrax", "titans-pytorch"):
        if engine in result:
            r = result[engine]
            temp = f", XLA temporaries {r['temp_mb']:.0f} MB" if "temp_mb" in r else ""
            ms = r["ms"]
            spread = f"min {ms['min']:.1f}, max {ms['max']:.1f}"
            print(f"{name:9} {engine:15} {ms['median']:8.1f} ms ({spread}); peak RSS {r['rss_mb']:.0f} MB{temp}")
    r = result["floor"]
    print(f"{name:9} {'floor':15} {r['ms']:8.1f} ms ({r['gflop']:.1f} GFLOP at the fastest product's speed)")
    if "ratio" in result:
        r = result["ratio"]
        spread = f"min {r['min']:.2f}, max {r['max']:.2f}"
        print(f"{name:9} {'ratio':15} {r['median']:8.2f} x  ({spread}); target {r['target']} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="a Python that has torch and titans-pytorch")
    parser.add_argument("--runs", type=int, default=21, help="timed runs of each engine (default 21)")
    parser.add_argument("--warmup", type=int, default=3, help="runs of each engine that are not counted (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each engine (default 2)")
    parser.add_argument("--save-every", type=int, default=1, help="neural_memory's save_every (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--output", help="write the figures as JSON to this file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve_engrax()
    if hasattr(os, "sched_setaffinity"):  # both engines inherit it; XLA takes one thread for each core it may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    if not args.peer_python:
        print(HOW_TO_ADD_PEER)
    report = report_head("neural_memory.py", args) | {"results": {}}
    for name in args.settings:
        report["results"][name] = compare(name, args)
        show(name, report["results"][name])
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
