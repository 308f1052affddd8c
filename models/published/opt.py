"""OPT: like GPT-2, with two unused positions; norms before or after; projected embeddings (OPT-350M)."""

from typing import Any

from engrax.layers.attention.attention import AttentionConfig
from engrax.models.block_style import BlockStyleConfig
from engrax.models.language_model import LanguageModelConfig
from engrax.models.published.common import head_dim_of
from engrax.models.published.fields import ACTIVATIONS, Fields
from engrax.models.published.gpt2 import ACTIVATION
from engrax.models.published.tables import Format, embeddings, linear, norm, plain


def read(fields: Fields) -> LanguageModelConfig:
    dim, heads = fields.take("hidden_size"), fields.take("num_attention_heads")
    fields.demand("layer_norm_elementwise_affine", True)
    fields.demand("_remove_final_layer_norm", False)
    positions, bias = fields.take("max_position_embeddings"), fields.take("enable_bias", True)
    width = fields.take("word_embed_proj_dim", dim)
    attention = AttentionConfig(
        heads=heads,
        head_dim=head_dim_of(fields, dim, heads),
        capacity=positions,
        rope_base=None,
        bias="all" if bias else "none",
    )
    layout = BlockStyleConfig(
        norm="layer",
        norm_eps=1e-5,
        norm_place="before" if fields.take("do_layer_norm_before", True) else "after",
        mlp="plain",
        activation=fields.choose("activation_function", ACTIVATIONS, "relu"),
        mlp_bias=bias,
        positions=positions,
        unused_positions=2,
        embed_dim=None if width == dim else width,
        tied=fields.take("tie_word_embeddings", True),
    )
    return LanguageModelConfig(
        vocab_size=fields.take("vocab_size"),
        dim=dim,
        mixers=(attention,),
        repeat=fields.layers(),
        mlp_hidden=fields.take("ffn_dim"),
        layout=layout,
    )


def write(config: LanguageModelConfig) -> dict[str, Any]:
    layout = config.layout
    return {
        "hidden_size": config.dim,
        "num_attention_heads": config.mixers[0].heads,
        "num_hidden_layers": config.num_layers,
        "ffn_dim": config.mlp_width,
        "vocab_size": config.vocab_size,
        "word_embed_proj_dim": layout.embed_dim or config.dim,
        "max_position_embeddings": layout.positions,
        "activation_function": ACTIVATION[layout.activation],
        "do_layer_norm_before": layout.norm_place == "before",
        "enable_bias": layout.mlp_bias,
        "tie_word_embeddings": layout.tied,
        "dropout": 0.0,
    }


def block(config, place, stored):
    return (
        linear("layers.{}.self_attn.q_proj", "mixer.q")
        | linear("layers.{}.self_attn.k_proj", "mixer.k")
        | linear("layers.{}.self_attn.v_proj", "mixer.v")
        | linear("layers.{}.self_attn.out_proj", "mixer.out")
        | norm("layers.{}.self_attn_layer_norm", "mixer_norm")
        | linear("layers.{}.fc1", "mlp.up")
        | linear("layers.{}.fc2", "mlp.down")
        | norm("layers.{}.final_layer_norm", "mlp_norm")
    )


FORMAT = Format(
    name="opt",
    architecture="OPTForCausalLM",
    library="transformers",
    mixers=(AttentionConfig,),
    read=read,
    write=write,
    outside=embeddings("embed_tokens.weight", "final_layer_norm")
    | plain("embed_positions.weight", "positions.table")
    | linear("project_in", "project_in")
    | linear("project_out", "project_out"),
    block=block,
    prefixes=("model.decoder.", "decoder."),
)
