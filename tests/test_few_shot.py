"""Recognition, recall and retention of sentences seen a few times."""

import dataclasses

import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx

from engrax import models
from engrax.data import NiahSingle1
from engrax.errors import UserError
from engrax.evals import Context
from engrax.evals.evaluators.few_shot import FewShotConfig, rouge_l
from engrax.layers import LinearAttentionConfig
from engrax.models import LanguageModelConfig
from engrax.tests.experiments import tiny
from engrax.train import runs

MIXERS = (LinearAttentionConfig(heads=2, head_dim=16),)
EXPERIMENT = tiny(
    model=LanguageModelConfig(vocab_size=256, dim=64, mixers=MIXERS, repeat=1, mlp_hidden=128),
    data=NiahSingle1(seq_len=1024),
)


@pytest.mark.parametrize(
    "text, reference, score",
    [
        ("a b c", "a b c", 1),
        ("a c", "a b c", 0.8),
        ("c b a", "a b c", 1 / 3),
        ("", "a", 0),
        ("x", "a", 0),
        ("a x b", "a b y", 2 / 3),
    ],
)
def test_rouge_l_by_hand(text, reference, score):
    assert rouge_l(text, reference) == pytest.approx(score)


@pytest.mark.long
def test_what_is_seen_often_is_recognised_and_training_changes_a_copy_only():
    model = models.build(EXPERIMENT.model, rngs=nnx.Rngs(0))
    context = Context(runs.Run(epath.Path("run"), EXPERIMENT, {}), model, 1)
    before = jax.tree.map(np.array, nnx.state(model, nnx.Param))
    config = FewShotConfig(sentences=16, exposures=(1, 60), later=(5,), most_tokens=64, learning_rate=1e-2)
    found = config.run(context)
    first, _, last, later = found.values["points"]
    assert (first["count"], last["count"], later["after"]) == (0, 60, "later updates")
    assert first["recognition"]["low"] < 0.5 < first["recognition"]["high"] and first["exact_recall"]["value"] == 0
    assert last["recognition"]["value"] == 1 and last["rouge_l"]["value"] > first["rouge_l"]["value"]
    assert found.figures[0].png.startswith(b"\x89PNG") and "recognition after 60" in found.summary[0][0]
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(nnx.state(model, nnx.Param))):
        np.testing.assert_array_equal(old, new)
    again = config.run(context)
    assert again.values == found.values


def test_mistakes_are_one_sentence(tmp_path):
    (tmp_path / "a.txt").write_text("Too short.")
    for fields, told in (
        (dict(exposures=(3, 1)), "must be positive numbers that ascend"),
        (dict(later=(0,)), "must be positive numbers that ascend"),
        (dict(sentences=1), "at least 2, not 1"),
    ):
        with pytest.raises(UserError, match=told):
            FewShotConfig(**fields)
    context = Context(runs.Run(epath.Path("run"), EXPERIMENT, {}), models.build(EXPERIMENT.model, rngs=nnx.Rngs(0)), 1)
    with pytest.raises(UserError, match="needs 256 sentences .* the text has 0"):
        FewShotConfig(text_path=str(tmp_path)).run(context)
    tokens = dataclasses.replace(EXPERIMENT, data=tiny().data)
    assert "was trained on mqar" in FewShotConfig().unavailable(tokens)
