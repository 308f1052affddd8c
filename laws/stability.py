"""Law 8: long rows, bfloat16 inputs and extreme gates give no NaN and no infinity."""

import jax
import jax.numpy as jnp
import numpy as np

from engrax.laws.breach import demand, law, leaf_position, output_position
from engrax.laws.gates import direction, extreme_gates
from engrax.laws.layouts import ROWS
from engrax.laws.subject import Subject, in_bfloat16, is_float

TOKENS, BLOCK = 10_240, 512  # tokens of the long row, and of each call


@law("stability.gradients")
def gradients_stay_finite_at_extreme_gates(s: Subject, deep: bool = False):
    """Gradients are finite where gates are almost, and exactly, 0 and 1."""
    initial = jax.tree.map(lambda p: p.astype(s.dtype) if is_float(p) else p, s.initial)
    for name, extreme in extreme_gates(s, initial):
        x = s.x if s.is_model or name == "fresh" else (s.x + direction(s.dim)).astype(s.dtype)
        grads = s.pullback(extreme, x, s.ids, s.weights)
        for path, g in jax.tree_util.tree_leaves_with_path(grads):
            demand(np.all(np.isfinite(g)), f"{name}: its gradient is not finite", position=leaf_position(path))


@law("stability.long")
def long_rows_and_extreme_gates_stay_finite(s: Subject, deep: bool = False):
    """bfloat16 inputs and parameters as the trainer casts them, streamed through the state; gates driven to 0 and 1."""
    with jax.enable_x64(False):
        long = s.with_capacity(TOKENS)
        for name, extreme in extreme_gates(s, in_bfloat16(s.initial)):
            state = long.start(extreme, ROWS)
            kinds = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
            for n in range(TOKENS // BLOCK if name == "fresh" else 4):
                y, state = long.run(extreme, _stream(s, n, shifted=name != "fresh"), state)
                broken = np.argwhere(~np.isfinite(np.asarray(y, np.float32)))
                if len(broken):
                    where = output_position(tuple(map(int, broken[0])), n * BLOCK)
                    demand(False, f"{name}: an output is not finite", position=where)
            then = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
            demand(then == kinds, f"{name}: the state changes its type")
            for path, leaf in jax.tree_util.tree_leaves_with_path(state):
                finite = not is_float(leaf) or np.all(np.isfinite(np.asarray(leaf, np.float32)))
                demand(finite, f"{name}: it is not finite", position=f"state {leaf_position(path)}")


def _stream(s: Subject, n: int, *, shifted: bool):
    """Block n of three kinds of row: random, one token repeated for ever, and zeros; shifted: the first along u."""
    rng = np.random.default_rng(100 + n)
    if s.is_model:
        kinds = [rng.integers(0, s.vocab, BLOCK), np.ones(BLOCK), np.zeros(BLOCK)]
        return jnp.asarray(np.stack(kinds), jnp.int32)
    kinds = [
        rng.standard_normal((BLOCK, s.dim)) + (direction(s.dim) if shifted else 0),
        np.ones((BLOCK, 1)) * np.sin(np.arange(s.dim)),
        np.zeros((BLOCK, s.dim)),
    ]
    return jnp.asarray(np.stack(kinds), jnp.bfloat16)
