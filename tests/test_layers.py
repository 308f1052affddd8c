"""The layers one by one: convolution, segments, attention and Titans against their definitions written plainly."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engrax.errors import UserError
from engrax.layers import MIXERS, AttentionConfig, HopfieldConfig, TitansConfig
from engrax.layers.attention import attention
from engrax.layers.attention.rope import rotate
from engrax.layers.common.conv import ShortConv
from engrax.layers.common.modules import l2_normalise, projection
from engrax.layers.common.segments import first_real_segment, last_segment_after, select_rows, starts_anew
from engrax.layers.test_time.mixer import MemoryConfig
from engrax.pallas_kernels import NeuralMemoryState, neural_memory
from engrax.tests.modules import compiled, graph, outputs, parameters

IDS = jnp.array([[0, 0, 0, 2, 2, -1, -1], [-1, -1, 3, 3, -1, 3, 4], [-1] * 7], jnp.int32)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def built(config, dim=8):
    """The config's module with float64 parameters."""
    return nnx.merge(graph(config, dim), jax.tree.map(lambda p: p.astype(jnp.float64), parameters(config, dim)))


# --- segments --------------------------------------------------------------------------------------------------------


def test_segment_helpers():
    assert first_real_segment(IDS).tolist() == [0, 3, -1]
    last = jnp.array([-1, 3, 5], jnp.int32)
    assert last_segment_after(last, IDS).tolist() == [2, 4, 5]
    assert starts_anew(last, IDS).tolist() == [False, False, False]  # nothing before; the same; no real token
    assert starts_anew(jnp.array([1, 2, 0], jnp.int32), IDS).tolist() == [True, True, False]
    rows = select_rows(jnp.array([True, False]), {"a": jnp.ones((2, 3))}, {"a": jnp.zeros((2, 3))})
    assert rows["a"].tolist() == [[1, 1, 1], [0, 0, 0]]


# --- convolution -----------------------------------------------------------------------------------------------------


def plain_conv(x, kernel, ids):
    """sum over taps j of kernel[j] x[t - j], where x[t - j] is a real token of the same segment."""
    y = np.zeros_like(x)
    for b, t in np.ndindex(x.shape[:2]):
        for j in range(min(len(kernel), t + 1)):
            if ids[b, t] >= 0 and ids[b, t - j] == ids[b, t]:
                y[b, t] += kernel[j] * x[b, t - j]
    return y


@pytest.mark.parametrize("width", [1, 2, 4, 9])
def test_convolution_is_its_definition_and_continues_anywhere(width, x64, rng):
    conv = ShortConv(3, width, rngs=nnx.Rngs(0))
    conv.kernel[...] = jnp.asarray(rng.standard_normal((width, 3)))
    x = jnp.asarray(rng.standard_normal((3, 7, 3)))
    tail = conv.init_tail(3, jnp.float64)
    wanted = plain_conv(np.asarray(x), np.asarray(conv.kernel[...]), np.zeros((3, 7)))
    np.testing.assert_allclose(conv(x, tail)[0], wanted, atol=1e-14)
    packed, _ = conv(x, tail, IDS)
    wanted = plain_conv(np.asarray(x), np.asarray(conv.kernel[...]), np.asarray(IDS))
    real = np.asarray(IDS) >= 0
    np.testing.assert_allclose(np.asarray(packed)[real], wanted[real], atol=1e-14)
    for a in range(1, 7):
        first, middle = conv(x[:, :a], tail)
        np.testing.assert_allclose(
            jnp.concatenate([first, conv(x[:, a:], middle)[0]], axis=1), conv(x, tail)[0], atol=1e-14
        )
        assert middle.shape == tail.shape


# --- attention -------------------------------------------------------------------------------------------------------


