"""The evaluators one by one: which run, what they share, and what each one draws."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from engrax.data import MQAR, StdlibText
from engrax.errors import UserError
from engrax.evals import Context, evaluation, plots, scoring
from engrax.evals.context import memory_names
from engrax.evals.evaluator import EVALUATORS
from engrax.evals.evaluators import diagnostics, memory_ablation, training
from engrax.layers import AttentionConfig, MixerConfig, TitansConfig
from engrax.models import LanguageModelConfig
from engrax.models.contract import Model, Output
from engrax.train import Experiment, runs

MIXERS = (AttentionConfig(), TitansConfig())


def experiment(data=None, mixers=MIXERS):
    model = LanguageModelConfig(vocab_size=256, dim=8, mixers=mixers, repeat=2, mlp_hidden=16)
    data = data or MQAR(seq_len=16, num_pairs=2, vocab_size=16, validation_examples=70)
    return Experiment(model=model, data=data, steps=1, batch_size=4, compute_dtype="float32")


def context_of(e, model):
    """A context whose run has no folder: only its rows and its model are asked for."""
    return Context(runs.Run(epath.Path("run"), e, {}), model, 1)


class Reporter(Model):
    """A stand-in model whose diagnostics are known, in two layers: of every token its own number, of every row their
    mean, of every head a constant."""

    def __init__(self):
        self.scale = nnx.Param(jnp.ones(()), role="norm")

    def __call__(self, tokens, memory=None, *, segment_ids=None, collect=(), mute=()):
        return Output(None, None, None, self.values_of(tokens))

    def values_of(self, tokens):
        values = jnp.stack([tokens, 2 * tokens]).astype(jnp.float32) * self.scale[...]
        heads = jnp.broadcast_to(jnp.arange(3.0), (2, 3))
        return {"titans.token": values, "titans.mean": values.mean(axis=(1, 2)), "titans.head": heads}


def test_the_documentation_lists_every_evaluator(root):
    rows = re.findall(r"^\| `(\w+)` \|", (root / "docs" / "evaluation.md").read_text(), re.MULTILINE)
    shipped = [name for name, cls in EVALUATORS.items() if cls.__module__.startswith("engrax.")]
    assert sorted(rows) == shipped
    assert rows == [c.registered_name for c in sorted((EVALUATORS[n]() for n in rows), key=lambda c: c.order)]


def names(chosen):
    return [config.registered_name for config in chosen]


def test_those_that_apply_run_unless_others_are_named():
    task, text = experiment(mixers=(AttentionConfig(),)), experiment(StdlibText())
    always = ["validation", "by_position", "diagnostics", "token_types", "training", "costs"]
    assert names(evaluation.choose(task, None)) == always
    whole = ["validation", "baselines", "memory_ablation", *always[1:]]
    assert names(evaluation.choose(text, None)) == whole, "streaming is asked for"
    assert names(evaluation.choose(text, ["costs", "stream", "validation"])) == ["validation", "stream", "costs"]
    (stream,) = [c for c in evaluation.choose(text, None, stream=2048) if c.registered_name == "stream"]
    assert stream.length == 2048


@pytest.mark.parametrize(
    "only, told",
    [
        (["validaton"], "did you mean 'validation'"),
        (["baselines"], "n-grams of text"),
        (["memory_ablation"], "no mixer here has any"),
        (["stream"], "only text has documents"),
        ([], "names no evaluator"),
    ],
)
def test_a_named_evaluator_that_does_not_apply_is_refused(only, told):
    with pytest.raises(UserError, match=told) as caught:
        evaluation.choose(experiment(mixers=(AttentionConfig(),)), only)
    assert "\n" not in str(caught.value)


@dataclasses.dataclass(frozen=True)
class WithoutReads(MixerConfig):
    """A mixer, a convolution say, none of whose reads is a memory's."""

    registered_name = "without_reads"
    memory_reads = ()

    def build(self, dim, *, rngs, layer=0, num_layers=1):
        raise NotImplementedError


def test_only_mixers_with_memory_reads_are_muted():
    e = experiment(mixers=(WithoutReads(), AttentionConfig(), TitansConfig()))
    assert memory_names(e) == ("titans",)


