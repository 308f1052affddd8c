"""The files of a frontier: frontier.json with every number, tables as .md and .csv, the plot, and a page with both."""

import csv
import dataclasses
import io
import json
import math
from typing import Any

from etils import epath

from engrax.evals import frontier as core
from engrax.evals import frontier_plot, report, verdicts
from engrax.evals.comparison_report import head_of
from engrax.evals.evaluator import Evaluation, Figure, Table
from engrax.evals.frontier import BASELINE, Found, Frontier, Point
from engrax.files import write_atomically
from engrax.train import runs
from engrax.train.cost import quantity, size

LOOK = "a look, no verdict"
CAPTION = (
    "Left: recall against the bytes of state of one sequence, all layers, tails of convolutions included. Right: the "
    "same points against the tokens per second of training. The dotted line is chance; a filled point is the best with "
    "as few bytes."
)


@dataclasses.dataclass(frozen=True, repr=False)
class FrontierResult:
    """A frontier as far as it has come."""

    directory: epath.Path
    points: tuple[Point, ...]
    left_out: dict[str, str]  # mixer, or mixer at a size -> why it is not in the frontier
    missing: dict[str, str]  # cell -> why it has no point yet
    markdown: str

    def __repr__(self) -> str:
        return self.markdown


def frontier(
    settings: Frontier,
    folder: epath.PathLike,
    *,
    processes: int = 1,
    minutes: float | None = None,
    command: str = "",
    progress: bool = True,
) -> FrontierResult:
    """Trains what is missing, as far as the minutes reach, and writes frontier.json, .md, .csv, .png and .html.

    `command` is printed in the files as the command to repeat it. Raises UserError like `engrax.evals.frontier.run`.
    """
    found = core.run(settings, folder, processes=processes, minutes=minutes, progress=progress)
    directory = runs.folder(folder)
    directory.mkdir(parents=True, exist_ok=True)
    head = _head(settings, found, processes, command)
    table, notes = _table(settings, found), _notes(settings, head, found)
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    text = "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)
    result = FrontierResult(directory, found.points, found.left_out, found.missing, f"{text}\n\n{' '.join(notes)}\n")
    points = [_plain(point) for point in found.points]
    data = head | {"points": points, "left_out": found.left_out, "missing": found.missing}
    write_atomically(directory / "frontier.json", json.dumps(data, indent=1) + "\n")
    write_atomically(directory / "frontier.md", result.markdown)
    write_atomically(directory / "frontier.csv", _csv(points))
    png = frontier_plot.draw(head["title"], head["chance"], points) if points else None
    if png:
        (directory / "frontier.png").write_bytes(png)
    write_atomically(directory / "frontier.html", _page(settings, head, table, notes, png))
    return result


def _plain(point: Point) -> dict[str, Any]:
    """A point for JSON, CSV and the plot."""
    number = lambda value: None if math.isnan(value) else value  # noqa: E731
    return {
        "mixer": point.cell.mixer,
        "size": point.cell.size,
        "state_bytes": point.cell.state_bytes,
        "parameters": point.cell.parameters,
        "learning_rate": point.learning_rate,
        "at_edge": point.at_edge,
        "accuracy": point.accuracy.value,
        "low": point.accuracy.low,
        "high": point.accuracy.high,
        "tokens_per_second": number(point.tokens_per_second),
        "best": point.best,
        "verdict": point.verdict,
        "seeds": [number(value) for value in point.seeds],
        "grid": {f"{rate:g}": number(value) for rate, value in point.grid.items()},
    }


def _csv(points: list[dict[str, Any]]) -> str:
    """The points as lines; lists and grids stay in the JSON."""
    names = [name for name in _COLUMNS if name not in ("seeds", "grid")]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(points)
    return stream.getvalue()


_COLUMNS = ("mixer", "size", "state_bytes", "parameters", "learning_rate", "at_edge", "accuracy", "low", "high")
_COLUMNS += ("tokens_per_second", "best", "verdict", "seeds", "grid")


