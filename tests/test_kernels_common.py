"""What the operations share: validation, split sums of log decay, products, segments, meshes."""

import logging
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engrax.pallas_kernels import debug_checks, linear_attention
from engrax.pallas_kernels.common import validation
from engrax.pallas_kernels.common.decay import Decay, channel_scores, chunk_decay, cumulative_decay, difference
from engrax.pallas_kernels.common.matmul import COLUMNS, ROWS, EmulatedPrecision, dot, emulated_on_cpu
from engrax.pallas_kernels.common.segments import aligned_layout, from_slots, segment_starts, to_slots


def test_debug_mode_reports_positive_gates(caplog):
    q, g = np.zeros((1, 3, 1, 4), np.float32), np.zeros((1, 3, 1), np.float32)
    g[0, 1] = 0.5
    try:
        with caplog.at_level(logging.WARNING, logger="engrax"):
            jax.block_until_ready(linear_attention(q, q, q, g=g))
            assert not caplog.messages  # off: nothing is looked at
            debug_checks(True)
            jax.block_until_ready(jax.jit(lambda g: linear_attention(q, q, q, g=g))(-jnp.abs(g)))
            jax.effects_barrier()
            assert not caplog.messages
            jax.block_until_ready(jax.jit(lambda g: linear_attention(q, q, q, g=g))(g))
            jax.effects_barrier()
            assert caplog.messages == ["1 values of g are positive (largest 0.5): a log-decay gate must be <= 0."]
    finally:
        debug_checks(False)


def test_checks_name_what_is_wrong():
    with pytest.raises(ValueError, match="x must be an array of shape .B., got list"):
        validation.check_array("x", [1.0], "[B]", (1,))
    with pytest.raises(ValueError, match="unknown colour 'gren'; did you mean 'green'"):
        validation.check_option("colour", "gren", ("red", "green"))
    for bad in (0, True, 1.0, "3"):
        with pytest.raises(ValueError, match="wanted an integer of at least 1"):
            validation.check_positive_int("n", bad)


GATES = np.random.default_rng(0).choice([0.0, -1e-4, -0.3, -50.0, -np.inf], p=[0.1, 0.5, 0.3, 0.07, 0.03], size=(64, 5))


def exact_products(g):
    """exp of the sums of the gates between two tokens, summed one by one in float64."""
    wanted = np.zeros((*g.shape[:1], *g.shape))
    for i in range(g.shape[0]):
        for j in range(i + 1):
            wanted[i, j] = np.exp(g[j + 1 : i + 1].astype(np.float64).sum(axis=0))
    return wanted


def test_split_sums_lose_nothing():
    """In float32, with gates of -50, -1e-4 and -inf side by side: as accurate as adding gate by gate."""
    g = GATES.astype(np.float32)
    decay = cumulative_decay(jnp.asarray(g), 0)
    assert decay.lo.dtype == jnp.float32 and np.abs(decay.lo).max() < 0.3
    distance = difference(jax.tree.map(lambda x: x[:, None], decay), jax.tree.map(lambda x: x[None], decay))
    lower = np.tril(np.ones((64, 64), bool))[..., None]
    error = np.abs(np.where(lower, np.exp(np.minimum(distance, 0)) - exact_products(g), 0)).max()
    assert error < 1e-7  # a plain cumulative sum errs by 1e-4 here, without the -inf
    gone = lower & (exact_products(g) == 0)
    assert gone.any() and np.all(np.exp(np.minimum(distance, 0))[gone] == 0)  # exactly


def test_decay_has_the_gradient_of_a_cumulative_sum():
    g = jnp.asarray(np.where(np.isinf(GATES), -np.inf, GATES), jnp.float32)[None]
    pull = jax.vjp(lambda g: chunk_decay(g, 16), g)[1]
    bar = jnp.asarray(np.random.default_rng(1).normal(size=g.shape), jnp.float32)
    (got,) = pull(Decay(jnp.full_like(bar, 7.0), bar))
    later = np.cumsum(np.asarray(bar).reshape(1, 4, 16, 5)[:, :, ::-1], axis=2)[:, :, ::-1].reshape(g.shape)
    np.testing.assert_allclose(got, np.where(np.isinf(g), 0, later), rtol=1e-5, atol=1e-5)


