"""Hopfield layers: sets, pooling, lookup, mixers beyond the laws, the Energy Transformer."""

import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from engrax.errors import UserError
from engrax.layers import (
    MIXERS,
    AssociationConfig,
    AttentionConfig,
    EnergyTransformerConfig,
    Hopfield,
    HopfieldConfig,
    HopfieldLayer,
    HopfieldLayerConfig,
    HopfieldPooling,
    HopfieldPoolingConfig,
)
from engrax.models.set_classifier import POOLINGS, SetClassifierConfig
from engrax.pallas_kernels import devices, dispatch, hopfield_retrieval
from engrax.pallas_kernels.dispatch import KERNELS_NEED_JAX, interpreted_kernels

kernels = pytest.mark.skipif(
    jax.__version_info__[:3] < KERNELS_NEED_JAX, reason="kernels need jax >= " + ".".join(map(str, KERNELS_NEED_JAX))
)
SMALL = AssociationConfig(heads=2, head_dim=4, value_dim=3)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def to_float64(module):
    graph, params = nnx.split(module)
    return nnx.merge(graph, jax.tree.map(lambda p: p.astype(jnp.float64) if is_float(p) else p, params))


def is_float(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def build(kind, *args, **options):
    return to_float64(kind(*args, rngs=nnx.Rngs(0), **options))


def test_raw_memory_is_the_operation(x64):
    """No parameter, no normalisation: states and patterns go in as they are."""
    memory = Hopfield(AssociationConfig.raw(12, heads=2, beta=0.8, steps=None), 12, rngs=nnx.Rngs(0))
    assert not jax.tree.leaves(nnx.state(memory, nnx.Param))
    x, xi = normal(2, 7, 12), normal(2, 3, 12, seed=1)
    heads = [y.reshape(*y.shape[:2], 2, 6) for y in (xi, x)]
    wanted = hopfield_retrieval(*heads, beta=0.8, steps=None).reshape(2, 3, 12)
    np.testing.assert_allclose(memory(xi, x), wanted, rtol=1e-12)
    nearest = Hopfield(AssociationConfig.raw(12, beta=50.0, similarity="l2"), 12, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(nearest(x + 0.05 * normal(2, 7, 12, seed=2), x), x, atol=1e-6)


def test_an_association_of_two_sets(x64):
    """Widths of their own, values of their own; hidden patterns may hold anything."""
    association = build(Hopfield, SMALL, 5, stored_dim=6, value_dim=7, out_dim=9)
    states, stored, values = normal(2, 3, 5), normal(2, 8, 6, seed=1), normal(2, 8, 7, seed=2)
    call = jax.jit(lambda *sets, mask=None: association(*sets, mask=mask))
    out = call(states, stored, values)
    assert out.shape == (2, 3, 9)
    order = np.random.default_rng(0).permutation(8)
    np.testing.assert_allclose(call(states, stored[:, order], values[:, order]), out, rtol=1e-10)
    mask = jnp.arange(8) < 6
    hidden = [jnp.where(mask[:, None], x, jnp.nan) for x in (stored, values)]
    shown = call(states, stored[:, :6], values[:, :6])
    np.testing.assert_allclose(call(states, *hidden, mask=jnp.tile(mask, (2, 1))), shown, rtol=1e-10)


def test_self_association_is_equivariant(x64):
    association = build(Hopfield, dataclasses.replace(SMALL, steps=3), 6)
    x, order = normal(2, 8, 6), np.random.default_rng(0).permutation(8)
    np.testing.assert_allclose(association(x[:, order]), association(x)[:, order], rtol=1e-10)


def test_weights_add_up_and_extra_patterns_are_among_them(x64):
    extra = dataclasses.replace(SMALL, bias_pattern=True, zero_pattern=True)
    association, x = build(Hopfield, extra, 6), normal(2, 8, 6)
    weights = association.weights(x, mask=jnp.zeros((2, 8), bool))
    assert weights.shape == (2, 8, 2, 10) and np.all(weights[..., :8] == 0)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-12)
    q, k, _ = association.spaces(x, None, None)
    score = jnp.einsum("bnhd,hd->bnh", q, association.bias_key[...]) / 2  # beside the zero pattern's 0
    np.testing.assert_allclose(weights[..., 8], jax.nn.sigmoid(score), rtol=1e-12)
    assert association.energy(x).shape == (2, 8, 2)


def test_trainable_beta_starts_where_it_is_told_and_each_head_has_its_own(x64):
    c = dataclasses.replace(SMALL, beta=(0.1, 3.0), trainable_beta=True)
    association, fixed = (build(Hopfield, s, 6) for s in (c, dataclasses.replace(c, trainable_beta=False)))
    np.testing.assert_allclose(association.betas(), (0.1, 3.0), rtol=1e-6)
    np.testing.assert_allclose(association(normal(2, 8, 6)), fixed(normal(2, 8, 6)), rtol=1e-5)
    extreme = Hopfield(dataclasses.replace(c, beta=(100.0, 1e-5)), 6, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(extreme.betas(), (100.0, 1e-5), rtol=1e-6)


@pytest.mark.parametrize("queries", [1, 3])
def test_pooling_does_not_depend_on_the_order_nor_on_padding(queries, x64):
    pooling = build(HopfieldPooling, dataclasses.replace(SMALL, steps=2), 6, queries=queries, out_dim=5)
    x = normal(2, 8, 6)
    out = pooling(x)
    assert out.shape == (2, queries, 5)
    np.testing.assert_allclose(pooling(x[:, ::-1]), out, rtol=1e-10)
    padded = jnp.concatenate([x, jnp.full((2, 3, 6), jnp.nan)], axis=1)
    mask = jnp.tile(jnp.arange(11) < 8, (2, 1))
    np.testing.assert_allclose(pooling(padded, mask=mask), out, rtol=1e-10)
    assert np.all(pooling.weights(padded, mask=mask)[..., 8:] == 0)


def test_gradients_of_pooling_do_not_depend_on_padding(x64):
    pooling, x = build(HopfieldPooling, SMALL, 6), normal(2, 8, 6)
    mask = jnp.arange(8) < jnp.array([[5], [0]])  # one set is empty
    graph, params = nnx.split(pooling)

    @jax.jit
    def slopes(params, x):
        return jax.grad(lambda p, x: jnp.sum(jnp.sin(nnx.merge(graph, p)(x, mask=mask))), argnums=(0, 1))(params, x)

    wanted = slopes(params, x)
    assert any(np.any(x != 0) for x in jax.tree.leaves(wanted[0]))
    jax.tree.map(np.testing.assert_array_equal, slopes(params, jnp.where(mask[..., None], x, jnp.nan)), wanted)


@pytest.mark.parametrize("extra", [("bias_pattern",), ("zero_pattern",), ("bias_pattern", "zero_pattern")])
def test_the_weights_of_pooling_have_the_extra_patterns(extra, x64):
    pooling, x = build(HopfieldPooling, dataclasses.replace(SMALL, **dict.fromkeys(extra, True)), 6), normal(2, 8, 6)
    weights = pooling.weights(x, mask=jnp.ones((2, 8), bool).at[:, 5:].set(False))
    assert weights.shape == (2, 1, 2, 8 + len(extra)) and np.all(weights[..., 8:] > 0)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-12)


def test_lookup_is_association_with_learned_patterns(x64):
    c = HopfieldLayerConfig(heads=2, head_dim=4, patterns=6, beta=0.9, steps=2)
    layer, x = build(HopfieldLayer, c, 5, out_dim=7), normal(2, 8, 5)
    q = layer.association.states(x)
    k, v = (jnp.broadcast_to(p[...], (2, 6, 2, 4)) for p in (layer.stored, layer.targets))
    wanted = layer.association.out(hopfield_retrieval(q, k, v, beta=0.9, steps=2).reshape(2, 8, 8))
    assert layer(x).shape == (2, 8, 7)
    np.testing.assert_allclose(layer(x), wanted, rtol=1e-12)


@kernels
def test_the_rows_of_a_lookup_can_be_split_over_a_mesh():
    """The TPU kernel of several updates takes each device's own rows: it refuses what they do not divide."""
    c = HopfieldLayerConfig(heads=2, head_dim=4, patterns=6, steps=2, implementation="pallas_tpu")
    layer = HopfieldLayer(c, 5, rngs=nnx.Rngs(0))
    mesh = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,))
    with interpreted_kernels(), jax.sharding.use_abstract_mesh(mesh):
        assert jax.eval_shape(layer, jax.ShapeDtypeStruct((4, 8, 5), jnp.float32)).shape == (4, 8, 5)
        with pytest.raises(ValueError, match="3 batch rows do not divide over the 2 devices"):
            jax.eval_shape(layer, jax.ShapeDtypeStruct((3, 8, 5), jnp.float32))


