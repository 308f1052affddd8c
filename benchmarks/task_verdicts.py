"""What the judged runs of a finished comparison know of each kind of question, and beyond the training's lengths.

    python benchmarks/task_verdicts.py forgetting_recall runs/forgetting_recall
    python benchmarks/task_verdicts.py parity runs/parity

`engrax compare forgetting_recall` and `engrax compare parity` make the folders. Forgetting MQAR: the accuracy of keys
that were bound again and of the others. Parity: the share of whole strings that are right at every position, at the
training's lengths, 2 to 40 bits, and at 41 to 80 and 81 to 160. A line is an experiment; a column has its mean over the
judged seeds and, in brackets, the lowest and the highest.
"""

import argparse
import json

import jax
import numpy as np
from etils import epath

from engrax import configs
from engrax.evals import scoring
from engrax.evals.comparison import folder_of
from engrax.train import runs

LENGTHS = {"2 to 40": {}} | {f"{a} to {b}": {"seq_len": b, "shortest": a} for a, b in ((41, 80), (81, 160))}


def judged(folder: epath.Path, name: str) -> list[epath.Path]:
    """The runs of the judged seeds of an experiment."""
    return sorted(run for run in (folder / folder_of(name)).glob("lr_*_seed_*") if not run.name.endswith("seed_0"))


def right(directory: epath.Path, fields: dict) -> tuple[scoring.Rows, np.ndarray, runs.Run]:
    """The validation rows of a run on data with these fields, and where it is right."""
    run = runs.open_run(directory, fields)
    model, _ = run.load()
    rows = scoring.validation_rows(run.experiment, None)
    return rows, scoring.Scorer(run.experiment, model).score(rows).right, run


def by_kind(directory: epath.Path) -> dict[str, float]:
    """The accuracy of every kind of question."""
    rows, found, run = right(directory, {})
    names, index = run.experiment.data.slices(rows.arrays())
    return {name: float(found[index == i].mean()) for i, name in enumerate(names) if (index == i).any()}


def by_length(directory: epath.Path) -> dict[str, float]:
    """The share of strings that are right at every position, by their lengths."""
    shares = {}
    for name, fields in LENGTHS.items():
        rows, found, _ = right(directory, fields)
        strings = rows.labelled.any(axis=1)  # the last batch is filled with empty rows
        shares[name] = float((found | ~rows.labelled).all(axis=1)[strings].mean())
    return shares


MEASURES = {"forgetting_recall": by_kind, "parity": by_length}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", choices=MEASURES)
    parser.add_argument("folder", type=epath.Path)
    parser.add_argument("--output", type=epath.Path, help="write the result as JSON to this file")
    arguments = parser.parse_args()
    comparison, _ = configs.find_comparison(arguments.comparison)
    table = {}
    for name in comparison.experiments:
        found = [MEASURES[arguments.comparison](run) for run in judged(arguments.folder, name)]
        table[name] = {column: [each[column] for each in found] for column in found[0]}
        if len(table) == 1:
            print("|  |", " | ".join(table[name]), "|")
        cells = (f"{np.mean(v):.3f} [{min(v):.3f}, {max(v):.3f}]" for v in table[name].values())
        print(f"| {name} |", " | ".join(cells), "|", flush=True)
    if arguments.output:
        device = jax.devices()[0].device_kind
        arguments.output.write_text(json.dumps({"device": device, "by_seed": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