def test_sums_of_segments_let_no_rounding_of_a_gradient_pass(x64):
    """Sums that start again at every boundary give the same products, and gradients that are 0 beyond it, exactly."""
    g = jnp.asarray(GATES)
    decay = cumulative_decay(g, 0, segments=True)
    distance = difference(jax.tree.map(lambda x: x[:, None], decay), jax.tree.map(lambda x: x[None], decay))
    lower = np.tril(np.ones((64, 64), bool))[..., None]
    np.testing.assert_allclose(np.where(lower, np.exp(np.minimum(distance, 0)), 0), exact_products(GATES), atol=1e-12)
    segment, bar = jnp.cumsum(jnp.isinf(g), axis=0), jnp.asarray(np.random.default_rng(1).normal(size=g.shape))
    for last in range(int(segment.max()) + 1):
        own = segment == last
        total = lambda g, own=own: jnp.sum(jnp.where(own, bar * cumulative_decay(g, 0, segments=True).lo, 0))  # noqa: E731
        grad = jax.grad(total)(g)
        assert not np.any(np.where(own, 0, grad)), "a gradient passes a boundary"


@pytest.mark.parametrize("tokens", [1, 2, 5, 16, 24, 64])
def test_channel_scores(tokens, x64):
    rng = np.random.default_rng(tokens)
    q, p, k = (rng.normal(size=(tokens, 5)) for _ in range(3))
    g = GATES[:tokens]
    scores = jax.jit(lambda q, p, k, g: channel_scores((q, p), k, cumulative_decay(g, 0), jnp.float64))(q, p, k, g)
    for x, got in zip((q, p), scores, strict=True):
        wanted = np.einsum("ic,jc,ijc->ij", x, k, exact_products(g))
        np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)


