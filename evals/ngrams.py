"""N-gram baselines: predictions from counts of the training tokens that a model has seen.

An order-k model predicts a token from the k tokens before it. Counts are interpolated from order 0 up after Witten and
Bell ("The zero-frequency problem", IEEE Trans. Information Theory 37, 1991, method C; Chen and Goodman 1999, eq. 16):

    p_k(w | h) = (c(h w) + n(h) p_{k-1}(w | h')) / (c(h) + n(h)),     p_{-1}(w) = 1 / V

c counts occurrences, n(h) the distinct tokens seen after h, and h' is h without its oldest token; for an unseen
context p_k = p_{k-1}. There are no parameters to tune. As for a model, a context is limited to its segment: near the
start of a segment the longest available context is used.
"""

import dataclasses

import numpy as np
from jaxtyping import Float64, Int, Shaped

Rows = Int[np.ndarray, "N T"]


@dataclasses.dataclass(frozen=True)
class _Order:
    """Counts of one order: sorted keys of (context, token) and of contexts."""

    pairs: Shaped[np.ndarray, " P"]  # context * V + token
    pair_counts: Int[np.ndarray, " P"]
    contexts: Shaped[np.ndarray, " C"]
    totals: Int[np.ndarray, " C"]  # c(h)
    kinds: Int[np.ndarray, " C"]  # n(h)


class NGrams:
    """N-gram models of orders 0 to `order` over a vocabulary, counted once."""

    def __init__(self, tokens: Rows, targets: Rows, segment_ids: Rows, *, vocab_size: int, order: int = 3):
        """Counts every labelled token (`targets` >= 0) of packed rows; the keys must fit 64 bits (`highest_order`)."""
        self.vocab_size, self.order = vocab_size, order
        keys, depth = _keys(tokens, targets, segment_ids, vocab_size, order)
        self._orders = [_count(pairs[depth >= k], vocab_size) for k, pairs in enumerate(keys)]

    def probabilities(self, tokens: Rows, targets: Rows, segment_ids: Rows) -> Float64[np.ndarray, "orders N T"]:
        """p_k of each target for k = 0 .. order; 1 where there is no target."""
        labelled = targets >= 0
        keys, depth = _keys(tokens, targets, segment_ids, self.vocab_size, self.order)
        p = np.full(depth.shape, 1.0 / self.vocab_size)
        found = np.ones((self.order + 1, *targets.shape))
        for k, (pairs, table) in enumerate(zip(keys, self._orders)):
            c_hw = _look_up(table.pairs, table.pair_counts, pairs)
            contexts = pairs // pairs.dtype.type(self.vocab_size)
            c_h, n_h = (_look_up(table.contexts, counts, contexts) for counts in (table.totals, table.kinds))
            known = (c_h > 0) & (depth >= k)
            p = np.where(known, (c_hw + n_h * p) / np.maximum(c_h + n_h, 1), p)
            found[k][labelled] = p
        return found


def highest_order(vocab_size: int, wanted: int = 3) -> int:
    """The highest order up to `wanted` whose keys fit 64 bits: 3 up to 65,536 tokens, 2 up to 2 million."""
    return max(k for k in range(wanted + 1) if vocab_size ** (k + 1) <= 2**64)


def _keys(tokens: Rows, targets: Rows, segment_ids: Rows, vocab_size: int, order: int):
    """(per order the (context, token) key of every labelled token, the longest context [N] within its segment)."""
    labelled = targets >= 0
    dtype = np.uint32 if vocab_size ** (order + 1) <= 2**32 else np.uint64
    depth = np.zeros(int(labelled.sum()), np.int8)
    context = np.zeros(len(depth), dtype)
    token = targets[labelled].astype(dtype)
    keys, place = [token], 1
    for back in range(order):  # the token at position t itself is the newest of the context
        older = np.roll(tokens, back, axis=1)
        inside = np.roll(segment_ids, back, axis=1) == segment_ids
        inside[:, :back] = False
        depth += inside[labelled]  # ids do not decrease: tokens between are inside too
        context = context + older[labelled].astype(dtype) * dtype(place)
        place *= vocab_size
        keys.append(context * dtype(vocab_size) + token)
    return keys, depth


def _count(pairs: Shaped[np.ndarray, " N"], vocab_size: int) -> _Order:
    ordered = np.sort(pairs)
    first = _starts(ordered)
    pairs, counts = ordered[first], np.diff(first, append=len(ordered))
    contexts = pairs // pairs.dtype.type(vocab_size)
    first = _starts(contexts)
    totals = np.add.reduceat(counts, first) if len(first) else counts
    return _Order(pairs, counts, contexts[first], totals, np.diff(first, append=len(contexts)))


def _starts(ordered: Shaped[np.ndarray, " N"]) -> Int[np.ndarray, " U"]:
    """Where each run of equal values begins."""
    return np.flatnonzero(np.concatenate([np.ones(min(len(ordered), 1), bool), ordered[1:] != ordered[:-1]]))


def _look_up(keys: Shaped[np.ndarray, " U"], values: Int[np.ndarray, " U"], wanted: Shaped[np.ndarray, " N"]):
    """The value of each wanted key, 0 if it is not among the sorted `keys`."""
    if not len(keys):
        return np.zeros(len(wanted), np.int64)
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, values[places], 0)
