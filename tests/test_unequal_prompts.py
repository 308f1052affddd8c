"""Prompts of unequal length in one batch: with padding anywhere, decoding continues as with each prompt alone."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx

from engrax.layers import MIXERS, AttentionConfig, GatedDeltaNetConfig, PrefixLinearAttentionConfig
from engrax.layers.attention import attention
from engrax.models import MODELS, LanguageModelConfig, RMTConfig
from engrax.tests.law_cases import COSTLY, RELATIVES

LENGTHS = (1, 40, 3, 33, 7, 40, 7, 33)
LONGEST, NEW, VOCAB = 40, 5, 16
PROMPTS = np.random.default_rng(0).integers(0, VOCAB, (len(LENGTHS), LONGEST)).astype(np.int32)
ROUNDING = 1e-9


def places(where: str) -> list[np.ndarray]:
    """The positions of each row's tokens."""
    left = [np.arange(LONGEST - n, LONGEST) for n in LENGTHS]
    if where == "left":
        return left
    if where == "right":
        return [np.arange(n) for n in LENGTHS]
    rng = np.random.default_rng(1)
    return [np.sort(rng.choice(LONGEST, n, replace=False)) for n in LENGTHS]


class Decoder:
    """A model with random float64 parameters, and its compiled call."""

    def __init__(self, config):
        graphdef, params = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))), nnx.Param)
        rng = np.random.default_rng(2)
        self.params = jax.tree.map(lambda p: 0.5 * rng.standard_normal(p.shape), params)

        def call(params, tokens, memory=None, ids=None):
            model = nnx.merge(graphdef, params)
            out = model(tokens, memory, segment_ids=ids)
            return model.logits(out.hidden), out.memory

        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        self.call = functools.partial(jax.jit(call, compiler_options=options), self.params)
        self.start = jax.jit(lambda params: nnx.merge(graphdef, params).init_memory(len(LENGTHS)))(self.params)
        axes = nnx.merge(graphdef, self.params).memory_axes
        self.join = lambda memories: jax.tree.map(
            lambda axis, *leaves: np.concatenate(leaves, axis=axis), axes(memories[0]), *memories
        )
        self.row = lambda memory, b: jax.tree.map(
            lambda axis, leaf: np.take(leaf, [b], axis=axis), axes(memory), jax.device_get(memory)
        )

    def alone(self):
        """(logits [n, V] of each prompt read alone, the memories after them), one call per prompt."""
        read = [self.call(PROMPTS[b : b + 1, :n]) for b, n in enumerate(LENGTHS)]
        return [np.asarray(logits[0]) for logits, _ in read], self.join([memory for _, memory in read])

    def by_tokens(self):
        """The same, token by token, each row as if the others continued: no padding, and one program suffices."""
        memory, logits, after = self.start, [], []
        for t in range(LONGEST):
            found, memory = self.call(PROMPTS[:, t : t + 1], memory)
            logits.append(np.asarray(found))
            after.append([(b, self.row(memory, b)) for b, n in enumerate(LENGTHS) if n == t + 1])
        memories = dict(pair for pairs in after for pair in pairs)
        logits = np.concatenate(logits, axis=1)
        return [logits[b, :n] for b, n in enumerate(LENGTHS)], self.join([memories[b] for b in range(len(LENGTHS))])

    def padded(self, where: str):
        """The same, for the prompts in one call with padding."""
        tokens, ids = (
            np.full((len(LENGTHS), LONGEST), VOCAB - 1, np.int32),
            np.full((len(LENGTHS), LONGEST), -1, np.int32),
        )
        for b, at in enumerate(places(where)):
            tokens[b, at], ids[b, at] = PROMPTS[b, : len(at)], 0
        logits, memory = self.call(tokens, None, ids)
        return [np.asarray(logits[b, at]) for b, at in enumerate(places(where))], memory


