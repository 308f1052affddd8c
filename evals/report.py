"""The page of an evaluation: one HTML file with its plots inside. It needs no network and no script."""

import base64
import json
from pathlib import Path
from typing import Any

from engrax.data.config import Splits
from engrax.evals.evaluator import Evaluation, Figure, Table

TEMPLATE = Path(__file__).with_name("report.html.jinja")
LABELS = {
    "commit": "commit of this evaluation",
    "trained_commit": "commit of the training",
    "device": "device of this evaluation",
}


def render(data: dict[str, Any], found: dict[str, Evaluation]) -> str:
    """The page for results.json's content and the evaluators' results, in their order."""
    return page(
        data=data,
        title=f"{data['run']}, step {data['step']:,}",
        subject=_subject(data["config"]),
        commit=(data["trained_commit"] or "unknown")[:12],
        seeds=", ".join(f"{value} ({name})" for name, value in data["seeds"].items()),
        cards=[evaluation.summary[0] for evaluation in found.values() if evaluation.summary],
        parts=[part for name, evaluation in found.items() for part in parts(name, evaluation)],
        provenance=_provenance(data),
        config=json.dumps(data["config"], indent=2),
    )


def page(**content: Any) -> str:
    """The page for the template's values."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(**content)


def _subject(config: dict[str, Any]) -> str:
    """The model, its mixers and the data, in one line."""
    model = config["model"]
    mixers = ", ".join(mixer["type"].split(":")[1] for mixer in model.get("mixers", ()))
    layers = f" ({mixers}) × {model['repeat']}" if mixers and "repeat" in model else ""
    return f"{model['type'].split(':')[1]}{layers} on {config['data']['type'].split(':')[1]}"


def parts(name: str, evaluation: Evaluation) -> list[dict[str, Any]]:
    """The sections of one evaluator: its figures or, without figures, its summary as a table."""
    figures = evaluation.figures
    if not figures and evaluation.summary:
        table = Table((), evaluation.summary)
        figures = [Figure(name, name.replace("_", " ").capitalize(), "", table=table, folded=False)]
    return [
        {
            "heading": figure.heading,
            "caption": figure.caption,
            "image": None if figure.png is None else base64.b64encode(figure.png).decode(),
            "table": figure.table,
            "folded": figure.folded,
        }
        for figure in figures
    ]


def _provenance(data: dict[str, Any]) -> Table:
    names = ("run", "step", "date", "trained_commit", "commit", "data_digest", "trained_data_digest")
    names += ("trained_device", "device", "devices")
    rows = [(LABELS.get(n, n.replace("_", " ")), "unknown" if data[n] is None else data[n]) for n in names]
    if data["splits"] is not None:
        rows += Splits.from_dict(data["splits"]).rows()
    rows.append(("seeds", ", ".join(f"{name} {value}" for name, value in data["seeds"].items())))
    rows.append(("versions", ", ".join(f"{name} {value}" for name, value in data["versions"].items() if value)))
    rows.append(("evaluators", ", ".join(data["evaluators"])))
    return Table((), rows)
