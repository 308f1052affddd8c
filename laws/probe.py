"""The probe before a training: does the model see the tokens that it should predict, or other rows of its batch?

The run's model, in float32, reads a few packed rows of the run's data. Its parameters are moved by noise, so nothing
hides behind a gate that starts at zero. Then three things are replaced: the last token of a document, all tokens from
its middle on, and all rows but the first. No output before a replaced token, and none of the first row, may change: on
the CPU in no bit, elsewhere by at most 4 times the difference between two equal runs.

A leak is found at any distance within the rows; `engrax check` looks further.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from engrax.laws.subject import is_float

LENGTH = 1024  # most tokens of a row
LOGITS = 2**24  # most logits checked in addition to the hidden states
NOISY = 4.0  # tolerance in differences of two equal runs, for devices with inexact programs
BOUND = 1e4  # above it the memory diverges, and the noise is too large
NOISE = 65_521  # normal numbers added to the parameters, repeated; a prime, so that no row repeats


class Leak(NamedTuple):
    """Something that a model sees but must not see."""

    cause: str  # the change, in words
    token: int  # position in the row of the first output that changed
    size: float  # largest change of an output


def probe(
    graphdef: nnx.GraphDef,
    params: Any,
    tokens: np.ndarray,
    segment_ids: np.ndarray,
    *,
    vocab_size: int,
    put: Callable[[np.ndarray], Any] = jnp.asarray,
) -> Leak | None:
    """The first leak found, or None.

    Args:
      graphdef, params: the model, split by `nnx.Param`; the parameters placed as in training.
      tokens, segment_ids: int32 [B, T], B >= 2, packed rows, equal on all processes; -1 in the ids is padding. Row 0 is
      watched.
      vocab_size: tokens in the vocabulary.
      put: makes the array that the model reads from one of these.
    """
    tokens, ids = np.asarray(tokens)[:, :LENGTH], np.asarray(segment_ids)[:, :LENGTH]
    reader = _Reader(graphdef, params, put(ids), put, tokens.size * vocab_size <= LOGITS)
    base = reader.settle(tokens)
    if base is None:  # not finite at the run's parameters either: the first step will say so
        return None
    allowed = 0.0 if reader.exact else NOISY * float(np.max(np.abs(reader(tokens) - base)))
    others = _others(tokens, vocab_size)

    def shows(*changes: Change) -> Leak | None:
        """The leak that the changes, made together, show in row 0."""
        changed = np.where(functools.reduce(np.logical_or, (change.where for change in changes)), others, tokens)
        size = np.max(np.abs(reader(changed)[0] - base[0]), axis=-1)
        before = min(change.before for change in changes)
        where = np.flatnonzero(~(size <= allowed) & (np.arange(len(size)) < before) & (ids[0] >= 0))
        return Leak(changes[0].cause, int(where[0]), float(np.max(size[where]))) if len(where) else None

    last, middle, rows = _changes(ids)
    for together in ((last, rows), (middle,)):
        leak = shows(*together)
        if leak:  # then one by one, to find the cause
            return next(filter(None, map(shows, together)), leak)
    return None


class _Reader:
    """tokens [B, T] -> outputs [B, T, n] of the model with moved parameters, as NumPy on every process."""

    def __init__(self, graphdef: nnx.GraphDef, params: Any, segment_ids: Any, put: Callable, with_logits: bool):
        self.fixed = (graphdef, params, _noise(params))
        self.segment_ids, self.put, self.with_logits = segment_ids, put, with_logits
        self.scale = 1.0  # scale of the noise
        self.exact = next(iter(jax.tree.leaves(params)[0].devices())).platform == "cpu"

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        outputs = _compiled(self.exact)(*self.fixed, self.scale, self.put(tokens), self.segment_ids, self.with_logits)
        if outputs.is_fully_addressable:
            return np.asarray(outputs)
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(outputs, tiled=True))

    def settle(self, tokens: np.ndarray) -> np.ndarray | None:
        """Outputs with the largest noise that keeps them bounded; None if they are never finite."""
        for self.scale in (1.0, 0.25, 0.0):
            outputs = self(tokens)
            if np.max(np.abs(outputs), initial=0) < BOUND or (self.scale == 0.0 and np.all(np.isfinite(outputs))):
                return outputs
        return None


class Change(NamedTuple):
    """Tokens that are replaced."""

    cause: str  # in words
    where: np.ndarray  # [B, T], True where replaced
    before: int  # outputs of row 0 before this position must stay


def _changes(ids: np.ndarray) -> tuple[Change, Change, Change]:
    """The last token of row 0's longest document, all from the middle of it on, and the other rows."""
    row, at = np.arange(len(ids))[:, None], np.arange(ids.shape[1])
    real = ids[0][ids[0] >= 0]
    longest = np.argmax(np.bincount(real)) if len(real) else -1
    document = np.flatnonzero(ids[0] == longest)
    last, middle = int(document[-1]), int(document[len(document) // 2])
    return (
        Change(f"token {last} is replaced", (row == 0) & (at == last), last),
        Change(f"the tokens from {middle} on are replaced", (row == 0) & (at >= middle), middle),
        Change("other rows of the batch are replaced", (row > 0) & (at >= 0), len(at)),
    )


def _others(tokens: np.ndarray, vocab: int) -> np.ndarray:
    """A different token for each."""
    return ((tokens + 1 + np.arange(tokens.shape[1]) % (vocab - 1)) % vocab).astype(tokens.dtype)


@functools.cache
def _compiled(cpu: bool) -> Callable:
    """`_outputs`, compiled. It runs five times: on CPU optimisation takes longer than it saves."""
    options = {"xla_backend_optimization_level": 0} if cpu else None
    return jax.jit(_outputs, static_argnums=(0, 6), compiler_options=options)


def _outputs(graphdef, params, noise, scale, tokens, segment_ids, with_logits: bool):
    """float32 hidden states, and logits if requested, at the parameters plus `scale` times the noise."""
    params = jax.tree.map(lambda p, n: p.astype(jnp.float32) + scale * n if is_float(p) else p, params, noise)
    model = nnx.merge(graphdef, params)
    hidden = model(tokens, segment_ids=segment_ids)[0]
    found = [hidden, model.logits(hidden)] if with_logits else [hidden]
    return jnp.concatenate([part.astype(jnp.float32) for part in found], axis=-1)


def _noise(params: Any) -> Any:
    """Normal noise for every parameter, as large as a fresh parameter of its shape, on the parameter's devices."""
    table = np.random.default_rng(0).standard_normal(NOISE).astype(np.float32)

    def of(i: int, p: jax.Array) -> jax.Array:
        width = p.shape[-2] ** -0.5 if p.ndim > 1 else 0.5
        whole = np.resize(np.roll(table, 7919 * i), p.shape) * np.float32(width)
        return jax.make_array_from_callback(p.shape, p.sharding, lambda index: whole[index])

    leaves, tree = jax.tree.flatten(params)
    return jax.tree.unflatten(tree, [of(i, p) for i, p in enumerate(leaves)])
