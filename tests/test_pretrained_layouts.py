"""The layouts of imported models as trainable models: the laws with learned positions, adapters, frozen parameters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engrax.errors import UserError
from engrax.laws import LAWS, Subject
from engrax.layers import AttentionConfig, MoMConfig
from engrax.layers.common import lora
from engrax.layers.common.lora import LoraConfig
from engrax.models import ARMTConfig, HMTConfig, LanguageModelConfig, ModelConfig, imported
from engrax.models.block_style import BlockStyleConfig
from engrax.tests import pretrained_numpy as oracle
from engrax.tests.law_cases import OWN_PROGRAMS
from engrax.tests.test_pretrained import TOKENS, logits_of

ATTENTION = AttentionConfig(heads=2, head_dim=4, capacity=64, rope_base=None)
# silu: gelu is exactly 0 far below 0, and at the laws' large parameters whole units would have no gradient.
PLAIN = BlockStyleConfig(norm="layer", mlp="plain", activation="silu", mlp_bias=True, positions=40)
LAYOUTS = {
    "opt_after": dataclasses.replace(PLAIN, norm_place="after", unused_positions=2, embed_dim=4),
    "gpt2": PLAIN,
}
BIASES = {"opt_after": "none", "gpt2": "all"}
# Rows of the table that no segment reaches have no gradient; a table ends; no softmax feels a bias of all keys, so that
# its gradient is rounding alone.
EXEMPT = {
    "opt_after": ("trainability.gradients", "stability.long"),
    "gpt2": ("trainability.gradients", "stability.long", "trainability.finite_differences"),
}
FAST = ("causality.finite_change", "packing.apart", "state_carry.steps", "padding.content")


@functools.lru_cache(maxsize=1)
def subject(name: str) -> Subject:
    sizes = dict(vocab_size=16, dim=8, repeat=2, mlp_hidden=12)
    attention = dataclasses.replace(ATTENTION, bias=BIASES[name])
    return Subject(LanguageModelConfig(mixers=(attention,), layout=LAYOUTS[name], **sizes))


def _case(name: str, law: str):
    quick = name == "opt_after" and law in FAST
    marks = [] if quick else [pytest.mark.long if law in OWN_PROGRAMS else pytest.mark.deep]
    return pytest.param(name, law, marks=marks, id=f"{name}-{law}")


@pytest.mark.parametrize("name, law", [_case(n, law) for n in LAYOUTS for law in LAWS if law not in EXEMPT[n]])
def test_learned_positions_obey_the_laws(name, law, x64):
    LAWS[law](subject(name))


@pytest.mark.deep
@pytest.mark.parametrize("name", LAYOUTS)
def test_learned_positions_have_gradients_where_segments_reach(name, x64):
    s = subject(name)
    longest = max(int(np.sum(np.asarray(row) == i)) for row in s.ids for i in np.unique(row) if i >= 0)
    unused = LAYOUTS[name].unused_positions
    for path, g in nnx.to_flat_state(s.pullback(s.params, s.x, s.ids, s.weights)):
        g = np.asarray(g.get_value())
        if path[-1] == "table":
            used = np.arange(len(g)) - unused
            reached = (used >= 0) & (used < longest)
            assert np.all(g[reached] != 0) and not np.any(g[~reached])
        elif path[-2:] != ("k", "bias"):
            assert np.all(np.isfinite(g)) and np.all(g != 0), path


def test_a_segment_beyond_the_table_spoils_nothing_but_its_own_end():
    layout = dataclasses.replace(LAYOUTS["opt_after"], positions=5)
    model = LanguageModelConfig(vocab_size=16, dim=8, mixers=(ATTENTION,), repeat=1, mlp_hidden=12, layout=layout)
    model, ids = model.build(rngs=nnx.Rngs(0)), jnp.asarray([[0, 0, 1, 1, 1, 1, 1, 1]])
    run = jax.jit(lambda tokens, ids, memory: model(tokens, memory, segment_ids=ids)[:2])
    hidden, memory = run(TOKENS[:1, :8] % 16, ids, None)
    lost = np.isnan(hidden).all(axis=-1)
    np.testing.assert_array_equal(lost, [[False] * 7 + [True]])
    np.testing.assert_array_equal(np.isnan(hidden).any(axis=-1), lost)
    goes_on = jnp.asarray([[1, 2, 2, -1, -1, -1, -1, -1]])
    hidden, _ = run(TOKENS[:1, :8] % 16, goes_on, memory)
    np.testing.assert_array_equal(np.isnan(hidden).any(axis=-1), [[True] + [False] * 7])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Qwen3 checkpoint."""
    path = tmp_path_factory.mktemp("qwen3")
    oracle.write_checkpoint(path, oracle.CONFIGS["qwen3"], oracle.random_tensors(oracle.CONFIGS["qwen3"]))
    return path


def adapted(folder, **fields):
    adapters = LoraConfig(rank=2, alpha=4.0, targets=("q", "v", "down"))
    return dataclasses.replace(imported.read_config(folder), lora=adapters, **fields)


