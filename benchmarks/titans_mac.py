"""Times a training step (forward + backward) of Titans MAC on CPU, beside titans-pytorch where its Python is given.

    python benchmarks/titans_mac.py
    python benchmarks/titans_mac.py --peer-python PEER/bin/python --output benchmarks/results/titans_mac.json

Width 256, 2 layers, segments of 128 tokens, 4 persistent tokens, memories of 4 heads of 64 (64 -> 256 -> 64), 513
bytes, one row, next-token loss. engrax runs the paper's memory as context, causal: retrieval, attention over what was
retrieved, a memory with step size, momentum and forgetting per token whose gradients are taken at the starts of chunks
of 64 tokens. titans-pytorch's MemoryAsContextTransformer adds its memory's output to the stream before the attention,
and takes all gradients at the initial weights. The two take turns, as in benchmarks/neural_memory.py, whose protocol
this is. After each step engrax's process multiplies two large matrices: at that speed the step's matrix products alone
take the time printed as the floor.
"""

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from neural_memory import HOW_TO_ADD_PEER, Peer, floor, product_timer, products_gflop, quantiles, report_head  # noqa: E402

TOKENS, DIM, DEPTH, SEGMENT, PERSISTENT, HEADS, HEAD_DIM = 513, 256, 2, 128, 4, 4, 64
MLP = DIM * 4 * 2 // 3  # as titans-pytorch's gated feed-forward network has it
TARGET = 3.0
PEER = dict(
    num_tokens=256,
    dim=DIM,
    depth=DEPTH,
    segment_len=SEGMENT,
    num_persist_mem_tokens=PERSISTENT,
    num_longterm_mem_tokens=16,
    neural_memory_kwargs=dict(dim_head=HEAD_DIM, heads=HEADS),
)


def make_model():
    """Returns the config of engrax's model."""
    from engrax.layers import MACConfig, TitansConfig
    from engrax.models import TitansMACConfig

    memory = TitansConfig(heads=HEADS, head_dim=HEAD_DIM, hidden=4 * HEAD_DIM, chunk_size=64)
    attention = dict(heads=8, head_dim=64, chunk_size=SEGMENT, persistent_tokens=PERSISTENT)
    return TitansMACConfig(dim=DIM, repeat=DEPTH, mlp_hidden=MLP, mixers=(MACConfig(memory=memory, **attention),))


def serve_engrax() -> None:
    """Answers the peer protocol for engrax."""
    import jax
    import jax.numpy as jnp
    import jaxlib
    from flax import nnx

    from engrax import models
    from engrax.train.objective import score

    jax.config.update("jax_cpu_enable_async_dispatch", False)  # as the training loop does, see train/host.py
    compiled = params = tokens = count = gflop = None
    speed = product_timer()
    for line in sys.stdin:
        request = json.loads(line)
        if "build" in request:
            graphdef, params = nnx.split(models.build(make_model(), rngs=nnx.Rngs(request["seed"])), nnx.Param)
            tokens = jax.random.randint(jax.random.key(1), (1, request["seq"]), 0, 256)

            def loss(params, tokens, graphdef=graphdef):
                batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
                return jnp.mean(score(nnx.merge(graphdef, params), batch).nats)

            step = jax.value_and_grad(loss)
            compiled, gflop = jax.jit(step).lower(params, tokens).compile(), products_gflop(step, params, tokens)
            value, grads = compiled(params, tokens)
            assert all(bool(jnp.isfinite(g).all()) for g in (value, *jax.tree.leaves(grads))), "not finite"
            count = sum(leaf.size for leaf in jax.tree.leaves(params))
            answer = {"versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__}}
        else:
            start = time.perf_counter()
            jax.block_until_ready(compiled(params, tokens))
            ms = (time.perf_counter() - start) * 1e3
            rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            answer = {"ms": ms, "rss_mb": rss, "parameters": count, "gflop": gflop, "gflop_per_s": speed()}
        print(json.dumps(answer), flush=True)


def compare(args) -> dict:
    """Runs both, turn by turn; returns times, parameters and ratios."""
    build = dict(seq=TOKENS, threads=args.threads, seed=args.seed)
    engines = {"engrax": Peer([sys.executable, __file__, "--serve"], build={}, **build)}
    if args.peer_python:
        script = str(Path(__file__).with_name("titans_pytorch_peer.py"))
        engines["titans-pytorch"] = Peer([args.peer_python, script], build=PEER, **build)
    times: dict[str, list[float]] = {engine: [] for engine in engines}
    result: dict = {"versions": {}}
    answers: list[dict] = []
    for turn in range(args.warmup + args.runs):
        for engine, process in engines.items():
            answer = process.ask(run=True)
            result[engine] = {"rss_mb": answer["rss_mb"], "parameters": answer["parameters"]}
            if turn >= args.warmup:
                times[engine].append(answer["ms"])
            if engine == "engrax":
                answers.append(answer)
    result["floor"] = floor(answers)
    for engine, process in engines.items():
        result[engine]["ms"] = quantiles(times[engine])
        result["versions"] |= process.versions
        process.close()
    if args.peer_python:
        ratios = [b / a for a, b in zip(times["engrax"], times["titans-pytorch"])]
        result["ratio"] = quantiles(ratios) | {"target": TARGET}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="a Python that has torch and titans-pytorch")
    parser.add_argument("--runs", type=int, default=15, help="timed runs of each engine (default 15)")
    parser.add_argument("--warmup", type=int, default=3, help="runs of each engine that are not counted (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="threads of each engine (default 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="write the figures as JSON to this file")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve_engrax()
    if hasattr(os, "sched_setaffinity"):  # both engines inherit it; XLA takes one thread for each core it may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    if not args.peer_python:
        print(HOW_TO_ADD_PEER)
    report = report_head("titans_mac.py", args) | {"result": compare(args)}
    for engine in ("engrax", "titans-pytorch"):
        if engine in report["result"]:
            r = report["result"][engine]
            ms, size = r["ms"], r["parameters"] / 1e6
            spread = f"min {ms['min']:.1f}, max {ms['max']:.1f}"
            print(f"{engine:15} {ms['median']:8.1f} ms ({spread}); {size:.1f} M parameters")
    r = report["result"]["floor"]
    print(f"floor           {r['ms']:8.1f} ms ({r['gflop']:.1f} GFLOP at the fastest product's speed)")
    if "ratio" in report["result"]:
        r = report["result"]["ratio"]
        print(f"ratio           {r['median']:8.2f} x  (min {r['min']:.2f}, max {r['max']:.2f}); target {TARGET} x")
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