# ---------------------------------------------------------------------------------------------------------------------
# Mixers


def test_one_update_is_attention_without_positions(x64):
    """The same weights in attention, its rotation turned off by a base so large that nothing turns."""
    options = dict(heads=2, head_dim=4, window=5)
    attention = build(AttentionConfig(**options, rope_base=None).build, 8)
    mixer = build(HopfieldConfig(**options).build, 8)
    for name, source in (("q", attention.q), ("k", attention.k), ("v", attention.v), ("out", attention.out)):
        getattr(mixer.association, name).kernel[...] = source.kernel[...]
    x = normal(2, 17, 8)
    np.testing.assert_allclose(mixer(x)[0], attention(x)[0], rtol=1e-10, atol=1e-12)


def test_running_pooling_is_set_pooling_of_every_prefix(x64):
    c = HopfieldPoolingConfig(heads=2, head_dim=4, value_dim=3, queries=3, chunk_size=8, beta=2.0)
    running, x = build(c.build, 6), 3 * normal(2, 13, 6)
    a, y = running.association, jax.jit(lambda x: running(x)[0])(x)
    for t in (0, 1, 8, 12):
        k = a.patterns(x[:, : t + 1])
        q = jnp.broadcast_to(running.queries[...], (2, *running.queries.shape))
        pooled = a.retrieve(q, k, a.contents(x[:, : t + 1], k)).reshape(2, 1, -1)
        np.testing.assert_allclose(y[:, t : t + 1], running.out(pooled), rtol=1e-9, atol=1e-12)


