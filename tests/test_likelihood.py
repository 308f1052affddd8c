"""Log-likelihoods of continuations are those of one plain pass, for any lengths, batches and sessions."""

import jax
import numpy as np
import pytest
from flax import nnx

from engrax import models
from engrax.errors import UserError
from engrax.evals.likelihood import continuations
from engrax.layers import AttentionConfig, TitansConfig
from engrax.models import LanguageModelConfig
from engrax.models.session import Session

TITANS = TitansConfig(heads=2, head_dim=4, hidden=6, chunk_size=4)


def build(*mixers, vocab_size=16):
    config = LanguageModelConfig(vocab_size=vocab_size, dim=8, mixers=mixers, repeat=1, mlp_hidden=12)
    model = models.build(config, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)  # scaled up, so that tokens differ in how likely they are
    nnx.update(model, jax.tree.map(lambda x: x * 3 if x.ndim > 1 else x, params))
    return model


@pytest.fixture(scope="module")
def model():
    return build(TITANS)


def ids(*lengths):
    rng = np.random.default_rng(sum(lengths))
    return [rng.integers(0, 16, n).tolist() for n in lengths]


def plain(model, context, scored):
    """The scores from the logits of one pass over as many tokens as the model reads, which compiles once."""
    ids = (context + scored)[:-1]
    capacity = getattr(model.config.mixers[0], "capacity", 512)
    logits = model.logits_of(ids + [0] * (capacity - len(ids)))[0, len(context) - 1 : len(ids)]
    log_p = np.asarray(jax.nn.log_softmax(logits))
    return -log_p[np.arange(len(scored)), scored], log_p.argmax(axis=-1) == scored


def test_scores_are_those_of_one_pass(model):
    """One token after a long context, contexts and continuations across the pieces that are read, and one of a word."""
    pairs = [tuple(ids(*lengths)) for lengths in ((90, 1), (1, 70), (64, 64), (63, 2), (3, 4))]
    greedy = int(np.argmax(model.logits_of(pairs[0][0])[0, -1]))
    pairs.append((pairs[0][0], [greedy]))
    for rows in (1, 4):
        for (context, scored), found in zip(pairs, continuations(Session(model), pairs, rows=rows), strict=True):
            nats, right = plain(model, context, scored)
            np.testing.assert_allclose(found.nats, nats, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(found.greedy, right)
            assert found.total == pytest.approx(-nats.sum(), abs=1e-4)
    assert found.greedy.all()


def test_a_session_is_continued_and_does_not_change(model):
    text, more, scored = ids(70, 5, 6)
    session = Session(model).feed(text)
    before = session.logits
    found = continuations(session, [([], scored), (more, scored), ([], scored[:1]), ([], [])], rows=3)
    wanted = [plain(model, text, scored), plain(model, text + more, scored)]
    for (nats, right), each in zip([*wanted, (wanted[0][0][:1], wanted[0][1][:1])], found):
        np.testing.assert_allclose(each.nats, nats, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(each.greedy, right)
    assert found[3].total == 0
    np.testing.assert_array_equal(session.logits, before)


def test_what_cannot_be_scored_is_refused(model):
    with pytest.raises(UserError, match="one row"):
        continuations(Session(model, rows=2), [([1], [2])])
    with pytest.raises(UserError, match="read nothing"):
        continuations(Session(model), [([], [1])])
    with pytest.raises(UserError, match="token id 16"):
        continuations(Session(model), [([1], [16])])
    with pytest.raises(UserError, match="not numbers"):
        continuations(Session(build(AttentionConfig(heads=2, head_dim=4, capacity=8))), [tuple(ids(9, 1))])
