"""Which plots an evaluation has, and the line under each that says what the reader should see."""

import dataclasses
import math
from typing import Any

import numpy as np

from engrax.evals import plots, token_type_breakdown

RUNS_AWAY = 10  # a diagnostic whose 99th percentile over rows is this many times its median is called out


@dataclasses.dataclass(frozen=True)
class Figure:
    """A plot: its file name without the ending, its heading, its PNG, and the line below it."""

    name: str
    heading: str
    png: bytes
    caption: str


def figures(data: dict[str, Any], history: list[dict[str, Any]]) -> list[Figure]:
    """All plots that the results (results.json's content) and the rows of metrics.jsonl have numbers for."""
    found = [
        _overview(data),
        *_positions(data),
        _streamed(data),
        _layers(data),
        _tokens(data),
        _types(data),
        _recall(data),
        _curves(data, history),
        _memory(data, history),
    ]
    return [figure for figure in found if figure is not None]


def _title(data: dict[str, Any], what: str) -> str:
    return f"{what} · {data['run']}, step {data['step']:,}"


def score_of(data: dict[str, Any]) -> dict[str, Any]:
    """The estimate that the whole evaluation turns on: in `data["unit"]`."""
    return data["validation"]["accuracy" if data["kind"] == "task" else "_".join(data["unit"].split())]


def _overview(data: dict[str, Any]) -> Figure:
    entries = [{"name": "model", "kind": "model"} | score_of(data)]
    entries += [{"name": f"{n} muted", "kind": "muted"} | found["muted"] for n, found in data["ablation"].items()]
    for found in reversed((data["baselines"] or {"orders": ()})["orders"]):
        entries.append({"name": f"order-{found['order']} n-gram", "kind": "baseline"} | found)
    for name, label in (("chance_in_context", "chance, in context"), ("chance", "chance"), ("oracle", "oracle")):
        if name in (data["task"] or {}):
            entries.append({"name": label, "kind": "reference", "value": data["task"][name]})
    task = data["kind"] == "task"
    label = "accuracy on labelled positions (higher is better)" if task else f"{data['unit']} (lower is better)"
    png = plots.bars(_title(data, "Result"), label, entries, limit=1.12 if task else None)
    return Figure("overview", "Result", png, " ".join(_overview_sentences(data)))


def _overview_sentences(data: dict[str, Any]) -> list[str]:
    value, unit = score_of(data)["value"], data["unit"]
    sentences = []
    if data["task"]:
        task = data["task"]
        sentences.append(
            f"The model answers {value:.1%} of the labelled positions; guessing answers {task['chance']:.1%}."
        )
        if "chance_in_context" in task:
            sentences.append(
                f"Above {task['chance_in_context']:.1%} it binds keys to values; below, it has at most learnt "
                "which tokens are answers."
            )
        if task["oracle"] < 1:
            sentences.append(f"The oracle scores {task['oracle']:.1%}: not every answer can be read off the tokens.")
    if data["baselines"]:
        best = min(data["baselines"]["orders"], key=lambda found: found["value"])
        gap = best["value"] - value
        sentences.append(
            f"The model needs {value:.3f} {unit}, {abs(gap):.3f} {'less' if gap > 0 else 'MORE'} than the best n-gram "
            f"(order {best['order']}) counted on the text that the model was trained on."
        )
    sentences += [ablation_sentence(name, found, data["kind"]) for name, found in data["ablation"].items()]
    return sentences or [f"The model's score: {value:.3f} {unit}."]


def ablation_sentence(name: str, found: dict[str, Any], kind: str) -> str:
    """What muting one memory's reads did, in words that follow the sign and the interval."""
    change = found["difference"]
    low, high = change["low"], change["high"]
    if low is not None and low <= 0 <= high:
        return f"Leaving out the reads of {name} changes nothing beyond chance ({change['value']:+.3f})."
    worse = change["value"] > 0 if kind != "task" else change["value"] < 0
    verb = "worsens" if worse else "IMPROVES"
    return f"Leaving out the reads of {name} {verb} it by {abs(change['value']):.3f}" + (
        ": the memory is in use." if worse else "."
    )


def _positions(data: dict[str, Any]) -> list[Figure]:
    found = []
    for name, heading in (("by_position", "By position"), ("by_context", "By length of context")):
        if not data[name]:
            continue
        task = data["kind"] == "task"
        names = {"chance": "chance", "chance_in_context": "chance in context"}
        levels = [(names[key], value) for key, value in (data["task"] or {}).items() if key in names]
        png = plots.curves(
            _title(data, heading),
            (data[name]["axis"], data["unit"] if not task else "accuracy"),
            data[name]["curves"],
            log_x=not task,
            levels=levels,
            y_range=(-0.03, 1.06) if task else None,
        )
        found.append(Figure(name, heading, png, _position_caption(data, data[name], task)))
    return found


