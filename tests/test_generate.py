"""Generation: unequal prompts, stops, sampling, no compilation from the second call on."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engrax import models
from engrax.errors import UserError
from engrax.layers import MIXERS, AttentionConfig, TitansConfig
from engrax.models import MODELS, LanguageModelConfig
from engrax.models import sampling as draws
from engrax.models.generate import Compiled, sample
from engrax.models.sampling import Sampling
from engrax.models.session import Session
from engrax.models.tokens import as_tokens

VOCABULARY = 16
LENGTHS = (1, 2, 5, 8, 13, 21, 34, 40)
NOT_CAUSAL = ("prefix_linear_attention",)


def language_model(*mixers, repeat=1, **kwargs):
    config = LanguageModelConfig(vocab_size=VOCABULARY, dim=8, mixers=mixers, repeat=repeat, mlp_hidden=12, **kwargs)
    return models.build(config, rngs=nnx.Rngs(0))


def louder(model, scale=3.0):
    """Parameters scaled up, so the most likely token is not always the one just read."""
    params = nnx.state(model, nnx.Param)
    dtype = jax.dtypes.canonicalize_dtype(np.float64)
    nnx.update(model, jax.tree.map(lambda x: x.astype(dtype) * scale if x.ndim > 1 else x.astype(dtype), params))
    return model


def prompts(lengths=LENGTHS):
    rng = np.random.default_rng(0)
    return [rng.integers(0, VOCABULARY, n) for n in lengths]


def titans():
    return louder(language_model(TitansConfig(heads=2, head_dim=4, hidden=6, chunk_size=4)))


@pytest.fixture(scope="module")
def small():
    """A model for tests that need any model; tests/test_session.py has one of the same structure."""
    return titans()


@pytest.fixture
def compiled():
    """The programs compiled since the fixture was made or cleared, by name."""
    found = []

    class Handler(logging.Handler):
        def emit(self, record):
            if "Finished XLA compilation" in record.getMessage():
                found.append(record.getMessage())

    handler, logger = Handler(), logging.getLogger("jax")
    logger.addHandler(handler)
    jax.config.update("jax_log_compiles", True)
    yield found
    jax.config.update("jax_log_compiles", False)
    logger.removeHandler(handler)


def check_unequal(model, tokens=6, causal=True, alone=LENGTHS[4:5]):
    """Compares a greedy batch of prompts of LENGTHS with each prompt alone and with one call on the whole text."""
    given = prompts()
    session = Session(model, rows=len(given)).feed(given)
    first = session.logits
    new = session.sample(tokens, temperature=0)
    last = session.logits
    if causal:
        longest = max(LENGTHS) + tokens
        texts = [np.concatenate([prompt, row]) for prompt, row in zip(given, new)]
        padded = np.stack([np.pad(text, (0, longest - len(text))) for text in texts])
        wanted = np.asarray(model.logits_of(padded))
        for i, n in enumerate(LENGTHS):
            np.testing.assert_allclose(first[i], wanted[i, n - 1], rtol=0, atol=1e-9)
            np.testing.assert_allclose(last[i], wanted[i, n + tokens - 1], rtol=0, atol=1e-9)
            scores = np.sort(wanted[i, n - 1 : n + tokens - 1], axis=-1)
            clear = scores[:, -1] - scores[:, -2] > 1e-6
            np.testing.assert_array_equal(new[i][clear], wanted[i, n - 1 : n + tokens - 1].argmax(-1)[clear])
    for n in alone if causal else LENGTHS:
        i = LENGTHS.index(n)
        session = Session(model).feed(given[i])
        np.testing.assert_allclose(session.logits[0], first[i], rtol=0, atol=1e-9)
        np.testing.assert_array_equal(session.sample(tokens, temperature=0)[0], new[i])
        np.testing.assert_allclose(session.logits[0], last[i], rtol=0, atol=1e-9)


@pytest.mark.deep
def test_unequal_prompts_equal_each_alone(x64):
    """Elsewhere padding counted as text: TransformerLensOrg/TransformerLens#1005, huggingface/transformers#29936."""
    check_unequal(titans(), alone=())


DEEP = ("gated_deltanet", "attention")


@pytest.mark.deep
@pytest.mark.parametrize("name", DEEP)
def test_unequal_prompts_for_some_mixers(name, x64):
    check_unequal(louder(language_model(MIXERS[name].examples()[0], repeat=2)))


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in MIXERS if name not in DEEP])
def test_unequal_prompts_for_every_mixer(name, x64):
    for config in MIXERS[name].examples()[:-1] or MIXERS[name].examples():
        scale = 1.5 if getattr(config, "depth", 1) > 2 else 3.0  # deep memories diverge at larger parameters
        check_unequal(louder(language_model(config), scale), causal=name not in NOT_CAUSAL)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in MODELS if hasattr(MODELS[name].examples()[0], "backbone")])
def test_unequal_prompts_for_models_of_segments(name, x64):
    for config in MODELS[name].examples():
        check_unequal(louder(models.build(dataclasses.replace(config), rngs=nnx.Rngs(0))))


