"""Evaluating a checkpoint of a run: what the model has learnt, what its memories are worth, and what it costs."""

import csv
import dataclasses
import datetime
import io
import json
import math
import sys
from typing import Any

import numpy as np
from etils import epath

from engrax.data.token_types import TokenTypes
from engrax.errors import UserError
from engrax.evals import ngrams, scoring, streaming, token_type_breakdown
from engrax.evals import statistics as stats
from engrax.train import cost, metrics, runs
from engrax.train import experiment as experiments
from engrax.train.experiment import Experiment

FORMAT_VERSION = 1  # of results.json
PACKED = (
    0.1  # part of the scored tokens in later segments of a row from which the length of context is a plot of its own
)
KINDS = ("text", "task", "tokens")  # text: bits per byte; task: accuracy on a generated task; tokens: bits per token


@dataclasses.dataclass(frozen=True, repr=False)
class Results:
    """A finished evaluation; `data` is what results.json holds, and its text the main numbers."""

    directory: epath.Path  # RUN/evals/step_N
    data: dict[str, Any]

    @property
    def step(self) -> int:
        """The evaluated step."""
        return self.data["step"]

    @property
    def report(self) -> epath.Path:
        """The self-contained page."""
        return self.directory / "report.html"

    @property
    def bits_per_byte(self) -> float | None:
        """Of the validation text; None where the data is no text."""
        found = self.data["validation"]["bits_per_byte"]
        return found and found["value"]

    @property
    def accuracy(self) -> float:
        """Rightly predicted labelled tokens / all labelled tokens."""
        return self.data["validation"]["accuracy"]["value"]

    def summary(self) -> str:
        """The main numbers and where the report is, for a terminal."""
        from engrax.evals.report import summary_rows

        rows = [*summary_rows(self.data), ("report", str(self.report))]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    __repr__ = summary