def plain_attention(module, x, ids, window):
    """Softmax attention, one query at a time, in NumPy; positions by complex rotation."""
    c = module.config
    q, k, v = (
        np.asarray(x @ p.kernel[...]).reshape(*x.shape[:2], -1, c.head_dim) for p in (module.q, module.k, module.v)
    )
    half = c.head_dim // 2
    turn = np.exp(1j * np.arange(x.shape[1])[:, None, None] * c.rope_base ** (-np.arange(half) / half))
    q, k = ((y[..., :half] + 1j * y[..., half:]) * turn for y in (q, k))
    y = np.zeros((*x.shape[:2], c.heads, c.head_dim))
    for b, t, h in np.ndindex(y.shape[:3]):
        group = h // (c.heads // k.shape[2])
        seen = [s for s in range(max(0, t - (window or t + 1) + 1), t + 1) if ids[b, s] == ids[b, t]]
        logits = np.array([(q[b, t, h] * k[b, s, group].conj()).real.sum() for s in seen]) / c.head_dim**0.5
        weights = np.exp(logits - logits.max())
        y[b, t, h] = (weights / weights.sum()) @ np.stack([v[b, s, group] for s in seen])
    y[np.asarray(ids) < 0] = 0
    return y.reshape(*x.shape[:2], -1) @ np.asarray(module.out.kernel[...])


@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize("dtype, tolerance", [(jnp.float64, 1e-12), (jnp.float32, 2e-5)])
def test_attention_is_its_definition(window, dtype, tolerance, x64, rng):
    module = built(AttentionConfig(heads=4, kv_heads=2, head_dim=4, window=window, capacity=16))
    x = jnp.asarray(rng.standard_normal((3, 7, 8)))
    wanted = plain_attention(module, x, IDS, window)
    graphdef, params = nnx.split(module, nnx.Param)
    module = nnx.merge(graphdef, jax.tree.map(lambda p: p.astype(dtype), params))
    np.testing.assert_allclose(module(x.astype(dtype), None, IDS)[0], wanted, atol=tolerance)


@pytest.mark.parametrize(
    "length, config",
    [
        pytest.param(
            100,
            AttentionConfig(heads=4, kv_heads=2, head_dim=4, window=8, conv_width=2, persistent_tokens=2),
            marks=pytest.mark.deep,
        ),
        (140, AttentionConfig(heads=2, head_dim=4, window=40)),
        (100, HopfieldConfig(heads=2, head_dim=4, window=32, beta=0.5)),
    ],
)
def test_blocks_of_a_window_change_nothing(length, config, x64, rng, monkeypatch):
    """When a long row under a window is cut into blocks, then values, gradients and state are the uncut row's."""
    module = built(config)
    head, x = (jnp.asarray(rng.normal(size=(2, n, 8))) for n in (config.window + 3, length))
    starts = np.sort(rng.choice(length, (2, 2), replace=False))
    segments = jnp.asarray((np.arange(length) >= starts[:, :1]) * 1 + (np.arange(length) >= starts[:, 1:]) * 1)
    segments = segments.at[0, -5:].set(-1)

    def run(module, x, head):
        def loss(x, head):
            state = module(head)[1]
            ys, after = zip(module(x, state, segments), module(x, None, segments), module(x))
            return sum(jnp.sum(jnp.sin(y)) for y in ys), (ys, after)

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, head)

    blocks = compiled(run)(module, x, head)
    monkeypatch.setattr(attention, "SMALLEST_BLOCK", 1000)
    whole = compiled(run)(module, x, head)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), blocks, whole)


@pytest.mark.parametrize("config", [AttentionConfig, HopfieldConfig])
def test_the_work_of_a_window_grows_with_the_row(config):
    """Its arithmetic and its temporary memory, not with the row's square: 4 times the tokens, 4 times the work."""
    cost = []
    for length in (512, 2048):
        params, x = parameters(config(heads=1, head_dim=8, window=32)), jnp.zeros((1, length, 8))
        call = lambda params, x: nnx.merge(graph(config(heads=1, head_dim=8, window=32)), params)(x)[0]  # noqa: E731
        program = jax.jit(call).lower(params, x).compile()
        cost.append((program.cost_analysis()["flops"], program.memory_analysis().temp_size_in_bytes))
    assert np.all(np.divide(cost[1], cost[0]) < 4.5), cost