def test_the_second_call_compiles_nothing(small, compiled):
    """Other lengths, settings, seeds and numbers of tokens, and other parameters of the same structure.

    Others compile at every call: huggingface/transformers#29410, huggingface/diffusers#927.
    """
    sample(small, [1, 2, 3], tokens=3)
    assert compiled
    compiled.clear()
    sample(small, np.arange(80)[None] % VOCABULARY, tokens=70, temperature=0.3, seed=9)
    sample(small, [5] * 64, tokens=1, temperature=0, stop=(3, 4))
    sample(small, [[7]], tokens=5, top_k=3, top_p=0.5, min_p=0.1, stop=(1,))
    graphdef, params = nnx.split(small, nnx.Param)
    other = nnx.merge(graphdef, jax.tree.map(lambda x: x + np.ones_like(x), jax.device_get(params)))
    sample(other, [1, 2], tokens=2)
    assert not compiled, compiled


def test_draws_keep_what_the_settings_say():
    """Top-k, top-p and min-p against a plain count, together with rows of other sizes."""
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.05, 0.05], [0.05, 0.05, 0.2, 0.3, 0.4]], np.float32))

    @jax.jit
    def many(settings):
        draw = lambda n: draws.choose(jnp.asarray(logits), jnp.full(2, n), settings)  # noqa: E731
        return jax.vmap(draw)(jnp.arange(400))

    for settings, kept in (
        (dict(), 5),
        (dict(top_k=2), 2),
        (dict(top_k=1), 1),
        (dict(top_k=99), 5),
        (dict(top_p=0.4), 1),
        (dict(top_p=0.41), 2),
        (dict(top_p=0.9), 3),
        (dict(top_k=3, top_p=0.75), 2),  # 0.4 and 0.3 are 7/9 of the rest after top-k
        (dict(min_p=0.49), 3),
        (dict(min_p=1.0), 1),
        (dict(temperature=0), 1),
        (dict(temperature=1e-30), 1),
    ):
        found = np.asarray(many(Sampling(**{"temperature": 1.0, **settings}).traced(np.arange(2))))
        assert len(np.unique(found[:, 0])) == kept and found[:, 0].max() == kept - 1, settings
        assert len(np.unique(found[:, 1])) == kept and found[:, 1].min() == 5 - kept, settings
    counts = np.bincount(np.asarray(many(Sampling(temperature=1.0).traced(np.arange(2))))[:, 0], minlength=5) / 400
    np.testing.assert_allclose(counts, np.exp(logits[0]), atol=0.08)


def test_equal_logits_are_cut_to_k():
    """A threshold keeps all tokens that tie with the k-th."""
    settings = Sampling(top_k=2).traced(np.arange(1))
    kept = draws._likeliest(jnp.array([[1.0, 1.0, 1.0, 0.0]]), settings)
    assert kept.tolist() == [[True, True, False, False]]


def test_a_row_draws_the_same_alone_and_in_any_batch(small):
    """The seed of one request depends on its batch in vllm-project/vllm#1595; equal prompts get the same draws in
    vllm-project/vllm#7808."""
    alone = sample(small, [3, 1, 4], tokens=8, seed=5, temperature=1.5)[0]
    for first in ([2, 2], [9] * 30):
        np.testing.assert_array_equal(sample(small, [first, [3, 1, 4]], tokens=8, seed=5, temperature=1.5)[1], alone)
    twice = sample(small, [[3, 1, 4]] * 2, tokens=8, seed=5, temperature=1.5)
    np.testing.assert_array_equal(twice[0], alone)
    assert not np.array_equal(twice[1], alone)
    assert not np.array_equal(sample(small, [3, 1, 4], tokens=8, seed=6, temperature=1.5)[0], alone)
    session = Session(small).feed([3, 1, 4])
    again = [session.sample(n, seed=5, temperature=1.5)[0] for n in (3, 5)]
    np.testing.assert_array_equal(np.concatenate(again), alone)


def test_a_stopped_row_writes_nothing_more(small):
    """Rows that finish early continue in huggingface/transformers#31261 and mistralai/mistral-inference#270."""
    given = [[1, 2, 3], [9] * 30]
    settings = dict(temperature=1.5, seed=1)
    free = sample(small, given, tokens=8, **settings)
    places = lambda token: [([*row, token].index(token)) for row in free.tolist()]  # noqa: E731
    stop = next(token for token in range(VOCABULARY) if 1 < min(places(token)) < max(places(token)))
    session = Session(small, rows=2).feed(given)
    found = session.sample(8, **settings, stop=stop)
    ends = []
    for row, wanted in zip(found, free):
        end = list(wanted).index(stop) + 1 if stop in wanted else 8
        ends.append(end)
        assert row[:end].tolist() == wanted[:end].tolist() and (row[end:] == -1).all()
    assert min(ends) < max(ends), "the stop must end some rows and not others"
    assert session.tokens_read.tolist() == [len(row) + end for row, end in zip(given, ends)]
    again = Session(small, rows=2).feed([[*row, *new[new >= 0]] for row, new in zip(given, found)])
    np.testing.assert_allclose(session.logits, again.logits, atol=1e-4)


