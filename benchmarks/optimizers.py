"""Optimizers on the quickstart's text at a small size, without and with spikes in the gradient.

    python benchmarks/optimizers.py --output benchmarks/results/optimizers.json

About 25 minutes of one core. A training that is in the output already is not repeated.

The model has the quickstart's mixers, one block of each at width 64. Every optimizer is trained with seed 0 at three
learning rates or more, a factor of 2.5 apart, until the best lies inside the grid (at most five); then with seeds 1, 2
and 3 at the best. Only these are judged, on the same validation rows, by the rule of `engrax.evals.verdicts`: better or
worse where the 95 % interval of the difference to AdamW excludes 0, corrected for the number of verdicts.

Spikes: in 1 % of the steps, drawn by the seed, the whole gradient is 1000 times as large. Further rules, written
beforehand: an optimizer survives the spikes if its mean with them is at most 10 % above that of AdamW without; moments
in 8 bits are as good as in float32 if the 95 % interval of the difference lies below 1 % of AdamW's score.
"""

import argparse
import dataclasses
import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from engrax import models
from engrax.configs import quickstart
from engrax.evals.comparison import Row, Score
from engrax.evals.verdicts import Bootstrap, holm
from engrax.layers import AttentionConfig, TitansConfig
from engrax.models import LanguageModelConfig
from engrax.train import (
    AdafactorConfig,
    AdamWConfig,
    ConstantConfig,
    CosineConfig,
    FRUGALConfig,
    GaLoreConfig,
    MuonConfig,
    NaturalGaLoreConfig,
    OptimizerConfig,
    ScheduleFreeConfig,
    SPAMConfig,
    objective,
)
from engrax.train.optimizers.base import build
from engrax.train.schedules import ScheduleConfig
from engrax.train.train_step import apply_gradient

sys.path.insert(0, str(Path(__file__).parent))

from neural_memory import report_head  # noqa: E402

