"""Multiple-instance learning on bit patterns: Hopfield pooling beside mean, max and gated-attention pooling.

    python benchmarks/hopfield_mil.py --output benchmarks/results/hopfield_mil.json --plot docs/hopfield_mil.png
    python benchmarks/hopfield_mil.py --instances 64 --bags 256 2048

Bags of 16 (or 64) patterns of 8 bits are positive where one pattern is among 8 signals; bag labels alone are shown
(engrax.data.BitPatterns). With 2048 training bags several poolings make next to no mistake, which tells nothing of
them: accuracy is measured against the number of training bags. All models are
engrax.models.set_classifier.SetClassifier with the same embedding and as many parameters, to 0.5 %.

The rule, written before the run. For each pooling and number of bags: the learning rates 3e-4 to 3e-2 with seed 0, and
as long as the best of them ends this grid, the next one too. The best on 1024 held-out bags (equal ones: the lower
cross-entropy) is retrained with seeds 1 to 5; only these are judged, on 2048 other held-out bags. Every seed has an
initialisation, an order and training bags of its own, the same bags for all poolings. Intervals and verdicts are those
of engrax.evals.verdicts: a bootstrap over seeds and judged bags with Student's t, "inconclusive" where the difference
to Hopfield pooling with one update may be 0. The target, to be ahead of mean and max pooling, is judged on the accuracy
averaged over the numbers of bags, the others stand beside it.
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
from engrax.evals import plots
from engrax.evals.comparison import Row
from engrax.evals.trials import Score
from engrax.evals.verdicts import Bootstrap, holm
from engrax.layers import AssociationConfig
from engrax.models.parameters import declare_roles
from engrax.models.set_classifier import SetClassifierConfig
from engrax.train import AdamWConfig, CosineConfig

sys.path.insert(0, str(Path(__file__).parent))

from neural_memory import report_head  # noqa: E402
from small_training import SmallTraining  # noqa: E402

LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
GRID = LEARNING_RATES[2:7]  # and what lies beside its best, until the best has neighbours
BAGS, MEAN = (128, 256, 512, 1024, 2048), "mean"  # of training bags; over their numbers
CHOOSING_SEED, JUDGED_SEEDS = 0, (1, 2, 3, 4, 5)
CHOOSING, JUDGING, BATCH = 1024, 2048, 128
OPTIMIZER = AdamWConfig(  # a learning rate of the grid is the factor of 1
    learning_rate=1.0, schedule=CosineConfig(warmup_steps=0, final_fraction=0.0), b2=0.999, weight_decay=0.01
)
ONCE, THRICE = (AssociationConfig(heads=4, head_dim=8, steps=steps) for steps in (1, 3))
MODELS = {
    "Hopfield, 1 update": SetClassifierConfig(pooling="hopfield", hopfield=ONCE),
    "Hopfield, 3 updates": SetClassifierConfig(pooling="hopfield", hopfield=THRICE),
    "mean": SetClassifierConfig(pooling="mean", width=94),
    "max": SetClassifierConfig(pooling="max", width=94),
    "gated attention": SetClassifierConfig(pooling="gated_attention", width=34),
}
BASELINE = "Hopfield, 1 update"


@partial(jax.jit, static_argnames=("config", "steps"))
def train(config, steps, count, learning_rate, seed, bags, labels):
    """Returns the parameters after `steps` steps of AdamW with a cosine schedule on the first `count` bags."""
    model = declare_roles(config.build(rngs=nnx.Rngs(jax.random.key(seed))))
    graph, params = nnx.split(model, nnx.Param)

    def loss(params, batch):
        logits = nnx.merge(graph, params)(bags[batch])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]))

    training = SmallTraining(OPTIMIZER, steps, loss)
    batches = jax.random.randint(jax.random.key(seed), (steps, BATCH), 0, count)
    return training.run(training.start(params), batches, learning_rate)[0]["params"]


@partial(jax.jit, static_argnames="config")
def score(config, params, bags, labels):
    """Returns whether every bag is classified rightly, and the mean cross-entropy."""
    model = nnx.eval_shape(lambda: declare_roles(config.build(rngs=nnx.Rngs(0))))
    graph, _ = nnx.split(model, nnx.Param)
    logits = nnx.merge(graph, params)(bags)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.argmax(logits, axis=-1) == labels, jnp.mean(loss)


def prepare(task, split, indices):
    bags, labels = task.generate(split, indices)
    return jnp.asarray(2.0 * bags - 1, jnp.float32), jnp.asarray(labels, jnp.int32)


def measure(name, count, steps, training, choosing, judging):
    """Returns the row of a pooling trained on `count` bags: the grid with one seed, the judged seeds at its best."""
    config, run = MODELS[name], partial(train, MODELS[name], steps, count)
    grid, missing = {}, GRID
    while missing:
        for rate in missing:
            right, loss = score(config, run(rate, CHOOSING_SEED, *training[CHOOSING_SEED]), *choosing)
            grid[rate] = float(right.mean()), -float(loss)
        best = max(grid, key=grid.get)
        place = LEARNING_RATES.index(best)
        missing = [rate for rate in LEARNING_RATES[max(place - 1, 0) : place + 2] if rate not in grid]
    judged = []
    for seed in JUDGED_SEEDS:
        right, _ = score(config, run(best, seed, *training[seed]), *judging)
        judged.append(Score(np.asarray(right, float), np.ones(len(right))))
    return Row(name, best, {rate: grid[rate][0] for rate in sorted(grid)}, tuple(judged), {})


def averaged(rows):
    """Returns one pooling's row whose scores are the mean over the numbers of bags, seed by seed."""
    sums = np.mean([[score.sums for score in row.scores] for row in rows], axis=0)
    scores = tuple(Score(x, np.ones(len(x))) for x in sums)
    return Row(rows[0].name, None, {}, scores, {})


