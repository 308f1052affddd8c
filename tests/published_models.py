"""Random tiny models of every published format, as engrax builds them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from engrax.layers import AttentionConfig
from engrax.layers.attention.rope import RopeScaling
from engrax.layers.delta.deltanet import DeltaNetConfig
from engrax.layers.delta.gated_deltanet import GatedDeltaNetConfig
from engrax.layers.delta.kda import KDAConfig
from engrax.layers.linear.gla import GLAConfig
from engrax.layers.linear.gsa import GSAConfig
from engrax.layers.linear.hgrn2 import HGRN2Config
from engrax.layers.linear.linear_attention import LinearAttentionConfig
from engrax.layers.linear.mamba2 import Mamba2Config
from engrax.layers.linear.retnet import RetNetConfig
from engrax.layers.routed.mom import MoMConfig
from engrax.models import LanguageModelConfig
from engrax.models.block_style import BlockStyleConfig

TOKENS = np.random.default_rng(3).integers(0, 40, (2, 21))
TIED, OPEN = BlockStyleConfig(), BlockStyleConfig(tied=False)
ATTENTION = AttentionConfig(heads=4, kv_heads=2, head_dim=8, capacity=128)
NORMED = dataclasses.replace(ATTENTION, qk_norm_eps=1e-6)
GATED = dataclasses.replace(NORMED, output_gate=True, rope_fraction=0.5)
SMALL = dict(heads=2, value_heads=4, head_dim=8, value_dim=12, chunk_size=8, conv_width=4)
GDN = GatedDeltaNetConfig(**SMALL, l2_eps=1e-6)
PLAIN = AttentionConfig(heads=4, head_dim=4, capacity=128, rope_base=None, bias="all")
OLMO = dataclasses.replace(NORMED, head_dim=6, rope_base=None, qk_norm="all")
YARN = RopeScaling("yarn", factor=4.0, original_context=16, beta_fast=4.0, magnitude=1.2)
LONG = RopeScaling("longrope", original_context=16, short_factors=(1.0, 1.5), long_factors=(2.0, 5.0), magnitude=1.1)
FLA_ATTENTION = AttentionConfig(heads=2, kv_heads=1, head_dim=8, window=5, capacity=128, bias="qkv")


def model(*mixers, layout=TIED, **sizes) -> LanguageModelConfig:
    return LanguageModelConfig(
        mixers=mixers, layout=layout, **dict(vocab_size=40, dim=16, repeat=2, mlp_hidden=24) | sizes
    )


CONFIGS: dict[str, tuple[str, LanguageModelConfig]] = {  # name -> (format, config)
    "llama": ("llama", model(ATTENTION, layout=OPEN)),
    "llama_yarn": ("llama", model(dataclasses.replace(ATTENTION, rope_scaling=YARN))),
    "llama_longrope": ("llama", model(dataclasses.replace(ATTENTION, head_dim=4, rope_scaling=LONG))),
    "mistral": ("mistral", model(dataclasses.replace(ATTENTION, window=5))),
    "qwen2": ("qwen2", model(dataclasses.replace(ATTENTION, bias="qkv"))),
    "qwen3": ("qwen3", model(dataclasses.replace(NORMED, window=5), NORMED)),
    "gpt2": (
        "gpt2",
        model(
            PLAIN,
            layout=BlockStyleConfig("layer", 1e-5, mlp="plain", activation="gelu_tanh", mlp_bias=True, positions=128),
        ),
    ),
    "qwen3_5": ("qwen3_5_text", model(GDN, GATED, layout=OPEN)),
    "qwen3_5_plain": ("qwen3_5_text", model(dataclasses.replace(GDN, value_heads=2, l2_eps=1e-12), NORMED)),
    "qwen3_5_linear": ("qwen3_5_text", model(GDN)),
    "olmo": (
        "olmo_hybrid",
        model(
            dataclasses.replace(GDN, norm_eps=1e-5, max_beta=2.0),
            OLMO,
            layout=BlockStyleConfig(norm_places=("before", "branch"), tied=False),
        ),
    ),
    "olmo_rotary": (
        "olmo_hybrid",
        model(
            dataclasses.replace(GDN, norm_eps=1e-5, value_heads=2),
            dataclasses.replace(OLMO, rope_base=10_000.0),
            layout=BlockStyleConfig(norm_places=("before", "branch")),
        ),
    ),
    "mamba2": (
        "mamba2",
        model(Mamba2Config(value_heads=4, head_dim=6, value_dim=8, chunk_size=8, conv_bias=True), mlp_hidden=0),
    ),
    "gated_deltanet": ("gated_deltanet", model(GDN, layout=OPEN)),
    "gated_deltanet_hybrid": (
        "gated_deltanet",
        model(dataclasses.replace(GDN, max_beta=2.0), FLA_ATTENTION, dataclasses.replace(FLA_ATTENTION, window=None)),
    ),
    "gated_deltanet_bare": (
        "gated_deltanet",
        model(
            dataclasses.replace(GDN, value_heads=2, conv_width=1, output_gate=False, norm_eps=1e-5),
            layout=BlockStyleConfig(norm_eps=1e-5),
        ),
    ),
    "delta_net": (
        "delta_net",
        model(DeltaNetConfig(heads=2, head_dim=8, value_dim=16, chunk_size=8, output_gate=True, l2_eps=1e-6)),
    ),
    "gla": ("gla", model(GLAConfig(heads=2, head_dim=4, value_dim=8, chunk_size=8))),
    "gla_conv": (
        "gla",
        model(GLAConfig(heads=2, head_dim=4, value_dim=8, chunk_size=8, conv_width=4, output_gate=False)),
    ),
    "linear_attn": (
        "linear_attn",
        model(LinearAttentionConfig(heads=2, head_dim=4, value_dim=8, chunk_size=8, normalise=False)),
    ),
    "retnet": ("retnet", model(RetNetConfig(heads=2, head_dim=8, value_dim=16, chunk_size=8))),
    "hgrn2": (
        "hgrn2",
        model(HGRN2Config(heads=2, head_dim=8, chunk_size=8, bounded=False, norm_eps=1e-5, conv_width=4)),
    ),
    "gsa": ("gsa", model(GSAConfig(heads=2, head_dim=8, chunk_size=8, slots=5, norm_eps=1e-5))),
    "kda": (
        "kda",
        model(KDAConfig(heads=2, value_heads=4, head_dim=8, value_dim=12, gate_rank=12, chunk_size=8, l2_eps=1e-6)),
    ),
    "mom": (
        "mom",
        model(MoMConfig(base=dataclasses.replace(GDN, value_heads=2), memories=3)),
    ),
    "mom_one": (
        "mom",
        model(MoMConfig(base=dataclasses.replace(GDN, value_heads=2), memories=3, shared=False, own_projections=False)),
    ),
}


def build(config: LanguageModelConfig, seed: int = 0):
    """The module with random parameters of which every one matters; norms lie between 0.5 and 2."""
    made = config.build(rngs=nnx.Rngs(seed))
    state, rng = nnx.state(made, nnx.Param), np.random.default_rng(seed)
    for path, leaf in nnx.to_flat_state(state):
        noise = rng.standard_normal(leaf.shape)
        name = path[-1]
        value = noise * 0.35
        if name == "scale":
            value = np.clip(1 + 0.3 * noise, 0.5, 2)
        if name in ("log_rate", "skip") or "conv" in path:
            value = 0.6 * noise
        leaf.set_value(jnp.asarray(value, jnp.float32))
    nnx.update(made, state)
    return made


def parameters(module) -> dict[str, np.ndarray]:
    """The module's parameters by name."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in flat}


def logits(module, tokens=TOKENS) -> np.ndarray:
    """The logits [B, T, V] of rows of tokens."""

    def run(params, tokens):
        made = nnx.merge(graph, params)
        return made.logits(made(tokens)[0])

    graph, params = nnx.split(module, nnx.Param)
    return np.asarray(jax.jit(run)(params, jnp.asarray(tokens, jnp.int32)))
