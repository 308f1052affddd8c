"""The files of a comparison: comparison.json with every number, comparison.md with the table, and a plot."""

import dataclasses
import datetime
import json
from typing import Any

from etils import epath

from engrax.evals import plots, scoring, verdicts
from engrax.evals.comparison import Comparison, Row, kind, run
from engrax.evals.trials import LEARNT
from engrax.files import write_atomically
from engrax.train import runs
from engrax.train.cost import quantity, size


@dataclasses.dataclass(frozen=True, repr=False)
class ComparisonResult:
    """A finished comparison."""

    directory: epath.Path
    lines: list[verdicts.TableRow]
    claims: list[verdicts.ClaimVerdict]
    markdown: str

    def __repr__(self) -> str:
        return self.markdown


def compare(
    comparison: Comparison, folder: epath.PathLike, *, command: str = "", progress: bool = True
) -> ComparisonResult:
    """Trains and scores the missing trials, judges, and writes comparison.json, comparison.md and comparison.png.

    `command` is printed in the files as the command to repeat it. Raises UserError like `engrax.evals.comparison.run`.
    """
    rows = run(comparison, folder, progress=progress)
    lines, claims = verdicts.judge(comparison, rows)
    directory = runs.folder(folder)
    head = _head(comparison, command)
    found = ComparisonResult(directory, lines, claims, _markdown(comparison, head, lines, claims))
    grids = {row.name: _grid(row) for row in rows}
    data = head | verdicts.to_dict(lines, claims) | {"grids": grids}
    write_atomically(directory / "comparison.json", json.dumps(data, indent=1) + "\n")
    write_atomically(directory / "comparison.md", found.markdown)
    entries = [{"name": line.name, "verdict": line.verdict, **dataclasses.asdict(line.score)} for line in lines]
    (directory / "comparison.png").write_bytes(plots.intervals(_title(comparison), head["unit"], entries))
    return found


def _grid(row: Row) -> dict[str, Any]:
    """Scores by learning rate with seed 0, and by judged seed at the best rate; None if a training diverged."""
    plain = lambda value: None if value != value else value  # noqa: E731
    return {
        "learning_rates": {f"{rate:g}": plain(value) for rate, value in row.grid.items()},
        "seeds": [plain(score.mean) for score in row.scores],
        "seconds": sum(score.seconds for score in row.scores),
    }


def _head(comparison: Comparison, command: str) -> dict[str, Any]:
    """The settings that the numbers depend on."""
    experiment = next(iter(comparison.experiments.values()))
    here = runs.describe_environment(experiment)
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command,
        "device": here["device"],
        "versions": here["versions"],
        "commit": here["commit"],
        "data_digest": here["data_digest"],
        "unit": scoring.UNITS[kind(comparison)],
        "steps": experiment.steps,
        "batch_size": experiment.batch_size,
        "seq_len": experiment.data.seq_len,
        "learning_rates": list(comparison.learning_rates),
        "seeds": list(range(1, comparison.seeds + 1)),
    }


def _title(comparison: Comparison) -> str:
    experiment = next(iter(comparison.experiments.values()))
    tokens = experiment.steps * experiment.batch_size * experiment.data.seq_len
    return f"{scoring.UNITS[kind(comparison)].capitalize()} after {quantity(tokens, 'tokens')}, 95 % intervals"


def _markdown(comparison: Comparison, head: dict[str, Any], lines: list[verdicts.TableRow], claims) -> str:
    task = kind(comparison) == "task"
    baseline = lines[0].name
    columns = ["", "parameters", "state", "FLOP/token", "learning rate", head["unit"], f"against {baseline}", "verdict"]
    columns += [f"steps to {LEARNT:.0%}"] if task else []
    table = [columns, ["---"] * len(columns)] + [_cells(line, comparison, task) for line in lines]
    text = ["\n".join("| " + " | ".join(cells) + " |" for cells in table), "", _notes(head, lines)]
    if claims:
        rows = [["claimed better", "than", "source", "difference here", "verdict"], ["---"] * 5]
        for found in claims:
            claim = found.claim
            rows.append([claim.better, claim.worse, claim.source, _difference(found.difference), found.verdict])
        text += ["", "\n".join("| " + " | ".join(cells) + " |" for cells in rows)]
    return "\n".join(text) + "\n"


def _cells(line: verdicts.TableRow, comparison: Comparison, task: bool) -> list[str]:
    seeds = f" ({line.diverged} diverged)" if line.diverged else ""
    cells = [
        line.name,
        f"{line.parameters:,}",
        "" if line.state_bytes is None else size(line.state_bytes),
        "" if line.flops_per_token is None else quantity(line.flops_per_token, "FLOP"),
        f"{line.learning_rate:g}{'*' if line.at_edge else ''}{seeds}",
        f"{line.score.value:.3f} [{line.score.low:.3f}, {line.score.high:.3f}]",
        "" if line.difference is None else _difference(line.difference),
        line.verdict or "",
    ]
    learnt = f"{line.learnt_at:g} ({line.learnt_seeds} of {comparison.seeds} seeds)" if line.learnt_seeds else "never"
    return cells + ([learnt] if task else [])


def _difference(found: verdicts.Interval) -> str:
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def _notes(head: dict[str, Any], lines: list[verdicts.TableRow]) -> str:
    grid = ", ".join(f"{rate:g}" for rate in head["learning_rates"])
    notes = [
        f"{head['date']}, {head['device']}, jax {head['versions'].get('jax')}; {head['steps']} steps of "
        f"{head['batch_size']} x {head['seq_len']} tokens; learning rates {grid} with seed 0, judged at the best "
        f"with seeds {head['seeds'][0]} to {head['seeds'][-1]}; 95 % intervals by bootstrap over seeds and rows; "
        "verdicts corrected for their number in a table (Holm).",
    ]
    if any(line.at_edge for line in lines):
        notes.append("`*`: the best learning rate ends the grid.")
    if head["command"]:
        notes.append(f"Command: `{head['command']}`.")
    return " ".join(notes)