def judge(rows):
    """Returns for every pooling what the rule says of rows that were trained on as many bags."""
    drawn, found = Bootstrap(rows), {}
    others = [row.name for row in rows if row.name != BASELINE]
    says = dict(zip(others, holm(drawn, [(BASELINE, name) for name in others], higher_is_better=True)))
    for row in rows:
        found[row.name] = {
            "learning_rate": row.learning_rate,
            "at_edge": row.learning_rate in (LEARNING_RATES[0], LEARNING_RATES[-1]),
            "grid": row.grid,
            "accuracy_by_seed": [score.mean for score in row.scores],
            "accuracy": vars(drawn.score(row.name)),
        }
        if row.name != BASELINE:
            difference = drawn.difference(BASELINE, row.name)
            words = {"better": "Hopfield is better", "worse": "Hopfield is worse"}
            said = says[row.name]
            found[row.name] |= {"hopfield_minus_this": vars(difference), "verdict": words.get(said, said)}
    return found


def plot(results, bags, instances):
    """Returns a PNG of accuracy against the number of training bags, with its intervals."""
    title = f"Which bags of {instances} bit patterns hold a signal? Mean of {len(JUDGED_SEEDS)} seeds, 95 % intervals"
    with plots.canvas(title) as drawn:
        axis = drawn.axes[0, 0]
        for i, (name, colour) in enumerate(zip(MODELS, plots.SERIES)):
            found = [results[str(n)][name]["accuracy"] for n in bags]
            middle = np.array([100 * x["value"] for x in found])
            ends = np.array([[100 * x["low"], 100 * x["high"]] for x in found]).T
            places = np.array(bags) * 1.03 ** (i - len(MODELS) // 2)  # side by side
            errors = np.abs(ends - middle)
            axis.errorbar(places, middle, errors, color=colour, label=name, marker="o", markersize=4, capsize=2.5)
        axis.axhline(50, color=plots.GREY, linestyle="--", linewidth=1.1, label="chance")
        axis.set_xscale("log", base=2)
        axis.set_xticks(bags, [f"{n:,}" for n in bags])
        axis.set_xlabel("training bags")
        axis.set_ylabel("accuracy on 2,048 other bags, %")
        axis.legend(loc=(0.76, 0.14), fontsize=9)
    return drawn.png


def show(number, results):
    """Prints the table of one number of bags, as docs/hopfield.md has it."""
    print(f"\n{number} training bags")
    for name, r in results.items():
        rate = "" if r["learning_rate"] is None else f" | {r['learning_rate']:g}{'*' if r['at_edge'] else ''}"
        seeds = ", ".join(f"{100 * x:.1f}" for x in r["accuracy_by_seed"])
        line = f"| {name}{rate} | {seeds} | {points(r['accuracy'])} |"
        if name != BASELINE:
            line += f" {points(r['hopfield_minus_this'], '+')} | {r['verdict']} |"
        print(line, flush=True)


def parameters(config) -> int:
    model = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def points(x, sign=""):
    value, low, high = (f"{100 * x[key]:{sign}.1f}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="training steps of 128 bags (default 1000)")
    parser.add_argument("--instances", type=int, default=16, help="patterns in a bag (default 16)")
    parser.add_argument("--bags", type=int, nargs="+", default=BAGS, help=f"numbers of training bags (default {BAGS})")
    parser.add_argument("--output", help="write the figures as JSON to this file")
    parser.add_argument("--plot", help="write accuracy against training bags as PNG to this file")
    args = parser.parse_args()
    most = max(args.bags)
    task = BitPatterns(instances=args.instances)
    seeds = (CHOOSING_SEED, *JUDGED_SEEDS)
    training = {seed: prepare(task, "train", seed * most + np.arange(most)) for seed in seeds}
    held = prepare(task, "validation", np.arange(CHOOSING + JUDGING))
    choosing, judging = ([x[part] for x in held] for part in (slice(CHOOSING), slice(CHOOSING, None)))
    begin, rows, results = time.process_time(), {}, {}
    for count in args.bags:
        rows[count] = [measure(name, count, args.steps, training, choosing, judging) for name in MODELS]
        results[str(count)] = judge(rows[count])
        show(count, results[str(count)])
    results[MEAN] = judge([averaged(column) for column in zip(*rows.values())])
    show("Mean over the numbers of", results[MEAN])
    args.peer_python, args.seed, args.runs = None, seeds, len(JUDGED_SEEDS)
    report = report_head("hopfield_mil.py", args) | {
        "steps": args.steps,
        "instances": args.instances,
        "chance": task.chance,
        "parameters": {name: parameters(config) for name, config in MODELS.items()},
        "processor_seconds": time.process_time() - begin,
        "results": results,
    }
    if args.output:
        Path(args.output).write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        Path(args.plot).write_bytes(plot(results, args.bags, args.instances))


if __name__ == "__main__":
    main()
