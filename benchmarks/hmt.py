"""Times HMT's inference per segment, and counts its state's bytes, from 1 to 100 segments of a document.

    python benchmarks/hmt.py [--backbone-dim 256] [--runs 30] [--output benchmarks/results/hmt.json]

A document of 100 segments is read segment by segment. The state is counted after every one. Then a segment is read
after the first and after the hundredth segment, by turns: the ratio is the median over the turns, with its range.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from neural_memory import quantiles, report_head  # noqa: E402

SEGMENTS, TARGET = 100, 1.2


def make_model(dim: int):
    """HMT with the published proportions around a small backbone."""
    from engrax.layers import AttentionConfig
    from engrax.models import HMTConfig, LanguageModelConfig

    attention = AttentionConfig(heads=dim // 32, head_dim=32)
    backbone = LanguageModelConfig(dim=dim, mixers=(attention,), repeat=4)
    return HMTConfig(
        backbone=backbone,
        segment_length=128,
        summary_tokens=64,
        sensory_tokens=32,
        cache_size=300,
        recall_width=dim,
    )


def measure(dim: int, runs: int, seed: int) -> dict:
    """Bytes of the state after each segment, and milliseconds of a segment early and late in the document."""
    import jax
    import numpy as np
    from flax import nnx

    from engrax import models

    config = make_model(dim)
    graphdef, params = nnx.split(models.build(config, rngs=nnx.Rngs(seed)), nnx.Param)
    read = jax.jit(lambda params, tokens, state: nnx.merge(graphdef, params)(tokens, state)[:2])
    tokens = np.random.default_rng(seed).integers(0, 256, (SEGMENTS, 1, config.segment_length)).astype(np.int32)
    state = jax.jit(lambda params: nnx.merge(graphdef, params).init_memory(1))(params)
    states, sizes = [], []
    for segment in tokens:
        _, state = read(params, segment, state)
        sizes.append(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        states.append(state)
    jax.block_until_ready(state)

    def milliseconds(state):
        begun = time.perf_counter()
        jax.block_until_ready(read(params, tokens[0], state))
        return 1e3 * (time.perf_counter() - begun)

    pairs = [(milliseconds(states[0]), milliseconds(states[-1])) for _ in range(runs)]
    return {
        "segment_length": config.segment_length,
        "state_bytes": {"after_1": sizes[0], "after_100": sizes[-1], "constant": len(set(sizes)) == 1},
        "memories_held": [int(states[n].memory.count[0]) for n in (0, SEGMENTS - 1)],
        "ms_after_1": quantiles([a for a, _ in pairs]),
        "ms_after_100": quantiles([b for _, b in pairs]),
        "ratio": quantiles([b / a for a, b in pairs]) | {"target": TARGET},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone-dim", type=int, default=256, help="width of the backbone, a multiple of 32")
    parser.add_argument("--runs", type=int, default=30, help="turns (default 30)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="write the figures as JSON to this file")
    args = parser.parse_args(namespace=argparse.Namespace(peer_python=None))
    report = report_head("hmt.py", args) | {"result": measure(args.backbone_dim, args.runs, args.seed)}
    result = report["result"]
    size = result["state_bytes"]
    print(f"state bytes: {size['after_1']:,} after 1 segment, {size['after_100']:,} after 100")
    for when in ("ms_after_1", "ms_after_100"):
        spread = f"min {result[when]['min']:.1f}, max {result[when]['max']:.1f}"
        print(f"{when:13} {result[when]['median']:8.1f} ms ({spread})")
    ratio = result["ratio"]
    print(f"ratio {ratio['median']:.3f} (min {ratio['min']:.3f}, max {ratio['max']:.3f}); target {TARGET}")
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
