"""Which set comes first: recall of a small causal state, read once, read twice (JRT-Prompt), and of JRT-RNN.

    python benchmarks/set_disjointness.py --output benchmarks/results/set_disjointness.json --plot docs/recall.png

About a quarter of an hour of one core. A run that is in the output already is not trained again.

The task is that of "Just read twice" (arXiv 2407.05483; engrax.data.SetDisjointness): two sets of 28 elements together,
one element in both, which is asked for at the end. Rows of all sizes of the first set are trained on together, and
scored apart. Three ways to read, at the same layers, width, and numbers of state:

    read once      Based's linear attention, causal
    read twice     the same model on rows that show both sets twice (JRT-Prompt)
    prefix         prefix linear attention (JRT-RNN): all tokens but the question are its prefix

The rule, written beforehand: the same three learning rates for each, the best by its accuracy with seed 0 on that
seed's own rows, then judged seeds at it, each scored on rows of its own. The gap of a way to read is its accuracy with
the smaller set first minus that with the larger first, a mean over sizes. "The order matters when read once" and "it
matters less when ..." hold where the 95 % interval over seeds (Student's t; Welch's for differences) of the gap, or of
the difference of gaps, lies above 0; they are contradicted where it lies below 0; else they are inconclusive.
"""

import argparse
import dataclasses
import json
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from engrax import models
from engrax.data import SetDisjointness
from engrax.layers import MIXERS
from engrax.models import LanguageModelConfig
from engrax.train import AdamWConfig, CosineConfig, objective

sys.path.insert(0, str(Path(__file__).parent))

from neural_memory import report_head  # noqa: E402
from small_training import SmallTraining  # noqa: E402

LEARNING_RATES = (3e-3, 7e-3, 1.6e-2)
TOTAL, FIRST = 28, (2, 4, 8, 14, 20, 24, 26)  # elements of both sets, of the first
VOCAB, BATCH, POOL, SCORED = 48, 64, 8192, 512  # tokens; rows of a step, of training and of scoring for each size
WARMUP, WEIGHT_DECAY = 0.1, 0.01  # part of the steps
LAYERS, DIM, MLP = 2, 32, 64
STATE = dict(heads=2, head_dim=2, chunk_size=64)  # 6 features a head, 12 a layer: fewer than the larger set's elements


@dataclasses.dataclass(frozen=True)
class Reading:
    """A way to read: the mixer of every layer, and how often the row shows the sets."""

    mixer: str
    value_dim: int  # a prefix has a state of its own, as large as the causal one: half the values make them equal
    passes: int = 1
    settings: tuple = ()

    def model(self) -> LanguageModelConfig:
        """The whole model."""
        mixer = MIXERS[self.mixer](value_dim=self.value_dim, **STATE, **dict(self.settings))
        return LanguageModelConfig(vocab_size=VOCAB, dim=DIM, mixers=(mixer,), repeat=LAYERS, mlp_hidden=MLP)


READINGS = {
    "read once": Reading("based", 15),
    "read twice": Reading("based", 15, passes=2),
    "prefix": Reading("prefix_linear_attention", 7, settings=(("prefix", TOTAL + 1),)),
}


