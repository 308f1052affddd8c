"""OLMo hybrid: gated DeltaNet after a norm, and full attention with norms on its branches and over all heads.

Written with the names and sizes that both transformers and vLLM read. What transformers 5 itself saves has other names
of norms, and cuts the joint convolution into three equal parts; it is read too.
"""

import dataclasses
from typing import Any

from engrax.layers.attention.attention import AttentionConfig
from engrax.layers.delta.gated_deltanet import GatedDeltaNetConfig
from engrax.models.block_style import BlockStyleConfig
from engrax.models.language_model import LanguageModelConfig
from engrax.models.published.common import head_dim_of, of_kind, of_layers, qkv
from engrax.models.published.fields import CAPACITY, EPS_NOTE, Fields
from engrax.models.published.llama import rotary_fields, self_attention
from engrax.models.published.qwen3_5 import KINDS, layer_types, read_eps, read_linear, silu, write_linear
from engrax.models.published.tables import Format, Shapes, Table, embeddings, gated_mlp, linear, norm, plain

NORM_EPS = 1e-5  # of the read of a linear layer, whatever config.json says
PLACES = {KINDS[0]: "before", KINDS[1]: "branch"}


def read(fields: Fields) -> LanguageModelConfig:
    layers, heads = fields.layers(), fields.take("num_attention_heads")
    dim, eps = fields.take("hidden_size"), read_eps(fields)
    kinds = fields.kinds(layers, KINDS, tuple(KINDS[(i + 1) % 4 == 0] for i in range(layers)))
    fields.require("layer_types", len(set(kinds)) == 2, "at least one layer of each kind")
    width = head_dim_of(fields, dim, heads)
    attention = AttentionConfig(
        heads=heads,
        kv_heads=fields.take("num_key_value_heads", heads),
        head_dim=width,
        **fields.rope(width, can_be_none=True),
        capacity=min(fields.take("max_position_embeddings", CAPACITY), CAPACITY),
        bias="all" if fields.take("attention_bias", False) else "none",
        qk_norm_eps=eps,
        qk_norm="all",
    )
    key = fields.take("linear_key_head_dim", int(0.75 * dim / heads))
    linear_layer = read_linear(
        fields, heads=heads, value_heads=heads, head_dim=key, value_dim=2 * key, norm_eps=NORM_EPS
    )
    if fields.take("linear_allow_neg_eigval", True):
        linear_layer = dataclasses.replace(linear_layer, max_beta=2.0)
    fields.ignore("linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max", "linear_dt_init_floor")
    return of_layers(
        [attention if kind == KINDS[1] else linear_layer for kind in kinds],
        BlockStyleConfig(norm_eps=eps, activation=silu(fields), tied=fields.take("tie_word_embeddings", False)),
        [PLACES[kind] for kind in kinds],
        vocab_size=fields.take("vocab_size"),
        dim=dim,
        mlp_hidden=fields.take("intermediate_size"),
    )


def write(config: LanguageModelConfig) -> dict[str, Any]:
    attention, mixer = of_kind(config, AttentionConfig), of_kind(config, GatedDeltaNetConfig)
    written = write_linear(config) | {"layer_types": layer_types(config)}
    if mixer is not None:
        written["linear_allow_neg_eigval"] = mixer.max_beta == 2
    attention = attention or AttentionConfig()
    return written | rotary_fields(config, attention) | {"attention_bias": attention.bias == "all"}


def block(config, place, stored) -> Table:
    older = any(name.endswith("attention_layer_norm.weight") for name in stored)
    mixer, prefix, mlp = config.mixers[place], "layers.{}", gated_mlp("layers.{}.mlp")
    if type(mixer) is AttentionConfig:
        first = "feedforward_layer_norm" if older else "post_attention_layernorm"
        norms = norm(f"{prefix}.{first}", "mixer_norm") | norm(f"{prefix}.post_feedforward_layernorm", "mlp_norm")
        return norms | self_attention() | mlp
    names = ("attention_layer_norm", "feedforward_layer_norm")
    first, second = names if older else ("input_layernorm", "post_attention_layernorm")
    norms = norm(f"{prefix}.{first}", "mixer_norm") | norm(f"{prefix}.{second}", "mlp_norm")
    return norms | _linear(mixer, stored) | mlp


def _linear(mixer: GatedDeltaNetConfig, stored: Shapes) -> Table:
    prefix, total = "layers.{}.linear_attn", sum(mixer.widths)
    third = -(-total // 3)
    cut = [shape[:1] for name, shape in stored.items() if name.endswith("linear_attn.q_conv1d.weight")]
    equal = (third,) in cut
    cuts = (third, third, total - 2 * third) if equal else mixer.widths
    found = qkv(mixer, prefix=f"{prefix}.", taps_of=cuts)
    return (
        found
        | linear(f"{prefix}.a_proj", "mixer.decay.project")
        | linear(f"{prefix}.b_proj", "mixer.beta")
        | linear(f"{prefix}.g_proj", "mixer.gate")
        | plain(f"{prefix}.A_log", "mixer.decay.log_rate")
        | plain(f"{prefix}.dt_bias", "mixer.decay.bias", "flat")
        | norm(f"{prefix}.o_norm", "mixer.norm")
        | linear(f"{prefix}.o_proj", "mixer.out")
    )


FORMAT = Format(
    name="olmo_hybrid",
    architecture="OlmoHybridForCausalLM",
    library="transformers",
    mixers=(GatedDeltaNetConfig, AttentionConfig),
    read=read,
    write=write,
    outside=embeddings("embed_tokens.weight", "norm"),
    block=block,
    prefixes=("model.",),
    notes={"gated_deltanet.l2_eps": EPS_NOTE},
)
