"""Padding (-1) has no effect; -2 is filler. Operations and caches take padding after a row's tokens, models anywhere.

Mixers and whole models: laws `padding` and `state_carry.padding`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engrax.data.config import check_rows
from engrax.errors import UserError
from engrax.laws import LAWS, Breach, Subject
from engrax.laws.breach import close, close_trees
from engrax.layers import MIXERS, AttentionConfig, HopfieldConfig, MoMConfig
from engrax.layers.common import conv
from engrax.layers.common.segments import first_real_segment, newest
from engrax.models import HMTConfig, LanguageModelConfig, RMTConfig, language_model
from engrax.models.contract import Output, PlainModel, compact, padding_last
from engrax.models.segment_runner import SegmentRunner
from engrax.pallas_kernels import NeuralMemoryState, gated_delta_rule, linear_attention, neural_memory
from engrax.pallas_kernels.common.segments import row_lengths
from engrax.train.objective import score


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
    """9 tokens padded to 12 and 3 padded to 7 fill 12 slots; gradients through the padding after them are finite."""
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


# Models.

ANYWHERE = np.array([[-1, 0, -2, -1, 1, 1], [0, 0, 0, 1, -1, -1], [-1, -1, -1, 3, -2, 3], [-1] * 6, [0] * 6], np.int32)
SMALL = dict(vocab_size=16, dim=8, repeat=1, mlp_hidden=0)
TOKENS = np.random.default_rng(0).integers(0, 16, ANYWHERE.shape).astype(np.int32)


def test_compact_keeps_the_order_of_tokens_and_filler():
    rows = compact(jnp.asarray(ANYWHERE))
    for b, ids in enumerate(ANYWHERE):
        kept = ids != -1
        assert rows.segment_ids[b].tolist() == [*ids[kept], *ids[~kept]]
        assert rows.gather(jnp.asarray(TOKENS))[b].tolist() == [*TOKENS[b, kept], *TOKENS[b, ~kept]]
    hidden = np.random.default_rng(1).standard_normal((2, *ANYWHERE.shape, 3)).astype(np.float32)
    order = np.asarray(rows.order)
    moved = jnp.asarray(np.stack([np.take_along_axis(part, order[..., None], axis=1) for part in hidden]))
    collected = {"token": moved[..., 0], "heads": moved, "mean": jnp.ones((2, 3))}
    out = rows.scatter(Output(moved[0], None, None, collected))
    np.testing.assert_array_equal(out.hidden, hidden[0])
    np.testing.assert_array_equal(out.collected["token"], hidden[..., 0])
    np.testing.assert_array_equal(out.collected["heads"], hidden)
    np.testing.assert_array_equal(out.collected["mean"], np.ones((2, 3)))
    grad = jax.grad(lambda h: jnp.sum(rows.scatter(Output(h, None, None, {})).hidden * hidden[0]))(
        jnp.zeros_like(moved[0])
    )
    np.testing.assert_array_equal(grad, moved[0])


def test_compact_adds_nothing_where_nothing_can_move():
    """Without ids, in a call of one token and in the rows of a training, a program has no sort."""
    model = LanguageModelConfig(mixers=(MIXERS["gated_convolution"].examples()[0],), **SMALL).build(rngs=nnx.Rngs(0))

    def sorts(tokens, ids, call=lambda t, i: model(t, segment_ids=i)):
        return "sort[" in str(jax.make_jaxpr(call)(tokens, ids))

    assert sorts(TOKENS, ANYWHERE)
    assert not sorts(TOKENS, None) and not sorts(TOKENS[:, :1], ANYWHERE[:, :1])
    batch = lambda t, i: score(model, {"tokens": t, "targets": t, "segment_ids": i}).nats  # noqa: E731
    assert not sorts(TOKENS, ANYWHERE, batch)

    def wrapped(tokens, ids):  # a model around another one with its own ids: the claim is not about them
        with padding_last(ids):
            return model(tokens, segment_ids=jnp.roll(ids, 1, axis=1))

    assert sorts(TOKENS, ANYWHERE, wrapped)


def test_training_rows_give_the_same_with_and_without_the_claim():
    model = LanguageModelConfig(mixers=(MIXERS["gated_convolution"].examples()[0],), **SMALL).build(rngs=nnx.Rngs(0))
    ids = jnp.array([[0, 0, 1, 1, -1, -1], [0, -2, -2, 1, 1, -1], [-2, 0, 0, 0, 0, 0], [-1] * 6, [3] * 6], jnp.int32)
    check_rows(np.asarray(ids))
    wanted = model(jnp.asarray(TOKENS), segment_ids=ids)
    with padding_last(ids):
        found = model(jnp.asarray(TOKENS), segment_ids=ids)
    kept = np.asarray(ids) >= 0
    close(np.asarray(found.hidden)[kept], np.asarray(wanted.hidden)[kept], "outputs", 1e-5)


def test_a_data_set_that_pads_before_a_token_is_refused():
    """Tokenizers pad on the left (huggingface/transformers#18478); the training program does not check for it."""
    check_rows(np.array([[-2, 0, 0, -2, 1, -1], [-1] * 6], np.int32))
    for ids in ([0, -1, 0], [-1, 0, 0], [0, -1, -2]):
        with pytest.raises(UserError, match=f"row 1 .* position {ids.index(-1)} and {ids[ids.index(-1) + 1]} after"):
            check_rows(np.array([[0, 0, -1], ids], np.int32))


class Summing(nnx.Module):
    """A user's module that is no Model: hidden states are sums over the row; the memory, the sum and the newest token.
    It takes padding only after a row's tokens, as a mixer does."""

    def __call__(self, tokens, memory=None, *, segment_ids=None):
        total, newest_token = (jnp.zeros(len(tokens)),) * 2 if memory is None else memory
        real = jnp.ones(tokens.shape, bool) if segment_ids is None else segment_ids >= 0
        values = jnp.where(real, tokens, 0) * jnp.arange(1.0, 1 + tokens.shape[1])
        sums = total[:, None] + jnp.cumsum(values, axis=1)
        last = jnp.sum(real, axis=1)
        newest_token = jnp.where(last > 0, tokens[jnp.arange(len(tokens)), last - 1], newest_token)
        return sums[..., None], (sums[:, -1], newest_token)


def test_a_plain_module_sees_padding_only_after_the_tokens():
    where = np.array([[1, 4, 5], [0, 1, 2], [2, 3, 5]])
    ids, tokens = np.full((3, 6), -1, np.int32), np.full((3, 6), 9, np.int32)
    call = jax.jit(lambda tokens, ids=None: PlainModel(Summing())(tokens, segment_ids=ids))
    np.put_along_axis(ids, where, 0, axis=1)
    np.put_along_axis(tokens, where, TOKENS[:3, :3], axis=1)
    wanted, found = call(TOKENS[:3, :3]), call(tokens, ids)
    np.testing.assert_array_equal(np.take_along_axis(np.asarray(found.hidden)[..., 0], where, 1), wanted.hidden[..., 0])
    jax.tree.map(np.testing.assert_array_equal, found.memory, wanted.memory)


@pytest.mark.deep
@pytest.mark.parametrize("kind", [LanguageModelConfig, RMTConfig])
def test_auxiliary_losses_do_not_count_padding(kind):
    """A router's loss per token of a row does not depend on the row's padding, also in segments."""
    model = LanguageModelConfig(mixers=(MoMConfig.examples()[0],), **SMALL)
    if kind is RMTConfig:
        model = RMTConfig(backbone=model, segment_length=4, memory_tokens=1)
    model = model.build(rngs=nnx.Rngs(0))
    run = jax.jit(lambda tokens, ids: model(tokens, segment_ids=ids).aux_loss)
    tokens = np.random.default_rng(3).integers(0, 16, (2, 8)).astype(np.int32)
    ids = np.zeros((2, 16), np.int32)
    ids[0, 8:], ids[1, :8] = -1, -1
    wanted = run(tokens, np.zeros((2, 8), np.int32))
    padded = np.stack([np.concatenate([tokens[0], tokens[1]]), np.concatenate([tokens[0], tokens[1]])])
    assert np.all(wanted > 0)
    np.testing.assert_allclose(run(padded, ids), wanted, rtol=1e-5)


def hmt(**fields) -> HMTConfig:
    backbone = LanguageModelConfig(mixers=(AttentionConfig(heads=1, head_dim=4),), **SMALL)
    sizes = dict(segment_length=4, summary_tokens=2, sensory_tokens=1, cache_size=4, recall_width=4)
    return HMTConfig(backbone=backbone, **(sizes | fields))


@pytest.mark.parametrize("mode", ["previous_segment", pytest.param("delayed_prefix", marks=pytest.mark.long)])
def test_rows_end_at_any_place_of_a_segment(mode, x64):
    """Rows of 0 to 8 tokens in two segments of 4, then 3 tokens more: the memory and the outputs are those of rows that
    read their tokens one by one."""
    model = hmt(mode=mode).build(rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 16, (9, 11)).astype(np.int32)
    lengths = np.arange(9)
    ids = np.where(np.arange(8) < lengths[:, None], 0, -1).astype(np.int32)
    run = jax.jit(lambda tokens, memory, ids: model(tokens, memory, segment_ids=ids)[:2])
    _, memory = run(tokens[:, :8], None, ids)
    assert memory.offset.tolist() == [n % 4 for n in lengths]
    assert memory.memory.count.tolist() == [n // 4 for n in lengths]

    @jax.jit
    def step(tokens, memory, reads):
        out = model(tokens, memory)
        axes = model.memory_axes(out.memory)

        def pick(axis, old, new):
            return jnp.where(reads.reshape([-1 if i == axis else 1 for i in range(new.ndim)]), new, old)

        return out.hidden, jax.tree.map(pick, axes, memory, out.memory)

    def next_tokens(t):
        return np.take_along_axis(tokens, np.maximum(t - 8 + lengths, 0)[:, None], axis=1)

    alone = jax.tree.map(jnp.asarray, model.init_memory(9))
    for t in range(8):  # row n begins at step 8 - n
        _, alone = step(next_tokens(t), alone, t >= 8 - lengths)
    close_trees(memory, alone, "the memory of rows that end anywhere", 1e-9)
    for t in range(8, 11):
        found, memory = run(next_tokens(t), memory, np.zeros((9, 1), np.int32))
        wanted, alone = step(next_tokens(t), alone, lengths >= 0)
        close(found, wanted, f"token {t - 8} after them", 1e-9)


def test_recall_of_padded_rows_is_reported_for_their_whole_segments():
    """A row of one segment and a half has one whole segment: it recalls nothing, and the other row's recall is kept."""
    model = hmt().build(rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 16, (2, 16)).astype(np.int32)
    ids = np.where(np.arange(16) < np.array([[6], [16]]), 0, -1).astype(np.int32)
    run = jax.jit(lambda tokens, ids: model(tokens, segment_ids=ids, collect=("hmt",)).collected["hmt.recall"])
    np.testing.assert_allclose(run(tokens, ids), run(tokens[1:], ids[1:]), atol=1e-6)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param("moved nowhere", marks=pytest.mark.deep),
        pytest.param("counted", marks=pytest.mark.deep),
        pytest.param("kept by no row", marks=pytest.mark.long),
    ],
)
def test_a_model_that_counts_padding_is_noticed(fault, x64, monkeypatch):
    """When nothing moves padding, when segments count it, or when a row's segment ends with the call."""
    config = hmt()
    if fault == "moved nowhere":
        config = LanguageModelConfig(mixers=(MIXERS["gated_convolution"].examples()[0],), **SMALL)
        monkeypatch.setattr(language_model, "compact", lambda ids: compact(None)._replace(segment_ids=ids))
    elif fault == "counted":
        monkeypatch.setattr(SegmentRunner, "count", lambda self, ids: jnp.full(len(ids), ids.shape[1], jnp.int32))
    else:
        monkeypatch.setattr(SegmentRunner, "with_incomplete", lambda self, complete, state, tokens, ids: state)
    with pytest.raises(Breach):
        LAWS["padding.nothing"](Subject(config, thorough=False), False)
