"""Data and results shared by the evaluators of one checkpoint, each computed once."""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float

from engrax.data.token_types import TokenTypes
from engrax.data.tokenizers import ByteTokenizer
from engrax.errors import UserError
from engrax.evals import ngrams, scoring
from engrax.models.layer_change import mixers_of
from engrax.models.segment_config import SegmentRecurrentConfig
from engrax.train import metrics
from engrax.train.experiment import Experiment
from engrax.train.runs import Run


class Context:
    """A checkpoint under evaluation. Costly results are computed at their first use and kept.

    Attributes:
      run: the run folder, opened.
      experiment: the run's experiment.
      step: the checkpoint's step.
      model: the model with the checkpoint's parameters, on one device or sharded over `mesh`.
      mesh: the devices that share the work; None for a single device.
      seed: for random draws of evaluators; the experiment's seed.
      bar: a tqdm progress bar, or None.
    """

    def __init__(
        self,
        run: Run,
        model: nnx.Module,
        step: int,
        *,
        mesh: Mesh | None = None,
        batches: int | None = None,
    ):
        """`batches`: number of validation batches to score, None for the default."""
        self.run, self.experiment, self.model, self.step, self.mesh = run, run.experiment, model, step, mesh
        self.seed = run.experiment.seed
        self._batches = batches
        self.bar: Any = None
        self._scores: dict[tuple[str, ...], scoring.Scores] = {}

    def expect(self, calls: int) -> Callable[[int], Any]:
        """Announces the number of calls to the progress bar; returns tick(n), which reports that n are done."""
        if self.bar is None:
            return lambda n: None
        self.bar.total = (self.bar.total or 0) + calls
        self.bar.refresh()
        return self.bar.update

    def title(self, what: str) -> str:
        """The title of a plot: its subject, the run and the step."""
        return f"{what} · {self.run.directory.name}, step {self.step:,}"

    @functools.cached_property
    def kind(self) -> str:
        """The kind of score: text (bits per byte), task (accuracy) or tokens (bits per token)."""
        return scoring.kind_of(self.experiment)

    @property
    def unit(self) -> str:
        """The unit of the score."""
        return scoring.UNITS[self.kind]

    @functools.cached_property
    def rows(self) -> scoring.Rows:
        """The scored validation rows."""
        return scoring.validation_rows(self.experiment, self._batches)

    @functools.cached_property
    def scorer(self) -> scoring.Scorer:
        """The model's compiled passes over rows."""
        return scoring.Scorer(self.experiment, self.model, self.mesh)

    @functools.cached_property
    def memories(self) -> tuple[str, ...]:
        """The registered names of the mixers whose memory reads can be muted."""
        return memory_names(self.experiment)

    def scores(self, mute: tuple[str, ...] = ()) -> scoring.Scores:
        """The scores of `rows` without the memory reads of the mixers in `mute`; each set is computed once.

        Raises UserError if a loss is not a number.
        """
        if mute not in self._scores:
            tick = self.expect(-(-len(self.rows) // self.scorer.rows))
            found = self.scorer.score(self.rows, mute=mute, tick=tick)
            if not np.isfinite(found.nats).all():
                muted = f" with {', '.join(mute)} muted" if mute else ""
                raise UserError(
                    f"the loss of step {self.step}{muted} is not a number on the validation rows; "
                    "evaluate an earlier step."
                )
            self._scores[mute] = found
        return self._scores[mute]

    def values(self, mute: tuple[str, ...] = ()) -> Float[np.ndarray, "N T"]:
        """Every token's part of the score: its bits, or for a task 1 for a correct answer; divide by `weights`."""
        scores = self.scores(mute)
        return scores.right.astype(float) if self.kind == "task" else scores.nats / math.log(2)

    @functools.cached_property
    def weights(self) -> Float[np.ndarray, "N T"]:
        """The divisor of the score, per token: the target's bytes for text, else 1; 0 if the token is not scored."""
        return scoring.divisors(self.rows, self.kind)

    @functools.cached_property
    def baseline(self) -> tuple[dict[str, Any], Float[np.ndarray, "orders N T"]]:
        """(description of the counted rows, bits of every token by the n-grams of orders 0, 1, ...), for text.

        The n-grams are counted on the model's training rows and score the same targets as the model.
        """
        vocab = self.experiment.data.vocab_size
        seen, epochs = scoring.seen_rows(self.experiment, self.step)
        model = ngrams.NGrams(**seen.arrays(), vocab_size=vocab, order=ngrams.highest_order(vocab))
        counted = {
            "smoothing": "interpolated Witten-Bell, from a uniform distribution up",
            "unit": "bytes" if isinstance(self.experiment.data.tokenizer, ByteTokenizer) else "tokens",
            "counted_rows": len(seen),
            "counted_bytes": int(seen.target_bytes.sum()),
            "counted_all_seen": seen.complete,
            "epochs_seen": epochs,
        }
        return counted, -np.log2(model.probabilities(**self.rows.arrays()))

    @functools.cached_property
    def diagnosed_rows(self) -> scoring.Rows:
        """The validation rows for diagnostics."""
        return scoring.reported_rows(self.rows)

    @functools.cached_property
    def diagnostics(self) -> dict[str, np.ndarray]:
        """The mixers' diagnostics, one row at a time (see `scoring.Scorer.report`); {} if no mixer reports any."""
        tick = self.expect(1)
        found = self.scorer.report(self.rows)
        tick(1)
        return found

    @functools.cached_property
    def token_types(self) -> TokenTypes:
        """The types of the tokens of `diagnosed_rows`; -1 at padding. Types without tokens are omitted."""
        rows = self.diagnosed_rows
        names, index = self.experiment.data.token_types(rows.arrays())
        real = rows.segment_ids >= 0
        used = [i for i in range(len(names)) if np.any(index[real] == i)]
        renumbered = np.full(len(names), -1)
        renumbered[used] = np.arange(len(used))
        return TokenTypes(tuple(names[i] for i in used), np.where(real, renumbered[index], -1))

    def block(self, name: str, repeat: int) -> str:
        """The block of a diagnostic in one repeat of the pattern: "block 3". Blocks count from 0 through the network.

        name: "titans.lr_mean", or "titans3.lr_mean" if titans occurs twice in the pattern.
        """
        stacks = getattr(self.experiment.model, "stacks", ())
        mixers = [stack.mixer.registered_name for stack in stacks]
        labels = [m if mixers.count(m) == 1 else f"{m}{i}" for i, m in enumerate(mixers)]
        mixer = name.split(".")[0]
        return f"block {stacks[labels.index(mixer)].layers[repeat] if mixer in labels else repeat}"

    @functools.cached_property
    def history(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return metrics.read(self.run.directory)


def memory_names(experiment: Experiment) -> tuple[str, ...]:
    """The registered names of parts that read a memory: models around a backbone (HMT), mixers with `memory_reads`."""
    config, names = experiment.model, []
    while isinstance(config, SegmentRecurrentConfig):
        names.append(config.registered_name)
        config = config.backbone
    names += [mixer.registered_name for mixer in mixers_of(config) if mixer.memory_reads]
    return tuple(dict.fromkeys(names))
