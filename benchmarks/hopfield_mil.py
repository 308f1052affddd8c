"""Multiple-instance learning on bit patterns: Hopfield pooling beside mean, max and gated-attention pooling.

    python benchmarks/hopfield_mil.py --output benchmarks/results/hopfield_mil.json
    python benchmarks/hopfield_mil.py --instances 64 --output benchmarks/results/hopfield_mil_64.json

Bags of 16 (or 64) patterns of 8 bits are positive where one pattern is among 8 signals; bag labels alone are shown
(engrax.data.BitPatterns). All models are engrax.models.hopfield_sets.SetClassifier with the same embedding and as many
parameters, to 0.5 %. The rule, written beforehand: the same three learning rates for each, the best on 1024 bags chosen
by seed 0, then three seeds at it, judged on 2048 other bags; the interval of a difference in accuracy to Hopfield
pooling with one update is a bootstrap over seeds and bags (95 %, 10,000 draws), and a difference counts where it
excludes 0, else it reads "inconclusive".
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from engrax.data import BitPatterns
from engrax.layers import HopfieldSettings
from engrax.models.hopfield_sets import SetClassifierConfig

sys.path.insert(0, str(Path(__file__).parent))

from neural_memory import report_head  # noqa: E402

LEARNING_RATES = (1e-3, 3e-3, 1e-2)
SEEDS = (0, 1, 2)
CHOOSING, DRAWS, BATCH, WEIGHT_DECAY = 1024, 10_000, 128, 0.01
ONCE, THRICE = (HopfieldSettings(heads=4, head_dim=8, steps=steps) for steps in (1, 3))
MODELS = {
    "Hopfield, 1 update": SetClassifierConfig(pooling="hopfield", hopfield=ONCE),
    "Hopfield, 3 updates": SetClassifierConfig(pooling="hopfield", hopfield=THRICE),
    "mean": SetClassifierConfig(pooling="mean", width=94),
    "max": SetClassifierConfig(pooling="max", width=94),
    "gated attention": SetClassifierConfig(pooling="gated_attention", width=34),
}
BASELINE = "Hopfield, 1 update"


@partial(jax.jit, static_argnames=("config", "steps"))
def train(config, steps, learning_rate, seed, bags, labels):
    """Returns the parameters after `steps` steps of AdamW with a cosine schedule, and the last losses."""
    graph, params = nnx.split(config.build(rngs=nnx.Rngs(jax.random.key(seed))), nnx.Param)
    # The schedule is a factor, so that one program serves all learning rates.
    schedule = optax.cosine_decay_schedule(1.0, steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.scale_by_adam(),
        optax.add_decayed_weights(WEIGHT_DECAY),
        optax.scale_by_schedule(schedule),
    )

    def loss(params, batch):
        logits = nnx.merge(graph, params)(bags[batch])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]))

    def step(carry, key):
        params, state = carry
        batch = jax.random.randint(key, (BATCH,), 0, len(bags))
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return (jax.tree.map(lambda p, u: p - learning_rate * u, params, updates), state), value

    keys = jax.random.split(jax.random.key(seed), steps)
    (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), keys)
    return params, losses[-50:].mean()


@partial(jax.jit, static_argnames="config")
def correct(config, params, bags, labels):
    """Whether every bag is classified rightly."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))), nnx.Param)
    return jnp.argmax(nnx.merge(graph, params)(bags), axis=-1) == labels


def prepare(task, split, count):
    bags, labels = task.generate(split, np.arange(count))
    return jnp.asarray(2.0 * bags - 1, jnp.float32), jnp.asarray(labels, jnp.int32)


def interval(right, other, rng):
    """The difference in accuracy and its 95 % interval; right, other: [seeds, bags], the same bags."""
    seeds, bags = right.shape
    found = []
    for _ in range(DRAWS // 100):  # a hundred draws of bags for every draw of seeds, which are few
        a, b = (x[rng.integers(0, seeds, seeds)].mean(axis=0) for x in (right, other))
        found.append((a - b)[rng.integers(0, bags, (100, bags))].mean(axis=1))
    low, high = np.quantile(np.concatenate(found), (0.025, 0.975))
    return float(right.mean() - other.mean()), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000, help="training steps of 128 bags (default 2000: 125 epochs)")
    parser.add_argument("--instances", type=int, default=16, help="patterns in a bag (default 16)")
    parser.add_argument("--output", help="write the figures as JSON to this file")
    args = parser.parse_args()
    task = BitPatterns(instances=args.instances, validation_examples=CHOOSING + 2048)
    training, held = prepare(task, "train", task.train_examples), prepare(task, "validation", task.validation_examples)
    choosing, judging = ([x[part] for x in held] for part in (slice(CHOOSING), slice(CHOOSING, None)))
    rows, right = {}, {}
    for name, config in MODELS.items():
        begin = time.perf_counter()
        run = partial(train, config, args.steps)
        tried = {rate: run(rate, 0, *training)[0] for rate in LEARNING_RATES}
        grid = {rate: float(correct(config, p, *choosing).mean()) for rate, p in tried.items()}
        best = max(grid, key=grid.get)
        trained = [tried[best] if seed == 0 else run(best, seed, *training)[0] for seed in SEEDS]
        right[name] = np.stack([correct(config, p, *judging) for p in trained]).astype(float)
        count = sum(x.size for x in jax.tree.leaves(trained[0]))
        rows[name] = dict(parameters=count, grid=grid, learning_rate=best, accuracy=right[name].mean(axis=1).tolist())
        rows[name]["seconds"] = time.perf_counter() - begin
        print(f"{name:20} {count} parameters, learning rate {best}: {rows[name]['accuracy']}", flush=True)
    rng = np.random.default_rng(0)
    for name in MODELS:
        if name != BASELINE:
            difference, low, high = interval(right[BASELINE], right[name], rng)
            verdict = "inconclusive" if low <= 0 <= high else f"Hopfield is {'better' if low > 0 else 'worse'}"
            rows[name] |= {"hopfield_minus_this": {"mean": difference, "low": low, "high": high}, "verdict": verdict}
            print(f"Hopfield - {name}: {difference:+.4f} [{low:+.4f}, {high:+.4f}]: {verdict}")
    args.peer_python, args.seed, args.runs = None, list(SEEDS), len(SEEDS)
    report = report_head("hopfield_mil.py", args) | {
        "steps": args.steps,
        "instances": args.instances,
        "chance": task.chance,
        "rows": rows,
    }
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