def _position_caption(data: dict[str, Any], curves: dict[str, Any], task: bool) -> str:
    bins = curves["curves"][0]["bins"]
    band = "The band is the model's 95 % interval over rows."
    if task:
        return f"Accuracy of the answers at each place of the row. A memory that forgets falls off to the right. {band}"
    halves = _mean_of(bins, 0, bins[-1]["to"] // 2), _mean_of(bins, bins[-1]["to"] // 2, bins[-1]["to"])
    falls = "" if None in halves else (
        f"From the first half of the row to the second the model {'gains' if halves[0] > halves[1] else 'loses'} "
        f"{abs(halves[0] - halves[1]):.3f} {data['unit']}. "
    )  # fmt: skip
    muted = (
        "The gap between the model and its muted form is what the memory gives at that distance. "
        if data["ablation"]
        else ""
    )
    return f"A model that uses its context falls to the right. {falls}{muted}{band}"


def _streamed(data: dict[str, Any]) -> Figure | None:
    found = data.get("streamed")
    if not found:
        return None
    marks = [(f"trained on {found['trained_length']:,}", found["trained_length"])]
    labels = (found["curve"]["axis"], found["unit"])
    png = plots.curves(_title(data, "Long documents"), labels, found["curve"]["curves"], log_x=True, marks=marks)
    state, time = found["state_bytes"], found["time"]
    drift, beside = (_signed(d) for d in (found["drift"], found["restarted"]["drift"]))
    caption = (
        f"{found['documents']} validation documents read to {found['length']:,} tokens through the carried memory. "
        f"Fourth quarter against the second, paired by document: {drift} {found['unit']}; the same of the distance to "
        f"the memory begun anew, from which a quarter's own difficulty cancels: {beside}. "
        f"The state has {state['first']:,} bytes after the first piece and {state['last']:,} after the last; a piece "
        f"takes {time['piece']['ratio']:.2f} times as long at the end, a single token {time['token']['ratio']:.2f} "
        "times (medians of alternating calls)."
    )
    return Figure("streamed", "Long documents", png, caption)


def _signed(found: dict[str, Any]) -> str:
    interval = "" if found["low"] is None else f" [{found['low']:+.3f}, {found['high']:+.3f}]"
    return f"{found['value']:+.3f}{interval}"


def _mean_of(bins: list[dict[str, Any]], first: int, last: int) -> float | None:
    inside = [b for b in bins if first <= (b["from"] + b["to"]) / 2 < last]
    return float(np.average([b["value"] for b in inside], weights=[b["tokens"] for b in inside])) if inside else None


def _layers(data: dict[str, Any]) -> Figure | None:
    panels = scalars(data)
    if not panels:
        return None
    if max(len(by) for by in panels.values()) < 2:
        return None  # one layer: the table says it all
    png = plots.by_layer(_title(data, "Memory by layer"), panels)
    return Figure("memory_by_layer", "Memory by layer", png, "Medians over validation rows. " + memory_sentences(data))


def memory_sentences(data: dict[str, Any]) -> str:
    """How to read the diagnostics by layer, and a warning where a memory runs away on some rows."""
    found = scalars(data)
    words = []
    if any(name.endswith("surprise_after") for name in found):
        words.append("A memory that learns at test time has a lower surprise after reading the row than before it.")
    if any(name.endswith("_saturated") for name in found):
        words.append(
            "Saturation is the part of gate values within 0.01 of 0 or 1: near 1, the gate is the same for every token."
        )
    wild = [
        f"{name} ({where})"
        for name in found
        if name.endswith(("norm", "surprise_after"))
        for where, by in data["memory"][name].items()
        if by["median"] is not None and (by["p99"] is None or by["p99"] > RUNS_AWAY * by["median"])
    ]
    if wild:
        words.append(
            f"On some rows the memory RUNS AWAY: the 99th percentile is over {RUNS_AWAY} times the median in "
            f"{', '.join(wild)}."
        )
    return " ".join(words)


def scalars(data: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The memory diagnostics that are one number per layer, medians over rows: {name: {layer: value}}."""
    numeric = {
        n: {k: v["median"] for k, v in by.items() if v.get("median") is not None} for n, by in data["memory"].items()
    }
    return {name: found for name, found in numeric.items() if found}


def _tokens(data: dict[str, Any]) -> Figure | None:
    """Diagnostics that are one number per position of the row."""
    panels = {
        name: {
            layer: (range(1, len(v["by_position"]) + 1), v["by_position"])
            for layer, v in by.items()
            if "by_position" in v
        }
        for name, by in data["memory"].items()
    }
    panels = {name: panel for name, panel in panels.items() if panel}
    if not panels:
        return None
    png = plots.small_multiples(_title(data, "Memory by position"), "position in the row, tokens", panels)
    return Figure(
        "memory_by_position", "Memory by position", png, "Diagnostics of each token, averaged over validation rows."
    )


def _types(data: dict[str, Any]) -> Figure | None:
    """Diagnostics of every token by its type: which memory gets what."""
    drawn = token_type_breakdown.draw(_title(data, "Memory by type of token"), data)
    return drawn and Figure("memory_by_type", "Memory by type of token", *drawn)


def _recall(data: dict[str, Any]) -> Figure | None:
    """Diagnostics that are a table per layer: what a memory recalls of each past segment."""
    panels = {
        f"{name}, {layer}" if len(by) > 1 else name: np.asarray(v["values"], float)
        for name, by in data["memory"].items()
        for layer, v in by.items()
        if np.ndim(v.get("values")) == 2
    }
    if not panels:
        return None
    png = plots.heat_maps(_title(data, "Recall by segment"), "recalled segment", "segment that begins", panels)
    caption = (
        "The weight of every past segment as a segment begins, averaged over validation rows. A bright diagonal looks "
        "no further back than the last segments; columns are segments that many others come back to."
    )
    return Figure("memory_recall", "Recall by segment", png, caption)


def _series(history: list[dict[str, Any]], key: str, scale: float = 1.0) -> tuple[list[int], list[float]]:
    rows = [(row["step"], float(row[key]) * scale) for row in history if key in row]
    rows = sorted((step, value) for step, value in rows if math.isfinite(value))
    return [step for step, _ in rows], [value for _, value in rows]


def _curves(data: dict[str, Any], history: list[dict[str, Any]]) -> Figure | None:
    per_byte = data["validation"]["bytes_per_token"]
    unit, scale = (
        ("bits per byte", 1 / math.log(2) / per_byte) if data["kind"] == "text" else ("loss, nats per token", 1.0)
    )
    loss, validation, rate = (
        _series(history, "loss", scale),
        _series(history, "validation_loss", scale),
        _series(history, "tokens_per_second"),
    )
    if len(loss[0]) < 2:
        return None
    lines = [{"name": "training", "x": loss[0], "y": loss[1], "style": "line"}]
    if validation[0]:
        lines.append({"name": "validation", "x": validation[0], "y": validation[1], "style": "points"})
    panels = [{"label": unit, "series": lines, "zero": False}]
    if data["kind"] == "task" and any("validation_accuracy" in row for row in history):
        x, y = _series(history, "validation_accuracy")
        panels.append(
            {
                "label": "validation accuracy",
                "series": [{"name": "validation", "x": x, "y": y, "style": "points"}],
                "zero": True,
            }
        )
    if len(rate[0]) > 1:
        panels.append(
            {
                "label": "tokens per second",
                "series": [{"name": "", "x": rate[0], "y": rate[1], "style": "line"}],
                "zero": True,
            }
        )
    caption = (
        "Validation close to training means little overfitting; a curve still falling at its end means that more steps "
        "would help. Faint: every logged step; bold: its running mean. Validation during training uses fewer rows than "
        "this evaluation."
    )
    return Figure("training", "Training", plots.training(_title(data, "Training"), panels, data["step"]), caption)


def _memory(data: dict[str, Any], history: list[dict[str, Any]]) -> Figure | None:
    """Keys "memory/titans.lr_mean/0" of the logged rows; the last part counts the repeats of the pattern."""
    layers = {name: list(by) for name, by in data["memory"].items()}
    panels: dict[str, dict[str, tuple]] = {}
    for key in sorted({key for row in history for key in row if key.startswith("memory/")}):
        _, name, repeat = key.split("/")
        known = layers.get(name, ())
        label = known[int(repeat)] if int(repeat) < len(known) else f"repeat {repeat}"
        x, y = _series(history, key)
        if len(x) > 1:
            panels.setdefault(name, {})[label] = (x, y)
    if not panels:
        return None
    png = plots.small_multiples(_title(data, "Memory over training"), "training step", panels, step=data["step"])
    caption = (
        "Each diagnostic at every validation, the mean over one batch, a line per layer. Look for gates that move away "
        "from where they started (the memory is being trained), and for norms that settle rather than run away."
    )
    return Figure("memory_over_training", "Memory over training", png, caption)
