"""The page of an evaluation: one HTML file with its plots inside, that needs no network and no script."""

import base64
import json
from collections.abc import Sequence
from html import escape
from typing import Any

from engrax.evals.figures import Figure, figures, memory_sentences, scalars, score_of
from engrax.train.cost import cost_rows

__all__ = ["figures", "render", "summary_rows"]

CSS = """
:root { color-scheme: light; --ink: #111827; --soft: #4b5563; --line: #e5e7eb; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0; background: #f9fafb; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; margin: .5rem 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 .75rem; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 1.1rem 1.2rem;
  margin: 1.1rem 0; }
.sub { color: var(--soft); margin: 0 0 1rem; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.card { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: .7rem .9rem; }
.card b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.card span { color: var(--soft); font-size: .85rem; }
.warning { background: #fff7ed; border-color: #fdba74; }
figure { margin: 0; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { color: var(--soft); margin-top: .6rem; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: pre-wrap; }
thead th { color: var(--soft); font-weight: 600; }
table.facts td { white-space: normal; overflow-wrap: anywhere; text-align: left; }
table.facts td:first-child { color: var(--soft); width: 12rem; }
details { margin-top: .9rem; } summary { cursor: pointer; color: var(--accent); }
pre { overflow-x: auto; font-size: .82rem; line-height: 1.4; }
code { font-size: .9em; }
"""