def test_window_of_one_token_carries_an_empty_cache(x64, rng):
    module, x = built(AttentionConfig(heads=2, head_dim=4, window=1)), jnp.asarray(rng.standard_normal((2, 5, 8)))
    wanted, state = module(x)
    assert state.keys.shape == (2, 0, 2, 4)
    first, state = module(x[:, :2])
    np.testing.assert_allclose(module(x[:, 2:], state)[0], wanted[:, 2:], atol=1e-14)


def test_rotation_depends_on_distance_alone(x64, rng):
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 2, 6))) for _ in range(2))

    def score(i, j):
        return jnp.sum(rotate(q, jnp.array([[i]]), 100.0) * rotate(k, jnp.array([[j]]), 100.0))

    np.testing.assert_allclose(score(9, 4), score(1005, 1000), rtol=1e-10)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3


def test_a_full_cache_raises_or_gives_nan(rng):
    module = AttentionConfig(heads=2, head_dim=4, capacity=8).build(8, rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.standard_normal((2, 9, 8)), jnp.float32)
    with pytest.raises(ValueError, match="capacity=8"):
        module(x)
    y, state = jax.jit(module.__call__)(x[:, :6])
    y, state = jax.jit(module.__call__)(x[:, :2], state)  # exactly full
    assert np.all(np.isfinite(y))
    state = state._replace(position=jnp.array([8, 3], jnp.int32))  # row 0 is full, row 1 is not
    y, _ = jax.jit(module.__call__)(x[:, :1], state)
    assert np.all(np.isnan(y[0])) and np.all(np.isfinite(y[1]))


# --- Titans ----------------------------------------------------------------------------------------------------------


@pytest.mark.deep
def test_persistent_tokens_are_written_before_every_segment(x64, rng):
    """Reads of a mixer with persistent tokens = reads of one without, after the same tokens in whole chunks."""
    config = TitansConfig(heads=2, head_dim=4, hidden=6, chunk_size=4, persistent_tokens=8, conv_width=1)
    module = built(config)
    x, persistent = jnp.asarray(rng.standard_normal((2, 6, 8))), module.persistent[...]
    params = nnx.state(module, nnx.Param)
    del params["persistent"]
    plain = nnx.merge(graph(dataclasses.replace(config, persistent_tokens=0)), params)
    wanted = outputs(plain, jnp.concatenate([jnp.broadcast_to(persistent, (2, 8, 8)), x], axis=1))
    np.testing.assert_allclose(outputs(module, x), wanted[:, 8:], atol=1e-12)
    two = jnp.broadcast_to(jnp.array([0, 0, 0, 0, 1, 1]), (2, 6)).astype(jnp.int32)
    np.testing.assert_allclose(outputs(module, x, None, two)[:, 4:], outputs(module, x[:, 4:]), atol=1e-12)


def test_padding_reads_zero(x64, rng):
    for config in (
        TitansConfig(heads=2, head_dim=4, chunk_size=4, persistent_tokens=2),
        AttentionConfig(heads=2, head_dim=4, window=3),
    ):
        y = np.asarray(outputs(built(config), jnp.asarray(rng.standard_normal((3, 7, 8))), None, IDS))
        assert np.all(y[np.asarray(IDS) < 0] == 0) and np.all(np.any(y[np.asarray(IDS) >= 0] != 0, axis=-1))


