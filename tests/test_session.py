"""Sessions: a memory is fed, branched, saved and restored."""

import jax
import numpy as np
import pytest
from flax import nnx

import engrax
from engrax import models
from engrax.errors import UserError
from engrax.layers import TitansConfig
from engrax.models import LanguageModelConfig
from engrax.models.session import Session


def build(seed=0, **kwargs):
    mixers = (TitansConfig(heads=2, head_dim=4, hidden=6, chunk_size=4),)
    config = LanguageModelConfig(vocab_size=16, dim=8, mixers=mixers, repeat=1, mlp_hidden=12, **kwargs)
    return models.build(config, rngs=nnx.Rngs(seed))


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture
def session(model):
    return Session(model).feed([1, 2, 3, 4, 5, 6])


def test_what_is_fed_in_parts_is_one_text(model, session):
    parts = engrax.session(model).feed([1, 2]).feed(np.array([3])).feed([4, 5, 6])
    np.testing.assert_allclose(parts.logits, session.logits, atol=1e-5)
    np.testing.assert_allclose(parts.logits[0], model.logits_of([1, 2, 3, 4, 5, 6])[0, -1], atol=1e-5)
    assert parts.tokens_read.tolist() == [6]


def test_a_prefix_is_read_once_and_asked_often(session):
    before = session.logits
    questions = [[7], [8, 9, 10]]
    both = session.branch(2).feed(questions)
    answers = both.sample(5, temperature=0)
    np.testing.assert_array_equal(session.logits, before)
    for question, answer, logits in zip(questions, answers, both.logits):
        one = session.branch(1).feed(question)
        np.testing.assert_array_equal(one.sample(5, temperature=0)[0], answer)
        np.testing.assert_allclose(one.logits[0], logits, atol=1e-5)
    drawn = session.branch(2).sample(8, seed=1, temperature=2.0)
    assert len(np.unique(drawn, axis=0)) == 2, "every branch has draws of its own"
    np.testing.assert_array_equal(drawn[0], session.sample(8, seed=1, temperature=2.0)[0])


def test_copies_of_a_row_stand_together(model):
    """Rows a and b, branched by 2, are a, a, b, b: logits, memory and tokens read."""
    two = Session(model, rows=2).feed([[1, 2, 3], [9, 8, 7, 6, 5]])
    four = two.branch(2)
    np.testing.assert_array_equal(four.logits, np.repeat(two.logits, 2, axis=0))
    assert four.tokens_read.tolist() == [3, 3, 5, 5]
    wanted = np.repeat(two.feed([4]).logits, 2, axis=0)
    np.testing.assert_allclose(four.feed([4]).logits, wanted, atol=1e-5)


def test_streaming_leaves_the_state_after_the_last_token_taken(session):
    whole = session.branch(1).sample(5, seed=2)[0]
    taken = [int(token[0]) for _, token in zip(range(3), session.stream(5, seed=2))]
    assert taken == whole[:3].tolist() and session.tokens_read.tolist() == [9]
    np.testing.assert_array_equal(session.sample(2, seed=2)[0], whole[3:])


def test_a_state_travels_in_a_file(model, session, tmp_path):
    session = session.branch(2)
    session.save(tmp_path / "a.state")
    other = Session(model).restore(tmp_path / "a.state")
    np.testing.assert_array_equal(other.logits, session.logits)
    np.testing.assert_array_equal(other.sample(6, seed=1), session.sample(6, seed=1))
    assert other.rows == 2 and other.tokens_read.tolist() == session.tokens_read.tolist()
    for stranger in (build(seed=1), build(layout=models.block_style.BlockStyleConfig(activation="gelu"))):
        fresh = Session(stranger).feed([3])
        before = fresh.logits
        with pytest.raises(UserError, match="saved by another model"):
            fresh.restore(tmp_path / "a.state")
        np.testing.assert_array_equal(fresh.logits, before)
    with pytest.raises(UserError, match="saved by another model"):
        Session(model, dtype="bfloat16").restore(tmp_path / "a.state")


def test_every_damage_of_a_file_is_one_sentence(model, session, tmp_path):
    session.save(tmp_path / "a.state")
    whole = (tmp_path / "a.state").read_bytes()
    fresh = Session(model)
    rng = np.random.default_rng(0)
    flipped = [bytearray(whole) for _ in range(30)]
    for content, at in zip(flipped, rng.integers(0, len(whole), 30)):
        content[at] ^= 1 << int(rng.integers(8))
    for content in (b"", b"{}", whole[:100], whole[:-1], whole + b"x", b"\x80\x04K\x01.", *flipped):
        (tmp_path / "b.state").write_bytes(content)
        with pytest.raises(UserError, match="b.state (is no saved state|was saved)"):
            fresh.restore(tmp_path / "b.state")
    with pytest.raises(UserError, match="no saved state at"):
        fresh.restore(tmp_path / "c.state")


def test_the_report_says_what_is_held(session):
    found = session.report()
    assert found["tokens_read"] == [6] and found["rows"] == 1
    assert found["state_bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(session._memory))
    assert found["diagnostics"]["titans.memory_norm"] > 0
    assert session.tokens_read.tolist() == [6]


def test_mistakes_are_named(model, session):
    for mistake, words in (
        (lambda: Session(model).logits, "has read nothing"),
        (lambda: Session(model).sample(1), "has read nothing"),
        (lambda: session.feed([[1], [2]]), "2 texts for a session of 1 row"),
        (lambda: session.feed("abc"), "no tokenizer"),
        (lambda: session.feed([]), "empty"),
        (lambda: session.feed([0.5]), "no sequence of token ids"),
        (lambda: session.feed([16]), "outside the vocabulary of 16"),
        (lambda: session.branch(0), "at least 1"),
        (lambda: Session(model, rows=0), "rows=0"),
    ):
        with pytest.raises(UserError, match=words):
            mistake()
    assert session.tokens_read.tolist() == [6]
