"""Titans memories hold out far past the length that they were trained at.

    engrax reproduce titans_length --preset full

The memory alone (LMM) and memory as context (MAC), `configs/titans_lmm.py` and `titans_mac.py`, are trained on rows of
256 bytes: as documents cut into rows; as streams with a memory carried from row to row (`carry_memory`; no gradient
passes from row to row); and on such streams after the rows, in a second stage. Half of the text is held out, for its
long documents, which are read from their beginning in pieces of 256. docs/titans.md has a full run.
"""

import functools

from engrax.configs import titans_lmm, titans_mac
from engrax.evals import claims, evaluate, plots
from engrax.evals.claims import Finding, Found
from engrax.evals.verdicts import Interval
from engrax.train import experiment as experiments
from engrax.train import loop

ALLOWED = 0.02  # bits per byte
CARRIED = {"carry_memory": True}
RUNS = {  # name -> config, fields, the run that it starts from
    "LMM": (titans_lmm, {}, None),
    "LMM, carried": (titans_lmm, CARRIED, None),
    "LMM, then carried": (titans_lmm, CARRIED, "LMM"),
    "MAC": (titans_mac, {}, None),
    "MAC, carried": (titans_mac, CARRIED, None),
    "MAC, then carried": (titans_mac, CARRIED, "MAC"),
}


def card() -> claims.Card:
    """The claim; the quick preset trains two for 20 steps and reads 1,024 bytes."""
    return claims.Card(
        paper="arXiv 2501.00663: Titans keep their quality at lengths far beyond the training's, past 2 M tokens in "
        "needle tasks (table 2, figure 6).",
        here="Models of 0.7 and 0.8 M parameters, 300 steps on rows of 256 bytes of Python's standard library. Every "
        "held-out document of more than 16,384 bytes is read to there, with the carried memory and with one that is "
        "reset every 256 bytes (quick: 20 steps, two runs, 1,024 bytes).",
        rule="A memory holds out where the loss of the fourth quarter is at most 0.02 bits per byte above that of the "
        "second, paired by document, with its whole 95 % interval; it does not where the interval lies above that; "
        "else it is inconclusive. Quarters differ in difficulty, so the same is asked of the gain over a reset "
        "memory, which may fall by at most 0.02. One seed: the intervals are over documents. The quick preset gives a "
        "look.",
        quick=functools.partial(run, length=1024, names=("LMM", "LMM, carried"), steps=20, batches=1),
        full=functools.partial(run, length=16_384, names=tuple(RUNS), steps=300, batches=None),
    )


def run(folder, options, *, length: int, names: tuple[str, ...], steps: int, batches: int | None) -> Found:
    """Trains what is missing, one run after the other, and reads the documents."""
    rows, findings = {}, []
    for name in names:
        directory = train(name, folder, steps, options.progress)
        rows[name] = claims.measured(functools.partial(streamed, length=length, batches=batches), directory)
        gain = {end: -x for end, x in rows[name]["gain_over_reset"]["drift"].items()}
        drifts = {"": rows[name]["drift"], ", gain over a reset memory": gain}
        for what, drift in drifts.items():
            low, high = sorted((ALLOWED - drift["low"], ALLOWED - drift["high"]))
            said = "reproduced" if low >= 0 else "contradicted" if high < 0 else "inconclusive"
            verdict = said if batches is None else claims.LOOK
            findings.append(Finding(f"{name} holds out{what}", Interval(ALLOWED - drift["value"], low, high), verdict))
    lines = ["| | bits per byte in rows | quarters of the documents | fourth - second |", "| --- | --- | --- | --- |"]
    for name, row in rows.items():
        quarters = ", ".join(f"{quarter['value']:.2f}" for quarter in row["quarters"])
        drift = "{value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**row["drift"])
        lines.append(f"| {name} | {row['bits_per_byte']:.2f} | {quarters} | {drift} |")
    return Found(findings, "\n".join(lines) + "\n", {"Loss by position": _plot(rows)}, {"rows": rows})


def train(name: str, folder, steps: int, progress: bool):
    """The folder of one run, which is trained, and first the one that it starts from."""
    module, own, first = RUNS[name]
    directory = folder / name.lower().replace(",", "").replace(" ", "_")
    start = {} if first is None else {"start_from": str(train(first, folder, steps, progress))}
    changes = {"data.validation_fraction": 0.5} | own | start
    experiment = experiments.replace(claims.of_length(module.config(), steps), changes)
    loop.train(experiment, directory, progress=progress)
    return directory


def streamed(directory, length: int, batches: int | None) -> dict:
    """What the evaluator `stream` finds of a run, and its bits per byte in rows."""
    found = evaluate(directory, only=["validation"], stream=length, batches=batches, progress=False)
    return found.evaluations["stream"] | {"bits_per_byte": found.bits_per_byte}


def _plot(rows: dict) -> bytes:
    lines = []
    for i, (name, row) in enumerate(rows.items()):
        bins = [b for b in row["curve"]["curves"][0]["bins"] if b["to"] > 64]
        lines.append({"name": name, "kind": "muted" if i else "model", "bins": bins})
    labels = next(iter(rows.values()))["curve"]["axis"], "bits per byte"
    return plots.curves("Past the training length", labels, lines, log_x=True, marks=[("trained on 256", 256)])