def test_products_round_their_operands_and_those_of_the_derivative():
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((5, 3), (7, 5)))
    bar = jnp.asarray(rng.normal(size=(3, 7)), jnp.float32)
    assert emulated_on_cpu(jnp.float32) == jnp.float32 and emulated_on_cpu(jnp.bfloat16) == EmulatedPrecision(
        jnp.bfloat16
    )
    got, pull = jax.vjp(lambda a, b: dot(a, b, ROWS, COLUMNS, emulated_on_cpu(jnp.bfloat16)), a, b)
    a16, b16, bar16 = (np.asarray(x.astype(jnp.bfloat16), np.float32) for x in (a, b, bar))
    np.testing.assert_allclose(got, a16.T @ b16.T, rtol=1e-6, atol=1e-6)
    assert not np.allclose(got, a.T @ b.T, rtol=1e-6, atol=1e-6)
    a_bar, b_bar = pull(bar)
    np.testing.assert_allclose(a_bar, b16.T @ bar16.T, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(b_bar, bar16.T @ a16.T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axis_a", [ROWS, COLUMNS])
@pytest.mark.parametrize("axis_b", [ROWS, COLUMNS])
def test_products_along_any_axis(axis_a, axis_b, x64):
    rng = np.random.default_rng(0)
    a, b = jnp.asarray(rng.normal(size=(4, 4))), jnp.asarray(rng.normal(size=(4, 4)))
    left, right = (a.T if axis_a == ROWS else a), (b if axis_b == ROWS else b.T)
    got, pull = jax.vjp(lambda a, b: dot(a, b, axis_a, axis_b, jnp.float64), a, b)
    wanted, plain = jax.vjp(lambda a, b: (a.T if axis_a == ROWS else a) @ (b if axis_b == ROWS else b.T), a, b)
    np.testing.assert_allclose(got, left @ right, rtol=1e-12)
    for x, y in zip(pull(a), plain(a)):
        np.testing.assert_allclose(x, y, rtol=1e-12)


IDS = np.array([[-1, 0, 0, 0, 2, 2, -1, 3, 3, 3, 3, 3], [1] * 12, [-1] * 12, [0, 1, 2, 3] + [-1] * 8], np.int32)


def test_segment_starts():
    wanted = np.zeros_like(IDS, bool)
    wanted[0, [4, 7]] = wanted[3, 1:4] = True
    assert np.array_equal(segment_starts(jnp.asarray(IDS)), wanted)


def segment_firsts(ids):
    return {int(np.nonzero(ids == segment)[0][0]) for segment in set(ids[ids >= 0])}


def test_segments_begin_at_chunk_boundaries():
    layout = aligned_layout(jnp.asarray(IDS), 4, 4)
    token = np.asarray(layout.token).reshape(4, -1, 4)
    assert token.shape[1] == (12 + 4 * 3) // 4
    for row in range(4):
        for segment in range(4):
            mine = np.nonzero(IDS[row] == segment)[0]
            chunks = token[row, np.asarray(layout.segment)[row] == segment]
            assert chunks[chunks < 12].tolist() == mine.tolist()  # in order, none lost
            assert len(mine) == 0 or chunks[0, 0] == mine[0]
            assert bool(layout.has_tokens[row, segment]) == (len(mine) > 0)
            if len(mine):
                assert mine[-1] in token[row, layout.last_chunk[row, segment]]
        begins = [n for n, chunk in enumerate(token[row]) if chunk[0] in segment_firsts(IDS[row])]
        assert np.nonzero(layout.first[row])[0].tolist() == begins
    x = jnp.arange(48.0).reshape(4, 12, 1) + 1
    np.testing.assert_array_equal(from_slots(to_slots(x, layout), layout), np.where(IDS[..., None] >= 0, x, 0))
    y = jnp.asarray(np.random.default_rng(0).normal(size=(4, 24, 1)), jnp.float32)
    (pulled,) = jax.vjp(lambda x: to_slots(x, layout), x)[1](y)
    np.testing.assert_array_equal(pulled, from_slots(y, layout))


MESH_PROGRAM = """
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, PartitionSpec as P
    from engrax.pallas_kernels.common.partition import shard_over_batch_and_heads
    seen = []
    def kernel(tokens, state):
        seen.append((tokens[0].shape, tokens[1], state.shape, jax.sharding.get_abstract_mesh().manual_axes))
        return tokens[0] * 2 + state[:, None], state.sum(2)
    def call(tokens, state):
        return shard_over_batch_and_heads(kernel, (("BTHK", None), "BHK"), ("BTHK", "BH"))(tokens, state)
    x, state = jnp.arange(4 * 3 * 2 * 5.0).reshape(4, 3, 2, 5), jnp.ones((4, 2, 5))
    wanted = call((x, None), state)
    assert seen.pop()[0] == (4, 3, 2, 5)
    auto = (AxisType.Auto,)
    for shape, names, local in (
        ((2, 2, 2), ("data", "fsdp", "tensor"), (1, 3, 1, 5)),
        ((4, 2), ("data", "sequence"), (1, 3, 2, 5)),
        ((8,), ("other",), (4, 3, 2, 5)),
    ):
        with jax.set_mesh(jax.make_mesh(shape, names, axis_types=auto * len(shape))):
            got = jax.jit(call)((x, None), state)
            jax.tree.map(np.testing.assert_array_equal, got, wanted)
            shape_seen, _, _, manual = seen.pop()
            assert shape_seen == local, shape_seen
            assert set(manual) == set(names), manual  # none is left to the partitioner
            text = jax.jit(call).lower((x, None), state).compile().as_text()
    with jax.set_mesh(jax.make_mesh((2, 4), ("data", "tensor"), axis_types=auto * 2)):
        try:
            jax.jit(call)((x, None), state)
        except ValueError as error:
            assert str(error) == "2 heads do not divide over the 4 devices of mesh axes tensor.", error
        else:
            raise AssertionError("sizes that do not divide were accepted")
        seen.clear()
        inner = jax.shard_map(lambda x, s: call((x, None), s), in_specs=(P("data"), P("data")),
                              out_specs=(P("data"), P("data")), axis_names={"data", "tensor"}, check_vma=False)
        jax.tree.map(np.testing.assert_array_equal, jax.jit(inner)(x, state), wanted)
        assert seen.pop()[0] == (2, 3, 2, 5)  # manual already: left alone
    print("all meshes agree")
"""


def test_kernels_run_on_their_own_rows_and_heads(run_python):
    assert "all meshes agree" in run_python(textwrap.dedent(MESH_PROGRAM), devices=8)
