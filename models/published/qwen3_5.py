"""Qwen 3.5, text alone: gated DeltaNet and gated full attention. Read by transformers, vLLM and SGLang.

Its norms multiply by 1 + w. Its attention always has a gate: for a model without one the gate's rows are 0, so that it
is 1/2 everywhere, and the output projection is doubled, which is exact.
"""

import dataclasses
from typing import Any

from engrax.layers.attention.attention import AttentionConfig
from engrax.layers.delta.gated_deltanet import GatedDeltaNetConfig
from engrax.models.block_style import BlockStyleConfig
from engrax.models.language_model import LanguageModelConfig
from engrax.models.published.common import head_dim_of, of_kind, of_layers
from engrax.models.published.fields import CAPACITY, EPS_NOTE, SMALL_EPS, Fields
from engrax.models.published.llama import rotary_fields, self_attention
from engrax.models.published.tables import Format, Part, Table, embeddings, gated_mlp, linear, norm, plain, taps

KINDS = ("linear_attention", "full_attention")


def read(fields: Fields) -> LanguageModelConfig:
    layers, heads = fields.layers(), fields.take("num_attention_heads", 16)
    dim, eps, every = fields.take("hidden_size"), read_eps(fields), fields.take("full_attention_interval", 4)
    kinds = fields.kinds(layers, KINDS, tuple(KINDS[(i + 1) % every == 0] for i in range(layers)))
    width = head_dim_of(fields, dim, heads, 256)
    attention = AttentionConfig(
        heads=heads,
        kv_heads=fields.take("num_key_value_heads", 4),
        head_dim=width,
        **fields.rope(width, 0.25),
        capacity=min(fields.take("max_position_embeddings", CAPACITY), CAPACITY),
        bias="all" if fields.take("attention_bias", False) else "none",
        qk_norm_eps=eps,
        output_gate=True,
    )
    linear_layer = read_linear(fields, heads=16, value_heads=32, head_dim=128, value_dim=128, norm_eps=eps)
    return of_layers(
        [attention if kind == KINDS[1] else linear_layer for kind in kinds],
        BlockStyleConfig(norm_eps=eps, activation=silu(fields), tied=fields.take("tie_word_embeddings", False)),
        vocab_size=fields.take("vocab_size"),
        dim=dim,
        mlp_hidden=fields.take("intermediate_size"),
    )


def read_eps(fields: Fields) -> float:
    return float(fields.take("rms_norm_eps", 1e-6))


def silu(fields: Fields) -> str:
    """The activation of MLPs, which is also that of the convolutions, where engrax has no other."""
    return fields.choose("hidden_act", {"silu": "silu", "swish": "silu"}, "silu")


def read_linear(fields: Fields, *, heads: int, value_heads: int, head_dim: int, value_dim: int, norm_eps: float):
    """The settings of the linear layers; the arguments are the family's defaults."""
    return GatedDeltaNetConfig(
        heads=fields.take("linear_num_key_heads", heads),
        value_heads=fields.take("linear_num_value_heads", value_heads),
        head_dim=fields.take("linear_key_head_dim", head_dim),
        value_dim=fields.take("linear_value_head_dim", value_dim),
        conv_width=fields.take("linear_conv_kernel_dim", 4),
        norm_eps=norm_eps,
        l2_eps=SMALL_EPS,
    )


def write(config: LanguageModelConfig) -> dict[str, Any]:
    attention = of_kind(config, AttentionConfig) or AttentionConfig()
    eps = config.layout.norm_eps
    written = rotary_fields(config, attention) | write_linear(config) | {"rms_norm_eps": eps}
    partial = {"partial_rotary_factor": attention.rope_fraction}
    return written | {
        "attention_bias": attention.bias == "all",
        "layer_types": layer_types(config),
        "use_cache": of_kind(config, AttentionConfig) is not None,  # without it transformers 5 has no cache that works
        "rope_parameters": written["rope_parameters"] | partial,
    }


def layer_types(config: LanguageModelConfig) -> list[str]:
    return [KINDS[type(mixer) is AttentionConfig] for mixer in config.mixers] * config.repeat


def write_linear(config: LanguageModelConfig) -> dict[str, Any]:
    """The fields of `read_linear`, nothing if there are no such layers."""
    mixer = of_kind(config, GatedDeltaNetConfig)
    if mixer is None:
        return {}
    return {
        "linear_num_key_heads": mixer.heads,
        "linear_num_value_heads": mixer.values[0],
        "linear_key_head_dim": mixer.head_dim,
        "linear_value_head_dim": mixer.values[1],
        "linear_conv_kernel_dim": mixer.conv_width,
    }


def block(config, place, stored) -> Table:
    mixer = config.mixers[place]
    shared = norm("layers.{}.input_layernorm", "mixer_norm", -1.0) | gated_mlp("layers.{}.mlp")
    shared |= norm("layers.{}.post_attention_layernorm", "mlp_norm", -1.0)
    return shared | (_attention(mixer) if type(mixer) is AttentionConfig else _linear())


def _linear() -> Table:
    prefix = "layers.{}.linear_attn"
    return (
        linear(f"{prefix}.in_proj_qkv", "mixer.qkv")
        | linear(f"{prefix}.in_proj_z", "mixer.gate")
        | linear(f"{prefix}.in_proj_b", "mixer.beta")
        | linear(f"{prefix}.in_proj_a", "mixer.decay.project")
        | taps(f"{prefix}.conv1d", Part("mixer.conv"))
        | plain(f"{prefix}.A_log", "mixer.decay.log_rate")
        | plain(f"{prefix}.dt_bias", "mixer.decay.bias", "flat")
        | norm(f"{prefix}.norm", "mixer.norm")
        | linear(f"{prefix}.out_proj", "mixer.out")
    )


def _attention(mixer: AttentionConfig) -> Table:
    prefix, width = "layers.{}.self_attn", mixer.heads * mixer.head_dim
    gate = Part("mixer.gate" if mixer.output_gate else None, (0, width))
    found = self_attention(prefix) | linear(f"{prefix}.q_proj", Part("mixer.q", (0, width)), gate)
    found |= norm(f"{prefix}.q_norm", "mixer.q_norm", -1.0) | norm(f"{prefix}.k_norm", "mixer.k_norm", -1.0)
    for name, tensor in found.items():
        if ".q_proj." in name:
            found[name] = dataclasses.replace(tensor, group=mixer.head_dim)
        if ".o_proj.weight" in name and not mixer.output_gate:
            found[name] = dataclasses.replace(tensor, scale=2.0)
    return found


FORMAT = Format(
    name="qwen3_5_text",
    architecture="Qwen3_5ForCausalLM",
    library="transformers",
    mixers=(GatedDeltaNetConfig, AttentionConfig),
    read=read,
    write=write,
    outside=embeddings("embed_tokens.weight", "norm", -1.0),
    block=block,
    prefixes=("model.", "model.language_model."),
    others=("mtp.", "model.visual."),
    notes={
        "gated_deltanet.l2_eps": EPS_NOTE,
        "attention.output_gate": "attention without a gate is written with one of 1/2, and its output doubled",
    },
)