def rows(passes: int, seed: int, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [sizes, count, T] and answers [sizes, count] of every size of the first set."""
    tokens, answers = [], []
    for first in FIRST:
        sizes = {"small": min(first, TOTAL - first), "large": max(first, TOTAL - first)}
        order = "small_first" if first <= TOTAL // 2 else "large_first"
        length = passes * (TOTAL + 2)
        task = SetDisjointness(seq_len=length, vocab_size=VOCAB, order=order, num_passes=passes, seed=seed, **sizes)
        shown, targets = task.generate(split, np.arange(count))
        tokens.append(shown)
        answers.append(targets[:, -1])
    return np.stack(tokens), np.stack(answers)


def ask(graph, params, tokens, answers) -> objective.Score:
    """The score of rows whose last token, the question, alone has a label."""
    targets = jnp.full(tokens.shape, -1).at[:, -1].set(answers)
    return objective.score(nnx.merge(graph, params), {"tokens": tokens, "targets": targets})


def make_trainer(reading: Reading, steps: int, every: int = 50):
    """(start(seed) -> state, advance(state, rate, tokens, answers) -> state after `every` steps and their mean loss,
    score(state, tokens, answers) -> accuracy)."""
    config = reading.model()
    graph = nnx.graphdef(nnx.eval_shape(lambda: models.build(config, rngs=nnx.Rngs(0))))
    schedule = CosineConfig(warmup_steps=int(WARMUP * steps), final_fraction=0.0)
    # A learning rate of the grid is the factor of 1.
    optimizer = AdamWConfig(learning_rate=1.0, schedule=schedule, weight_decay=WEIGHT_DECAY)
    training = SmallTraining(optimizer, steps, lambda p, batch: jnp.sum(ask(graph, p, *batch).nats) / BATCH)

    @jax.jit
    def start(seed):
        params = nnx.state(models.build(config, rngs=nnx.Rngs(jax.random.key(seed))), nnx.Param)
        return training.start(params), jax.random.key(1000 + seed)

    @partial(jax.jit, donate_argnums=0)
    def advance(state, rate, tokens, answers):
        inner, key = state
        key, drawn = jax.random.split(key)
        index = jax.random.randint(drawn, (every, BATCH), 0, len(tokens))
        inner, losses = training.run(inner, (tokens[index], answers[index]), rate)
        return (inner, key), jnp.mean(losses)

    @jax.jit
    def score(state, tokens, answers):
        return jnp.mean(ask(graph, state[0]["params"], tokens, answers).correct[:, -1])

    return start, advance, score


def train_and_score(trainer, reading: Reading, steps: int, rate: float, seed: int, every: int = 50) -> dict:
    """One training: accuracy by the size of the first set, mean loss of the last steps, seconds of processor time."""
    start, advance, score = trainer
    tokens, answers = rows(reading.passes, seed, "train", POOL)
    tokens, answers = tokens.reshape(-1, tokens.shape[-1]), answers.reshape(-1)
    begun, state = time.process_time(), start(seed)
    for _ in range(steps // every):
        state, loss = advance(state, rate, tokens, answers)
    loss = float(loss)
    held = rows(reading.passes, seed, "validation", SCORED)
    accuracy = [float(score(state, t, a)) for t, a in zip(*held)]
    return {"seed": seed, "learning_rate": rate, "accuracy": accuracy, "loss": loss,
            "processor_seconds": round(time.process_time() - begun, 1)}  # fmt: skip


def run_all(steps: int, seeds: int, runs: dict, save) -> None:
    """Trains what is missing in `runs`, {reading: [run, ...]}, the grid first; `save()` after every run."""
    for name, reading in READINGS.items():
        trainer, done = make_trainer(reading, steps), runs.setdefault(name, [])

        def once(rate, seed, name=name, reading=reading, trainer=trainer, done=done):
            for found in done:
                if (found["learning_rate"], found["seed"]) == (rate, seed):
                    return found
            done.append(train_and_score(trainer, reading, steps, rate, seed))
            save()
            print(name, done[-1], flush=True)
            return done[-1]

        grid = [once(rate, 0) for rate in LEARNING_RATES]
        best = max(grid, key=lambda found: np.mean(found["accuracy"]))["learning_rate"]
        for seed in range(1, seeds + 1):
            once(best, seed)


def interval(samples, minus=None) -> dict:
    """Mean of the samples, or difference of two means, and its 95 % interval: Student's t, or Welch's."""
    from scipy.stats import t

    groups = [np.asarray(x, float) for x in ((samples,) if minus is None else (samples, minus))]
    value = groups[0].mean() - (groups[1].mean() if minus is not None else 0)
    parts = [g.var(ddof=1) / len(g) for g in groups]
    freedom = sum(parts) ** 2 / max(sum(p**2 / (len(g) - 1) for p, g in zip(parts, groups)), 1e-30)
    half = t.ppf(0.975, max(freedom, 1)) * sum(parts) ** 0.5
    return {"value": float(value), "low": float(value - half), "high": float(value + half)}


def verdict(found: dict) -> str:
    """What an interval says of "it is positive"."""
    return "reproduced" if found["low"] > 0 else "contradicted" if found["high"] < 0 else "inconclusive"


def judge(runs: dict) -> dict:
    """Accuracies by size of the first set, accuracies and gaps of both orders with intervals over the judged seeds, and
    the verdicts."""
    lines, gaps = {}, {}
    small, large = ([i for i, first in enumerate(FIRST) if sign * (first - TOTAL / 2) > 0] for sign in (-1, 1))
    for name, reading in READINGS.items():
        judged = np.array([found["accuracy"] for found in runs[name] if found["seed"]])
        orders = [judged[:, places].mean(axis=1) for places in (small, large)]
        gaps[name] = orders[0] - orders[1]
        lines[name] = {
            "learning_rate": next(found["learning_rate"] for found in runs[name] if found["seed"]),
            "seeds": len(judged),
            "parameters": sum(p.size for p in jax.tree.leaves(shapes(reading))),
            "state_numbers": state_numbers(reading),
            "by_first_set": {first: interval(judged[:, i]) for i, first in enumerate(FIRST)},
            "smaller_first": interval(orders[0]),
            "larger_first": interval(orders[1]),
            "gap": interval(gaps[name]),
        }
    once, *others = READINGS
    claims = {f"the order matters when {once}": interval(gaps[once])}
    claims |= {f"it matters less: {name}": interval(gaps[once], gaps[name]) for name in others}
    return {"readings": lines, "claims": {text: found | {"verdict": verdict(found)} for text, found in claims.items()}}


def shapes(reading: Reading):
    """The parameters' shapes."""
    return nnx.state(nnx.eval_shape(lambda: reading.model().build(rngs=nnx.Rngs(0))), nnx.Param)


def state_numbers(reading: Reading) -> int:
    """Numbers in the matrices of all layers that a row is carried by."""
    (matrix,) = reading.model().mixers[0].matrices
    return LAYERS * matrix.heads * matrix.key * matrix.value


def draw(judged: dict, file: str) -> None:
    """Accuracy by the size of the first set, with intervals over seeds."""
    from engrax.evals import plots

    with plots.canvas("Which set comes first: recall of the element that two sets share", height=3.9) as drawn:
        axis = drawn.axes[0, 0]
        for colour, (name, line) in zip(plots.SERIES, judged["readings"].items()):
            found = list(line["by_first_set"].values())
            axis.plot(FIRST, [f["value"] for f in found], "o-", color=colour, label=name, markersize=4)
            axis.fill_between(
                FIRST, [f["low"] for f in found], [f["high"] for f in found], color=colour, alpha=0.15, lw=0
            )
        axis.plot(
            FIRST, [1 / min(f, TOTAL - f) for f in FIRST], ":", color=plots.GREY, label="guess in the smaller set"
        )
        axis.axvline(TOTAL / 2, color=plots.GREY, linestyle="--", linewidth=1.1)
        for place, words in ((0.25, "the smaller set first"), (0.75, "the larger set first")):
            axis.text(place, 1.01, words, transform=axis.transAxes, ha="center", color=plots.GREY)
        axis.set(xlabel=f"elements of the first set, of {TOTAL} in both", ylabel="accuracy", ylim=(0, 1), xticks=FIRST)
        axis.legend(loc="best", fontsize=9)
    Path(file).write_bytes(drawn.png)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500, help=f"training steps of {BATCH} rows, a multiple of 50")
    parser.add_argument("--seeds", type=int, default=3, help="judged seeds, 1 and up; seed 0 chooses the rate")
    parser.add_argument("--output", help="the results as JSON; runs that are in this file are not trained again")
    parser.add_argument("--plot", help="the plot, a PNG")
    args = parser.parse_args(namespace=argparse.Namespace(peer_python=None, runs=None, seed=0))
    settings = {"steps": args.steps, "batch": BATCH, "first": FIRST, "total": TOTAL, "vocabulary": VOCAB, "pool": POOL}
    settings |= {"layers": LAYERS, "width": DIM, "mlp": MLP, "state": STATE, "learning_rates": LEARNING_RATES}
    settings = json.loads(json.dumps(settings | {"readings": {n: dataclasses.asdict(r) for n, r in READINGS.items()}}))
    report = report_head("set_disjointness.py", args) | {"settings": settings, "runs": {}}
    if args.output and Path(args.output).exists():
        old = json.loads(Path(args.output).read_text())
        if old["settings"] == settings:
            report["runs"] = old["runs"]

    def save():
        if args.output:
            Path(args.output).write_text(json.dumps(report, indent=1) + "\n")

    run_all(args.steps, args.seeds, report["runs"], save)
    report |= judge(report["runs"])
    save()
    for name, line in report["readings"].items():
        words = (f"{what} {line[what]['value']:.3f} [{line[what]['low']:.3f}, {line[what]['high']:.3f}]"
                 for what in ("smaller_first", "larger_first", "gap"))  # fmt: skip
        print(f"{name:12}", *words)
    for text, found in report["claims"].items():
        print(f"{text}: {found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}], {found['verdict']}")
    if args.plot:
        draw(report, args.plot)


if __name__ == "__main__":
    main()
