"""Optimizers on the quickstart's text at a small size, without and with spikes in the gradient.

    python benchmarks/optimizers.py FOLDER [--minutes 30] [--output benchmarks/results/optimizers.json]

About 20 minutes of one core. It is a comparison as `engrax compare` makes it: one grid of learning rates for all with
seed 0, then seeds 1, 2 and 3 at the best rate of each; only these are judged, by the rule of `engrax.evals.verdicts`.
Every finished training is kept in FOLDER, and the same command continues there.

Spikes: in one step of every hundred, drawn anew for every seed, the whole gradient is 1000 times as large. Further
rules, written beforehand: an optimizer survives the spikes if the upper end of its difference to AdamW without them is
below 10 % of AdamW's score, and does not if the lower end is above; moments in 8 bits are within 1 % of float32's if
both ends of the difference are. This one is paired: the trainings of one seed have the same parameters and batches.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from etils import epath

import engrax
from engrax import evals
from engrax.configs import quickstart
from engrax.errors import UserError
from engrax.evals import Claim, Comparison, trials
from engrax.evals.comparison import RATE, Row, folder_of
from engrax.evals.verdicts import Bootstrap, Interval
from engrax.layers import AttentionConfig
from engrax.models import LanguageModelConfig
from engrax.train import (
    AdafactorConfig,
    AdamWConfig,
    CheckpointConfig,
    ConstantConfig,
    CosineConfig,
    EvalConfig,
    Experiment,
    FRUGALConfig,
    GaLoreConfig,
    LogConfig,
    MuonConfig,
    NaturalGaLoreConfig,
    OptimizerConfig,
    ScheduleFreeConfig,
    SPAMConfig,
    cost,
)
from engrax.train.experiment import replace

STEPS, WARMUP = 300, 20
SPIKE, EVERY = 1000.0, 100  # factor of the gradient; one step of so many has it
SURVIVES, EIGHT_BIT = 0.10, 0.01  # largest parts of AdamW's score


@engrax.register("spiked")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SpikedConfig(OptimizerConfig):
    """`inner` on gradients with spikes. The fields that all optimizers share are read here, not in `inner`."""

    elementwise = False

    inner: OptimizerConfig = AdamWConfig()
    clip: float = 0.0  # largest norm of the gradient, spike included; 0 = no clipping
    clip_norm: float = 0.0  # it would act before the spike

    def direction(self) -> optax.GradientTransformation:
        clips = [optax.clip_by_global_norm(self.clip)] if self.clip else []
        return optax.chain(spikes(), *clips, self.inner.direction())


class SpikesState(NamedTuple):
    """Steps done, and the seed of the spikes."""

    count: Any
    seed: Any


def spikes() -> optax.GradientTransformation:
    """Multiplies the gradient by SPIKE in one step of every EVERY, which the initial parameters draw."""

    def init(params):
        total = sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(params))
        return SpikesState(jnp.zeros((), jnp.int32), jax.lax.bitcast_convert_type(total, jnp.uint32))

    def update(grads, state, params=None):
        key = jax.random.fold_in(jax.random.key(state.seed), state.count // EVERY)
        spiked = state.count % EVERY == jax.random.randint(key, (), 0, EVERY)
        factor = jnp.where(spiked, SPIKE, 1.0)
        return jax.tree.map(lambda g: g * factor, grads), state._replace(count=state.count + 1)

    return optax.GradientTransformation(init, update)


COSINE = CosineConfig(warmup_steps=WARMUP)
LOW = dict(rank=16, gap=50)  # a quarter of the width
SPAM = SPAMConfig(schedule=COSINE, gap=100, warmup=30)
ADAMW = AdamWConfig(schedule=COSINE)
OPTIMIZERS = {
    "AdamW": ADAMW,
    "AdamW, 8-bit moments": dataclasses.replace(ADAMW, moments="float8"),
    "Muon": MuonConfig(schedule=COSINE),
    "Adafactor": AdafactorConfig(schedule=COSINE),
    "schedule-free AdamW": ScheduleFreeConfig(schedule=ConstantConfig(warmup_steps=WARMUP)),
    "GaLore": GaLoreConfig(schedule=COSINE, **LOW),
    "Natural GaLore": NaturalGaLoreConfig(schedule=COSINE, **LOW),
    "FRUGAL": FRUGALConfig(schedule=COSINE, gap=50),
    "SPAM": SPAM,
    "AdamW, spikes": SpikedConfig(schedule=COSINE, inner=ADAMW),
    "AdamW, clipped spikes": SpikedConfig(schedule=COSINE, inner=ADAMW, clip=1.0),
    "SPAM, spikes": SpikedConfig(schedule=COSINE, inner=SPAM),
    "SPAM without resets, threshold 100, spikes": SpikedConfig(
        schedule=COSINE, inner=dataclasses.replace(SPAM, gap=500, warmup=150, threshold=100.0)
    ),
}
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
CLAIMS = (
    Claim("SPAM, spikes", "AdamW, spikes", "arXiv 2501.06842: SPAM survives spikes"),
    Claim("Muon", "AdamW", "Muon trains faster than AdamW"),
    Claim("Natural GaLore", "GaLore", "arXiv 2410.16029: lower loss than GaLore's"),
    Claim("FRUGAL", "GaLore", "arXiv 2411.07837: lower loss than GaLore's"),
)


def experiment(optimizer: OptimizerConfig, steps: int = STEPS) -> Experiment:
    """The quickstart's text in rows of 64 bytes, and two layers of its attention at width 64."""
    mixer = AttentionConfig(heads=2, head_dim=32, window=32)
    return Experiment(
        model=LanguageModelConfig(vocab_size=256, dim=64, mixers=(mixer,), repeat=2),
        data=dataclasses.replace(quickstart.config().data, seq_len=64),
        steps=steps,
        batch_size=8,
        optimizer=optimizer,
        checkpoint=CheckpointConfig(every=0, keep_last=1, keep_best=0),
        eval=EvalConfig(every=0, batches=1),
        log=LogConfig(every=10),
    )