class Letters:
    """A tokenizer of one letter per token; the last letter of the vocabulary ends a text."""

    end_of_text = (VOCABULARY - 1,)

    def encode(self, text):
        return np.array([ord(letter) - ord("a") for letter in text], np.int32)

    def decode(self, ids):
        return "".join(chr(ord("a") + int(i)) for i in ids)


def test_texts_and_ends_of_texts_stop(small, monkeypatch):
    free = Session(small, tokenizer=Letters()).feed("bcd")
    text = free.generate(12, temperature=1.5, seed=3)
    stop = text[3:5]
    found = Session(small, tokenizer=Letters()).feed("bcd").generate(12, temperature=1.5, seed=3, stop=stop)
    assert found == text[: text.index(stop) + 2]
    assert "".join(Session(small, tokenizer=Letters()).feed("bcd").stream_text(12, temperature=1.5, seed=3)) == text
    monkeypatch.setattr(Letters, "end_of_text", tuple(Letters().encode(text[2])))
    assert (
        Session(small, tokenizer=Letters()).feed("bcd").generate(12, temperature=1.5, seed=3)
        == text[: text.index(text[2])]
    )


def test_a_tokenizer_names_its_ends_of_text(tmp_path):

    from engrax.data.tokenizers import load_tokenizer

    added = [
        {"id": i, "content": content, "special": special, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False}
        for i, content, special in ((2, "<|endoftext|>", True), (3, "<s>", True), (4, "</s>", False))
    ]
    vocabulary = {"a": 0, "b": 1, "<|endoftext|>": 2, "<s>": 3, "</s>": 4}
    spec = {"version": "1.0", "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec | {"added_tokens": added}))
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).end_of_text == (2,)
    assert load_tokenizer(None).end_of_text == ()


def test_weights_that_are_not_numbers_are_named(small):
    graphdef, params = nnx.split(small, nnx.Param)
    model = nnx.merge(graphdef, jax.tree.map(jnp.copy, params))
    gate = model.blocks[0].mixer.qkv.kernel
    gate.set_value(gate[...].at[0, 2, 3].set(jnp.nan))
    with pytest.raises(
        UserError,
        match=r"the weights of step 7 hold values that are not numbers, in blocks.0.mixer.qkv.kernel, layer 0",
    ):
        Session(model, name="step 7").feed([1, 2]).sample(2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(temperature=float("inf")), "temperature=inf"),
        (dict(temperature=-1), "temperature=-1"),
        (dict(top_k=0), "top_k=0"),
        (dict(top_k=-3), "top_k=-3"),
        (dict(top_p=0.0), "top_p=0.0"),
        (dict(top_p=1.5), "top_p=1.5"),
        (dict(min_p=float("nan")), "min_p=nan"),
        (dict(seed=-1), "seed=-1"),
        (dict(stop=("",)), "stop=''"),
        (dict(stop=99), "token id 99 is outside the vocabulary of 16"),
        (dict(stop="x"), "there is no tokenizer"),
        (dict(beams=4), "no setting 'beams'"),
        (dict(tokens=0), "tokens=0"),
    ],
)
def test_settings_out_of_range_are_refused(small, settings, words):
    with pytest.raises(UserError, match=words):
        sample(small, [1], **{"tokens": 2, **settings})


def test_ids_are_checked_on_the_host(small):
    """An id outside the vocabulary silently reads another row; huggingface/transformers#3108."""
    for given in ([3, 16], [[1, 2], [-1, 3]], np.array([99]), jnp.array([[16]])):
        with pytest.raises(UserError, match="is outside the vocabulary of 16"):
            small(given)
        with pytest.raises(UserError, match="is outside the vocabulary of 16"):
            sample(small, given, tokens=1)
    with pytest.raises(UserError, match="unequal lengths"):
        small([[1, 2], [3]])
    with pytest.raises(UserError, match="empty"):
        sample(small, [[1], []], tokens=1)
    for given in ([1, 2], [[1, 2]], np.array([1, 2]), np.array([[1, 2]], np.uint8)):
        assert as_tokens(given, VOCABULARY).tolist() == [[1, 2]]
    assert small.logits_of([[1, 2], [3, 4]]).shape == (2, 2, VOCABULARY)


def test_the_compute_dtype_is_that_of_training(small):
    cast = Compiled(small, jnp.bfloat16).params
    assert cast["embedding"].get_value().dtype == jnp.bfloat16
    assert cast["norm"]["scale"].get_value().dtype == jnp.float32


def test_a_cache_smaller_than_a_piece_serves():
    model = language_model(AttentionConfig(heads=2, head_dim=4, capacity=12))
    assert sample(model, [[1] * 7, [2] * 3], tokens=5).shape == (2, 5)
    with pytest.raises(UserError, match="exceed an attention cache's capacity"):
        sample(model, [[1] * 7, [2] * 3], tokens=6)
