"""Llama, and the models of its layout: Mistral (windows), Qwen 2 (biases), Qwen 3 (q/k norms, windows by layer)."""

import dataclasses
from typing import Any

from engrax.layers.attention.attention import AttentionConfig
from engrax.models.block_style import BlockStyleConfig
from engrax.models.language_model import LanguageModelConfig
from engrax.models.published.common import head_dim_of, of_layers
from engrax.models.published.fields import ACTIVATIONS, CAPACITY, Fields, rope_fields
from engrax.models.published.tables import Format, embeddings, gated_mlp, linear, norm

ACTIVATION = {"silu": "silu", "relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
KINDS = ("full_attention", "sliding_attention")


def _read_llama(fields: Fields) -> LanguageModelConfig:
    biased = fields.take("attention_bias", False)
    return _rotary(fields, bias="all" if biased else "none", mlp_bias=fields.take("mlp_bias", False))


def _read_mistral(fields: Fields) -> LanguageModelConfig:
    window = fields.optional("sliding_window") if fields.has("sliding_window") else 4096
    return _rotary(fields, bias="none", window=window)


def _read_qwen2(fields: Fields) -> LanguageModelConfig:
    return _windows(fields, lambda: _rotary(fields, bias="qkv"))


def _read_qwen3(fields: Fields) -> LanguageModelConfig:
    biased = fields.take("attention_bias", False)
    return _windows(fields, lambda: _rotary(fields, bias="all" if biased else "none", head_dim=128, qk_norm=True))


def _windows(fields: Fields, full) -> LanguageModelConfig:
    """The model with windows in the layers that have them; `full()` reads the rest."""
    used = fields.take("use_sliding_window", False)
    window, first = (fields.optional("sliding_window"), fields.take("max_window_layers", 28)) if used else (None, 0)
    config = full()
    layers = config.repeat
    by_default = tuple(KINDS[window is not None and i >= first] for i in range(layers))
    kinds = fields.kinds(layers, KINDS if window else KINDS[:1], by_default)
    attention = config.mixers[0]
    mixers = [dataclasses.replace(attention, window=window) if kind == KINDS[1] else attention for kind in kinds]
    rest = {name: getattr(config, name) for name in ("vocab_size", "dim", "mlp_hidden")}
    return of_layers(mixers, config.layout, **rest)


def _rotary(
    fields: Fields,
    *,
    bias: str,
    mlp_bias: bool = False,
    head_dim: int | None = None,
    qk_norm: bool = False,
    window: int | None = None,
) -> LanguageModelConfig:
    """Settings shared by Llama and related models; `head_dim` is the family's default, None = dim / heads."""
    dim, heads = fields.take("hidden_size"), fields.take("num_attention_heads")
    eps, width = float(fields.take("rms_norm_eps", 1e-6)), head_dim_of(fields, dim, heads, head_dim)
    attention = AttentionConfig(
        heads=heads,
        kv_heads=fields.take("num_key_value_heads", heads),
        head_dim=width,
        window=window,
        **fields.rope(width),
        capacity=min(fields.take("max_position_embeddings", CAPACITY), CAPACITY),
        bias=bias,
        qk_norm_eps=eps if qk_norm else None,
    )
    layout = BlockStyleConfig(
        norm_eps=eps,
        activation=fields.choose("hidden_act", ACTIVATIONS, "silu"),
        mlp_bias=mlp_bias,
        tied=fields.take("tie_word_embeddings", False),
    )
    return LanguageModelConfig(
        vocab_size=fields.take("vocab_size"),
        dim=dim,
        mixers=(attention,),
        repeat=fields.layers(),
        mlp_hidden=fields.take("intermediate_size"),
        layout=layout,
    )


def rotary_fields(config: LanguageModelConfig, attention: AttentionConfig) -> dict[str, Any]:
    """The fields of `_rotary`."""
    return {
        "hidden_size": config.dim,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads or attention.heads,
        "head_dim": attention.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": attention.capacity,
        "hidden_act": ACTIVATION[config.layout.activation],
        "rms_norm_eps": config.layout.norm_eps,
        "tie_word_embeddings": config.layout.tied,
    } | rope_fields(attention)


def _write_llama(config: LanguageModelConfig) -> dict[str, Any]:
    attention = config.mixers[0]
    biases = {"attention_bias": attention.bias == "all", "mlp_bias": config.layout.mlp_bias}
    return rotary_fields(config, attention) | biases


def _write_mistral(config: LanguageModelConfig) -> dict[str, Any]:
    return rotary_fields(config, config.mixers[0]) | {"sliding_window": config.mixers[0].window}


def _window_fields(config: LanguageModelConfig) -> dict[str, Any]:
    windows = [mixer.window for mixer in config.mixers]
    window = next((window for window in windows if window), None)
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "layer_types": [KINDS[window is not None] for window in windows] * config.repeat,
    }


def _write_qwen2(config: LanguageModelConfig) -> dict[str, Any]:
    return rotary_fields(config, config.mixers[0]) | _window_fields(config)


def _write_qwen3(config: LanguageModelConfig) -> dict[str, Any]:
    return _write_qwen2(config) | {"attention_bias": config.mixers[0].bias == "all"}


def self_attention(prefix: str = "layers.{}.self_attn") -> dict:
    """The four projections and two norms of attention."""
    return (
        linear(f"{prefix}.q_proj", "mixer.q")
        | linear(f"{prefix}.k_proj", "mixer.k")
        | linear(f"{prefix}.v_proj", "mixer.v")
        | linear(f"{prefix}.o_proj", "mixer.out")
        | norm(f"{prefix}.q_norm", "mixer.q_norm")
        | norm(f"{prefix}.k_norm", "mixer.k_norm")
    )


def _block(config, place, stored):
    norms = norm("layers.{}.input_layernorm", "mixer_norm") | norm("layers.{}.post_attention_layernorm", "mlp_norm")
    return norms | self_attention() | gated_mlp("layers.{}.mlp")


def _format(name: str, architecture: str, read, write) -> Format:
    return Format(
        name=name,
        architecture=architecture,
        library="transformers",
        mixers=(AttentionConfig,),
        read=read,
        write=write,
        outside=embeddings("embed_tokens.weight", "norm"),
        block=_block,
        prefixes=("model.",),
        skipped=(".rotary_emb.inv_freq",),
    )


FORMATS = (
    _format("llama", "LlamaForCausalLM", _read_llama, _write_llama),
    _format("mistral", "MistralForCausalLM", _read_mistral, _write_mistral),
    _format("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_qwen2),
    _format("qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen3),
)
