"""Learning-rate schedules at a small size: at one budget, and over two corpora one after the other.

    python benchmarks/schedules.py FOLDER [--minutes 30] [--output benchmarks/results/schedules.json] [--plot FILE.png]

About 20 minutes of one core. Every finished training is kept in FOLDER, and the same command continues there.

One budget: a comparison as `engrax compare` makes it, on the quickstart's text. A schedule is a pure function of the
step, so the trainings of one seed and rate are one training until the first decay. The drop is how much the validation
bits per byte fall over the last fifth of the steps: in the decay of WSD, and at the constant rate.

Two corpora: first source code of the standard library, then, from these parameters (`start_from`), the prose of its
language reference. With cosine the rate warms up to its peak again; the infinite schedule stays at its constant and is
annealed at the end. The rate is chosen with seed 0 for the lowest mean over both corpora, seeds 1, 2 and 3 are judged.
Forgetting is what the bits per byte on the code rise in the second training. The three verdicts are corrected for their
number: each is read off the interval at 1 - 0.05 / 3.
"""

import argparse
import dataclasses
import json
import math
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from engrax import evals
from engrax.configs import quickstart
from engrax.data import TextFolder
from engrax.errors import UserError
from engrax.evals import Claim, Comparison, plots, scoring, sweep, trials, verdicts
from engrax.evals.comparison import RATE, Row, folder_of
from engrax.layers import AttentionConfig
from engrax.models import LanguageModelConfig
from engrax.train import (
    AdamWConfig,
    CheckpointConfig,
    ConstantConfig,
    CosineConfig,
    EvalConfig,
    Experiment,
    InfiniteConfig,
    InverseRootConfig,
    LinearConfig,
    LogConfig,
    ScheduleConfig,
    WSDConfig,
    WSDSConfig,
    metrics,
)