def _head(settings: Frontier, found: Found, processes: int, command: str) -> dict[str, Any]:
    """The settings that the numbers depend on."""
    e = settings.experiment
    task = e.data.registered_name
    return {
        "title": f"Frontier on {task}: {e.data.seq_len} tokens, width {e.model.dim}, {e.steps:,} steps",
        **head_of(e, command),
        "task": dataclasses.asdict(e.data) | {"type": task},
        "chance": e.data.chance,
        "dim": e.model.dim,
        "layers": e.model.repeat,
        "sizes": list(settings.sizes),
        "learning_rates": list(settings.learning_rates),
        "seeds": list(range(1, settings.seeds + 1)),
        "processes": processes,
        "finished": not found.missing,
    }


def _table(settings: Frontier, found: Found) -> Table:
    judged = settings.seeds >= verdicts.LEAST_SEEDS
    columns = ["mixer", "state", "parameters", "learning rate", "recall", "tokens/s", "best at its bytes"]
    columns += [f"against {BASELINE}"] if judged else []
    rows = []
    for p in found.points:
        diverged = sum(math.isnan(value) for value in p.seeds)
        spread = f"{p.accuracy.value:.3f} [{p.accuracy.low:.3f}, {p.accuracy.high:.3f}]"
        cells = [
            p.cell.mixer + (", whole row" if p.cell.size == "whole row" else ""),
            size(p.cell.state_bytes),
            f"{p.cell.parameters:,}",
            f"{p.learning_rate:g}" + "*" * p.at_edge,
            spread + (f" ({diverged} diverged)" if diverged else ""),
            "" if math.isnan(p.tokens_per_second) else f"{p.tokens_per_second:,.0f}",
            "yes" if p.best else "",
        ]
        rows.append(cells + ([p.verdict or ""] if judged else []))
    return Table(columns, rows)


def _notes(settings: Frontier, head: dict[str, Any], found: Found) -> list[str]:
    """Sentences below the table."""
    e, seeds = settings.experiment, head["seeds"]
    grid = ", ".join(f"{rate:g}" for rate in settings.learning_rates)
    tokens = quantity(e.steps * e.batch_size * e.data.seq_len, "tokens")
    notes = [
        f"{head['date']}, {head['device']}, jax {head['versions'].get('jax')}, {head['processes']} at once; "
        f"{head['layers']} layers of width {e.model.dim}, {e.steps} steps of {e.batch_size} x {e.data.seq_len} tokens "
        f"({tokens}); learning rates {grid} with seed 0, judged at the best with seed"
        + (f" {seeds[0]}" if len(seeds) == 1 else f"s {seeds[0]} to {seeds[-1]}")
        + "; 95 % intervals by bootstrap over seeds and rows.",
    ]
    if len(seeds) < verdicts.LEAST_SEEDS:
        notes.append(f"Fewer than {verdicts.LEAST_SEEDS} judged seeds: {LOOK}.")
    else:
        notes.append("Verdicts are corrected for their number (Holm).")
    if any(point.at_edge for point in found.points):
        notes.append("`*`: the best learning rate ends the grid.")
    if found.missing:
        notes.append(f"Unfinished: {len(found.missing)} of {len(found.missing) + len(found.points)} cells are missing.")
    notes += [f"Without {name}: {why.rstrip('.')}." for name, why in found.left_out.items()]
    return notes + ([f"Command: `{head['command']}`."] if head["command"] else [])


def _page(settings: Frontier, head: dict[str, Any], table: Table, notes: list[str], png: bytes | None) -> str:
    """The frontier as one HTML file."""
    figure = Figure("frontier", "Recall by state and by speed", CAPTION, png, table, folded=False)
    warnings = [note for note in notes if note.startswith(("Unfinished", "Fewer"))]
    facts = [(name.replace("_", " "), value) for name, value in head.items() if name not in ("title", "versions")]
    facts.append(("versions", ", ".join(f"{name} {value}" for name, value in head["versions"].items() if value)))
    return report.page(
        data=head | {"warnings": warnings},
        title=head["title"],
        subject=" ".join(note for note in notes if note not in warnings),
        commit=(head["commit"] or "unknown")[:12],
        seeds=", ".join(map(str, head["seeds"])),
        cards=[],
        parts=report.parts("frontier", Evaluation({}, [figure])),
        provenance=Table((), facts),
        config=json.dumps(head["task"], indent=2),
    )
