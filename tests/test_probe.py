"""The probe: a training of a model that sees the future, or other rows, is refused before anything is written."""

import dataclasses
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engrax import cli
from engrax.errors import UserError
from engrax.layers import MIXERS, MixerConfig
from engrax.layers.common.modules import projection
from engrax.models import LanguageModelConfig
from engrax.models.language_model import LanguageModel
from engrax.tests.experiments import tiny
from engrax.train import loop
from engrax.train.probe import refuse_leaks
from engrax.train.trainer import Trainer

FUTURE = '''
"""A memory that hands every token its successor."""

import dataclasses

import jax.numpy as jnp
from flax import nnx

import engrax
from engrax.data import MQAR
from engrax.models import LanguageModelConfig
from engrax.train import Experiment


@engrax.register("hands_over")
@dataclasses.dataclass(frozen=True)
class HandsOverConfig(engrax.MixerConfig):
    def build(self, dim, *, rngs, layer=0, num_layers=1):
        return HandsOver()

    def flops_per_token(self, dim, seq_len):
        return 0.0


class HandsOver(nnx.Module):
    def init_state(self, batch_size):
        return {"none": jnp.zeros((batch_size,))}

    def __call__(self, x, state=None, segment_ids=None):
        return jnp.roll(x, -1, axis=1), self.init_state(len(x)) if state is None else state


def config():
    model = LanguageModelConfig(vocab_size=32, dim=8, mixers=(HandsOverConfig(),), repeat=1, mlp_hidden=8)
    data = MQAR(seq_len=16, num_pairs=2, vocab_size=32, train_examples=64, validation_examples=16)
    return Experiment(model=model, data=data, steps=1, batch_size=4)
'''


@dataclasses.dataclass(frozen=True)
class LeakyConfig(MixerConfig):
    """A map of each token, and what it sees beside; registered nowhere."""

    sees: str = ""

    def build(self, dim, *, rngs, layer=0, num_layers=1):
        return Leaky(self, dim, rngs=rngs)


class Leaky(nnx.Module):
    def __init__(self, config, dim, *, rngs):
        self.sees = config.sees
        self.map = projection(dim, dim, ("embed", "mlp"), rngs=rngs)
        self.gate = nnx.Param(jnp.zeros(()), role="gate")  # shut where the training begins

    def init_state(self, batch_size):
        return jnp.zeros((batch_size, 1))

    def __call__(self, x, state=None, segment_ids=None):
        state = self.init_state(len(x)) if state is None else state
        y = self.map(x)
        if self.sees == "distant":
            return y + 1e-4 * self.gate[...] * jnp.roll(y, -20, axis=1), state
        if self.sees == "rows":
            return y + 1e-4 * jnp.roll(y, 1, axis=0), state
        if self.sees == "maximum":
            return y + 1e-2 * jnp.max(y, axis=1, keepdims=True), state
        return y, state


@dataclasses.dataclass(frozen=True)
class LeakyModelConfig(LanguageModelConfig):
    """A model whose mixers are sound and that looks ahead itself."""

    def build(self, *, rngs):
        return LeakyModel(self, rngs=rngs)


class LeakyModel(LanguageModel):
    def embed(self, tokens_BT):
        x_BTD = super().embed(tokens_BT)
        return x_BTD + 1e-3 * jnp.roll(x_BTD, -2, axis=1)


def refusal(model, **fields) -> str | None:
    """What the probe says of an experiment's model, None where it lets it pass."""
    trainer = Trainer(tiny(model=model, **fields))
    batch = next(trainer.loader("train"))
    try:
        refuse_leaks(trainer, trainer.init_state()["params"], batch, None)
    except UserError as error:
        return str(error)
    return None


def small(sees: str, cls=LanguageModelConfig):
    return cls(vocab_size=32, dim=8, mixers=(LeakyConfig(sees),), repeat=1, mlp_hidden=8)


def test_a_memory_that_sees_the_future_is_not_trained(tmp_path, capsys, monkeypatch):
    path, run = tmp_path / "hands_over.py", tmp_path / "run"
    path.write_text(textwrap.dedent(FUTURE))
    try:
        assert cli.main(["train", str(path), "--run-dir", str(run)]) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("engrax:")]
        assert len(lines) == 1 and "its output at token 14 of a row changes by" in lines[0], lines
        assert (
            "token 15 is replaced" in lines[0] and f"engrax check {path}" in lines[0] and "--allow-future" in lines[0]
        )
        assert not run.exists()

        asked = []
        monkeypatch.setattr(loop, "refuse_leaks", lambda *args: asked.append(refuse_leaks(*args)))
        command = ["train", str(path), "--run-dir", str(run), "--allow-future"]
        assert cli.main(command) == 0 and len(asked) == 1
        assert cli.main(command) == 0 and len(asked) == 1  # what was begun is not probed again
    finally:
        del MIXERS._classes["hands_over"]


@pytest.mark.parametrize(
    "model, token, cause",
    [
        (small("distant"), 3, "token 23 is replaced"),
        (small("rows"), 0, "other rows of the batch are replaced"),
        (small("maximum"), 0, "replaced"),
        (small("", LeakyModelConfig), 21, "token 23 is replaced"),
    ],
)
def test_leaks_are_refused(model, token, cause):
    told = refusal(model)
    assert f"at token {token} of a row" in told and cause in told, told
    assert refusal(model, allow_future=True) is None


def test_a_sound_model_passes():
    assert refusal(small("")) is None


def test_the_probe_reads_documents_and_not_padding():
    """The longest document of a row ends before the row does, and only tokens of the documents are looked at."""
    trainer = Trainer(tiny(model=small("distant")))
    params = trainer.init_state()["params"]
    batch = next(trainer.loader("train"))
    batch["segment_ids"] = np.tile(np.repeat(np.int32([0, 1, -1]), [2, 21, 1]), (len(batch["tokens"]), 1))
    with pytest.raises(UserError, match="at token 2 of a row .* token 22 is replaced"):
        refuse_leaks(trainer, params, batch, None)
