"""The settings that published formats need, in models: the laws, and what each setting computes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engrax.errors import UserError
from engrax.laws import LAWS, Subject
from engrax.layers import AttentionConfig
from engrax.layers.attention.rope import RopeScaling, rotate
from engrax.layers.delta.gated_deltanet import GatedDeltaNetConfig
from engrax.layers.linear.hgrn2 import HGRN2Config
from engrax.layers.linear.mamba2 import Mamba2Config
from engrax.models import LanguageModelConfig
from engrax.models.block_style import BlockStyleConfig

LINEAR = GatedDeltaNetConfig.examples()[0]
GATED = AttentionConfig(
    heads=2, head_dim=8, capacity=64, qk_norm_eps=1e-6, qk_norm="all", output_gate=True, rope_fraction=0.5
)
YARN = RopeScaling("yarn", factor=4.0, original_context=16, beta_fast=4.0, magnitude=1.2)
SUBJECTS = {
    "hybrid": ((LINEAR, GATED), ("before", "branch")),
    "others": (
        (
            Mamba2Config(value_heads=2, head_dim=4, value_dim=4, chunk_size=8, conv_bias=True),
            HGRN2Config(heads=2, head_dim=4, chunk_size=8, bounded=False, conv_width=4),
            AttentionConfig(heads=2, head_dim=8, window=8, rope_scaling=YARN),
        ),
        (),
    ),
}


@functools.lru_cache(maxsize=1)
def subject(name: str) -> Subject:
    mixers, places = SUBJECTS[name]
    layout = BlockStyleConfig(norm_places=places)
    return Subject(LanguageModelConfig(vocab_size=16, dim=8, mixers=mixers, repeat=1, mlp_hidden=12, layout=layout))


LONG_ROWS = "stability.long"  # not run: attention without a window has a capacity


@pytest.mark.long
@pytest.mark.parametrize("name, law", [(name, law) for name in SUBJECTS for law in LAWS if law != LONG_ROWS])
def test_the_laws(name, law, x64):
    """The laws of models with these settings; examples of the mixers and of the model have them too."""
    LAWS[law](subject(name))


def apply(config, x, seed=0):
    """(the output of a mixer with random parameters, its module)."""
    mixer = config.build(x.shape[-1], rngs=nnx.Rngs(seed))
    state = nnx.state(mixer, nnx.Param)
    keys = jax.random.split(jax.random.key(seed), len(nnx.to_flat_state(state)))
    for key, (_, leaf) in zip(keys, nnx.to_flat_state(state)):
        leaf.set_value(leaf.get_value() + 0.3 * jax.random.normal(key, leaf.shape))
    nnx.update(mixer, state)
    return mixer(x)[0], mixer


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(5), (1, 6, 8))


def test_an_attention_gate_multiplies_the_read(x):
    """When the gate's logits are 0, then the output is half of that without a gate."""
    config = AttentionConfig(heads=2, head_dim=4, output_gate=True)
    _, mixer = apply(config, x)
    plain = dataclasses.replace(config, output_gate=False).build(8, rngs=nnx.Rngs(0))
    flat = nnx.to_flat_state(nnx.state(mixer, nnx.Param))
    nnx.update(plain, nnx.from_flat_state((path, leaf) for path, leaf in flat if path[0] != "gate"))
    mixer.gate.kernel[...] = jnp.zeros((8, 8))
    np.testing.assert_allclose(2 * mixer(x)[0], plain(x)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_norms_of_queries_go_over_a_head_or_over_all(x):
    config = AttentionConfig(heads=2, kv_heads=1, head_dim=4, qk_norm_eps=1e-6)
    _, by_head = apply(config, x)
    _, over_all = apply(dataclasses.replace(config, qk_norm="all"), x)
    assert by_head.q_norm.scale.shape == by_head.k_norm.scale.shape == over_all.k_norm.scale.shape == (4,)
    assert over_all.q_norm.scale.shape == (8,)
    y = np.asarray(jax.random.normal(jax.random.key(1), (1, 3, 2, 4)))
    wanted = y / np.sqrt((y.reshape(1, 3, 8) ** 2).mean(-1) + 1e-6)[..., None, None]
    np.testing.assert_allclose(
        over_all._normed(jnp.asarray(y), "q_norm") / over_all.q_norm.scale[...].reshape(2, 4), wanted, rtol=1e-4
    )


def test_a_part_of_a_head_may_be_rotated():
    y, places = jax.random.normal(jax.random.key(2), (1, 3, 1, 8)), jnp.arange(3)[None]
    turned = rotate(y, places, 100.0, width=4)
    np.testing.assert_array_equal(turned[..., 4:], y[..., 4:])
    np.testing.assert_allclose(turned[..., :4], rotate(y[..., :4], places, 100.0), rtol=1e-6)
    with pytest.raises(UserError, match="rope_fraction=0.1 must lie"):
        AttentionConfig(head_dim=8, rope_fraction=0.1)


def test_longrope_chooses_by_the_declared_length():
    scaling = RopeScaling("longrope", original_context=16, short_factors=(1.0, 2.0), long_factors=(4.0, 8.0))
    frequency = np.array([1.0, 0.5])
    np.testing.assert_allclose(scaling.apply(frequency, 16), [1.0, 0.25])
    for length in (17, None):
        np.testing.assert_allclose(scaling.apply(frequency, length), [0.25, 0.0625])
    with pytest.raises(UserError, match="2 long_factors for 3 rotated pairs"):
        scaling.apply(np.ones(3))


def test_yarn_keeps_what_turns_fast_and_slows_the_rest():
    frequency = 10_000.0 ** (-np.arange(32) / 32)
    scaled = RopeScaling("yarn", factor=8.0, original_context=4096).apply(frequency)
    turns = 4096 * frequency / (2 * np.pi)
    assert np.all(scaled[turns > 40] == frequency[turns > 40])
    np.testing.assert_allclose(scaled[turns < 0.8], frequency[turns < 0.8] / 8)
    between = scaled[(turns < 20) & (turns > 2)] / frequency[(turns < 20) & (turns > 2)]
    assert np.all((between > 1 / 8) & (between < 1)) and np.all(np.diff(between) < 0)


@pytest.mark.deep
def test_epsilons_and_biases_are_where_they_are_said_to_be(x):
    base = dataclasses.replace(LINEAR, conv_bias=False, l2_eps=1e-12, norm_eps=1e-6)
    plain, _ = apply(base, x)
    for change in (dict(l2_eps=1.0), dict(norm_eps=1.0)):
        other, _ = apply(dataclasses.replace(base, **change), x)
        assert np.abs(other - plain).max() > 1e-3, change
    _, mixer = apply(dataclasses.replace(base, conv_bias=True), x)
    mixer.conv.kernel[...] = jnp.zeros_like(mixer.conv.kernel[...])
    channels = sum(base.widths)
    y, _ = mixer.conv(jnp.ones((1, 2, channels)), jnp.ones((1, 3, channels)))
    np.testing.assert_array_equal(y[0, 1], mixer.conv.bias[...])


def test_a_place_of_norms_for_every_mixer_of_the_pattern():
    with pytest.raises(UserError, match="layout.norm_places has 1 entries for 2 mixers"):
        LanguageModelConfig(mixers=(LINEAR, GATED), layout=BlockStyleConfig(norm_places=("branch",)))
