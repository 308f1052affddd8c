"""Memory for sentences seen a few times: recognition, recall, and what later training leaves of both.

Orhan, "Recognition, recall, and retention of few-shot memories in large language models", arXiv 2303.17557. A copy of
the model is trained on sentences it has not seen, a few times each. Recognition: of a seen sentence and a foil, another
sentence, the seen one has the lower loss per token. Recall: the first half of a seen sentence is given, the rest is
written greedily and compared with the true rest (ROUGE-L, and exact). Retention: the same after further updates on new
sentences. The run itself does not change.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import numpy as np
import optax
from flax import nnx

from engrax.data.draws import Draws
from engrax.data.haystack import load_text, sentences
from engrax.errors import UserError
from engrax.evals import plots
from engrax.evals import statistics as stats
from engrax.evals.context import Context
from engrax.evals.evaluator import Evaluation, EvaluatorConfig, Figure, Table
from engrax.models.parameters import cast
from engrax.models.session import Session
from engrax.registry import register
from engrax.train import train_step
from engrax.train.objective import score

LEAST_WORDS = 8  # of a sentence


@register("few_shot")
@dataclasses.dataclass(frozen=True)
class FewShotConfig(EvaluatorConfig):
    """Recognition, recall and retention of sentences seen a few times; runs only if it is named."""

    sentences: int = 64  # seen ones, and as many foils
    exposures: tuple[int, ...] = (1, 3, 10)  # times that each is seen, at which memory is tested
    later: tuple[int, ...] = (10, 100)  # updates on new sentences after the last exposure, at which it is tested again
    batch: int = 16  # sentences of one update
    learning_rate: float = 1e-3  # of AdamW
    most_tokens: int = 128  # of a sentence
    text_path: str | None = None  # folder or file with the sentences; None = Python's own documentation

    order: ClassVar[int] = 45
    optional: ClassVar[bool] = True

    def __post_init__(self):
        for name in ("sentences", "batch", "most_tokens"):
            if getattr(self, name) < 2:
                raise UserError(f"{name} of few_shot must be at least 2, not {getattr(self, name)}.")
        for name in ("exposures", "later"):
            if not self.exposures or any(a >= b for a, b in zip((0, *getattr(self, name)), getattr(self, name))):
                raise UserError(f"{name}={getattr(self, name)} of few_shot must be positive numbers that ascend.")

    def unavailable(self, experiment: Any) -> str | None:
        """The run must read text."""
        if experiment.data.tokenizer is None:
            return (
                f"few_shot needs a run that reads text, and this one was trained on {experiment.data.registered_name}."
            )
        return None

    def run(self, context: Context) -> Evaluation:
        """See the class."""
        seen, foils, new = self._sentences(context)
        study = Study(context, self, seen, foils)
        tick = context.expect(1 + len(self.exposures) + len(self.later))
        points = [study.test("exposures", 0)]
        tick(1)
        for times in self.exposures:
            study.train(seen, times * -(-len(seen) // self.batch) - study.updates)
            points.append(study.test("exposures", times))
            tick(1)
        before = study.updates
        for updates in self.later:
            study.train(new, before + updates - study.updates)
            points.append(study.test("later updates", updates))
            tick(1)
        last = points[len(self.exposures)]
        summary = [
            (f"recognition after {self.exposures[-1]} exposures (chance 0.5)", _estimate(last["recognition"])),
            ("  recall, ROUGE-L", _estimate(last["rouge_l"])),
        ]
        return Evaluation({"points": points}, [_figure(context, points)], summary)

    def _sentences(self, context: Context) -> list[list[np.ndarray]]:
        """Tokens of seen sentences, foils and new ones, all distinct."""
        encode, found = context.experiment.data.tokenizer.encode, {}
        every = sentences(" ".join(load_text(self.text_path).words))
        for place in Draws(context.seed, 1).shuffled(range(len(every))):
            tokens = encode(every[place])
            if len(every[place].split()) >= LEAST_WORDS and len(tokens) <= self.most_tokens:
                found[every[place]] = tokens
            if len(found) == 4 * self.sentences:
                break
        if len(found) < 4 * self.sentences:
            raise UserError(
                f"few_shot needs {4 * self.sentences} sentences of {LEAST_WORDS} words and at most {self.most_tokens} "
                f"tokens, and the text has {len(found)}; ask for fewer, or set text_path."
            )
        every, n = list(found.values()), self.sentences
        return [every[:n], every[n : 2 * n], every[2 * n :]]


class Study:
    """A copy of the model under training, and its tests."""

    def __init__(self, context: Context, config: FewShotConfig, seen: list[np.ndarray], foils: list[np.ndarray]):
        self.context, self.config, self.seen, self.foils, self.updates = context, config, seen, foils, 0
        dtype = train_step.resolve_dtype(context.experiment.compute_dtype)
        self.graphdef, self.params = nnx.split(context.model, nnx.Param)
        tx = optax.adamw(config.learning_rate, weight_decay=0.0)
        self.optimizer = tx.init(self.params)

        def nats(params, batch):
            return score(nnx.merge(self.graphdef, cast(params, dtype)), batch).nats

        def update(params, optimizer, batch):
            labels = (batch["targets"] >= 0).sum()
            grads = jax.grad(lambda p: nats(p, batch).sum() / labels)(params)
            changes, optimizer = tx.update(grads, optimizer, params)
            return optax.apply_updates(params, changes), optimizer

        self._nats, self._update, self.dtype = jax.jit(nats), jax.jit(update), dtype

    def _batch(self, rows: list[np.ndarray]) -> dict[str, np.ndarray]:
        tokens = np.zeros((self.config.batch, self.config.most_tokens), np.int32)
        targets, ids = np.full_like(tokens, -1), np.full_like(tokens, -1)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], ids[i, : len(row)], targets[i, : len(row) - 1] = row, 0, row[1:]
        return {"tokens": tokens, "targets": targets, "segment_ids": ids}

    def train(self, rows: list[np.ndarray], updates: int) -> None:
        """So many updates on batches of the sentences, again and again in one order."""
        groups = [rows[i : i + self.config.batch] for i in range(0, len(rows), self.config.batch)]
        for i in range(updates):
            group = groups[(self.updates + i) % len(groups)]
            self.params, self.optimizer = self._update(self.params, self.optimizer, self._batch(group))
        self.updates += updates

    def losses(self, rows: list[np.ndarray]) -> np.ndarray:
        """The loss per token of every sentence."""
        size = self.config.batch
        batches = [rows[i : i + size] for i in range(0, len(rows), size)]
        nats = np.concatenate([np.asarray(self._nats(self.params, self._batch(b)).sum(axis=1)) for b in batches])
        return nats[: len(rows)] / [len(row) - 1 for row in rows]

    def test(self, what: str, count: int) -> dict[str, Any]:
        """Recognition and recall, with intervals over sentences."""
        known = (self.losses(self.seen) < self.losses(self.foils)).astype(float)[:, None]
        pairs = self._recalled()
        exact = np.array([float(text == rest) for text, rest in pairs])[:, None]
        rouge = np.array([rouge_l(text, rest) for text, rest in pairs])[:, None]
        ones = np.ones_like(known)
        return {
            "after": what,
            "count": count,
            "recognition": stats.proportion(known, ones).to_dict(),
            "exact_recall": stats.proportion(exact, ones).to_dict(),
            "rouge_l": stats.mean(rouge, ones).to_dict(),
        }

    def _recalled(self) -> list[tuple[str, str]]:
        """(what is written after the first half of every seen sentence, the true second half)."""
        data, found = self.context.experiment.data, []
        model = nnx.merge(self.graphdef, self.params)
        for first in range(0, len(self.seen), self.config.batch):
            rows = self.seen[first : first + self.config.batch]
            filled = rows + rows[-1:] * (self.config.batch - len(rows))
            session = Session(model, tokenizer=data.tokenizer, rows=len(filled), dtype=self.dtype)
            session.feed([row[: len(row) // 2] for row in filled])
            written = session.sample(self.config.most_tokens - self.config.most_tokens // 2, temperature=0)
            for row, ids in zip(rows, written):
                rest = row[len(row) // 2 :]
                found.append(tuple(map(session.text, (ids[: len(rest)][ids[: len(rest)] >= 0], rest))))
        return found


def rouge_l(text: str, reference: str) -> float:
    """The F measure of the longest common subsequence of words (Lin 2004)."""
    a, b = text.split(), reference.split()
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i, j] = table[i - 1, j - 1] + 1 if x == y else max(table[i - 1, j], table[i, j - 1])
    return 2 * int(table[-1, -1]) / max(len(a) + len(b), 1)


def _estimate(found: dict[str, Any]) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def _figure(context: Context, points: list[dict[str, Any]]) -> Figure:
    heading = "Few-shot memory: recognition, recall, retention"
    names = [f"{p['count']} {'seen' if p['after'] == 'exposures' else 'later'}" for p in points]
    measures = {"recognition": "recognition", "rouge_l": "recall, ROUGE-L", "exact_recall": "recall, exact"}
    entries = [
        {"name": name, "kind": "model", "x": names}
        | {end: [p[measure][end] for p in points] for end in ("value", "low", "high")}
        for measure, name in measures.items()
    ]
    entries.append({"name": "chance", "kind": "reference", "x": names, "value": [0.5] * len(names)})
    png = plots.lines(
        context.title(heading), ("times seen, then updates on new sentences", "score"), entries, ticks=names
    )
    rows = [(name, *(_estimate(p[measure]) for measure in measures)) for name, p in zip(names, points)]
    caption = (
        "A copy of the model is trained on sentences. Recognition: the seen one of two sentences has the lower loss "
        "(chance 0.5). Recall: its second half is written from the first. Bands are 95 % intervals over sentences."
    )
    return Figure("few_shot", heading, caption, png, Table(("", *measures.values()), rows))
