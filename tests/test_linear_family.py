"""The mixers with a matrix memory against their papers' recurrences, their reductions, their sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engrax.errors import UserError
from engrax.layers import MIXERS
from engrax.layers.linear.based import taylor_features
from engrax.models import LanguageModelConfig
from engrax.tests.linear_family import DIM, LENGTH, NORMALISED, PLAIN, ROWS, SMALL, TIED, built, inputs, jitted


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("name", PLAIN)
def test_mixer_is_its_papers_recurrence(name, x64, rng):
    plain, settings = PLAIN[name]
    module, x = built(name, rng, **settings | dict(output_gate=True)), inputs(rng)
    wanted = plain(module, np.asarray(x))
    # The division by a sum of scores has 1e-6 added to the sum, the unit length 1e-12 to the square.
    tolerance = 1e-4 if name in NORMALISED else 1e-10
    np.testing.assert_allclose(jitted(module, "__call__", x)[0], wanted, rtol=tolerance, atol=tolerance)


# --- reductions -------------------------------------------------------------------------------------------------------


def shared(source, target, *names):
    """Copies the parameters of `names`, modules or single ones, from one mixer to another."""
    for name in names:
        nnx.update(getattr(target, name), nnx.state(getattr(source, name), nnx.Param))


def outputs(module, x):
    return np.asarray(jitted(module, "__call__", x)[0])


def test_gla_with_equal_gates_is_mamba2s_scan(x64, rng):
    """log sigmoid(z) / 16 = -exp(A) softplus(-z) with A = -log 16, on every channel of a head."""
    gla, mamba = (built(name, rng, **SMALL) for name in ("gla", "mamba2"))
    columns = rng.standard_normal((gla.config.gate_rank, 4))
    gla.forget.up.kernel[...] = jnp.asarray(np.repeat(columns, 4, axis=1))
    gla.forget_bias[...] = jnp.asarray(np.repeat(rng.standard_normal((4, 1)), 4, axis=1))
    mamba.decay.project.kernel[...] = -gla.forget.down.kernel[...] @ columns
    mamba.decay.bias[...] = -gla.forget_bias[...][:, :1]
    mamba.decay.log_rate[...] = jnp.full(4, -np.log(16))
    mamba.skip[...] = jnp.zeros(4)
    shared(gla, mamba, "qkv", "conv")
    x, start = inputs(rng), np.zeros((ROWS, 1), np.int32)
    q, k, v, _ = jitted(gla, "_project", x, gla.init_state(ROWS).tail, None)
    *_, terms = jitted(gla, "tokens", x, q, k, v, start)
    C, B, step_u, mamba_terms = jitted(mamba, "tokens", x, q, k, v, start)
    memory = gla.init_state(ROWS)
    np.testing.assert_allclose(terms["g"], np.repeat(mamba_terms["g"][..., None], 4, axis=-1), atol=1e-13)
    wanted, _ = gla.apply_operation(2 * C, B, step_u, terms, memory, None)  # GLA reads with q / sqrt(4)
    found, _ = mamba.apply_operation(C, B, step_u, mamba_terms | {"scale": 1.0}, memory, None)
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    assert np.abs(wanted).max() > 0.1


def test_gla_that_keeps_everything_is_linear_attention(x64, rng):
    gla = built("gla", rng, **SMALL, output_gate=True)
    linear = built("linear_attention", rng, **SMALL, output_gate=True, feature_map="identity", normalise=False)
    shared(gla, linear, "qkv", "conv", "norm", "gate", "out")
    x = inputs(rng)
    assert np.abs(outputs(gla, x) - outputs(linear, x)).max() > 1e-3
    gla.forget_bias[...] = gla.forget_bias[...] + 1000
    np.testing.assert_allclose(outputs(gla, x), outputs(linear, x), atol=1e-12)


def test_retnet_is_linear_attention_with_a_constant_decay(x64, rng):
    """The decay of a key is 1 / gamma^j, that of a query gamma^i: without any gate."""
    retnet = built("retnet", rng, **SMALL, rope_base=None)
    linear = built("linear_attention", rng, **SMALL, feature_map="identity", normalise=False)
    x, memory, t = inputs(rng), retnet.init_state(ROWS), np.arange(LENGTH)[:, None, None]
    q, k, v, _ = jitted(retnet, "_project", x, retnet.init_state(ROWS).tail, None)
    q, k, v, terms = jitted(retnet, "tokens", x, q, k, v, np.zeros((ROWS, 1), np.int32))
    found, _ = retnet.apply_operation(q, k, v, terms, memory, None)
    gamma = (1 - 2.0 ** (-5.0 - np.arange(4)))[:, None]
    q, k = (np.repeat(y, 2, axis=2) for y in (q, k))
    wanted, _ = linear.apply_operation(q * gamma**t, k * gamma**-t, v, {}, memory, None)
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_hgrn2_is_gla_with_keys_one_minus_forget(x64, rng):
    hgrn2, gla = built("hgrn2", rng, **TIED), built("gla", rng, **TIED, gate_temperature=1.0)
    x, start = inputs(rng), hgrn2.init_state(ROWS)
    q, k, v, _ = jitted(hgrn2, "_project", x, start.tail, None)
    q, k, v, terms = jitted(hgrn2, "tokens", x, q, k, v, np.zeros((ROWS, 1), np.int32))
    np.testing.assert_allclose(k, 1 - np.exp(terms["g"]), atol=1e-14)
    wanted, _ = gla.apply_operation(q, 1 - jnp.exp(terms["g"]), v, terms, start, None)
    np.testing.assert_allclose(jitted(hgrn2, "_mix", x, None, None)[0], wanted, atol=1e-12)


def test_gated_deltanet_without_decay_is_deltanet(x64, rng):
    gated, plain = (built(name, rng, **SMALL, output_gate=True) for name in ("gated_deltanet", "deltanet"))
    shared(gated, plain, "qkv", "conv", "beta", "norm", "gate", "out")
    x = inputs(rng)
    assert np.abs(outputs(gated, x) - outputs(plain, x)).max() > 1e-3
    gated.decay.log_rate[...] = gated.decay.log_rate[...] - 1000
    np.testing.assert_allclose(outputs(gated, x), outputs(plain, x), atol=1e-12)


def test_kda_with_equal_channels_is_gated_deltanet(x64, rng):
    kda = built("kda", rng, **SMALL, output_gate=False, gate_rank=3)
    gated = built("gated_deltanet", rng, **SMALL, output_gate=False)
    shared(kda, gated, "qkv", "conv", "beta", "norm", "out")
    x, columns = inputs(rng), rng.standard_normal((3, 4))
    gated.decay.log_rate[...] = kda.decay.log_rate[...]
    gated.decay.bias[...] = kda.decay.bias[...][:, :1]
    gated.decay.project.kernel[...] = kda.decay.project.down.kernel[...] @ columns
    assert np.abs(outputs(kda, x) - outputs(gated, x)).max() > 1e-3
    kda.decay.project.up.kernel[...] = jnp.asarray(np.repeat(columns, 4, axis=1))
    kda.decay.bias[...] = jnp.repeat(kda.decay.bias[...][:, :1], 4, axis=1)
    np.testing.assert_allclose(outputs(kda, x), outputs(gated, x), atol=1e-11)


def test_taylor_features_are_the_polynomial(x64, rng):
    q, k = rng.standard_normal((2, 50, 16))
    found = np.sum(np.asarray(taylor_features(jnp.asarray(q)) * taylor_features(jnp.asarray(k))), axis=-1)
    s = np.sum(q * k, axis=-1) / 4
    np.testing.assert_allclose(found, 1 + s + s**2 / 2, rtol=1e-12)
    assert taylor_features(jnp.asarray(q)).shape[-1] == 153  # 1 + 16 + 136


def test_prefix_is_seen_whole_and_carried_past_every_cut_after_it(x64, rng):
    """Tokens of the prefix in any order are the same to what follows; a cut after the prefix changes nothing."""
    module, x = built("prefix_linear_attention", rng, **SMALL | dict(conv_width=1), prefix=4), inputs(rng)
    wanted, _ = jitted(module, "__call__", x)
    shuffled, _ = jitted(module, "__call__", x[:, jnp.array([2, 0, 3, 1, *range(4, LENGTH)])])
    np.testing.assert_allclose(shuffled[:, 4:], wanted[:, 4:], atol=1e-12)
    for a in (4, 7):
        first, state = jitted(module, "__call__", x[:, :a])
        second, _ = jitted(module, "__call__", x[:, a:], state)
        np.testing.assert_allclose(jnp.concatenate([first, second], axis=1), wanted, atol=1e-12)
    first, _ = jitted(module, "__call__", x[:, :2])
    assert np.abs(first - wanted[:, :2]).max() > 1e-3  # the rest of the prefix was not there


# --- layers of a model, sizes, settings -------------------------------------------------------------------------------


def test_fixed_decays_and_bounds_follow_the_layer():
    """Layers stacked under vmap: lightning's decays slow down with depth, HGRN2's bounds rise."""
    mixers = tuple(MIXERS[name](heads=2, head_dim=4) for name in ("lightning", "hgrn2"))
    model = LanguageModelConfig(vocab_size=8, dim=8, mixers=mixers, repeat=2, mlp_hidden=8).build(rngs=nnx.Rngs(0))
    np.testing.assert_allclose(model.blocks[0].mixer.depth[...], [[1.0], [0.5]])  # layers 0 and 2 of 4
    bounds = jax.nn.sigmoid(model.blocks[1].mixer.forget_bound[...])
    np.testing.assert_allclose(bounds[:, 0, 0], [0.25, 0.75], rtol=1e-5)  # layers 1 and 3 of 4


PUBLISHED = {  # parameters of a layer of width d, in d^2, as the papers and their models state
    "gla": (4, dict(heads=4, head_dim=128, value_dim=256)),  # as many as softmax attention
    "retnet": (8, dict(heads=4, head_dim=256, value_dim=512)),  # values twice as wide
    "hgrn2": (4, dict(heads=8, head_dim=128)),
    "gsa": (4.25, dict(heads=4, head_dim=256, slots=64)),  # q, k, v, o and 64 slots in each of 4 heads
    "deltanet": (4, dict(heads=8, head_dim=128)),
    "gated_deltanet": (6, dict(heads=6, head_dim=128, value_dim=256)),  # keys 3/4 d, values 3/2 d
    "mamba2": (6, dict(heads=1, value_heads=32, head_dim=128, value_dim=64)),  # expansion 2; B, C and dt on top
    "kda": (4, dict(heads=8, head_dim=128)),  # q, k, v, o; low-rank gates on top
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    squares, settings = PUBLISHED[name]
    dim, config = 1024, MIXERS[name](**settings)
    params = nnx.state(nnx.eval_shape(lambda: config.build(dim, rngs=nnx.Rngs(0))), nnx.Param)
    extra = {"mamba2": 2 * 128 * dim + 32 * dim, "kda": 2 * 128 * 2 * dim}.get(name, 0)
    count = sum(p.size for p in jax.tree.leaves(params))
    assert abs(count / (squares * dim**2 + extra) - 1) < 0.02, f"{count / dim**2:.3f} d^2 parameters"


@pytest.mark.parametrize("name", PLAIN)
def test_flops_count_every_projection_and_the_report_is_finite(name):
    """Multiply-adds of the parameters are the kernels' sizes: gates, low-rank ones too, are all counted."""
    config = dataclasses.replace(MIXERS[name](**PLAIN[name][1]), output_gate=True)
    module = config.build(DIM, rngs=nnx.Rngs(0))
    leaves = jax.tree_util.tree_leaves_with_path(nnx.state(module, nnx.Param))
    kernels = sum(p.size for path, p in leaves if "kernel" in jax.tree_util.keystr(path))
    memory = 0.0
    for m in config.matrices:
        sizes = dict(heads=m.heads, query_heads=m.query_heads, key=m.key, value=m.value)
        memory += config.operation_flops(batch=1, seq=64, chunk_size=4, **sizes) / 64
    if name == "prefix_linear_attention":
        memory *= 1.5  # forwards with twice the heads, and backwards
    if name == "infini_attention":
        memory = 2 * memory + 4 * config.heads * config.head_dim * (config.block + 1) / 2
    assert config.flops_per_token(DIM, 64) == 2 * kernels + memory
    report = jitted(module, "report", jnp.ones((1, 5, DIM)))
    assert report["memory_norm"] > 0 and all(np.all(np.isfinite(x)) for x in report.values())


