"""Which segments does HMT recall where two documents take turns? Those of the same document, at even ages.

    python benchmarks/hmt_interleaved.py --output benchmarks/results/hmt_interleaved.json \
        --plot docs/hmt_interleaved.png

A document is random within an alphabet of its own, 4 of 32 symbols; two take turns, segment by segment of 8 tokens. A
tiny HMT is trained in two stages with the same parameters, as in the paper: recall of the last memory on one document
a row (120 steps), then attention over the memories on two (240). Beside it the backbone with the same prompts and no
memory, 240 steps on two. New documents are read then: the loss on the first three tokens of segments whose document was
read before, and over 20 segments the weight of memories by age. The rule, written beforehand: the recall is periodic
where the 95 % interval (Student's t over the seeds) of the weight at even ages minus that at odd ones lies above 0.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402
from neural_memory import report_head  # noqa: E402
from small_training import SmallTraining  # noqa: E402

from engrax import models  # noqa: E402
from engrax.train import AdamWConfig, CosineConfig  # noqa: E402
from engrax.train.objective import score  # noqa: E402

LENGTH, SEGMENTS, MANY, VOCAB, ALPHABET = 8, 8, 20, 32, 4
ROWS, STEPS, SEEDS = 16, 120, 5
BEGIN = [n * LENGTH + i for n in range(2, SEGMENTS) for i in range(3)]  # of segments whose document was read before


def make_config():
    """HMT without sensory tokens: what it knows of the past is its memory."""
    from engrax.layers import AttentionConfig
    from engrax.models import HMTConfig, LanguageModelConfig

    attention = AttentionConfig(heads=2, head_dim=16)
    backbone = LanguageModelConfig(vocab_size=VOCAB, dim=32, mixers=(attention,), repeat=2, mlp_hidden=64)
    sizes = dict(segment_length=LENGTH, summary_tokens=LENGTH // 2, sensory_tokens=0)
    return HMTConfig(backbone=backbone, **sizes, cache_size=MANY, recall_width=32)


def documents(rng, rows: int = ROWS, segments: int = SEGMENTS, texts: int = 2) -> np.ndarray:
    """Rows of random symbols [rows, segments * LENGTH]: `texts` documents, each with an alphabet, take turns."""
    alphabets = np.argsort(rng.random((rows, texts, VOCAB)), axis=2)[:, np.arange(segments) % texts, :ALPHABET]
    drawn = rng.integers(0, ALPHABET, (rows, segments, LENGTH))
    return np.take_along_axis(alphabets, drawn, axis=2).reshape(rows, -1).astype(np.int32)


def losses(graphdef, params, text):
    """Nats of every next token."""
    targets = jnp.pad(text[:, 1:], ((0, 0), (0, 1)), constant_values=-1)
    return score(nnx.merge(graphdef, params), {"tokens": text, "targets": targets}).nats[:, :-1]


class Trainer:
    """One recall's compiled training: `trainer(params, seed, texts)`."""

    def __init__(self, config, steps: int):
        self.graphdef = nnx.split(nnx.eval_shape(lambda: models.build(config, rngs=nnx.Rngs(0))), nnx.Param)[0]
        self.steps = steps
        schedule = CosineConfig(warmup_steps=steps // 10, final_fraction=0.02)
        adam = AdamWConfig(learning_rate=1e-2, schedule=schedule, b2=0.999, weight_decay=0.0, clip_norm=0.0)
        training = SmallTraining(adam, steps, lambda params, text: losses(self.graphdef, params, text).mean())
        self.run = jax.jit(lambda params, rows: training.run(training.start(params), rows)[0]["params"])

    def __call__(self, params, rng, texts: int):
        return self.run(params, jnp.asarray(np.stack([documents(rng, texts=texts) for _ in range(self.steps)])))


def by_age(weights: np.ndarray) -> list[float]:
    """Mean weight of the memory of age 1, 2, ... over the later half of the segments."""
    late = range(len(weights) // 2, len(weights))
    return [float(np.mean([weights[n, n - age] for n in late])) for age in range(1, len(weights) // 2)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"trainings of each (default {SEEDS})")
    parser.add_argument("--output", help="write the figures as JSON to this file")
    parser.add_argument("--plot", help="write the weight of the recall as PNG to this file")
    args = parser.parse_args(namespace=argparse.Namespace(peer_python=None, runs=1))

    if args.seeds < 2:
        parser.error("--seeds: an interval needs two or more.")

    from engrax.evals import plots
    from engrax.evals import statistics as stats

    config = make_config()
    change = dataclasses.replace
    first, second, without = (
        Trainer(change(config, recall=recall), steps)
        for recall, steps in (("last", STEPS), ("attention", 2 * STEPS), ("off", 2 * STEPS))
    )
    init = jax.jit(lambda key: nnx.state(models.build(config, rngs=nnx.Rngs(key)), nnx.Param))
    trainers = {"HMT": second, "off": without}
    read = {kind: jax.jit(lambda p, x, g=t.graphdef: losses(g, p, x)) for kind, t in trainers.items()}
    look = jax.jit(lambda p, x: nnx.merge(second.graphdef, p)(x, collect=("hmt",)).collected["hmt.recall"][0])
    found, heats = [], []
    for seed in range(args.seeds):
        rng = np.random.default_rng(seed)
        params = init(jax.random.key(seed))
        trained = {"HMT": second(first(params, rng, 1), rng, 2), "off": without(params, rng, 2)}
        test, begin = documents(rng, rows=128), np.array(BEGIN) - 1
        nats = {kind: float(np.mean(read[kind](p, test)[:, begin])) for kind, p in trained.items()}
        heats.append(np.asarray(look(trained["HMT"], documents(rng, segments=MANY))))
        ages = by_age(heats[-1])
        even, odd = float(np.mean(ages[1::2])), float(np.mean(ages[0::2]))
        found.append({"nats": nats, "recall_by_age": ages, "even": even, "odd": odd})
        losses_said = f"{nats['HMT']:.2f} nats, {nats['off']:.2f} without"
        print(f"seed {seed}: {losses_said}; weight {even:.3f} even, {odd:.3f} odd", flush=True)
    few = lambda values: stats.mean_of_few(np.array(values)).to_dict()  # noqa: E731
    args.seed = list(range(args.seeds))
    report = report_head("hmt_interleaved.py", args) | {
        "seeds": found,
        "even_minus_odd": few([f["even"] - f["odd"] for f in found]),
        "nats_saved": few([f["nats"]["off"] - f["nats"]["HMT"] for f in found]),
    }
    report["periodic"] = report["even_minus_odd"]["low"] > 0
    print({name: report[name] for name in ("even_minus_odd", "nats_saved", "periodic")})
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        panels = {"seed 0": heats[0], f"mean of {args.seeds} seeds": np.mean(heats, axis=0)}
        labels = ("recalled segment", "segment that begins")
        Path(args.plot).write_bytes(plots.heat_maps("Two documents in turns: the recall", *labels, panels))


if __name__ == "__main__":
    main()
