"""Titans as MAC, MAG and MAL: what the laws do not say of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engrax.errors import UserError
from engrax.laws import LAWS, Breach, Subject
from engrax.layers import AttentionConfig, MACConfig, MAGConfig, MALConfig, TitansConfig
from engrax.layers.attention.attention import masked_attention
from engrax.layers.attention.rope import rotate
from engrax.models import MODELS, ModelConfig
from engrax.models.parameters import cast
from engrax.pallas_kernels.dispatch import recorded_calls
from engrax.tests.experiments import tiny
from engrax.train.experiment import from_dict, to_dict
from engrax.train.trainer import check

MEMORY = TitansConfig(heads=2, head_dim=4, hidden=6, chunk_size=4)
SMALL = MACConfig(memory=MEMORY, chunk_size=8, heads=2, head_dim=4, persistent_tokens=2)
VARIANTS = ("titans_lmm", "titans_mac", "titans_mag", "titans_mal")


def randomised(config, dim=8, seed=0):
    module = config.build(dim, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    params = nnx.state(module, nnx.Param)
    nnx.update(module, jax.tree.map(lambda p: jnp.asarray(np.asarray(p) + 0.3 * rng.standard_normal(p.shape)), params))
    return module


def cast_module(module, dtype):
    graphdef, params = nnx.split(module)
    return nnx.merge(graphdef, cast(params, dtype))


def test_the_printed_mac_leaks(x64):
    """Both ways: through what later tokens retrieved, and through the gate of the memory after the segment."""
    s = Subject(dataclasses.replace(SMALL, mode="paper"))
    with pytest.raises(Breach, match="outputs before token 1 after a change of token 1"):
        LAWS["causality.finite_change"](s)


def test_a_model_that_sees_the_future_is_not_trained_unless_asked(x64):
    paper = MODELS["titans_mac"](vocab_size=32, dim=16, mixers=(dataclasses.replace(SMALL, mode="paper"),))
    with pytest.raises(UserError, match="--allow-future"):
        check(tiny(model=paper))
    inside = MAGConfig(memory=dataclasses.replace(SMALL, mode="paper"))
    with pytest.raises(UserError, match="--allow-future"):
        check(tiny(model=MODELS["titans_mag"](vocab_size=32, dim=16, mixers=(inside,))))
    check(tiny(model=paper, allow_future=True))
    check(tiny(model=MODELS["titans_mac"](vocab_size=32, dim=16, mixers=(SMALL,))))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_config_survives_json(name):
    config = MODELS[name].examples()[0]
    assert from_dict(to_dict(config), ModelConfig) == config


def literal_mac(m, x):
    """One row from the start, segment by segment: the printed equations with the causal masks."""
    c, titans = m.config, m.memory
    inner = c.heads * c.head_dim
    mixed, _ = m.conv(jnp.concatenate([m.qkv(x), m.query(x)], axis=-1), m.conv.init_tail(1, x.dtype))
    q, k, v, query = jnp.split(mixed, [inner, 2 * inner, 3 * inner], axis=-1)
    split = lambda y: y.reshape(*y.shape[:2], c.heads, c.head_dim)  # noqa: E731
    state, outputs = titans.init_state(1), []
    for start in range(0, x.shape[1], c.chunk_size):
        s = slice(start, min(start + c.chunk_size, x.shape[1]))
        n = s.stop - s.start
        w1, w2 = state.memory.weights
        h = m._queries(query[:, s])
        h = jnp.einsum("bthf,bhfv->bthv", jax.nn.gelu(jnp.einsum("bthk,bhkf->bthf", h, w1)), w2)
        h = m.recalled(m.recalled_norm(h).reshape(1, n, -1))
        place = jnp.arange(n)[None]
        turn = lambda y, place=place: rotate(y, place, c.rope_base)  # noqa: E731
        k_h, v_h = jnp.split(m.recalled_kv(h), 2, axis=-1)
        _, k_p, v_p = jnp.split(m.qkv(m.persistent[...][None]), 3, axis=-1)
        keys = jnp.concatenate([split(k_p), turn(split(k_h)), turn(split(k[:, s]))], axis=1)
        values = jnp.concatenate([split(v_p), split(v_h), split(v[:, s])], axis=1)
        lower = jnp.tri(n, dtype=bool)[None]
        mask = jnp.concatenate([jnp.ones((1, n, k_p.shape[1]), bool), lower, lower], axis=2)
        y = m.attended(masked_attention(turn(split(q[:, s])), keys, values, mask).reshape(1, n, -1))
        gate, state = titans(y, state)
        outputs.append(m.out(m.norm(y) * 2 * jax.nn.sigmoid(gate)))
    return jnp.concatenate(outputs, axis=1)


def test_mac_is_its_equations(x64):
    module = randomised(SMALL)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 21, 8)))
    graphdef, params = nnx.split(module)
    found, wanted = jax.jit(lambda p: [f(nnx.merge(graphdef, p), x) for f in (lambda m, x: m(x)[0], literal_mac)])(
        params
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.long
def test_mac_hands_its_choice_of_implementation_on(x64):
    """Token by token and by chunks: rows that begin documents at, before and after segments, and continue anywhere."""
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 27, 8)))
    ids = jnp.asarray([[0] * 6 + [-2] * 2 + [1] * 8 + [2] * 11, [3] * 19 + [4] * 4 + [-1] * 4], jnp.int32)
    found = []
    for implementation in ("reference", "xla"):
        memory = dataclasses.replace(MEMORY, implementation=implementation, persistent_tokens=3)
        module = randomised(dataclasses.replace(SMALL, memory=memory))
        with recorded_calls() as calls:
            y, state = module(x[:, :21], None, ids[:, :21])
        assert {call.asked for call in calls} == {implementation}
        found.append([y, module(x[:, 21:], state, ids[:, 21:])])
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10)


def test_mac_calls_the_operation_in_the_dtype_of_training():
    """bfloat16 tokens, as GPU kernels take them, at phases that are known: no block more than the segment has."""
    module = cast_module(randomised(SMALL), jnp.bfloat16)
    x, ids = jnp.zeros((2, 24, 8), jnp.bfloat16), jnp.zeros((2, 24), jnp.int32)
    with recorded_calls() as calls:
        jax.eval_shape(lambda: module(x, None, ids))
    (call,) = calls
    assert (call.asked, call.shapes.tokens, call.shapes.dtype) == (None, jnp.bfloat16, jnp.float32)
    assert call.shapes.blocks == 2 and call.shapes.aligned and call.shapes.segments


def test_a_silent_memory_lets_the_attention_through(x64):
    config = MAGConfig(memory=MEMORY, attention=AttentionConfig(heads=2, head_dim=4, window=6))
    module = randomised(config)
    module.memory.out.kernel[...] = jnp.zeros_like(module.memory.out.kernel[...])
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 13, 8)))
    alone, _ = module.attention(x)
    np.testing.assert_allclose(module(x)[0], module.out(module.norm(alone)), rtol=1e-9, atol=1e-10)


def test_mag_and_mal_are_their_equations(x64):
    parts = dict(memory=MEMORY, attention=AttentionConfig(heads=2, head_dim=4, window=6))
    mag, mal = randomised(MAGConfig(**parts)), randomised(MALConfig(**parts))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 13, 8)))
    gate = 2 * jax.nn.sigmoid(mag.memory_norm(mag.memory(x)[0]))
    np.testing.assert_allclose(mag(x)[0], mag.out(mag.norm(mag.attention(x)[0]) * gate), rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(mal(x)[0], mal.attention(mal.memory_norm(mal.memory(x)[0]))[0], rtol=1e-9, atol=1e-10)


def test_persistent_tokens_are_seen_from_everywhere(x64):
    """With a window of one token the only other things to attend to are the persistent ones, at any distance."""
    module = randomised(AttentionConfig(heads=2, head_dim=4, window=1, persistent_tokens=3))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((1, 40, 8)))
    x = x.at[:, -1].set(x[:, 0])
    y, _ = module(x)
    np.testing.assert_allclose(y[:, -1], y[:, 0], rtol=1e-9, atol=1e-10)
    module.persistent[...] = module.persistent[...] + 1
    assert np.all(np.any(np.abs(module(x)[0] - y) > 1e-6, axis=-1))


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(chunk_size=10), "not a multiple of memory.chunk_size=4"),
        (dict(head_dim=3), "pairs of channels"),
        (dict(mode="printed"), "causal, paper"),
    ],
)
def test_mac_refuses_settings_without_meaning(fields, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(SMALL, **fields)


def test_mag_needs_a_window():
    with pytest.raises(UserError, match="set a window"):
        MAGConfig(attention=AttentionConfig(window=None))


@pytest.mark.parametrize("name", VARIANTS)
def test_decoding_compiles_once_and_its_state_keeps_its_size(name):
    config = dataclasses.replace(MODELS[name].examples()[0], repeat=1)
    model = config.build(rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    traced = []

    @jax.jit
    def step(params, token, memory):
        traced.append(None)
        return nnx.merge(graphdef, params)(token, memory)[:2]

    memory = model.init_memory(2)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(memory)]
    for t in range(20):
        _, memory = step(params, jnp.full((2, 1), t % 16), memory)
    assert len(traced) == 1
    assert [leaf.nbytes for leaf in jax.tree.leaves(memory)] == sizes
