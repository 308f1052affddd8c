"""Padding (-1) after a row's last token of a call is nothing, in operations and caches; -2 is filler. Mixers: law 9."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engrax.laws import LAWS, Breach, Subject
from engrax.laws.breach import close, close_trees
from engrax.layers import MIXERS, AttentionConfig, HopfieldConfig
from engrax.layers.common import conv
from engrax.layers.common.segments import first_real_segment, newest
from engrax.pallas_kernels import NeuralMemoryState, gated_delta_rule, linear_attention, neural_memory
from engrax.pallas_kernels.common.segments import row_lengths


def test_lengths_count_filler_and_no_padding():
    ids = jnp.array(
        [[0, -2, 3, -1, -1], [-1] * 5, [-2, -2, -1, -1, -1], [0, 0, -2, 1, -2], [-1, 0, -1, 0, -1]], jnp.int32
    )
    assert row_lengths(ids).tolist() == [3, 0, 2, 5, 4]
    assert first_real_segment(ids).tolist() == [0, -1, -1, 0, 0]
    joined = jnp.concatenate([jnp.array([[7, 8]] * 5), jnp.arange(5)[None] + jnp.zeros((5, 1), jnp.int32)], axis=1)
    assert newest(joined, 2, row_lengths(ids)).tolist() == [[1, 2], [7, 8], [0, 1], [3, 4], [2, 3]]
    assert newest(joined, 2, None).tolist() == [[3, 4]] * 5


@pytest.mark.parametrize("kind", [AttentionConfig, HopfieldConfig])
def test_padding_takes_no_slot_of_a_full_cache(kind, x64):
    """9 tokens padded to 12 and 3 padded to 7 fill 12 slots; gradients through the padding behind them are finite."""
    module = kind(heads=2, head_dim=4, capacity=12).build(16, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (1, 12, 16), jnp.float64)
    wanted, state = jax.jit(module)(x)

    @jax.jit
    def run(x):
        a, b = jnp.pad(x[:, :9], ((0, 0), (0, 3), (0, 0))), jnp.pad(x[:, 9:], ((0, 0), (0, 4), (0, 0)))
        first, between = module(a, None, jnp.array([[0] * 9 + [-1] * 3], jnp.int32))
        second, after = module(b, between, jnp.array([[0] * 3 + [-1] * 4], jnp.int32))
        return jnp.concatenate([first[:, :9], second[:, :3]], axis=1), after

    found, after = run(x)
    close(found, wanted, "outputs", 1e-12)
    close_trees(after, state, "the state", 1e-12)
    assert np.all(np.isfinite(jax.jit(jax.grad(lambda x: jnp.sum(run(x)[0] ** 2)))(x)))


def test_a_tail_that_ends_with_the_call_is_noticed(x64, monkeypatch):
    """When a convolution's tail ends with the call, not with the row's last token, then law 9 is broken."""
    monkeypatch.setattr(conv, "row_lengths", lambda ids: jnp.full(len(ids), ids.shape[1], jnp.int32))
    with pytest.raises(Breach):
        LAWS["padding.nothing"](Subject(MIXERS["gated_convolution"].examples()[0], thorough=False), False)


def operation(name, rng, length):
    """(function of tokens, state and ids -> (out, state), tokens, first state) for three rows."""
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape))  # noqa: E731
    tokens = {key: normal(3, length, 2, 4) for key in "qkv"}
    if name == "neural_memory":
        tokens |= {key: jnp.asarray(rng.random((3, length, 2))) for key in ("lr", "momentum", "forget")}
        tokens["lr"] *= 0.1
        weights = (normal(2, 4, 4),)
        reset = (weights, (jnp.zeros((2, 4, 4)),))
        call = functools.partial(neural_memory, reset=reset, chunk_size=4)
        return (
            lambda t, s, ids, how: call(**t, state=s, segment_ids=ids, implementation=how),
            tokens,
            (NeuralMemoryState.start(weights, 3)),
        )
    tokens["g"] = -jnp.asarray(rng.random((3, length, 2)))
    if name == "gated_delta_rule":
        tokens["beta"] = jnp.asarray(rng.random((3, length, 2)))
    op = {"gated_delta_rule": gated_delta_rule, "linear_attention": linear_attention}[name]

    def call(t, s, ids, how):
        return op(**t, initial_state=s, segment_ids=ids, chunk_size=4, implementation=how)

    return call, tokens, normal(3, 2, 4, 4)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("name", ["linear_attention", "gated_delta_rule", "neural_memory"])
def test_operations_leave_padding_out(name, implementation, x64):
    """Two calls of 13 places, padded by different amounts, against the same tokens and filler one after another."""
    ids = np.full((2, 3, 13), -1, np.int32)
    ids[0, 0, :9], ids[0, 1, :8] = 0, [0, 0, -2, -2, 1, 1, 1, 1]  # 9: into a chunk; 8: up to its end; 0
    ids[1, 0, :4], ids[1, 1, :13], ids[1, 2, :6] = [0, 0, -2, 3], 1, 5
    call, tokens, start = operation(name, np.random.default_rng(0), 26)
    step = jax.jit(lambda t, s, ids: call(t, s, ids, implementation))
    halves = [jax.tree.map(lambda x, k=k: x[:, 13 * k : 13 * k + 13], tokens) for k in range(2)]
    first, state = step(halves[0], start, ids[0])
    state = state._replace(phase=jnp.asarray(state.phase)) if name == "neural_memory" else state
    second, state = step(halves[1], state, ids[1])
    found = np.concatenate([first, second], axis=1)
    flat = ids.transpose(1, 0, 2).reshape(3, 26)
    assert np.all(found[flat < 0] == 0)
    for row in range(3):
        kept = flat[row] != -1
        alone = jax.tree.map(lambda x, row=row, kept=kept: x[row : row + 1, kept], tokens)
        begin = jax.tree.map(lambda x, row=row: x[row : row + 1], start)
        out, after = call(alone, begin, flat[None, row, kept], implementation)
        close(found[row, kept], out[0], f"outputs of row {row}", 1e-12)
        close_trees(jax.tree.map(lambda x, row=row: x[row : row + 1], state), after, f"the state of row {row}", 1e-12)