def test_running_pooling_keeps_its_precision_where_scores_rise():
    """Scores from -100 to 100 and back, float32: no sum overflows, none is lost."""
    c = HopfieldPoolingConfig(heads=1, head_dim=1, queries=1, chunk_size=8, beta=1.0)
    mixer = c.build(1, rngs=nnx.Rngs(0))
    mixer.queries[...], mixer.association.k.kernel[...] = jnp.ones((1, 1, 1)), jnp.ones((1, 1))
    x = 100 * jnp.sin(jnp.arange(40.0) / 3)[None, :, None]
    score, value = (
        np.asarray(x, np.float64)[0, :, 0],
        np.asarray(x * mixer.association.v.kernel[...], np.float64)[0, :, 0],
    )
    y = np.asarray(jax.jit(lambda x: mixer(x)[0])(x))[0, :, 0] / float(mixer.out.kernel[0, 0])
    for t in range(40):
        p = np.exp(score[: t + 1] - score[: t + 1].max())
        np.testing.assert_allclose(y[t], p @ value[: t + 1] / p.sum(), rtol=1e-4)


def test_the_cache_has_its_capacity():
    mixer = HopfieldConfig(heads=2, head_dim=4, capacity=8).build(8, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="9 tokens exceed the Hopfield cache's capacity=8"):
        mixer(jnp.zeros((1, 9, 8)))
    _, state = mixer(jnp.ones((1, 5, 8)))
    y, _ = mixer(jnp.ones((1, 5, 8)), state)
    assert np.all(np.isnan(y))


@kernels
@pytest.mark.parametrize("device, kernel", [("h200", "pallas_gpu"), ("v5e", "pallas_tpu")])
@pytest.mark.parametrize("window", [None, 16])
def test_kernels_serve_training_with_packed_rows(device, kernel, window):
    """Long rows with a window are cut into blocks that see the block before; without one, whole rows."""
    mixer = HopfieldConfig(heads=2, head_dim=16, steps=2, window=window).build(8, rngs=nnx.Rngs(0))
    x, ids = jax.ShapeDtypeStruct((2, 100, 8), jnp.bfloat16), jax.ShapeDtypeStruct((2, 100), jnp.int32)
    with dispatch.recorded_calls() as calls:
        jax.eval_shape(lambda x, ids: mixer(x, segment_ids=ids)[0], x, ids)
    (call,) = calls
    assert (call.shapes.causal, call.shapes.window, call.shapes.segments) == (True, window, True)
    assert (call.shapes.states, call.shapes.patterns) == ((100, 100) if window is None else (32, 64))
    assert dispatch.explain(call, devices.NAMED[device]).by == kernel


def test_earlier_calls_fill_the_cache_by_row(x64):
    """Rows with different numbers of tokens before a call of several: each sees its own past, and no later token."""
    mixer, x = build(HopfieldConfig(heads=2, head_dim=4, steps=2, capacity=16).build, 8), normal(2, 11, 8)
    before = jnp.asarray([[0, 0, 0, 0, 0], [0, 0, -1, -1, -1]], jnp.int32)
    _, state = mixer(x[:, :5], segment_ids=before)
    y = mixer(x[:, 5:], state)[0]
    for row, joined in enumerate((x[:1], jnp.concatenate([x[1:, :2], x[1:, 5:]], axis=1))):
        np.testing.assert_allclose(y[row], mixer(joined)[0][0, -6:], rtol=1e-10, atol=1e-12)