def comparison(steps: int = STEPS) -> Comparison:
    """The comparison; AdamW first."""
    experiments = {name: experiment(optimizer, steps) for name, optimizer in OPTIMIZERS.items()}
    return Comparison(experiments=experiments, learning_rates=RATES, claims=CLAIMS)


def judge(data: dict[str, Any], folder: epath.Path, steps: int) -> dict[str, Any]:
    """The comparison's numbers, with the bytes of every optimizer's state and the further rules."""
    base = data["lines"][0]["score"]["value"]
    for line in data["lines"]:
        costs = cost.costs(experiment(OPTIMIZERS[line["name"]], steps), 1)
        line["optimizer_bytes"] = costs["memory_per_device"]["optimizer_bytes_unsharded"]
        found = line["difference"]
        if found and "spikes" in line["name"]:
            survives = {found["high"] < SURVIVES * base: "survives", found["low"] > SURVIVES * base: "does not survive"}
            line["rule"] = survives.get(True, "inconclusive")
        if "8-bit" in line["name"]:
            paired = paired_difference(folder, data["lines"][0], line, steps)
            ends = [paired.low / base, paired.high / base]
            within = "within 1 %" if max(map(abs, ends)) < EIGHT_BIT else "not shown to be within 1 %"
            line["rule"] = f"{within} (paired {ends[0]:+.2%} to {ends[1]:+.2%})"
            line["paired_difference"] = dataclasses.asdict(paired)
    return data


def paired_difference(folder: epath.Path, first: dict[str, Any], other: dict[str, Any], steps: int) -> Interval:
    """`other` - `first`, whose trainings of one seed are compared with each other."""
    sums = []
    for line in (first, other):
        made, rate = experiment(OPTIMIZERS[line["name"]], steps), line["learning_rate"]
        for seed in (1, 2, 3):
            config = replace(made, {RATE: rate, "seed": seed})
            sums.append(trials.read(config, folder / folder_of(line["name"]) / f"lr_{rate:g}_seed_{seed}"))
    scores = tuple(trials.Score(b.sums - a.sums, a.counts) for a, b in zip(sums[:3], sums[3:], strict=True))
    return Bootstrap([Row(other["name"], other["learning_rate"], {}, scores, {})]).score(other["name"])


def table(data: dict[str, Any]) -> str:
    """The table in Markdown."""
    span = lambda x, sign: f"{x['value']:{sign}.3f} [{x['low']:{sign}.3f}, {x['high']:{sign}.3f}]"  # noqa: E731
    rows = ["| optimizer | learning rate | bits per byte | against AdamW | verdict | state, KB |", "|---" * 6 + "|"]
    for line in data["lines"]:
        edge = "*" if line["at_edge"] else ""
        difference = span(line["difference"], "+") if line["difference"] else ""
        verdict = "; ".join(filter(None, (line["verdict"], line.get("rule"))))
        cells = [line["name"], f"{line['learning_rate']:g}{edge}", span(line["score"], ""), difference, verdict]
        rows.append(f"| {' | '.join(cells)} | {line['optimizer_bytes'] / 1000:.0f} |")
    rows += ["", "| claimed better | than | source | difference here | verdict |", "|---" * 5 + "|"]
    for found in data["claims"]:
        claim = found["claim"]
        cells = [claim["better"], claim["worse"], claim["source"], span(found["difference"], "+"), found["verdict"]]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> int:
    """Trains what is missing, prints the table, and returns 1 if trainings are still missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=epath.Path, help="where the trainings and comparison.png go")
    parser.add_argument("--steps", type=int, default=STEPS, help="of every training")
    parser.add_argument("--minutes", type=float, help="begin no training that would end later")
    parser.add_argument("--output", type=Path, help="a file for the numbers")
    args = parser.parse_args()
    command = "python benchmarks/optimizers.py FOLDER" + f" --steps {args.steps}" * (args.steps != STEPS)
    try:
        found = evals.compare(comparison(args.steps), args.folder, minutes=args.minutes, command=command)
    except UserError as error:
        raise SystemExit(str(error)) from None
    data = judge(json.loads((args.folder / "comparison.json").read_text()), args.folder, args.steps)
    print(table(data))
    if args.output:
        args.output.write_text(json.dumps(data, indent=1) + "\n")
    for name, why in found.missing.items():
        print(f"missing: {name}: {why}")
    return bool(found.missing)


if __name__ == "__main__":
    raise SystemExit(main())
