"""Log-likelihoods of tokens that continue what a session has read, several rows at once and at any length.

Rows are read in pieces through the carried memory, so no context is cut and one compiled call serves all lengths. The
session does not change.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from engrax.errors import UserError
from engrax.models.session import Session
from engrax.models.tokens import check_ids
from engrax.train.objective import score

Pair = tuple[Sequence[int], Sequence[int]]  # token ids of a context, and of what is scored after it


class Likelihood(NamedTuple):
    """The scores of one continuation of N tokens."""

    nats: Float[np.ndarray, " N"]  # -log p of every token
    greedy: Bool[np.ndarray, " N"]  # it had the highest logit

    @property
    def total(self) -> float:
        """log p of the whole continuation, in nats."""
        return -float(np.sum(self.nats, dtype=np.float64))


def continuations(
    session: Session, pairs: Sequence[Pair], *, rows: int = 1, tick: Callable[[int], Any] = lambda n: None
) -> list[Likelihood]:
    """Scores the second part of every pair after the session's text and the pair's first part, `rows` pairs at once.

    The first part may be empty if the session has read something. `tick(n)` is called after every n pairs. Raises
    UserError for a session of several rows, ids outside the vocabulary, or outputs that are not numbers.
    """
    if session.rows != 1:
        raise UserError(f"continuations are scored after a session of one row; this one has {session.rows}.")
    if any(len(scored) and not len(context) for context, scored in pairs):
        session.logits  # noqa: B018, raises if the session has read nothing
    order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))  # rows of a batch are about equally long
    found: dict[int, Likelihood] = {}
    for at in range(0, len(order), rows):
        chosen = order[at : at + rows]
        found |= zip(chosen, _batch(session, [pairs[i] for i in chosen], rows))
        tick(len(chosen))
    return [found[i] for i in range(len(pairs))]


def _batch(session: Session, pairs: list[Pair], rows: int) -> list[Likelihood]:
    compiled, logits, memory = session.branch(rows).release()
    whole = [np.asarray([*context, *scored], np.int64) for context, scored in pairs]
    for ids in whole:
        check_ids(ids, compiled.vocabulary)
    longest = -(-max(len(ids) - 1 for ids in whole) // compiled.piece) * compiled.piece
    tokens, targets = np.zeros((rows, longest), np.int32), np.full((rows, longest), -1, np.int32)
    segments = targets.copy()  # rows without a pair are padding
    for i, (ids, (context, _)) in enumerate(zip(whole, pairs)):
        tokens[i, : len(ids) - 1], segments[i, : len(ids) - 1] = ids[:-1], 0
        first = max(len(context) - 1, 0)
        targets[i, first : len(ids) - 1] = ids[first + 1 :]
    nats, greedy = np.zeros(tokens.shape, np.float32), np.zeros(tokens.shape, bool)
    for at in range(0, longest, compiled.piece):
        part = slice(at, at + compiled.piece)
        batch = {"tokens": tokens[:, part], "targets": targets[:, part], "segment_ids": segments[:, part]}
        nats[:, part], greedy[:, part], memory = _read(compiled.structure, compiled.params, batch, memory)
    scored = [
        _joined(logits[i], ids, context, nats[i], greedy[i]) for i, (ids, (context, _)) in enumerate(zip(whole, pairs))
    ]
    if any(np.isnan(each.nats).any() for each in scored):
        raise compiled.not_numbers(session.name)
    return scored


def _joined(logits_V, ids: Int[np.ndarray, " L"], context: Sequence[int], nats, greedy) -> Likelihood:
    """The scores of a row's labelled tokens; the first token of an empty context is predicted by the session."""
    part = slice(max(len(context) - 1, 0), len(ids) - 1)
    if len(context) or not len(ids):
        return Likelihood(nats[part], greedy[part])
    log_p = np.asarray(jax.nn.log_softmax(jnp.asarray(logits_V, jnp.float32)))
    first = np.float32(-log_p[ids[0]]), log_p[ids[0]] == log_p.max()
    return Likelihood(*(np.concatenate([[one], found[part]]) for one, found in zip(first, (nats, greedy))))


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _read(structure, params, batch, memory):
    found = score(structure.model(params), batch, memory)
    return found.nats, found.correct, found.memory