def test_a_cache_without_parameters_keeps_float64(x64):
    mixer, x = HopfieldConfig.raw(6, window=5).build(6, rngs=nnx.Rngs(0)), normal(2, 9, 6)
    np.testing.assert_array_equal(mixer(x)[1].keys[:, :, 0], x[:, -4:])


def test_a_mixer_reports_on_itself(x64):
    c = HopfieldConfig(heads=2, head_dim=4, window=6, beta=(0.0, 50.0), zero_pattern=True)
    found = build(c.build, 8).report(4 * normal(2, 20, 8))
    assert {"hopfield_energy", "patterns_of_90_percent", "beta"} == set(found)
    assert np.isfinite(found["hopfield_energy"]) and 2 < found["patterns_of_90_percent"] < 5


def test_flops_are_counted():
    """By XLA's own count of the products, a multiply-add being 2, to 20 %."""
    for name, T in (("hopfield", 64), ("hopfield_layer", 64)):
        c = dataclasses.replace(MIXERS[name](), steps=2)  # XLA counts the body of a loop once
        graph, params = nnx.split(c.build(64, rngs=nnx.Rngs(0)))
        run = jax.jit(lambda p, x, graph=graph: nnx.merge(graph, p)(x)[0])
        counted = run.lower(params, jnp.zeros((1, T, 64))).cost_analysis()
        claimed = c.flops_per_token(64, T) * T
        if name == "hopfield":  # XLA also counts what is masked
            claimed += c.association_flops((T - 1) / 2) * T
        assert 0.8 < counted["flops"] / claimed < 1.5, (name, counted["flops"], claimed)


