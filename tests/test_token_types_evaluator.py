"""Diagnostics of every token, averaged and drawn by the token's type."""

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from engrax.data import MQAR
from engrax.evals import Context
from engrax.evals.evaluators import diagnostics, token_types
from engrax.layers import LinearAttentionConfig, MoMConfig, TitansConfig
from engrax.models import LanguageModelConfig
from engrax.models.contract import Model, Output
from engrax.train import Experiment, runs


def experiment(mixer):
    model = LanguageModelConfig(vocab_size=16, dim=8, mixers=(mixer,), repeat=2, mlp_hidden=16)
    return Experiment(
        model=model,
        data=MQAR(seq_len=16, num_pairs=2, vocab_size=16, validation_examples=70),
        steps=1,
        batch_size=4,
        compute_dtype="float32",
    )


class Reporter(Model):
    """A stand-in model whose diagnostics are known: the token's own number, and with it whether it is the row's first,
    in two layers."""

    def __init__(self):
        self.scale = nnx.Param(jnp.ones(()), role="norm")

    def __call__(self, tokens, memory=None, *, segment_ids=None, collect=(), mute=()):
        return Output(None, None, None, self.values_of(tokens))

    def values_of(self, tokens):
        values = jnp.stack([tokens, 2 * tokens]).astype(jnp.float32) * self.scale[...]
        return {"titans.token": values, "titans.load": jnp.stack([values, values == values[..., :1]], axis=-1)}


def context_of(e, model):
    """A context whose run has no folder: only its rows and its model are asked for."""
    return Context(runs.Run(epath.Path("run"), e, {}), model, 1)


def test_diagnostics_of_tokens_are_averaged_by_type():
    """Given a token's kind by its place in the task, each kind's mean is that of a plain loop over its tokens."""
    e = experiment(TitansConfig())
    context = context_of(e, Reporter())
    rows, found = context.rows, token_types.TokenTypesConfig().run(context).values
    inside = rows.segment_ids >= 0
    kinds = np.where(rows.labelled, "query", "filler")
    kinds[:, [0, 2]], kinds[:, [1, 3]] = "key", "value"
    types = context.token_types
    assert types.names == ("key", "value", "query", "filler")
    wanted, first = [], 2 * rows.tokens[:, :1]
    for kind in (None, *types.names):
        tokens = inside if kind is None else inside & (kinds == kind)
        wanted.append([np.mean(2 * rows.tokens[tokens]), np.mean((2 * rows.tokens == first)[tokens])])
    np.testing.assert_allclose(found["means"]["titans.load"]["block 1"], wanted, rtol=1e-6)
    by_token = found["means"]["titans.token"]["block 1"]
    np.testing.assert_allclose(by_token, np.array(wanted)[:, 0], rtol=1e-6)
    assert found["tokens"] == {
        "all tokens": 1120,
        "key": 140,
        "value": 140,
        "query": 140,
        "filler": 700,
    }


def test_a_mixtures_load_is_drawn_by_type_of_token():
    """A panel for every layer; over all tokens it is the load that the mixture itself reports."""
    base = LinearAttentionConfig(heads=1, head_dim=4, value_dim=4, chunk_size=8, conv_width=1)
    memory = MoMConfig(base=base, shared=False, own_projections=False)  # compiles fastest
    e = experiment(memory)
    context = context_of(e, e.model.build(rngs=nnx.Rngs(0)))
    found = token_types.TokenTypesConfig().run(context)
    load = diagnostics.DiagnosticsConfig().run(context).values["mom.load"]
    assert list(found.values["means"]["mom.load_by_token"]) == ["block 0", "block 1"]
    for block, table in found.values["means"]["mom.load_by_token"].items():
        table = np.array(table)
        assert table.shape == (5, 4) and np.ptp(table, axis=0).max() > 0.01
        np.testing.assert_allclose(table.sum(axis=1), 1, rtol=1e-6)
        np.testing.assert_allclose(table[0], load[block]["values"], rtol=1e-5)
    (figure,) = found.figures
    assert figure.png.startswith(b"\x89PNG") and "mom.load_by_token differs most in block" in figure.caption
    context.diagnostics = {"mom.load": context.diagnostics["mom.load"]}
    assert token_types.TokenTypesConfig().run(context).figures == []
