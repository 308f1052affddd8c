"""Decoding of the neural memory with waiting writes: exact, in place, and with little memory traffic."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engrax.laws.breach import close, close_trees
from engrax.pallas_kernels import NeuralMemoryState, neural_memory
from engrax.pallas_kernels.neural_memory import decode

ROWS, HEADS, WIDTHS = 3, 2, (4, 6, 4)


def problem(length, widths=WIDTHS):
    rng = np.random.default_rng(0)
    tokens = {name: jnp.asarray(rng.standard_normal((ROWS, length, HEADS, widths[0]))) for name in "qkv"}
    tokens |= {name: jnp.asarray(rng.random((ROWS, length, HEADS))) for name in ("lr", "momentum", "forget")}
    tokens["lr"] = 0.02 * tokens["lr"]
    tokens["momentum"] = tokens["momentum"].at[:, 3].set(0).at[:, 5].set(1)  # exact gates
    tokens["forget"] = (0.3 * tokens["forget"]).at[:, 4].set(0).at[:, 6].set(1)
    weights = tuple(jnp.asarray(0.3 * rng.standard_normal((HEADS, i, o))) for i, o in zip(widths, widths[1:]))
    return tokens, NeuralMemoryState.start(weights, ROWS)


def part(tokens, start, stop):
    return {name: x[:, start:stop] for name, x in tokens.items()}


@pytest.mark.parametrize(
    ("chunk_size", "widths"),
    [
        (24, WIDTHS),
        pytest.param(1, (4, 4), marks=pytest.mark.deep),
        pytest.param(5, WIDTHS, marks=pytest.mark.deep),
        pytest.param(7, (4, 6, 5, 4), marks=pytest.mark.long),
    ],
)
def test_single_tokens_equal_chunks(chunk_size, widths, x64):
    """Rows that begin at different phases, each with padding in the middle, against one call per row."""
    length, prefix = 40, (0, 3, 3)
    tokens, start = problem(length, widths)
    call = functools.partial(neural_memory, chunk_size=chunk_size)
    states = [
        call(**jax.tree.map(lambda x, i=i: x[i : i + 1], part(tokens, 0, n)), state=_row(start, i))[1]
        if n
        else _row(start, i)
        for i, n in enumerate(prefix)
    ]
    state = jax.tree.map(lambda *rows: jnp.concatenate(rows), *states)
    memory = decode.open_memory(state, chunk_size)
    step = jax.jit(functools.partial(decode.decode, chunk_size=chunk_size))
    found, at = np.zeros((ROWS, length, HEADS, widths[-1])), np.array(prefix)
    for turn in range(length + 6):
        real = (at < length) & ~((turn >= 9) & (turn < 12) & (np.arange(ROWS) == 1))
        one = {name: x[np.arange(ROWS), np.minimum(at, length - 1)][:, None] for name, x in tokens.items()}
        one |= {name: jnp.where(real[:, None, None, None], one[name], jnp.nan) for name in "qkv"}
        out, memory = step(**one, memory=memory, segment_ids=jnp.where(real, 0, -1)[:, None])
        assert np.all(np.asarray(out)[~real] == 0)
        found[np.arange(ROWS)[real], at[real]] = np.asarray(out)[real, 0]
        at = at + real
    assert at.tolist() == [length] * ROWS
    wanted, after = call(**tokens, state=start)
    for i, n in enumerate(prefix):
        close(found[i, n:], wanted[i, n:], f"reads of row {i}", 1e-12)
    closed = decode.close_memory(memory)
    if length % chunk_size == 0:  # at phase 0 the anchor is ignored
        closed, after = (state._replace(anchor=()) for state in (closed, after))
    close_trees(closed, after, "the state", 1e-12)


def _row(state, i):
    return jax.tree.map(lambda x: jnp.asarray(x)[i : i + 1], state)


def test_a_token_moves_little_and_copies_no_matrix():
    """At most 1.3 times the bytes of reading and writing weights and momentum once, with the settled writes."""
    rows, shapes = 64, ((1, 64, 256), (1, 256, 64))
    memory = decode.open_memory(NeuralMemoryState.start(tuple(map(jnp.zeros, shapes)), rows), 16)
    qkv, gate = jnp.zeros((rows, 1, 1, 64)), jnp.zeros((rows, 1, 1))

    def step(memory):
        return decode.decode(qkv, qkv, qkv, lr=gate, momentum=gate, forget=gate, memory=memory, chunk_size=16)

    compiled = jax.jit(step, donate_argnums=0).lower(memory).compile()
    unit = 4 * sum(leaf.nbytes for leaf in memory.weights)
    assert compiled.cost_analysis()["bytes accessed"] <= 1.3 * unit
    text = compiled.as_text()
    assert not re.findall(r"f32\[64,1,(?:64,256|256,64)\]\S* copy\(", text)
    assert len(re.findall(r"f32\[64,1,(?:64,256|256,64)\]\S* parameter\(", text)) >= 6, "the matrices' shapes are those"