def evaluate(
    run_dir: epath.PathLike,
    *,
    step: int | str | None = None,
    batches: int | None = None,
    stream: int | None = None,
    progress: bool = True,
) -> Results:
    """Evaluates a checkpoint on the default device and writes RUN/evals/step_N.

    The folder gets results.json (every number), results.csv (the same, flat), a PNG per plot and report.html, which
    holds everything and needs no network.

    Args:
      run_dir: a run folder, trained on whatever hardware.
      step: None = the newest checkpoint, "best" = the one of lowest validation loss, or a number.
      batches: validation batches of `scoring.batch_rows` rows; None scores up to `scoring.DEFAULT_TOKENS` tokens.
      stream: also read this many tokens of long validation documents in pieces, through the carried memory and, for
        comparison, through one that begins anew with every piece.
      progress: show a progress bar on stderr. Warnings go there in any case.

    Raises:
      UserError: no such run, step or data, a damaged checkpoint, or a model whose loss is not a number.
    """
    from engrax.evals import report

    run = runs.open_run(run_dir)
    documents = None if stream is None else streaming.long_documents(run.experiment, stream)  # refuses before scoring
    model, number = run.load(step)
    here = runs.describe_environment(run.experiment)
    data = _header(run, number, here)
    for warning in data["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    rows = scoring.validation_rows(run.experiment, batches)
    scorer = scoring.Scorer(run.experiment, model)
    memories = memory_names(run.experiment)
    scored, reported = _passes(scorer, rows, memories, progress)
    data |= measure(run.experiment, number, rows, scored)
    types = token_type_breakdown.types_of(run.experiment, scoring.reported_rows(rows))
    data["token_types"], data["memory"] = token_type_breakdown.counts(types), _by_layer(run.experiment, reported, types)
    data["streamed"] = None if documents is None else _streamed(run.experiment, model, documents, progress)
    history = metrics.read(run.directory)
    data["training"] = _training(history)
    data["costs"] = cost.costs(run.experiment) | {"evaluation_tokens_per_second": scored[()].tokens_per_second}
    directory = run.directory / "evals" / f"step_{number}"
    results = Results(directory, _plain(data))
    _write(results, report.figures(results.data, history))
    return results


def _header(run: runs.Run, step: int, here: dict[str, Any]) -> dict[str, Any]:
    trained = run.environment
    warnings = []
    if trained.get("data_digest") and trained["data_digest"] != here["data_digest"]:
        warnings.append(
            "the data is not what this run was trained on (its digest differs): validation may hold what it has seen, "
            "and the n-gram baselines count other text than the model saw."
        )
    elif not trained.get("data_digest"):
        warnings.append(
            "environment.json of the run holds no data digest, so nothing says that this is the data of the training."
        )
    e = run.experiment
    return {
        "format_version": FORMAT_VERSION,
        "run": run.directory.name,
        "step": step,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": here["commit"],
        "trained_commit": trained.get("commit"),
        "data_digest": here["data_digest"],
        "trained_data_digest": trained.get("data_digest"),
        "seeds": {"experiment": e.seed} | ({"data": e.data.seed} if hasattr(e.data, "seed") else {}),
        "device": here["device"],
        "trained_device": trained.get("device"),
        "versions": here["versions"],
        "warnings": warnings,
        "config": experiments.to_dict(e),
    }


def memory_names(experiment: Experiment) -> tuple[str, ...]:
    """The registered names of the pattern's mixers that are memories: all but "attention"."""
    names = [mixer.registered_name for mixer in getattr(experiment.model, "mixers", ())]
    return tuple(dict.fromkeys(name for name in names if name != "attention"))


def _passes(scorer: scoring.Scorer, rows: scoring.Rows, memories: tuple[str, ...], progress: bool):
    """(scores by muted mixers: () is the model itself, the memories' diagnostics)."""
    from tqdm import tqdm

    batches = -(-len(rows) // scorer.rows)
    with tqdm(total=batches * (1 + len(memories)) + 1, unit="batch", disable=not progress, file=sys.stderr) as bar:
        bar.set_description("evaluate")
        scored = {
            mute: scorer.score(rows, mute=mute, tick=bar.update) for mute in ((), *((name,) for name in memories))
        }
        reported = scorer.report(rows)
        bar.update()
    return scored, reported


def _streamed(experiment: Experiment, model: Any, documents: Any, progress: bool) -> dict[str, Any]:
    from tqdm import tqdm

    with tqdm(total=streaming.calls(documents), unit="piece", disable=not progress, file=sys.stderr) as bar:
        bar.set_description("stream")
        return streaming.stream(experiment, model, documents, tick=bar.update)


def kind_of(experiment: Experiment) -> str:
    """One of KINDS, by what the data config offers."""
    if hasattr(experiment.data, "solve") and hasattr(experiment.data, "chance"):
        return "task"
    return "text" if experiment.data.tokenizer is not None else "tokens"


def measure(
    experiment: Experiment, step: int, rows: scoring.Rows, scored: dict[tuple, scoring.Scores]
) -> dict[str, Any]:
    """Everything that follows from the scores: validation, ablation, by position, baselines."""
    for mute, scores in scored.items():
        if not np.isfinite(scores.nats).all():
            muted = f" with {mute[0]} muted" if mute else ""
            raise UserError(
                f"the loss of step {step}{muted} is not a number on the validation rows; evaluate an earlier step."
            )
    kind = kind_of(experiment)
    labelled = rows.labelled
    weights = divisors(experiment, rows, kind)
    unit = {"text": "bits per byte", "task": "accuracy", "tokens": "bits per token"}[kind]
    per_token = {mute: s.right.astype(float) if kind == "task" else s.nats / math.log(2) for mute, s in scored.items()}
    own = per_token[()]
    found: dict[str, Any] = {
        "kind": kind,
        "unit": unit,
        "validation": _validation(rows, scored[()], weights, kind, scoring.batch_rows(experiment)),
        "ablation": {},
        "baselines": None,
        "task": None,
    }
    curves = {"model": ("model", own)}
    for mute, values in per_token.items():
        if mute:
            name = mute[0]
            found["ablation"][name] = {
                "muted": stats.mean(values, weights).to_dict(),
                "difference": stats.mean(values - own, weights).to_dict(),
            }
            curves[f"{name} muted"] = ("muted", values)
    if kind == "text":
        found["baselines"], best = _baselines(experiment, step, rows, weights)
        curves[f"order-{found['baselines']['orders'][-1]['order']} n-gram"] = ("baseline", best)
    if kind == "task":
        found["task"] = _task(experiment, rows)
    found["by_position"] = _by_position(rows, weights, curves, kind, context=False)
    packed = (rows.segment_ids[labelled] > 0).mean() > PACKED
    found["by_context"] = _by_position(rows, weights, curves, kind, context=True) if packed and kind != "task" else None
    return found


def divisors(experiment: Experiment, rows: scoring.Rows, kind: str) -> np.ndarray:
    """What the mean divides by, per token: the target's bytes for text, else 1; 0 where nothing is scored."""
    if kind != "text":
        return rows.labelled.astype(float)
    lengths = np.asarray(experiment.data.tokenizer.byte_lengths)
    return np.where(rows.labelled, lengths[np.maximum(rows.targets, 0)], 0).astype(float)


def _validation(
    rows: scoring.Rows, scores: scoring.Scores, weights: np.ndarray, kind: str, per_batch: int
) -> dict[str, Any]:
    labelled, bits = rows.labelled, scores.nats / math.log(2)
    tokens = int(labelled.sum())
    return {
        "rows": int(labelled.any(axis=1).sum()),
        "batches": -(-len(rows) // per_batch),
        "rows_per_batch": per_batch,
        "tokens": tokens,
        "bytes": int(weights.sum()) if kind == "text" else None,
        "complete": rows.complete,
        "bits_per_byte": stats.mean(bits, weights).to_dict() if kind == "text" else None,
        "bits_per_token": stats.mean(bits, labelled).to_dict(),
        "bytes_per_token": float(weights.sum()) / tokens if kind == "text" else None,
        "loss_nats_per_token": float(scores.nats.sum(dtype=np.float64)) / tokens,
        "accuracy": stats.mean(scores.right, labelled).to_dict(),
    }


def _baselines(experiment: Experiment, step: int, rows: scoring.Rows, weights: np.ndarray):
    """(n-gram results, the highest order's bits of every token): counted on what the model saw, on the same targets."""
    vocab = experiment.data.vocab_size
    seen, epochs = scoring.seen_rows(experiment, step)
    model = ngrams.NGrams(**seen.arrays(), vocab_size=vocab, order=ngrams.highest_order(vocab))
    bits = -np.log2(model.probabilities(**rows.arrays()))
    lengths = np.asarray(experiment.data.tokenizer.byte_lengths)
    counted = lengths[seen.targets[seen.labelled]].sum()
    found = {
        "smoothing": "interpolated Witten-Bell, from a uniform distribution up",
        "unit": "bytes" if (lengths == 1).all() else "tokens",
        "counted_rows": len(seen),
        "counted_bytes": int(counted),
        "counted_all_seen": seen.complete,
        "epochs_seen": epochs,
        "orders": [{"order": k} | stats.mean(bits[k], weights).to_dict() for k in range(1, len(bits))],
    }
    return found, bits[-1]


def _task(experiment: Experiment, rows: scoring.Rows) -> dict[str, Any]:
    solved = experiment.data.solve(rows.tokens) == rows.targets
    names = ("chance", "chance_in_context")
    found = {name: float(getattr(experiment.data, name)) for name in names if hasattr(experiment.data, name)}
    return found | {"oracle": float(solved[rows.labelled].mean())}


def _by_position(rows: scoring.Rows, weights: np.ndarray, curves: dict[str, tuple], kind: str, *, context: bool):
    """The curves over bins of the position in the row, or of the tokens of context that the prediction had."""
    length = rows.tokens.shape[1]
    positions = np.broadcast_to(np.arange(length), rows.tokens.shape)
    if kind == "task":
        asked = np.flatnonzero(rows.labelled.any(axis=0))
        edges = stats.even_bins(int(asked[0]), int(asked[-1]))
    else:
        edges = stats.log_bins(length)
    if context:
        positions = stats.context_positions(rows.segment_ids)
    return {
        "axis": "tokens of context" if context else "position in the row, tokens",
        "curves": [
            {"name": name, "kind": what, "bins": stats.by_position(values, weights, positions, edges)}
            for name, (what, values) in curves.items()
        ],
    }


def _by_layer(experiment: Experiment, reported: dict[str, np.ndarray], types: TokenTypes) -> dict[str, dict[str, Any]]:
    """{"titans.lr_mean": {"block 1": {"median", "mean", "p99"} over rows}}; a diagnostic of every token gives
    {"by_position": [T], "by_type": [1 + types]} instead, one of every token and memory {"by_type": [1 + types, M]}
    (`token_type_breakdown.means`). Blocks count from 0 through the whole network."""
    by_token = types.index.shape
    found: dict[str, dict[str, Any]] = {}
    for name, values in reported.items():
        for repeat in range(values.shape[1]):
            layer, where = values[:, repeat], f"block {block_of(experiment, name, repeat)}"
            if layer.ndim == 1:
                summary = {"median": np.median(layer), "mean": np.mean(layer), "p99": np.percentile(layer, 99)}
            elif layer.shape[:2] == by_token:
                summary = {"by_type": token_type_breakdown.means(layer, types.index, len(types.names))}
                if layer.ndim == 2:
                    tokens = np.maximum(np.isfinite(layer).sum(axis=0), 1)
                    summary["by_position"] = (np.nansum(layer, axis=0) / tokens).tolist()
            else:  # heads, memories, experts: their means over rows
                summary = {"values": np.mean(layer, axis=0).tolist()}
            found.setdefault(name, {})[where] = summary
    return found


def block_of(experiment: Experiment, name: str, repeat: int) -> int:
    """The block of a diagnostic in one repeat: "titans.lr_mean", or "titans3.lr_mean" where titans stands twice."""
    mixers = [mixer.registered_name for mixer in getattr(experiment.model, "mixers", ())]
    labels = [m if mixers.count(m) == 1 else f"{m}{i}" for i, m in enumerate(mixers)]
    mixer = name.split(".")[0]
    return labels.index(mixer) + repeat * len(mixers) if mixer in labels else repeat


def _training(history: list[dict[str, Any]]) -> dict[str, Any]:
    """What metrics.jsonl says in a few numbers."""
    losses, rates = ([row[key] for row in history if key in row] for key in ("loss", "tokens_per_second"))
    validated = [
        (row["validation_loss"], row["step"]) for row in history if isinstance(row.get("validation_loss"), float)
    ]
    best = min(validated, default=(None, None))
    return {
        "last_step": history[-1]["step"] if history else None,
        "last_loss": losses[-1] if losses else None,
        "best_validation_loss": best[0],
        "best_validation_step": best[1],
        "tokens_per_second_median": float(np.median(rates)) if rates else None,
        "seconds_to_first_step": next(
            (row["seconds_to_first_step"] for row in history if "seconds_to_first_step" in row), None
        ),
    }


def _plain(value: Any) -> Any:
    """Only what JSON carries: NaN and infinities become null."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(results: Results, figures: list[Any]) -> None:
    """All files of an evaluation; results.json last, so that its presence means a whole folder."""
    from engrax.evals import report

    results.directory.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        (results.directory / f"{figure.name}.png").write_bytes(figure.png)
    runs.write_atomically(results.directory / "results.csv", _csv(results.data))
    runs.write_atomically(results.report, report.render(results.data, figures))
    runs.write_atomically(
        results.directory / "results.json", json.dumps(results.data, indent=2, allow_nan=False) + "\n"
    )


def _csv(data: dict[str, Any]) -> str:
    """One line per number: its dotted name in results.json, and its value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("name", "value"))
    writer.writerows(_numbers({k: v for k, v in data.items() if k != "config"}))
    return text.getvalue()


def _numbers(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [pair for k, v in items for pair in _numbers(v, f"{name}.{k}" if name else str(k))]
    return [(name, value)] if isinstance(value, (int, float)) else []