def test_report_names_finite_numbers_and_memory_lowers_surprise(rng):
    config = TitansConfig(heads=2, head_dim=8, hidden=16, chunk_size=4)
    report = jax.jit(lambda params, x: nnx.merge(graph(config), params).report(x))
    x = jnp.asarray(np.tile(rng.standard_normal((1, 1, 8)), (2, 64, 1)), jnp.float32)  # one token, over and over
    report = report(parameters(config), x)
    before, after = (np.asarray(report.pop(f"error_{when}_write")) for when in ("before", "after"))
    report = {name: float(value) for name, value in report.items()}
    assert all(np.isfinite(list(report.values())))
    assert np.isnan(before[:, 0]).all() and np.all(before[:, -4:] < 0.5 * before[:, 1:2])
    assert np.all(after[:, 1:8] < before[:, 1:8])
    assert report["surprise_after"] < 0.5 * report["surprise_before"]
    assert 0 < report["lr_mean"] <= 1 / 4 and 0 < report["momentum_mean"] < 1 and 0 < report["forget_mean"] < 0.1


@pytest.mark.parametrize(
    "target", [pytest.param(target, marks=pytest.mark.deep) for target in ("next", "value", "residual")]
)
def test_errors_by_token_are_those_of_the_memory_at_that_moment(target, x64, rng):
    """When the row is cut before a token, then the state there, read at the token's key, errs by what is reported."""
    config = MemoryConfig(heads=2, head_dim=4, hidden=6, chunk_size=4, target=target, conv_width=1)
    module, x = built(config), jnp.asarray(rng.standard_normal((2, 11, 8)))
    ids = jnp.asarray([[0] * 11, [0] * 5 + [-1] * 2 + [1] * 4], jnp.int32)
    errors = compiled(lambda module, x, ids: module.errors_by_token(x, None, ids))(module, x, ids)
    wanted = np.ones((2, 11), bool)
    wanted[0, 0] = wanted[1, [0, 5, 6, 7]] = False
    for found in errors.values():
        assert np.array_equal(np.isfinite(found), wanted)

    @compiled
    def error(module, x):  # of what the memory after the tokens x holds of the one whose error is wanted
        _, k, v = module._prepare(x, None, None)[0]
        still = jax.tree.map(lambda g: jnp.zeros_like(g[:, :1]), module._gates(x))
        _, state = module(x[:, :end])
        read, _ = module._memory(k[:, key : key + 1], k[:, :1], v[:, :1], still, state.memory, None, None)
        aim = v[:, token] - k[:, token] if target == "residual" else v[:, token]
        return 0.5 * jnp.mean(jnp.sum((read[:, 0] - aim) ** 2, axis=-1), axis=-1)

    for end, when in ((4, "before"), (5, "after"), (9, "before"), (10, "after")):  # tokens 4 and 9 in both
        token = end - 1 if when == "after" else end
        key = token - 1 if target == "next" else token
        np.testing.assert_allclose(errors[f"error_{when}_write"][0, token], error(module, x)[0], rtol=1e-5)


@pytest.mark.parametrize(
    "wrong, word",
    [
        (lambda: AttentionConfig(heads=4, kv_heads=3), "kv_heads=3"),
        (lambda: AttentionConfig(head_dim=5), "head_dim=5"),
        (lambda: AttentionConfig(window=0), "window=0"),
        (lambda: TitansConfig(depth=5), "depth=5"),
        (lambda: TitansConfig(chunk_size=0), "chunk_size=0"),
        (lambda: TitansConfig(forget_init=0.0), "forget_init=0.0"),
        (lambda: TitansConfig(max_lr=-1.0), "max_lr=-1.0"),
        (lambda: MIXERS["titan"], "'titans'"),
    ],
)
def test_wrong_settings_name_the_field(wrong, word):
    with pytest.raises(UserError, match=word):
        wrong()


# --- reductions: each memory equals its simpler relative at the right setting ------------------------------


