"""The files of a comparison: comparison.json with every number, comparison.md with the table, and a plot."""

import dataclasses
import datetime
import json
from collections.abc import Sequence
from typing import Any

from etils import epath

from engrax.evals import finished_runs, plots, scoring, verdicts
from engrax.evals.comparison import Comparison, Row, folder_of, run
from engrax.evals.trials import LEARNT
from engrax.files import write_atomically
from engrax.train import runs
from engrax.train.cost import quantity, size
from engrax.train.experiment import Experiment


@dataclasses.dataclass(frozen=True)
class JudgedTable:
    """One table."""

    lines: list[verdicts.TableRow]
    claims: list[verdicts.ClaimVerdict]
    markdown: str
    data: dict[str, Any]  # for comparison.json
    plot: bytes  # PNG


@dataclasses.dataclass(frozen=True, repr=False)
class ComparisonResult:
    """A finished comparison; `lines` and `claims` are those of its first task."""

    directory: epath.Path | None  # of its files
    tables: dict[str, JudgedTable]  # by task, "" if the comparison names none
    missing: dict[str, str]  # experiments without a row, and why

    @property
    def lines(self) -> list[verdicts.TableRow]:
        return next(iter(self.tables.values())).lines

    @property
    def claims(self) -> list[verdicts.ClaimVerdict]:
        return next(iter(self.tables.values())).claims

    @property
    def markdown(self) -> str:
        """All tables, and what is missing."""
        parts = [(f"## {task}\n\n" if task else "") + table.markdown for task, table in self.tables.items()]
        parts += [f"Not in the table: {name}, {why}.\n" for name, why in self.missing.items()]
        return "\n".join(parts)

    def __repr__(self) -> str:
        return self.markdown


def compare(
    comparison: Comparison,
    folder: epath.PathLike,
    *,
    processes: int = 1,
    minutes: float | None = None,
    command: str = "",
    progress: bool = True,
) -> ComparisonResult:
    """Trains and scores the missing trials, judges, and writes comparison.json, comparison.md and comparison.png.

    With several tasks there is one comparison_TASK.png each. `command` is printed in the files as the command to repeat
    it. Raises UserError like `engrax.evals.comparison.run`.
    """
    ran = run(comparison, folder, processes=processes, minutes=minutes, progress=progress)
    parts = comparison.parts()
    text = how(comparison.learning_rates, comparison.seeds)
    tables = {task: table(parts[task], rows, _head(parts[task], command), text) for task, rows in ran.rows.items()}
    found = ComparisonResult(runs.folder(folder), tables, ran.missing)
    write(found)
    return found


def compare_runs(paths: Sequence[epath.PathLike], folder: epath.PathLike | None = None, *, command: str = ""):
    """The ComparisonResult of finished runs, scored as they are; its files are written into `folder` if it is given.

    Runs that differ only in their seed are one row. Raises UserError if runs differ in their data.
    """
    group, rows = finished_runs.rows_of(paths)
    first = next(iter(group.experiments.values()))
    names = [*group.differing]
    note = f"; the experiments differ in {', '.join(names)}" if names else ""
    text = f"{len(paths)} finished runs, scored at their last checkpoints on the same rows{note}"
    head = head_of(first, command) | {"runs": [str(path) for path in paths]}
    where = None if folder is None else runs.folder(folder)
    found = ComparisonResult(where, {"": table(group, rows, head, text)}, {})
    if where is not None:
        runs.refuse_file(where)
        write(found)
    return found


def table(
    comparison: Comparison | finished_runs.Finished, rows: list[Row], head: dict[str, Any], text: str
) -> JudgedTable:
    """Judges the rows of one task; `text` says how they came about."""
    lines, claims = verdicts.judge(comparison, rows)
    data = head | verdicts.to_dict(lines, claims) | {"grids": {row.name: _grid(row) for row in rows}}
    look = "" if any(line.seeds >= verdicts.LEAST_SEEDS for line in lines) else "A look, no verdicts: "
    entries = [{"name": line.name, "verdict": line.verdict, **dataclasses.asdict(line.score)} for line in lines]
    title = f"{look}{head['unit'].capitalize()}, 95 % intervals"
    if look == "" and "learning_rates" in head:
        tokens = head["steps"] * head["batch_size"] * head["seq_len"]
        title = f"{head['unit'].capitalize()} after {quantity(tokens, 'tokens')}, 95 % intervals"
    return JudgedTable(
        lines, claims, _markdown(head, lines, claims, text), data, plots.intervals(title, head["unit"], entries)
    )