def decode_equally(config, *, alone: bool, where=("right", "left", "inside")):
    """Asserts that prompts read together with padding, and NEW tokens decoded after them, equal each prompt alone."""
    decoder = Decoder(config)
    prompts, after = decoder.alone() if alone else decoder.by_tokens()
    for place in where:
        wanted, memory = [row[-1] for row in prompts], after
        found, padded = decoder.padded(place)
        scale = max(np.abs(row).max() for row in prompts)
        for b, (row, alone_row) in enumerate(zip(found, prompts)):
            assert np.all(np.isfinite(row))
            np.testing.assert_allclose(row, alone_row, atol=ROUNDING * scale, err_msg=f"prompt {b}, padding {place}")
        found = [row[-1] for row in found]
        for t in range(NEW):
            tokens, second = np.argmax(wanted, axis=-1), np.sort(wanted, axis=-1)[:, -2]
            clear = np.max(wanted, axis=-1) - second > 1e-6
            np.testing.assert_array_equal(np.argmax(found, axis=-1)[clear], tokens[clear])
            tokens = tokens[:, None].astype(np.int32)
            (found, padded), (wanted, memory) = decoder.call(tokens, padded), decoder.call(tokens, memory)
            found, wanted = np.asarray(found)[:, 0], np.asarray(wanted)[:, 0]
            np.testing.assert_allclose(found, wanted, atol=ROUNDING * scale, err_msg=f"token {t}, padding {place}")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(attention, "SMALLEST_BLOCK", 1)


def model_of(*mixers) -> LanguageModelConfig:
    """A language model of one block."""
    return LanguageModelConfig(vocab_size=VOCAB, dim=8, mixers=mixers, repeat=1, mlp_hidden=0)


@pytest.mark.parametrize(
    "config",
    [
        model_of(AttentionConfig(heads=2, head_dim=4, capacity=LONGEST + NEW), GatedDeltaNetConfig.examples()[0]),
        RMTConfig(backbone=model_of(AttentionConfig(heads=2, head_dim=4)), segment_length=4, memory_tokens=2),
    ],
    ids=["attention and gated_deltanet", "rmt"],
)
def test_prompts_of_unequal_length(config, x64):
    """Rotary positions, a cache, a short convolution and segments: none may count padding.

    Cases from huggingface/transformers#31540 and #32677 (Mamba: padding reached the convolution and the state), of
    fla-org/flash-linear-attention#1272 (padding inside a row decayed the state) and of ndif-team/nnsight#673 (positions
    counted padding).
    """
    decode_equally(config, alone=False)


def raised(config):
    """The config with caches for the prompts and the new tokens."""
    return dataclasses.replace(config, capacity=64) if getattr(config, "capacity", 64) < 64 else config


CHEAP = [n for n in MIXERS if n not in RELATIVES and not any(word in MIXERS[n].__module__ for word in COSTLY)]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.deep if name in CHEAP else pytest.mark.long)
        for name in MIXERS
        if MIXERS[name].__module__.startswith("engrax.") and MIXERS[name] is not PrefixLinearAttentionConfig
    ],
)
def test_prompts_of_unequal_length_of_every_mixer(name, x64):
    decode_equally(model_of(raised(MIXERS[name].examples()[0])), alone=False, where=("left", "inside"))


@pytest.mark.deep
def test_prompts_of_unequal_length_with_a_prefix(x64):
    """Each prompt in one call, also alone, because a prefix sees all of itself."""
    decode_equally(model_of(PrefixLinearAttentionConfig.examples()[0]), alone=True)


@pytest.mark.parametrize(
    "name, index",
    [
        pytest.param("hmt", 0, marks=pytest.mark.deep),
        *[pytest.param(*case, marks=pytest.mark.long) for case in (("hmt", 1), ("language_model", 1))],
        *[pytest.param(name, 0, marks=pytest.mark.long) for name in MODELS if name not in ("hmt", "rmt")],
    ],
)
def test_prompts_of_unequal_length_of_every_model(name, index, x64):
    decode_equally(MODELS[name].examples()[index], alone=False, where=("left", "inside"))