@pytest.fixture
def unchecked():
    """As outside the tests, where no type is checked."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


BAD = [
    (dict(steps=0), "steps=0 retrieves nothing"),
    (dict(heads=0), "heads=0 must be at least 1"),
    (dict(beta=(1.0, 2.0, 3.0)), "beta has 3 entries for heads=2"),
    (dict(beta=-1.0), "must not be negative"),
    (dict(beta=0.0, trainable_beta=True), "positive where it is trainable"),
    (dict(gradient="implicit"), "gradient='implicit' needs steps=None"),
    (dict(separation="entmax", alpha=1.0), "alpha=1.0 must be above 1"),
    (dict(separation="soft"), "unknown separation 'soft'; did you mean 'softmax'"),
    (dict(values="foo"), r"unknown values 'foo' \(known: projected, of_stored, plain\)"),
    (dict(state_norm="batch"), r"unknown state_norm 'batch' \(known: none, rms, layer\)"),
    (dict(value_dim=0), "value_dim=0 must be at least 1"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[m for _, m in BAD])
def test_bad_settings_are_named(change, message, unchecked):
    with pytest.raises(UserError, match=message):
        AssociationConfig(**(dict(heads=2) | change))


def test_widths_that_do_not_fit_are_named(unchecked):
    with pytest.raises(UserError, match="stored patterns of width 7 are not projected"):
        Hopfield(AssociationConfig.raw(6), 6, stored_dim=7, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="running pooling carries sums of one softmax update"):
        HopfieldPoolingConfig(steps=3)
    with pytest.raises(UserError, match="capacity=-1 must be at least 1"):
        HopfieldConfig(capacity=-1)
    with pytest.raises(UserError, match="unknown targets 'pattern'; did you mean 'patterns'"):
        HopfieldLayerConfig(targets="pattern")
    with pytest.raises(ValueError, match=r"mask has shape \(2, 7\)"):
        Hopfield(SMALL, 6, rngs=nnx.Rngs(0))(jnp.ones((2, 8, 6)), mask=jnp.ones((2, 7), bool))


# ---------------------------------------------------------------------------------------------------------------------
# Energy Transformer, set classifiers


ET = EnergyTransformerConfig(heads=2, head_dim=4, memories=12, steps=12, step_size=0.1)


def test_the_energy_transformer_descends(x64):
    block, x = build(ET.build, 8), 2 * normal(3, 6, 8)
    after, energies = jax.jit(lambda x: block.descend(x))(x)
    assert np.all(np.diff(np.concatenate([energies, block.energy(after)[None]]), axis=0) < 0)
    slope = jax.grad(lambda g: jnp.sum(block.energy_of(g)))(block.normalised(x))
    one = dataclasses.replace(ET, steps=1)
    first = build(one.build, 8)(x)
    np.testing.assert_allclose(first, x - 0.1 * slope, rtol=1e-10)


def test_the_energy_is_the_papers(x64):
    block, x = build(ET.build, 8), normal(1, 5, 8)
    g = block.normalised(x)[0]
    q, k = (np.asarray(g @ p.kernel[...]).reshape(5, 2, 4) for p in (block.q, block.k))
    wanted = -0.5 * np.sum(np.maximum(g @ block.memory.kernel[...], 0) ** 2)
    for h, c in np.ndindex(2, 5):
        scores = 0.5 * np.delete(k[:, h] @ q[c, h], c)
        wanted -= (np.log(np.sum(np.exp(scores))) - np.log(4)) / 0.5  # the constant: how many it sees
    np.testing.assert_allclose(block.energy(x)[0], wanted, rtol=1e-10)


def test_the_energy_transformer_treats_tokens_alike_and_rows_apart(x64):
    block, x = build(ET.build, 8), normal(3, 6, 8)
    run = jax.jit(lambda x, mask: block(x, mask=mask))
    everything = jnp.ones((3, 6), bool)
    out = run(x, everything)
    np.testing.assert_allclose(run(x[:, ::-1], everything)[:, ::-1], out, rtol=1e-9)
    np.testing.assert_array_equal(run(x.at[1:].multiply(-2.0), everything)[0], out[0])
    mask = everything.at[:, 4:].set(False)
    hidden = run(x.at[:, 4:].multiply(9.0), mask)
    np.testing.assert_allclose(hidden[:, :4], run(x, mask)[:, :4], rtol=1e-12)
    np.testing.assert_array_equal(hidden[:, 4:], x.at[:, 4:].multiply(9.0)[:, 4:])
    grads = jax.grad(lambda x: jnp.sum(jnp.sin(run(x, mask))))(x)
    assert np.all(np.isfinite(grads)) and np.any(grads != 0)


def test_what_the_energy_transformer_masks_may_hold_anything(x64):
    block, x = build(ET.build, 8), normal(2, 6, 8)
    mask = jnp.ones((2, 6), bool).at[:, 4:].set(False)
    graph, params = nnx.split(block)

    @jax.jit
    def run(params, x):
        def loss(params, x):
            out, energies = nnx.merge(graph, params).descend(x, mask=mask)
            return jnp.sum(jnp.sin(jnp.where(mask[..., None], out, 0))) + jnp.sum(energies), out

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    (wanted_grads, _), wanted = run(params, x)
    nans = x.at[:, 4:].set(jnp.nan)
    (grads, of_x), out = run(params, nans)
    np.testing.assert_array_equal(out[:, :4], wanted[:, :4])
    assert np.all(np.isnan(out[:, 4:]))
    jax.tree.map(np.testing.assert_array_equal, grads, wanted_grads)
    assert np.all(of_x[:, 4:] == 0) and np.all(np.isfinite(of_x)) and np.any(of_x != 0)
    np.testing.assert_array_equal(block.energy(nans, mask=mask), block.energy(x, mask=mask))


def test_the_energy_transformer_descends_in_float32():
    """Steps too small for bfloat16 are not lost: one rounding, at the end."""
    block = dataclasses.replace(ET, steps=200, step_size=2e-4).build(8, rngs=nnx.Rngs(0))
    x = (2 * normal(2, 6, 8)).astype(jnp.bfloat16)
    run = jax.jit(lambda x: block(x))
    out, wanted = run(x), run(x.astype(jnp.float32))
    assert out.dtype == jnp.bfloat16 and np.abs(wanted - x).max() > 0.05
    np.testing.assert_allclose(out.astype(jnp.float32), wanted, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_set_classifiers_see_sets(pooling, x64):
    model = build(SetClassifierConfig(features=5, hidden=8, width=6, pooling=pooling, hopfield=SMALL).build)
    x = normal(3, 7, 5)
    out = model(x)
    assert out.shape == (3, 2)
    np.testing.assert_allclose(model(x[:, ::-1]), out, rtol=1e-10, atol=1e-12)
    padded = jnp.concatenate([x, jnp.full((3, 2, 5), jnp.nan)], axis=1)
    mask = jnp.tile(jnp.arange(9) < 7, (3, 1))
    np.testing.assert_allclose(model(padded, mask), out, rtol=1e-10, atol=1e-12)
    assert not np.allclose(model(x.at[:, 0].add(3.0)), out)
