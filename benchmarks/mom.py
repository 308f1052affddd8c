"""Times a training step (forward + backward) of a mixture of memories on CPU, beside its base layer and masked-dense.

    python benchmarks/mom.py
    python benchmarks/mom.py --base kda --output benchmarks/results/mom.json

Batch 4, 1024 tokens, width 256, 4 heads of 64, chunks of 64 tokens, convolution of 4 taps, output gate; the loss is the
mean squared output, for the mixtures with the balance loss. Timed are mixtures of 4 and of 16 memories, top-2 with a
shared memory; the base layer, one memory, on as many tokens as the mixture has copies (rows of 3 x 1024); and the
masked-dense form of the mixture of 4, in which every memory runs over all tokens and those of other memories have
beta 0 and gate 0. It has no convolution: a memory's own tokens do not stand side by side there.

All take turns in one process, so that whatever else the machine does falls on all of them; ratios are of the same turn.
The time of the processors is printed beside that of the clock.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

BATCH, TOKENS, DIM, HEADS, HEAD_DIM, CHUNK, CONV, TOP_K = 4, 1024, 256, 4, 64, 64, 4, 2
TARGETS = {"mom 4 / base": 1.5, "mom 16 / mom 4": 1.2}
RATIOS = (("mom 4", "base"), ("mom 16", "mom 4"), ("masked-dense 4", "mom 4"))


def masked_dense(module, x):
    """What a mixture of memories without a convolution computes, every memory run over all tokens.

    Tokens that a memory was not sent write nothing to it (key 0, beta 0) and do not let it decay (gate 0).
    """
    import jax
    import jax.numpy as jnp

    c, base, choice = module.config, module.base, module.route(x)
    q, total = module.query(x), 0.0
    assert c.own_projections and c.base.conv_width == 1, "the masked-dense form is that of own weights, unconvolved"
    state = module.init_state(len(x))

    def linears(project):
        return (project.down, project.up) if hasattr(project, "down") else (project,)

    def through(project, n):
        y = x
        for linear in linears(project):
            y = y @ linear.kernel[n]
        return y

    for n in range(c.states):
        chosen = choice.memory == n
        weight = jnp.sum(jnp.where(chosen, choice.weight, 0), axis=-1)
        sent = jnp.any(chosen, axis=-1)
        if n == c.memories:
            weight, sent = jnp.ones_like(weight), jnp.ones_like(sent)
        k, v = jnp.split(through(module.key_value, n), [c.base.widths[1]], axis=-1)
        heads = zip((q, k, v), (c.base.heads, c.base.heads, c.base.values[0]))
        q_n, k, v = base.features(*(y.reshape(*x.shape[:2], h, -1) for y, h in heads))
        terms = base.gates({name: through(p, n) for name, p in base.gate_projections().items()})
        mask = lambda y, sent=sent: jnp.where(sent.reshape(sent.shape + (1,) * (y.ndim - 2)), y, 0)  # noqa: E731
        own = state._replace(memory=tuple(m[:, n] for m in state.memory))
        read, _ = base.apply_operation(q_n, mask(k), v, jax.tree.map(mask, terms), own, None)
        total = total + weight.astype(read.dtype)[..., None, None] * read
    return base.project_read(x, total)


def configs(base_name: str) -> dict:
    """The mixers timed, by name."""
    import dataclasses

    from engrax.layers import MIXERS, MoMConfig

    shape = dict(heads=HEADS, head_dim=HEAD_DIM, value_dim=HEAD_DIM, chunk_size=CHUNK, conv_width=CONV)
    base = MIXERS[base_name](**shape, output_gate=True)
    mixture = MoMConfig(base=base, memories=4, top_k=TOP_K)
    return {
        "base": base,
        "mom 4": mixture,
        "mom 16": dataclasses.replace(mixture, memories=16),
        "masked-dense 4": dataclasses.replace(mixture, base=dataclasses.replace(base, conv_width=1)),
    }


def compile_step(name: str, config, seed: int):
    """Returns a function that runs one training step, and how many parameters it trains."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    graphdef, params = nnx.split(config.build(DIM, rngs=nnx.Rngs(seed)), nnx.Param)
    rows = (BATCH, TOKENS * (TOP_K + 1 if name == "base" else 1), DIM)
    x = jax.random.normal(jax.random.key(seed + 1), rows)

    def loss(params, x):
        module = nnx.merge(graphdef, params)
        y = masked_dense(module, x) if name.startswith("masked") else module(x)[0]
        return jnp.mean(y * y) + jnp.mean(module.auxiliary_loss(x))

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(params, x).compile()
    leaves = jax.tree.leaves(compiled(params, x))
    assert all(bool(jnp.isfinite(g).all()) for g in leaves), f"{name}: not finite"
    temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
    return lambda: jax.block_until_ready(compiled(params, x)), sum(p.size for p in jax.tree.leaves(params)), temporary


def compare(args) -> dict:
    """Runs all, turn by turn; returns times, parameters, temporary memory and ratios."""
    import jax
    import jaxlib
    from neural_memory import quantiles

    steps, result = {}, {"versions": {"jax": jax.__version__, "jaxlib": jaxlib.__version__}}
    for name, config in configs(args.base).items():
        steps[name], parameters, temporary = compile_step(name, config, args.seed)
        result[name] = {"parameters": parameters, "temp_mb": temporary}
    times: dict[str, list[float]] = {name: [] for name in steps}
    cpu_times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(args.warmup + args.runs):
        for name, step in steps.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            step()
            if turn >= args.warmup:
                times[name].append((time.perf_counter() - start) * 1e3)
                cpu_times[name].append((time.process_time() - cpu_start) * 1e3)
    for name in steps:
        result[name] |= {"ms": quantiles(times[name]), "cpu_ms": quantiles(cpu_times[name])}
    result["ratios"] = {}
    for a, b in RATIOS:
        name, ratios = f"{a} / {b}", [x / y for x, y in zip(times[a], times[b])]
        result["ratios"][name] = quantiles(ratios) | ({"target": TARGETS[name]} if name in TARGETS else {})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="gated_deltanet", help="the rule of the memories (default gated_deltanet)")
    parser.add_argument("--runs", type=int, default=15, help="timed runs of each (default 15)")
    parser.add_argument("--warmup", type=int, default=2, help="runs of each that are not counted (default 2)")
    parser.add_argument("--threads", type=int, default=2, help="threads (default 2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="write the figures as JSON to this file")
    parser.set_defaults(peer_python=None)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # XLA takes one thread for each core it may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    from neural_memory import report_head

    report = report_head("mom.py", args) | {"result": compare(args)}
    for name, r in report["result"].items():
        if "ms" in r:
            ms, spread = r["ms"], f"min {r['ms']['min']:.0f}, max {r['ms']['max']:.0f}"
            size = f"{r['parameters'] / 1e6:.2f} M parameters, XLA temporaries {r['temp_mb']:.0f} MB"
            print(f"{name:15} {ms['median']:8.1f} ms ({spread}), {r['cpu_ms']['median']:.0f} ms of CPU; {size}")
    for name, r in report["result"]["ratios"].items():
        target = f"; at most {r['target']} wanted" if "target" in r else ""
        print(f"{name:24} {r['median']:6.2f} x (min {r['min']:.2f}, max {r['max']:.2f}){target}")
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