def write(found: ComparisonResult) -> None:
    """Writes the files of a comparison."""
    found.directory.mkdir(parents=True, exist_ok=True)
    named = [*found.tables] != [""]
    data = {"tasks": {task: one.data for task, one in found.tables.items()}} if named else found.tables[""].data
    write_atomically(
        found.directory / "comparison.json", json.dumps(data | {"missing": found.missing}, indent=1) + "\n"
    )
    write_atomically(found.directory / "comparison.md", found.markdown)
    for task, one in found.tables.items():
        name = f"comparison_{folder_of(task)}.png" if task else "comparison.png"
        (found.directory / name).write_bytes(one.plot)


def how(learning_rates: Sequence[float], seeds: int) -> str:
    """How the rows of a comparison came about."""
    grid = ", ".join(f"{rate:g}" for rate in learning_rates)
    judged = "seed 1" if seeds == 1 else f"seeds 1 to {seeds}"
    return f"learning rates {grid} with seed 0, judged at the best with {judged}"


def _grid(row: Row) -> dict[str, Any]:
    """Scores by learning rate with seed 0, and by judged seed at the best rate; None if a training diverged."""
    plain = lambda value: None if value != value else value  # noqa: E731
    return {
        "learning_rates": {f"{rate:g}": plain(value) for rate, value in row.grid.items()},
        "seeds": [plain(score.mean) for score in row.scores],
        "seconds": sum(score.seconds for score in row.scores),
    }


def head_of(experiment: Experiment, command: str) -> dict[str, Any]:
    """The settings that the numbers depend on."""
    here = runs.describe_environment(experiment)
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": command,
        "device": here["device"],
        "versions": here["versions"],
        "commit": here["commit"],
        "data_digest": here["data_digest"],
        "unit": scoring.UNITS[scoring.kind_of(experiment)],
        "steps": experiment.steps,
        "batch_size": experiment.batch_size,
        "seq_len": experiment.data.seq_len,
    }


def _head(comparison: Comparison, command: str) -> dict[str, Any]:
    rates, seeds = list(comparison.learning_rates), list(range(1, comparison.seeds + 1))
    return head_of(next(iter(comparison.experiments.values())), command) | {"learning_rates": rates, "seeds": seeds}


def _markdown(head: dict[str, Any], lines: list[verdicts.TableRow], claims: Sequence[Any], how: str) -> str:
    task = head["unit"] == scoring.UNITS["task"]
    baseline = lines[0].name
    columns = ["", "parameters", "state", "FLOP/token", "learning rate", head["unit"], f"against {baseline}", "verdict"]
    columns += [f"steps to {LEARNT:.0%}"] if task else []
    table = [columns, ["---"] * len(columns)] + [_cells(line, task) for line in lines]
    text = ["\n".join("| " + " | ".join(cells) + " |" for cells in table), "", _notes(head, lines, how)]
    if claims:
        rows = [["claimed better", "than", "source", "difference here", "verdict"], ["---"] * 5]
        for found in claims:
            claim = found.claim
            rows.append([claim.better, claim.worse, claim.source, _difference(found.difference), found.verdict])
        text += ["", "\n".join("| " + " | ".join(cells) + " |" for cells in rows)]
    return "\n".join(text) + "\n"


def _cells(line: verdicts.TableRow, task: bool) -> list[str]:
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
    learnt = f"{line.learnt_at:g} ({line.learnt_seeds} of {line.seeds} seeds)" if line.learnt_seeds else "never"
    return cells + ([learnt] if task else [])


def _difference(found: verdicts.Interval) -> str:
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def _notes(head: dict[str, Any], lines: list[verdicts.TableRow], how: str) -> str:
    verdict = "verdicts corrected for their number in a table (Holm)."
    if any(line.verdict == "no verdict" for line in lines):
        verdict = f"no verdict where a side has fewer than {verdicts.LEAST_SEEDS} seeds, or the baseline has no row."
    notes = [
        f"{head['date']}, {head['device']}, jax {head['versions'].get('jax')}; {head['steps']} steps of "
        f"{head['batch_size']} x {head['seq_len']} tokens; {how}; 95 % intervals by bootstrap over seeds and rows; "
        + verdict,
    ]
    if any(line.at_edge for line in lines):
        notes.append("`*`: the best learning rate ends the grid.")
    if head["command"]:
        notes.append(f"Command: `{head['command']}`.")
    return " ".join(notes)