def trained(model, seed=0):
    """The model with adapters as training might leave them."""
    rng = np.random.default_rng(seed)
    state = nnx.state(model, nnx.Param)
    for path, leaf in nnx.to_flat_state(state):
        if str(path[-1]).startswith("lora_"):
            leaf.set_value(jnp.asarray(rng.standard_normal(leaf.shape) * 0.3, jnp.float32))
    nnx.update(model, state)
    return model


def test_adapters_start_as_nothing_and_merge_into_the_kernels(folder, tmp_path):
    base, model = imported.load(folder), imported.load(folder, adapted(folder))
    wanted = logits_of(base, TOKENS)
    np.testing.assert_array_equal(logits_of(model, TOKENS), wanted)
    changed = logits_of(trained(model), TOKENS)
    assert np.abs(changed - wanted).max() > 0.1
    merged = imported.merge(model)
    names = {path[-1] for path, _ in nnx.to_flat_state(nnx.state(merged, nnx.Param))}
    assert names == {path[-1] for path, _ in nnx.to_flat_state(nnx.state(base, nnx.Param))}
    np.testing.assert_allclose(logits_of(merged, TOKENS), changed, rtol=0, atol=1e-5 * np.abs(changed).max())
    imported.export(model, tmp_path / "out", like=folder)
    np.testing.assert_array_equal(logits_of(imported.load(tmp_path / "out"), TOKENS), logits_of(merged, TOKENS))


def test_adapters_cost_a_multiply_add_for_each_entry(folder):
    base, config = imported.read_config(folder), adapted(folder)
    entries = 3 * 2 * ((16 + 24) + (16 + 12) + (24 + 16))  # layers x rank x (inputs + outputs) of q, v and down
    assert config.flops_per_token(32) - base.flops_per_token(32) == 2 * entries


def test_an_adapter_is_the_scaled_product_of_its_matrices():
    linear = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    layer = lora.LoraLinear(linear, LoraConfig(rank=3, alpha=6.0), rngs=nnx.Rngs(1))
    layer.lora_b[...] = jax.random.normal(jax.random.key(2), (3, 5))
    x = jax.random.normal(jax.random.key(3), (4, 6))
    wanted = linear(x) + 2.0 * x @ layer.lora_a[...] @ layer.lora_b[...]
    np.testing.assert_allclose(layer(x), wanted, atol=1e-5)


def test_targets_must_name_projections(folder):
    config = dataclasses.replace(imported.read_config(folder), lora=LoraConfig(rank=2, targets=("q", "gates")))
    with pytest.raises(UserError, match="'gates', but no projection.*did you mean 'gate'"):
        imported.load(folder, config)


def _shapes(config):
    return nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("target", ["router", "key_value"])
def test_targets_must_be_matrices_that_their_mixer_calls(target):
    config = LanguageModelConfig(vocab_size=16, dim=8, mixers=MoMConfig.examples()[:1], repeat=2, mlp_hidden=12)
    with pytest.raises(UserError, match=f"names '{target}', but this projection of MoM cannot have an adapter"):
        _shapes(dataclasses.replace(config, lora=LoraConfig(rank=2, targets=("out", target))))
    blocks = _shapes(dataclasses.replace(config, lora=LoraConfig(rank=2, targets=("query", "out", "down")))).blocks
    mixer = blocks[0].mixer
    assert all(isinstance(p, lora.LoraLinear) for p in (mixer.query, mixer.base.out, blocks[0].mlp.down))


def test_targets_must_belong_to_the_backbone(folder):
    """The memories that ARMT adds to the blocks are trained whole: they get no adapters."""
    backbone = dataclasses.replace(imported.read_config(folder), lora=LoraConfig(rank=2, targets=("q", "beta")))
    with pytest.raises(UserError, match="'beta', but no projection of the model has this name"):
        _shapes(ARMTConfig(backbone=backbone))


def test_a_wrapped_backbone_is_found_filled_and_frozen(folder):
    """What HMT adds around the backbone, and ARMT inside its blocks, is neither the checkpoint's nor frozen."""
    config = imported.read_config(folder)
    source = dict(nnx.to_flat_state(nnx.state(imported.load(folder), nnx.Param)))
    for wrapper in (HMTConfig, ARMTConfig):
        wrapped = wrapper(backbone=dataclasses.replace(config, frozen=True))
        found, at = imported.find_backbone(wrapped)
        imported.check(folder, found)
        state = nnx.state(nnx.eval_shape(lambda w=wrapped: w.build(rngs=nnx.Rngs(0))), nnx.Param)
        like = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), state)
        params = imported.read_params(folder, like, at=at)
        assert {path[len(at) :] for path in params} == set(source)
        for path, value in params.items():
            np.testing.assert_array_equal(value, source[path[len(at) :]].get_value())
        frozen = {path for path, leaf in nnx.to_flat_state(state) if lora.is_frozen(leaf)}
        assert frozen == set(params) and len(nnx.to_flat_state(state)) > len(frozen)
    with pytest.raises(UserError, match="wraps none"):
        imported.find_backbone(ModelConfig())


def test_frozen_parameters_are_marked_and_adapters_are_not(folder):
    model = imported.load(folder, adapted(folder, frozen=True))
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        assert lora.is_frozen(leaf) is not str(path[-1]).startswith("lora_"), path
    model = imported.load(folder, adapted(folder))
    assert not any(lora.is_frozen(leaf) for _, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)))