def render(data: dict[str, Any], drawn: Sequence[Figure]) -> str:
    """The page for results.json's content and its plots."""
    by_name = {figure.name: figure for figure in drawn}
    parts = [_head(data), _cards(data)]
    parts += [f'<section class="warning"><strong>Warning:</strong> {escape(w)}</section>' for w in data["warnings"]]
    parts.append(_section("Result", _figure(by_name.get("overview")), _scores(data)))
    for name in ("by_position", "by_context"):
        if name in by_name:
            parts.append(
                _section(
                    by_name[name].heading,
                    _figure(by_name[name]),
                    _details("Numbers", _position_table(data, data[name])),
                )
            )
    if "streamed" in by_name:
        table = _details("Numbers", _position_table(data, data["streamed"]["curve"]))
        parts.append(_section(by_name["streamed"].heading, _figure(by_name["streamed"]), table))
    if data["memory"]:
        words = "" if "memory_by_layer" in by_name else f'<p class="sub">{escape(memory_sentences(data))}</p>'
        parts.append(_section("Memory by layer", _figure(by_name.get("memory_by_layer")), _memory_table(data), words))
    for name in ("memory_by_type", "memory_by_position", "memory_recall", "memory_over_training", "training"):
        if name in by_name:
            table = _training_table(data) if name == "training" else ""
            parts.append(_section(by_name[name].heading, _figure(by_name[name]), table))
    parts.append(_section("Cost", _cost_table(data)))
    parts.append(_section("Where these numbers come from", _provenance(data)))
    title = escape(f"{data['run']}, step {data['step']:,}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>engrax: {title}</title><style>{CSS}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def summary_rows(data: dict[str, Any]) -> list[tuple[str, str]]:
    """The main numbers as (name, value), for a terminal."""
    rows = [("run", f"{data['run']}, step {data['step']:,}"), (f"validation {data['unit']}", estimate(score_of(data)))]
    for found in (data["baselines"] or {"orders": ()})["orders"]:
        rows.append((f"  order-{found['order']} n-gram, same training text", f"{found['value']:.4f}"))
    for name, found in data["ablation"].items():
        rows.append((f"  {name} muted", f"{found['muted']['value']:.4f} ({signed(found['difference'])})"))
    rows += [(f"  {name.replace('_', ' ')}", f"{value:.4f}") for name, value in (data["task"] or {}).items()]
    if data["streamed"]:
        name = f"fourth - second quarter of {data['streamed']['length']:,} tokens, {data['streamed']['unit']}"
        rows.append((name, signed(data["streamed"]["drift"])))
        rows.append(
            ("  the same of its distance to a memory begun anew", signed(data["streamed"]["restarted"]["drift"]))
        )
    if data["kind"] != "task":
        rows.append(("next-token accuracy", f"{data['validation']['accuracy']['value']:.4f}"))
    rows.append(("parameters", f"{data['costs']['parameters']['total']:,}"))
    rows.append(("scored", _scored(data)))
    return rows


def estimate(found: dict[str, Any], digits: int = 4) -> str:
    """value ± half of the 95 % interval."""
    if found["value"] is None:
        return "none"
    return f"{found['value']:.{digits}f}" + (
        "" if found["low"] is None else f" ± {(found['high'] - found['low']) / 2:.{digits}f}"
    )


def signed(found: dict[str, Any]) -> str:
    """A difference with its sign."""
    return ("+" if found["value"] >= 0 else "-") + estimate(found | {"value": abs(found["value"])})


def _scored(data: dict[str, Any]) -> str:
    v = data["validation"]
    of = "the whole validation split" if v["complete"] else "the first validation rows"
    size = f"{v['bytes']:,} bytes in " if v["bytes"] else ""
    return f"{size}{v['tokens']:,} labelled tokens, {v['rows']:,} rows of {data['costs']['seq_len']} ({of})"


def _head(data: dict[str, Any]) -> str:
    model = data["config"]["model"]
    mixers = ", ".join(m["type"].split(":")[1] for m in model.get("mixers", ()))
    layers = f" ({mixers}) × {model['repeat']}" if mixers and "repeat" in model else ""
    what = f"{model['type'].split(':')[1]}{layers} on {data['config']['data']['type'].split(':')[1]}"
    seeds = ", ".join(f"{value} ({name})" for name, value in data["seeds"].items())
    commit = (data["trained_commit"] or "unknown")[:12]
    return (
        f"<h1>{escape(data['run'])}, step {data['step']:,}</h1>"
        f'<p class="sub">{escape(what)} · commit <code>{escape(commit)}</code> · '
        f"data <code>{data['data_digest'][:12]}</code> · seed {escape(seeds)} · {escape(data['device'])} · "
        f"{data['date'][:10]}</p>"
    )


def _cards(data: dict[str, Any]) -> str:
    cards = [(data["unit"], f"{score_of(data)['value']:.3f}")]
    if data["task"]:
        cards.append(("chance", f"{data['task']['chance']:.3f}"))
    if data["baselines"]:
        best = min(data["baselines"]["orders"], key=lambda found: found["value"])
        cards.append((f"order-{best['order']} n-gram", f"{best['value']:.3f}"))
    cards += [(f"{n} muted", f"{found['muted']['value']:.3f}") for n, found in data["ablation"].items()]
    cards.append(("parameters", f"{data['costs']['parameters']['total']:,}"))
    cards.append(("tokens/s, evaluation", f"{data['costs']['evaluation_tokens_per_second']:,.0f}"))
    return (
        '<div class="cards">'
        + "".join(f'<div class="card"><b>{v}</b><span>{escape(k)}</span></div>' for k, v in cards)
        + "</div>"
    )


def _section(heading: str, *content: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{''.join(content)}</section>"


def _figure(figure: Figure | None) -> str:
    if figure is None:
        return ""
    image = base64.b64encode(figure.png).decode()
    return (
        f'<figure><img alt="{escape(figure.heading, quote=True)}" src="data:image/png;base64,{image}">'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
    )


def _details(heading: str, content: str) -> str:
    return f"<details><summary>{escape(heading)}</summary>{content}</details>"


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = "") -> str:
    head = "<thead><tr>" + "".join(f"<th>{escape(c)}</th>" for c in columns) + "</tr></thead>" if columns else ""
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table class="{kind}">{head}<tbody>{body}</tbody></table></div>'


def _scores(data: dict[str, Any]) -> str:
    rows = [("model", estimate(score_of(data)), "")]
    rows += [(f"{n} muted", estimate(f["muted"]), signed(f["difference"])) for n, f in data["ablation"].items()]
    own = score_of(data)["value"]
    for found in (data["baselines"] or {"orders": ()})["orders"]:
        rows.append((f"order-{found['order']} n-gram", estimate(found), f"{found['value'] - own:+.4f}"))
    rows += [
        (name.replace("_", " "), f"{value:.4f}", f"{value - own:+.4f}") for name, value in (data["task"] or {}).items()
    ]
    notes = [f"Scored: {_scored(data)}. ± is the half-width of a 95 % interval over rows."]
    if data["ablation"]:
        notes.append(
            "Muted: the memory's reads are left out of the residual stream, without training again; compared by row."
        )
    if data["baselines"]:
        notes.append(_baseline_note(data["baselines"]))
    return (
        _table(("", data["unit"], "minus the model"), rows)
        + f'<p class="sub">{escape(" ".join(notes))}</p>'
        + _more_scores(data)
    )


def _more_scores(data: dict[str, Any]) -> str:
    v = data["validation"]
    rows = [
        ("bits per token", estimate(v["bits_per_token"])),
        ("loss, nats per token", f"{v['loss_nats_per_token']:.4f}"),
    ]
    rows.append(("accuracy of the most likely token", estimate(v["accuracy"])))
    if v["bytes_per_token"]:
        rows.append(("bytes per token", f"{v['bytes_per_token']:.4f}"))
    return _details("Other units", _table(("", "value"), rows))


def _baseline_note(found: dict[str, Any]) -> str:
    part = "all" if found["counted_all_seen"] else "the first"
    times = f" (seen {found['epochs_seen']:.2f} times)" if found["epochs_seen"] else ""
    return (
        f"N-grams over {found['unit']}, {found['smoothing']}, counted on {part} {found['counted_bytes']:,} bytes that "
        f"the model was trained on{times}, and scored on the same targets with the same context, cut at segment ends."
    )


def _position_table(data: dict[str, Any], curves: dict[str, Any]) -> str:
    lines = curves["curves"]
    rows = []
    for i, b in enumerate(lines[0]["bins"]):
        where = f"{b['from'] + 1:,}" if b["to"] == b["from"] + 1 else f"{b['from'] + 1:,} to {b['to']:,}"
        rows.append((where, f"{b['tokens']:,}", *(estimate(line["bins"][i], 3) for line in lines)))
    return _table((curves["axis"], "scored tokens", *(line["name"] for line in lines)), rows)


def _memory_table(data: dict[str, Any]) -> str:
    found = scalars(data)
    layers = sorted({layer for by in found.values() for layer in by}, key=lambda layer: int(layer.split()[1]))
    rows = []
    for name in found:
        shown = [data["memory"][name].get(layer, {}) for layer in layers]
        rows.append((name, *(f"{_short(v['median'])} ({_short(v['p99'])})" if v else "" for v in shown)))
    return _table(("median over rows (99th percentile)", *layers), rows)


def _training_table(data: dict[str, Any]) -> str:
    shown = [(name.replace("_", " "), value) for name, value in data["training"].items() if value is not None]
    return _details("Numbers", _table((), [(name, f"{v:,}" if isinstance(v, int) else _short(v)) for name, v in shown]))


def _short(value: Any) -> str:
    """Four significant digits, whole numbers above a thousand, powers of ten above a million."""
    if not isinstance(value, float):
        return "not finite" if value is None else str(value)
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"


def _cost_table(data: dict[str, Any]) -> str:
    rows = [*cost_rows(data["costs"])]
    rows.append(
        (f"evaluation speed, tokens/s ({data['device']})", f"{data['costs']['evaluation_tokens_per_second']:,.0f}")
    )
    speed = data["training"]["tokens_per_second_median"]
    if speed:
        rows.append(
            (f"training speed, median tokens/s ({data['trained_device'] or 'device unknown'})", f"{speed:,.0f}")
        )
    return _table((), rows)


def _provenance(data: dict[str, Any]) -> str:
    names = (
        "run",
        "step",
        "date",
        "trained_commit",
        "commit",
        "data_digest",
        "trained_data_digest",
        "trained_device",
        "device",
    )
    labels = {
        "commit": "commit of this evaluation",
        "trained_commit": "commit of the training",
        "device": "device of this evaluation",
    }
    rows = [
        (labels.get(name, name.replace("_", " ")), data[name] if data[name] is not None else "unknown")
        for name in names
    ]
    rows.append(("seeds", ", ".join(f"{name} {value}" for name, value in data["seeds"].items())))
    rows.append(("versions", ", ".join(f"{name} {value}" for name, value in data["versions"].items() if value)))
    config = _details("Config", f"<pre>{escape(json.dumps(data['config'], indent=2))}</pre>")
    return _table((), rows, "facts") + config
