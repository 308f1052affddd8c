"""Law 8: long rows, bfloat16 inputs and extreme gates give no NaN and no infinity."""

import jax
import jax.numpy as jnp
import numpy as np

from engrax.laws.breach import demand, law, leaf_position, output_position
from engrax.laws.gates import KEEPING, direction, extreme_gates
from engrax.laws.layouts import ROWS
from engrax.laws.subject import Subject, in_bfloat16, is_float

TOKENS, BLOCK = 10_240, 512  # tokens of the long row, and of each call
LONG = ("fresh", KEEPING)  # variants that read the whole long row; the others read four blocks
SETTLED = 4  # calls after which a state's size is measured
GROWTH = 1e4  # largest growth from there to the end of the long row; sums over the row stay far below it


@law("stability.gradients")
def gradients_stay_finite_at_extreme_gates(s: Subject, deep: bool = False):
    """Gradients are finite at gates of almost and exactly 0 and 1."""
    initial = jax.tree.map(lambda p: p.astype(s.dtype) if is_float(p) else p, s.initial)
    for name, extreme in extreme_gates(initial, None if s.is_model else s.dim):
        x = s.x if s.is_model or name == "fresh" else (s.x + direction(s.dim)).astype(s.dtype)
        grads = s.pullback(extreme, x, s.ids, s.weights)
        for path, g in jax.tree_util.tree_leaves_with_path(grads):
            demand(np.all(np.isfinite(g)), f"{name}: its gradient is not finite", position=leaf_position(path))


@law("stability.long")
def long_rows_and_extreme_gates_stay_bounded(s: Subject, deep: bool = False):
    """bfloat16 inputs and parameters as the trainer casts them, streamed through the state; gates driven to 0 and 1.

    Outputs are finite, and the state does not grow exponentially: 0.2 % a token breaks the law.
    """
    with jax.enable_x64(False):
        long = s.with_capacity(TOKENS)
        for name, extreme in extreme_gates(in_bfloat16(s.initial), None if s.is_model else s.dim):
            state = long.start(extreme, ROWS)
            kinds = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
            for n in range(TOKENS // BLOCK if name in LONG else SETTLED):
                y, state = long.run(extreme, _stream(s, n, shifted=name != "fresh"), state)
                broken = np.argwhere(~np.isfinite(np.asarray(y, np.float32)))
                if len(broken):
                    where = output_position(tuple(map(int, broken[0])), n * BLOCK)
                    demand(False, f"{name}: an output is not finite", position=where)
                if n + 1 == SETTLED:
                    settled = _sizes(state)
            then = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
            demand(then == kinds, f"{name}: the state changes its type")
            for where, size in _sizes(state).items():
                demand(np.isfinite(size), f"{name}: it is not finite", position=where)
                bounded = size <= GROWTH * max(1.0, settled[where])
                demand(bounded, f"{name}: it grows exponentially", position=where, size=size)


def _sizes(state) -> dict[str, float]:
    """The largest absolute value of every floating-point leaf."""
    leaves = [(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state) if is_float(leaf)]
    return {
        f"state {leaf_position(path)}": float(np.max(np.abs(np.asarray(leaf, np.float32)), initial=0.0))
        for path, leaf in leaves
    }


def _stream(s: Subject, n: int, *, shifted: bool):
    """Block n of three kinds of row: random, one token repeated, and zeros; shifted: the first two along u."""
    rng = np.random.default_rng(100 + n)
    if s.is_model:
        kinds = [rng.integers(0, s.vocab, BLOCK), np.ones(BLOCK), np.zeros(BLOCK)]
        return jnp.asarray(np.stack(kinds), jnp.int32)
    along = direction(s.dim) if shifted else 0
    kinds = [
        rng.standard_normal((BLOCK, s.dim)) + along,
        np.ones((BLOCK, 1)) * (np.sin(np.arange(s.dim)) + along),
        np.zeros((BLOCK, s.dim)),
    ]
    return jnp.asarray(np.stack(kinds), jnp.bfloat16)