LENGTH, BATCH, SCORED, WARMUP = 128, 8, 128, 20  # bytes of a row, rows of a step, validation rows, steps
FACTOR, MOST_RATES, SEEDS = 2.5, 5, 3
SPIKE, SPIKED = 1000.0, 0.01  # factor of the gradient, part of the steps
COSINE = CosineConfig(warmup_steps=WARMUP)
MODEL = LanguageModelConfig(
    vocab_size=256,
    dim=64,
    mixers=(
        AttentionConfig(heads=2, head_dim=32, window=32),
        TitansConfig(heads=2, head_dim=32, hidden=32, chunk_size=32),
    ),
    repeat=1,
)
LOW = dict(rank=16, gap=50)  # a quarter of the width
SPAM = SPAMConfig(learning_rate=5e-3, schedule=COSINE, gap=100, warmup=30, clip_norm=0.0)
ADAMW = AdamWConfig(learning_rate=5e-3, schedule=COSINE)
OPTIMIZERS = {  # name: (optimizer at the middle learning rate, whether the gradient has spikes)
    "AdamW": (ADAMW, False),
    "AdamW, moments in 8 bits": (dataclasses.replace(ADAMW, moments="float8"), False),
    "Muon": (MuonConfig(learning_rate=5e-3, schedule=COSINE), False),
    "Adafactor": (AdafactorConfig(learning_rate=5e-2, schedule=COSINE), False),
    "schedule-free AdamW": (
        ScheduleFreeConfig(learning_rate=5e-3, schedule=ConstantConfig(warmup_steps=WARMUP)),
        False,
    ),
    "GaLore": (GaLoreConfig(learning_rate=1e-2, schedule=COSINE, **LOW), False),
    "Natural GaLore": (NaturalGaLoreConfig(learning_rate=1e-2, schedule=COSINE, **LOW), False),
    "FRUGAL": (FRUGALConfig(learning_rate=2e-3, schedule=COSINE, gap=50), False),
    "SPAM": (SPAM, False),
    "AdamW, spikes": (dataclasses.replace(ADAMW, clip_norm=0.0), True),
    "AdamW with clip_norm=1, spikes": (ADAMW, True),
    "SPAM, spikes": (SPAM, True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaled(ScheduleConfig):
    """A schedule times a traced factor: one program serves all learning rates."""

    inner: ScheduleConfig
    factor: Any

    def rate(self, peak: float, steps: int) -> optax.Schedule:
        return lambda step: self.factor * self.inner.rate(peak, steps)(step)

    def after_warmup(self, peak: float, steps: int, warmup: int) -> optax.Schedule:
        return self.inner.after_warmup(peak, steps, warmup)


def batches(split: str, seed: int, count: int, rows: int) -> dict[str, np.ndarray]:
    """{field: [count, rows, T]} of the quickstart's text."""
    data = dataclasses.replace(quickstart.config().data, seq_len=LENGTH)
    epochs = None if split == "train" else 1
    loader = data.loader(split, batch_size=rows, seed=seed, process_index=0, process_count=1, epochs=epochs, align=1)
    found = list(itertools.islice(loader, count))
    loader.close()
    return {name: np.stack([batch[name] for batch in found]) for name in ("tokens", "targets", "segment_ids")}


def make_trainer(optimizer: OptimizerConfig, steps: int):
    """train(seed, factor, batches, spikes [steps]) -> (parameters to evaluate, losses [steps])."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: models.build(MODEL, rngs=nnx.Rngs(0))))

    @jax.jit
    def train(seed, factor, data, spikes):
        params = nnx.state(models.build(MODEL, rngs=nnx.Rngs(jax.random.key(seed))), nnx.Param)
        scaled = dataclasses.replace(optimizer, schedule=Scaled(inner=optimizer.schedule, factor=factor))
        rule = build(scaled, steps, params)

        def step(state, batch):
            rows, spike = batch
            loss, grads = jax.value_and_grad(lambda p: mean_nats(graph, p, rows))(state["params"])
            grads = jax.tree.map(lambda g: g * spike, grads)
            norm = optax.tree.norm(grads)
            params, opt_state = apply_gradient(rule, state, state["params"], grads, norm, optimizer.clip_norm)
            return {"params": params, "opt_state": opt_state}, loss

        state, losses = jax.lax.scan(step, {"params": params, "opt_state": rule.init(params)}, (data, spikes))
        return scaled.evaluated(state["params"], state["opt_state"]), losses

    return train


def mean_nats(graph, params, rows):
    """The loss of a batch."""
    scored = objective.score(nnx.merge(graph, params), rows)
    return jnp.sum(scored.nats) / jnp.maximum(jnp.sum(rows["targets"] >= 0), 1) + jnp.sum(scored.aux)


@jax.jit
def bits_by_row(params, rows):
    """Bits of every row's labelled bytes."""
    graph = nnx.graphdef(nnx.eval_shape(lambda: models.build(MODEL, rngs=nnx.Rngs(0))))
    return jnp.sum(objective.score(nnx.merge(graph, params), rows).nats, axis=-1) / math.log(2)


def run(trainer, spiked: bool, steps: int, rate: float, factor: float, seed: int) -> dict:
    """One training: bits of every validation row (None if it diverged), loss of the last steps, processor time."""
    started = time.process_time()
    drawn = np.zeros(steps, bool)
    drawn[np.random.default_rng(seed).choice(steps, round(SPIKED * steps) * spiked, replace=False)] = True
    data = batches("train", seed, steps, BATCH)
    params, losses = trainer(seed, factor, data, np.where(drawn, SPIKE, 1.0).astype(np.float32))
    held = {name: array[0] for name, array in batches("validation", 0, 1, SCORED).items()}
    bits = np.asarray(bits_by_row(params, held), float)
    sound = np.isfinite(bits).all()
    return {
        "seed": seed,
        "learning_rate": rate,
        "spikes": int(drawn.sum()),
        "loss": float(np.mean(losses[-20:])) if sound else None,
        "bits": [round(b, 2) for b in bits] if sound else None,
        "bytes": (held["targets"] >= 0).sum(axis=-1).tolist(),
        "processor_seconds": round(time.process_time() - started, 1),
    }


def score(found: dict) -> float:
    """Bits per byte; nan if it diverged."""
    return sum(found["bits"]) / sum(found["bytes"]) if found["bits"] else math.nan


def run_all(steps: int, done: dict, save) -> None:
    """Trains what is missing in `done`, {name: [run, ...]}."""
    for name, (optimizer, spiked) in OPTIMIZERS.items():
        trainer, runs = make_trainer(optimizer, steps), done.setdefault(name, [])

        def once(factor, seed, name=name, optimizer=optimizer, spiked=spiked, trainer=trainer, runs=runs):
            rate = float(f"{optimizer.learning_rate * factor:.3g}")
            known = [r for r in runs if (r["learning_rate"], r["seed"]) == (rate, seed)]
            if not known:
                runs.append(run(trainer, spiked, steps, rate, factor, seed))
                save()
                print(f"{name}: rate {rate:g}, seed {seed}: {score(runs[-1]):.4f} bits per byte, "
                      f"{runs[-1]['processor_seconds']} s", flush=True)  # fmt: skip
            return score((known or runs[-1:])[0])

        grid = {factor: once(factor, 0) for factor in (1 / FACTOR, 1.0, FACTOR)}
        while len(grid) < MOST_RATES:
            best = _best(grid)
            further = {min(grid): best / FACTOR, max(grid): best * FACTOR}.get(best)
            if further is None:
                break
            grid[further] = once(further, 0)
        for seed in range(1, SEEDS + 1):
            once(_best(grid), seed)


def _best(grid: dict[float, float]) -> float:
    return min(grid, key=lambda factor: math.inf if math.isnan(grid[factor]) else grid[factor])


def judge(done: dict) -> dict:
    """The table's lines, each with its interval and verdict against AdamW, and the further rules."""
    rows = []
    for name, runs in done.items():
        judged = [r for r in runs if r["seed"]]
        scores = tuple(
            Score(np.asarray(r["bits"]), np.asarray(r["bytes"])) if r["bits"] else Score(None, None) for r in judged
        )
        grid = {r["learning_rate"]: score(r) for r in runs if not r["seed"]}
        rows.append(Row(name, judged[0]["learning_rate"], grid, scores, {}))
    whole = [row for row in rows if all(s.sums is not None for s in row.scores)]
    drawn, (first, *others) = Bootstrap(whole), whole
    said = dict(zip([row.name for row in others], holm(drawn, [(row.name, first.name) for row in others], False)))
    lines, base = {}, drawn.value(first.name)
    for row in rows:
        if row not in whole:
            lines[row.name] = {"learning_rate": row.learning_rate, "diverged": True, "grid": _json(row.grid)}
            continue
        lines[row.name] = {
            "learning_rate": row.learning_rate,
            "at_edge": row.learning_rate in (min(row.grid), max(row.grid)),
            "grid": _json(row.grid),
            "score": dataclasses.asdict(drawn.score(row.name)),
            "difference": row is not first and dataclasses.asdict(drawn.difference(row.name, first.name)),
            "verdict": said.get(row.name),
            "state_bytes": state_bytes(OPTIMIZERS[row.name][0]),
        }
        if OPTIMIZERS[row.name][1]:
            lines[row.name]["survives"] = drawn.value(row.name) <= 1.1 * base
    eight = drawn.difference("AdamW, moments in 8 bits", first.name)
    ends = [end / base for end in (eight.value, eight.low, eight.high)]
    return {
        "lines": lines,
        "eight_bit": dict(zip(("value", "low", "high"), ends)) | {"within_1_percent": ends[2] < 0.01},
    }


def _json(grid: dict[float, float]) -> dict[str, float | None]:
    return {f"{rate:g}": None if math.isnan(value) else round(value, 4) for rate, value in grid.items()}


def state_bytes(optimizer: OptimizerConfig) -> int:
    """Bytes of the optimizer's state for MODEL."""
    params = nnx.state(nnx.eval_shape(lambda: models.build(MODEL, rngs=nnx.Rngs(0))), nnx.Param)
    state = jax.eval_shape(build(optimizer, 1, params).init, params)
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(state))


def show(report: dict) -> None:
    """Prints the table in Markdown."""
    print("| optimizer | learning rate | bits per byte | difference to AdamW | verdict | state, KB |")
    print("|---|---|---|---|---|---|")
    for name, line in report["lines"].items():
        if line.get("diverged"):
            print(f"| {name} | {line['learning_rate']:g} | diverged | | | |")
            continue
        s, d = line["score"], line["difference"]
        score = f"{s['value']:.3f} [{s['low']:.3f}, {s['high']:.3f}]"
        difference = f"{d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]" if d else ""
        edge = " (edge)" if line["at_edge"] else ""
        words = [name, f"{line['learning_rate']:g}{edge}", score, difference, line["verdict"] or ""]
        survives = "" if "survives" not in line else "; survives" if line["survives"] else "; does not survive"
        print(f"| {' | '.join(words)}{survives} | {line['state_bytes'] / 1000:.0f} |")
    eight = report["eight_bit"]
    print(f"moments in 8 bits: {eight['value']:+.2%} [{eight['low']:+.2%}, {eight['high']:+.2%}]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200, help=f"training steps of {BATCH} rows of {LENGTH} bytes")
    parser.add_argument("--output", help="the results as JSON; trainings that are in this file are not repeated")
    args = parser.parse_args(namespace=argparse.Namespace(peer_python=None, runs=None, seed=0))
    settings = {"steps": args.steps, "batch": BATCH, "length": LENGTH, "factor": FACTOR, "spike": SPIKE}
    settings |= {"optimizers": {name: repr(o) for name, o in OPTIMIZERS.items()}, "model": repr(MODEL)}
    report = report_head("optimizers.py", args) | {"settings": settings, "runs": {}}
    if args.output and Path(args.output).exists():
        old = json.loads(Path(args.output).read_text())
        report["runs"] = {
            name: runs
            for name, runs in old["runs"].items()
            if {**old["settings"], "optimizers": 0} == {**settings, "optimizers": 0}
            and old["settings"]["optimizers"].get(name) == settings["optimizers"].get(name)
        }

    def save():
        if args.output:
            Path(args.output).write_text(json.dumps(report, indent=1) + "\n")

    run_all(args.steps, report["runs"], save)
    report |= judge({name: report["runs"][name] for name in OPTIMIZERS})
    save()
    show(report)


if __name__ == "__main__":
    main()