def test_linear_memory_without_momentum_is_the_gated_delta_rule(x64, rng):
    """Depth 1, gradient_at="decayed", chunk 1: S_t = a_t S_{t-1} + b_t k_t^T (v_t - k_t a_t S_{t-1}), y_t = q_t S_t."""
    B, T, H, K, V = 2, 9, 2, 3, 4
    q, k, v = (jnp.asarray(rng.standard_normal((B, T, H, n))) for n in (K, K, V))
    lr, forget = (jnp.asarray(rng.uniform(0, 0.5, (B, T, H))) for _ in range(2))
    start = jnp.asarray(rng.standard_normal((H, K, V)))
    wanted = np.zeros((B, T, H, V))
    for b, h in np.ndindex(B, H):
        S = np.asarray(start[h])
        for t in range(T):
            S = (1 - float(forget[b, t, h])) * S
            error = np.asarray(v[b, t, h]) - np.asarray(k[b, t, h]) @ S
            S = S + float(lr[b, t, h]) * np.outer(k[b, t, h], error)
            wanted[b, t, h] = np.asarray(q[b, t, h]) @ S
    state = NeuralMemoryState.start((start,), B)
    gates = dict(lr=lr, momentum=jnp.zeros_like(lr), forget=forget)
    y, _ = neural_memory(q, k, v, **gates, state=state, gradient_at="decayed", chunk_size=1)
    np.testing.assert_allclose(y, wanted, atol=1e-12)


def test_a_wide_window_is_full_attention(x64, rng):
    config, x = AttentionConfig(heads=2, head_dim=4, capacity=16), jnp.asarray(rng.standard_normal((3, 7, 8)))
    full, wide = built(config), built(dataclasses.replace(config, window=7))
    for ids in (None, IDS):
        np.testing.assert_allclose(wide(x, None, ids)[0], full(x, None, ids)[0], atol=1e-13)
    narrow = built(dataclasses.replace(config, window=6))
    assert np.any(np.abs(narrow(x)[0] - full(x)[0]) > 1e-6)


def test_grouped_heads_are_full_heads_with_shared_keys(x64, rng):
    config, x = AttentionConfig(heads=4, kv_heads=2, head_dim=4, window=5), jnp.asarray(rng.standard_normal((2, 7, 8)))
    grouped = built(config)
    for kv_heads in (None, 4):
        full = built(dataclasses.replace(config, kv_heads=kv_heads))
        for name in ("q", "out"):
            getattr(full, name).kernel[...] = getattr(grouped, name).kernel[...]
        for name in ("k", "v"):
            kernel = getattr(grouped, name).kernel[...].reshape(8, 2, 4)
            getattr(full, name).kernel[...] = jnp.repeat(kernel, 2, axis=1).reshape(8, 16)
        np.testing.assert_allclose(full(x)[0], grouped(x)[0], atol=1e-13)


def test_titans_without_a_gate_is_titans_with_that_gate_shut(x64, rng):
    full = TitansConfig(heads=2, head_dim=4, hidden=6, chunk_size=4, max_lr=0.2)
    x = jnp.asarray(rng.standard_normal((2, 11, 8)))
    gated = built(full)
    gated.gate_bias[...] = jnp.asarray(rng.standard_normal((3, 2)))
    for row, name in ((1, "momentum"), (2, "forgetting")):

        def without(path, p, row=row):
            where = jax.tree_util.keystr(path)
            p = jnp.delete(p, row, axis=0) if "gate_bias" in where else p
            return jnp.delete(p.reshape(8, 3, 2), row, axis=1).reshape(8, 4) if "'gates'" in where else p

        def shut(path, p, row=row):
            return p.at[row].set(-1e4) if "gate_bias" in jax.tree_util.keystr(path) else p

        graphdef, params = nnx.split(gated, nnx.Param)
        plain = nnx.merge(
            graph(dataclasses.replace(full, **{name: False})), jax.tree_util.tree_map_with_path(without, params)
        )
        closed = nnx.merge(graphdef, jax.tree_util.tree_map_with_path(shut, params))
        np.testing.assert_allclose(outputs(plain, x), outputs(closed, x), atol=1e-13)


