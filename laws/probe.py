"""The probe before a training: does the model see the tokens that it should predict, or other rows of its batch?

The run's own model, in float32, reads a few packed rows of the run's own data with its parameters moved by noise, so
that nothing hides behind a gate that begins at zero. Then the last token of a document, all tokens from the middle of
it on, and all rows but the first are replaced. No output before a replaced token, and none of the first row, may
change: on the CPU in no bit, elsewhere by no more than 4 times what two equal runs differ by.

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
LOGITS = 2**24  # most logits that are looked at beside the hidden states
NOISY = 4.0  # times the difference of two equal runs: what counts as equal where programs are not exact
BOUND = 1e4  # outputs beyond it: the memory diverges at parameters moved so far
NOISE = 65_521  # normal numbers that the parameters are moved by, over and over; a prime, so that no row repeats


class Leak(NamedTuple):
    """Something that a model sees and must not."""

    cause: str  # what was changed, in words
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
      graphdef, params: the model, split by `nnx.Param`; the parameters where the training has them.
      tokens, segment_ids: int32 [B, T], B >= 2, packed rows, the same on every process; -1 in the ids is padding. Row 0
        is the one that is watched.
      vocab_size: tokens that the model knows.
      put: makes the array that the model reads from one of these.
    """
    tokens, ids = np.asarray(tokens)[:, :LENGTH], np.asarray(segment_ids)[:, :LENGTH]
    with_logits = tokens.size * vocab_size <= LOGITS
    noise = np.random.default_rng(0).standard_normal(NOISE).astype(np.float32)
    segments = put(ids)
    exact = next(iter(jax.tree.leaves(params)[0].devices())).platform == "cpu"
    program = _compiled(exact)

    def run(tokens: np.ndarray, scale: float) -> np.ndarray:
        return _gathered(program(graphdef, params, noise, scale, put(tokens), segments, with_logits))

    for scale in (1.0, 0.25, 0.0):
        base = run(tokens, scale)
        if np.max(np.abs(base), initial=0) < BOUND or (scale == 0.0 and np.all(np.isfinite(base))):
            break
    else:  # not finite at the run's own parameters either: its first step will say so
        return None
    allowed = 0.0 if exact else NOISY * float(np.max(np.abs(run(tokens, scale) - base)))

    def first_leak(changes: list[Change]) -> Leak | None:
        """What the changes, made together, show in row 0."""
        changed = np.select([where for _, where, _ in changes], [_others(tokens, vocab_size)] * len(changes), tokens)
        size = np.max(np.abs(run(changed, scale)[0] - base[0]), axis=-1)
        before = min(change.before for change in changes)
        where = np.flatnonzero((size > allowed) & (np.arange(len(size)) < before) & (ids[0] >= 0))
        return Leak(changes[0].cause, int(where[0]), float(np.max(size[where]))) if len(where) else None

    last, middle, rows = _changes(ids)
    for together in ((last, rows), (middle,)):
        if first_leak(list(together)):  # then one by one, to tell which
            return next(filter(None, (first_leak([change]) for change in together)), first_leak(list(together)))
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
    """Another token for each."""
    return ((tokens + 1 + np.arange(tokens.shape[1]) % (vocab - 1)) % vocab).astype(tokens.dtype)


@functools.cache
def _compiled(cpu: bool) -> Callable:
    """`_outputs` as a program. It runs five times: on CPU optimising it takes longer than it saves."""
    options = {"xla_backend_optimization_level": 0} if cpu else None
    return jax.jit(_outputs, static_argnums=(0, 6), compiler_options=options)


def _outputs(graphdef, params, noise, scale, tokens, segment_ids, with_logits: bool):
    """Hidden states, and logits where asked for, at parameters moved by `scale` times the laws' noise."""
    model = nnx.merge(graphdef, _moved(params, noise, scale))
    hidden = model(tokens, segment_ids=segment_ids)[0]
    found = [hidden, model.logits(hidden)] if with_logits else [hidden]
    return jnp.concatenate([part.astype(jnp.float32) for part in found], axis=-1)


def _moved(params: Any, noise: jax.Array, scale: jax.Array) -> Any:
    """float32 parameters moved by noise of about their own size, never tiny (see `subject.noise_width`)."""
    leaves, tree = jax.tree.flatten(params)
    moved = []
    for i, p in enumerate(leaves):
        if not is_float(p):
            moved.append(p)
            continue
        p = p.astype(jnp.float32)
        floor = p.shape[-2] ** -0.5 if p.ndim > 1 else 0.5
        width = jnp.clip(jnp.sqrt(jnp.mean(p * p)), floor, 1.0)
        place = jnp.arange(p.size).reshape(p.shape) + 7919 * i
        moved.append(p + scale * width * noise[place % NOISE])
    return jax.tree.unflatten(tree, moved)


def _gathered(outputs: jax.Array) -> np.ndarray:
    """A global array as NumPy, on every process."""
    if outputs.is_fully_addressable:
        return np.asarray(outputs)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(outputs, tiled=True))