STEPS, WARMUP, VALIDATED = 400, 20, 20  # steps; of the warmup; between validations
RATES, SEEDS = (1e-3, 3e-3, 1e-2), (1, 2, 3)
WARM = dict(warmup_steps=WARMUP)
CODE = ("asyncio", "concurrent", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest", "xml")


def schedules(steps: int) -> dict[str, ScheduleConfig]:
    """The schedules at one budget; cosine first."""
    return {
        "cosine": CosineConfig(**WARM),
        "linear": LinearConfig(**WARM),
        "inverse root": InverseRootConfig(**WARM),
        "constant": ConstantConfig(**WARM),
        "WSD": WSDConfig(**WARM),
        "WSD-S, one end": WSDSConfig(**WARM),
        "WSD-S, an end at half": WSDSConfig(**WARM, ends=(steps // 2,)),
        "infinite, annealed": InfiniteConfig(**WARM, cooldown_steps=steps // 2, anneal_steps=steps // 5),
    }


def stages(steps: int) -> dict[str, tuple[tuple[ScheduleConfig, float], tuple[ScheduleConfig, float]]]:
    """{name: (schedule, factor of the learning rate) on the first and on the second corpus}; cosine first."""
    infinite = InfiniteConfig(**WARM, cooldown_steps=steps // 2)
    after = dict(cooldown_steps=0, constant_fraction=1.0, final_fraction=0.1, anneal_steps=steps // 5)
    cosine = (CosineConfig(**WARM), 1.0)
    return {
        "cosine twice": (cosine, cosine),
        "infinite": ((infinite, 1.0), (InfiniteConfig(**WARM, **after), infinite.constant_fraction)),
    }


def experiment(schedule: ScheduleConfig, steps: int, **fields: Any) -> Experiment:
    """Rows of 64 bytes, and two layers of the quickstart's attention at width 64."""
    mixer = AttentionConfig(heads=2, head_dim=32, window=32)
    return Experiment(
        **{"data": dataclasses.replace(quickstart.config().data, seq_len=64)} | fields,
        model=LanguageModelConfig(vocab_size=256, dim=64, mixers=(mixer,), repeat=2),
        steps=steps,
        batch_size=8,
        optimizer=AdamWConfig(schedule=schedule),
        checkpoint=CheckpointConfig(every=0, keep_last=1, keep_best=0),
        eval=EvalConfig(every=VALIDATED, batches=8),
        log=LogConfig(every=10),
    )


def comparison(steps: int) -> Comparison:
    """The comparison at one budget."""
    claims = (
        Claim("WSD", "constant", "arXiv 2404.06395: the loss falls in the decay"),
        Claim("WSD-S, an end at half", "constant", "arXiv 2410.05192"),
        Claim(
            "WSD-S, one end", "WSD-S, an end at half", "a branch for every budget: arXiv 2410.05192 finds them alike"
        ),
    )
    made = {name: experiment(schedule, steps) for name, schedule in schedules(steps).items()}
    return Comparison(experiments=made, learning_rates=RATES, claims=claims)


def curves(folder: epath.Path, data: dict[str, Any]) -> dict[str, np.ndarray]:
    """{name: validation bits per byte [seeds, validations]} of the judged trainings."""
    found = {}
    for line in data["lines"]:
        runs = [folder / folder_of(line["name"]) / f"lr_{line['learning_rate']:g}_seed_{seed}" for seed in SEEDS]
        kept = [[row for row in metrics.read(run) if "validation_bits_per_byte" in row] for run in runs]
        found[line["name"]] = np.array([[row["validation_bits_per_byte"] for row in rows] for rows in kept])
    return found


def drops(found: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """{name: for every seed, the fall over the last fifth of the steps}."""
    return {name: (values[:, -1 - values.shape[1] // 5] - values[:, -1]).tolist() for name, values in found.items()}


def write_corpora(folder: epath.Path) -> dict[str, TextFolder]:
    """Writes both corpora, source code and prose of the running Python, unless they are there."""
    from pydoc_data.topics import topics

    root = Path(sysconfig.get_path("stdlib"))
    code = {str(f.relative_to(root)): f.read_bytes() for name in CODE for f in (root / name).rglob("*.py")}
    prose = {f"{name}.txt": text.encode() for name, text in topics.items()}
    for corpus, files in (("code", code), ("prose", prose)):
        for name, content in files.items():
            path = folder / corpus / name
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
    where = {corpus: str((folder / corpus).resolve()) for corpus in ("code", "prose")}
    return {corpus: TextFolder(path=path, suffixes=(".py", ".txt"), seq_len=64) for corpus, path in where.items()}


class Continual:
    """The trainings on two corpora, and their scores."""

    def __init__(self, folder: epath.Path, steps: int):
        self.folder, self.steps, self.corpora = folder, steps, write_corpora(folder / "corpora")
        first = experiment(CosineConfig(**WARM), steps, data=self.corpora["code"])
        self.rows = scoring.validation_rows(first, None)

    def pair(self, name: str, rate: float, seed: int) -> list[trials.Trial]:
        """The trainings on the first and on the second corpus."""
        made, start_from = [], None
        for (schedule, factor), (corpus, data) in zip(stages(self.steps)[name], self.corpora.items(), strict=True):
            config = experiment(schedule, self.steps, data=data, start_from=start_from)
            settings = {RATE: float(f"{rate * factor:.4g}"), "seed": seed}
            made.append(trials.Trial(f"{name}/lr_{rate:g}_seed_{seed}/{corpus}", config, settings))
            start_from = str(self.folder.resolve() / made[-1].path)
        return made

    def scores(self, name: str, rate: float, seed: int) -> dict[str, trials.Score]:
        """Bits of the validation rows: of both corpora after the second training, and forgotten of the first."""
        made = self.pair(name, rate, seed)
        first, second = (self.folder / trial.path for trial in made)
        before, after = trials.read(made[0].config, first), trials.read(made[1].config, second)
        old = trials.measure(second, self.rows)
        forgotten = trials.Score(old.sums - before.sums, old.counts)
        return {"prose": after, "code": old, "forgetting": forgotten}

    def run(self, minutes: float | None) -> dict[str, Any]:
        """Trains what is missing and judges. Raises UserError if trainings are missing still."""
        names = list(stages(self.steps))

        def train(chosen):
            outcome = sweep.run([t for each in chosen for t in self.pair(*each)], self.folder, minutes=minutes)
            for name, why in outcome.missing.items():
                raise UserError(f"{name} is missing: {why}.")

        train([(name, rate, 0) for name in names for rate in RATES])
        grids = {name: {rate: self.scores(name, rate, 0) for rate in RATES} for name in names}
        means = {n: {r: (s["prose"].mean + s["code"].mean) / 2 for r, s in grid.items()} for n, grid in grids.items()}
        best = {name: min(grid, key=grid.get) for name, grid in means.items()}
        train([(name, best[name], seed) for name in names for seed in SEEDS])
        judged = {name: [self.scores(name, best[name], seed) for seed in SEEDS] for name in names}
        base, other = names
        result: dict[str, Any] = {"learning_rates": best, "grid": {n: to_text(grid) for n, grid in means.items()}}
        for what in ("prose", "code", "forgetting"):
            rows = [Row(name, best[name], {}, tuple(s[what] for s in judged[name]), {}) for name in names]
            drawn = verdicts.Bootstrap(rows)
            result[what] = {name: dataclasses.asdict(drawn.score(name)) for name in names} | {
                "difference": dataclasses.asdict(drawn.difference(other, base)),
                "verdict": verdicts.verdict(drawn.difference(other, base, verdicts.LEVEL / 3), False),
            }
        return result


def to_text(grid: dict[float, float]) -> dict[str, float | None]:
    """A grid as JSON takes it."""
    return {f"{rate:g}": None if math.isnan(value) else value for rate, value in grid.items()}


def plot(found: dict[str, np.ndarray], steps: int) -> bytes:
    """The mean validation curves of four schedules, from a quarter of the steps on."""
    with plots.canvas("Validation during the training, mean of three seeds") as drawn:
        axis, first = drawn.axes[0, 0], steps // 4 // VALIDATED
        for name, colour in zip(("cosine", "constant", "WSD", "WSD-S, an end at half"), plots.SERIES):
            if name in found:
                at = VALIDATED * np.arange(1, found[name].shape[1] + 1)
                axis.plot(at[first:], found[name].mean(axis=0)[first:], color=colour, label=name)
        axis.set_xlabel("step")
        axis.set_ylabel("bits per byte")
        axis.legend()
    return drawn.png


def told(result: dict[str, Any]) -> str:
    """The tables in Markdown."""
    span = lambda x, sign="": f"{x['value']:{sign}.3f} [{x['low']:{sign}.3f}, {x['high']:{sign}.3f}]"  # noqa: E731
    lines = ["| schedule | learning rate | bits per byte | against cosine | verdict | fall in the last fifth |"]
    lines.append("|---" * 6 + "|")
    for line in result["lines"]:
        edge, fallen = "*" if line["at_edge"] else "", result["drops"][line["name"]]
        fall = f"{np.mean(fallen):.3f} ({min(fallen):.3f} to {max(fallen):.3f})"
        difference = span(line["difference"], "+") if line["difference"] else ""
        cells = [line["name"], f"{line['learning_rate']:g}{edge}", span(line["score"]), difference]
        lines.append(f"| {' | '.join([*cells, line['verdict'] or '', fall])} |")
    lines += ["", "| claimed better | than | source | difference here | verdict |", "|---" * 5 + "|"]
    for found in result["claims"]:
        claim, difference = found["claim"], span(found["difference"], "+")
        lines.append(
            f"| {claim['better']} | {claim['worse']} | {claim['source']} | {difference} | {found['verdict']} |"
        )
    two = result.get("two_corpora")
    if two:
        base, other = two["learning_rates"]
        lines += ["", f"| bits per byte | {base} | {other} | difference | verdict on {other} |", "|---" * 5 + "|"]
        names = {"prose": "second corpus", "code": "first corpus after the second", "forgetting": "forgetting"}
        for what, name in names.items():
            found = two[what]
            cells = [name, span(found[base]), span(found[other]), span(found["difference"], "+"), found["verdict"]]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Trains what is missing, prints the tables, and returns 1 if trainings are still missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=epath.Path, help="where the trainings go")
    parser.add_argument("--steps", type=int, default=STEPS, help="of every training")
    parser.add_argument("--minutes", type=float, help="of each half: begin no training that would end later")
    parser.add_argument("--output", type=Path, help="a file for the numbers")
    parser.add_argument("--plot", type=Path, help="a file for the validation curves")
    args = parser.parse_args()
    command = "python benchmarks/schedules.py FOLDER" + f" --steps {args.steps}" * (args.steps != STEPS)
    budget = args.folder / "one_budget"
    try:
        found = evals.compare(comparison(args.steps), budget, minutes=args.minutes, command=command)
        result = json.loads((budget / "comparison.json").read_text())
        validated = curves(budget, result)
        result["drops"] = drops(validated)
        if args.plot:
            args.plot.write_bytes(plot(validated, args.steps))
        missing = [f"{name}: {why}" for name, why in found.missing.items()]
        try:
            result["two_corpora"] = Continual(args.folder / "two_corpora", args.steps).run(args.minutes)
        except UserError as error:
            missing.append(str(error))
    except UserError as error:
        raise SystemExit(str(error)) from None
    print(told(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    for line in missing:
        print(f"missing: {line}")
    return bool(missing)


if __name__ == "__main__":
    raise SystemExit(main())