# --- modules ---------------------------------------------------------------------------------------------------------


def test_l2_normalise_has_a_finite_gradient_at_zero(x64):
    np.testing.assert_allclose(l2_normalise(jnp.array([3.0, 4.0])), [0.6, 0.8], rtol=1e-9)
    assert np.all(np.isfinite(jax.grad(lambda x: l2_normalise(x).sum())(jnp.zeros(2))))


@pytest.mark.parametrize("name", MIXERS)
def test_every_parameter_names_its_axes_and_differs_by_key(name):
    for config in MIXERS[name].examples():
        module = nnx.eval_shape(lambda config=config: config.build(8, rngs=nnx.Rngs(0)))
        for variable in jax.tree.leaves(nnx.state(module, nnx.Param), is_leaf=lambda leaf: isinstance(leaf, nnx.Param)):
            axes = variable.get_metadata().get("axes")
            assert axes is not None and len(axes) == len(variable.shape), variable
        assert config.flops_per_token(8, 64) > 0
    one, other = parameters(MIXERS[name].examples()[0], seeds=(0, 1))
    changed = [bool(np.any(a != b)) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other))]
    assert any(changed), "the parameters do not depend on the key"


def test_a_projection_is_differentiated_in_the_order_of_its_kernel(rng, x64):
    """The kernel's gradient is one product [in, out]: no transpose, which XLA's CPU code would do for all tokens."""
    module = projection(6, 5, ("embed", "mlp"), rngs=nnx.Rngs(0), bias=True)
    definition, params = nnx.split(module)
    params = jax.tree.map(lambda p: p.astype(jnp.float64), params)
    x, bar = rng.standard_normal((2, 3, 6)), rng.standard_normal((2, 3, 5))

    def total(params, x):
        return jnp.sum(nnx.merge(definition, params)(x) * bar)

    value, (grads, x_bar) = jax.value_and_grad(total, argnums=(0, 1))(params, x)
    kernel = np.asarray(params["kernel"][...])
    np.testing.assert_allclose(value, np.sum((x @ kernel) * bar), rtol=1e-12)
    np.testing.assert_allclose(grads["kernel"][...], np.einsum("bti,bto->io", x, bar), rtol=1e-12)
    np.testing.assert_allclose(grads["bias"][...], bar.sum(axis=(0, 1)), rtol=1e-12)
    np.testing.assert_allclose(x_bar, bar @ kernel.T, rtol=1e-12)
    assert "transpose" not in str(jax.make_jaxpr(jax.grad(total))(params, x))


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_a_key_that_fills_its_chunks_is_learned_at_the_largest_step(depth):
    """When one key comes 256 times to memories with large weights, then deep ones learn it too, and diverge without the
    smaller bound that they have by default."""
    config = TitansConfig(heads=8, depth=depth)
    keys, widths = iter(jax.random.split(jax.random.key(0), 8)), config.layer_widths
    weights = tuple(
        2.0 * jax.random.normal(next(keys), (config.heads, a, b)) * a**-0.5 for a, b in zip(widths[:-1], widths[1:])
    )

    def repeated():
        x = jax.random.normal(next(keys), (1, 1, config.heads, config.head_dim))
        return jnp.broadcast_to(x / jnp.linalg.norm(x, axis=-1, keepdims=True), (1, 256, *x.shape[2:]))

    k, v, state = repeated(), repeated(), NeuralMemoryState.start(weights, 1)
    nothing = jnp.zeros(k.shape[:3])

    @jax.jit
    def last_error(bound):
        gates = dict(lr=nothing + bound, momentum=nothing, forget=nothing)
        out, _ = neural_memory(k, k, v, state=state, chunk_size=config.chunk_size, **gates)
        return jnp.sum((out - v)[0, -1] ** 2, axis=-1).max()

    assert last_error(config.lr_bound) < 0.1
    assert depth == 2 or not jnp.isfinite(last_error(TitansConfig().lr_bound))