@pytest.mark.parametrize(
    "name, wrong, word",
    [
        ("gla", dict(heads=4, value_heads=6), "value_heads=6"),
        ("gla", dict(heads=0), "heads=0"),
        ("gla", dict(value_dim=0), "value_dim=0"),
        ("gla", dict(gate_rank=0), "gate_rank=0"),
        ("gla", dict(gate_temperature=0.0), "gate_temperature=0.0"),
        ("linear_attention", dict(feature_map="elu"), "did you mean"),
        ("linear_attention", dict(feature_map="identity"), "normalise=False"),
        ("retnet", dict(head_dim=5), "head_dim=5"),
        ("hgrn2", dict(heads=2, value_heads=4), "value_heads=4"),
        ("gsa", dict(heads=2, value_heads=4), "value_heads=4"),
        ("gsa", dict(slots=0), "slots=0"),
        ("deltanet", dict(max_beta=2.5), "max_beta=2.5"),
        ("kda", dict(gate_rank=0), "gate_rank=0"),
        ("rebased", dict(head_dim=1), "head_dim=1"),
        ("prefix_linear_attention", dict(prefix=0), "prefix=0"),
        ("infini_attention", dict(block=0), "block=0"),
        ("infini_attention", dict(head_dim=5), "head_dim=5"),
        ("infini_attention", dict(value_dim=8), "value_dim"),
    ],
)
def test_wrong_settings_are_named(name, wrong, word):
    with pytest.raises(UserError, match=word):
        MIXERS[name](**wrong)