def test_the_caption_of_an_ablation_follows_the_sign_and_the_interval():
    sentence = memory_ablation.sentence
    change = {"value": 0.2, "low": 0.1, "high": 0.3}
    assert "worsens the score by 0.200: the model uses this memory" in sentence("titans", change, "text")
    assert "IMPROVES the score" in sentence("titans", change, "task")
    assert "within chance" in sentence("titans", change | {"low": -0.1}, "text")


def test_a_loss_that_is_no_number_is_refused(monkeypatch):
    context = context_of(experiment(), Reporter())
    nothing = scoring.Scores(np.full(context.rows.tokens.shape, np.nan), context.rows.labelled, 1.0)
    monkeypatch.setattr(scoring.Scorer, "score", lambda self, rows, mute, tick: nothing)
    with pytest.raises(UserError, match="not a number"):
        context.scores()


def test_diagnostics_are_taken_row_by_row():
    context = context_of(experiment(), Reporter())
    found, rows = diagnostics.summarise(context), context.rows
    real = rows.labelled.any(axis=1)
    tokens, inside = rows.tokens[real], rows.segment_ids[real] >= 0
    row_means = tokens.mean(axis=1)
    np.testing.assert_allclose(found["titans.mean"]["block 3"]["median"], np.median(2 * row_means), rtol=1e-6)
    np.testing.assert_allclose(found["titans.mean"]["block 1"]["p99"], np.percentile(row_means, 99), rtol=1e-6)
    by_hand = (tokens * inside).sum(axis=0) / np.maximum(inside.sum(axis=0), 1)
    np.testing.assert_allclose(found["titans.token"]["block 1"]["by_position"], by_hand, rtol=1e-6)
    assert found["titans.head"]["block 3"] == {"values": [0.0, 1.0, 2.0]}


def test_diagnostics_that_are_arrays_are_drawn(monkeypatch):
    """When a memory reports a value for each head, then the report shows a row per block and a column per head."""
    drawn = {}
    grids = plots.grids
    monkeypatch.setattr(plots, "grids", lambda *args: drawn.update(args[-1]) or grids(*args))
    found = diagnostics.DiagnosticsConfig().run(context_of(experiment(), Reporter()))
    assert [figure.name for figure in found.figures] == ["memory_by_block", "memory_by_entry", "memory_by_position"]
    assert all(figure.png.startswith(b"\x89PNG") for figure in found.figures)
    assert list(drawn) == ["titans.head"], "a value for each token is drawn by position"
    blocks, values = drawn["titans.head"]
    assert blocks == ["block 1", "block 3"]
    np.testing.assert_allclose(values, [[0, 1, 2], [0, 1, 2]])


def test_the_report_lists_skipped_steps():
    history = [{"step": n, "loss": 2.0} for n in range(1, 30)]
    for n in (3, 4):
        history[n - 1] |= {"skipped_not_finite": 1.0, "loss": "nan"}
    history[28] |= {"skipped_loss_spike": 1.0, "save_blocked_seconds": 0.5, "loss": "inf"}
    values = training._values(history)
    assert values["skipped_steps"] == 3 and values["save_blocked_seconds_median"] == 0.5 and values["last_loss"] == 2.0
    assert training.skipped(history) == {"not finite": [3, 4], "loss spike": [29]}
    assert training._listed(list(range(30))).endswith("18, 19 and 10 more")
    assert training._values(history[:2])["skipped_steps"] is None


def test_the_plot_of_the_training_shows_the_data_s_loss_and_the_mixers_apart():
    """Given metrics whose loss is the data's and whose aux_loss is the mixers', bits per byte are those of the data."""
    history = [{"step": i, "loss": np.log(2) * 4 / i, "aux_loss": 0.5, "tokens_per_second": 9.0} for i in (1, 2, 4)]
    drawn = {panel["label"]: panel["series"][0] for panel in training.panels(history, "text", 2.0)}
    assert list(drawn) == ["bits per byte", "added by the mixers, nats per token", "tokens per second"]
    assert drawn["bits per byte"]["y"] == pytest.approx([2.0, 1.0, 0.5])
    assert drawn["added by the mixers, nats per token"]["y"] == [0.5] * 3
    for row in history:
        row["aux_loss"] = 0.0
    assert len(training.panels(history, "text", 2.0)) == 2, "a mixer that adds nothing has no panel"
