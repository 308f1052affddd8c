"""GPT-2: LayerNorm, learned positions, plain MLP, biases everywhere."""

from typing import Any

from engrax.layers.attention.attention import AttentionConfig
from engrax.models.block_style import BlockStyleConfig
from engrax.models.language_model import LanguageModelConfig
from engrax.models.published.common import head_dim_of
from engrax.models.published.fields import ACTIVATIONS, Fields
from engrax.models.published.tables import Format, embeddings, linear, norm, plain

ACTIVATION = {"silu": "silu", "relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new"}


def read(fields: Fields) -> LanguageModelConfig:
    dim, heads = fields.take("n_embd"), fields.take("n_head")
    fields.demand("scale_attn_weights", True)
    fields.demand("scale_attn_by_inverse_layer_idx", False)
    positions = fields.take("n_positions")
    attention = AttentionConfig(
        heads=heads, head_dim=head_dim_of(fields, dim, heads), capacity=positions, rope_base=None, bias="all"
    )
    layout = BlockStyleConfig(
        norm="layer",
        norm_eps=float(fields.take("layer_norm_epsilon", 1e-5)),
        mlp="plain",
        activation=fields.choose("activation_function", ACTIVATIONS, "gelu_new"),
        mlp_bias=True,
        positions=positions,
        tied=fields.take("tie_word_embeddings", True),
    )
    return LanguageModelConfig(
        vocab_size=fields.take("vocab_size"),
        dim=dim,
        mixers=(attention,),
        repeat=fields.layers("n_layer"),
        mlp_hidden=fields.take("n_inner", 4 * dim),
        layout=layout,
    )


def write(config: LanguageModelConfig) -> dict[str, Any]:
    return {
        "n_embd": config.dim,
        "n_head": config.mixers[0].heads,
        "n_layer": config.num_layers,
        "n_positions": config.layout.positions,
        "n_inner": config.mlp_width,
        "vocab_size": config.vocab_size,
        "activation_function": ACTIVATION[config.layout.activation],
        "layer_norm_epsilon": config.layout.norm_eps,
        "tie_word_embeddings": config.layout.tied,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    }


def block(config, place, stored):
    return (
        norm("h.{}.ln_1", "mixer_norm")
        | linear("h.{}.attn.c_attn", "mixer.q", "mixer.k", "mixer.v", form="plain")
        | linear("h.{}.attn.c_proj", "mixer.out", form="plain")
        | norm("h.{}.ln_2", "mlp_norm")
        | linear("h.{}.mlp.c_fc", "mlp.up", form="plain")
        | linear("h.{}.mlp.c_proj", "mlp.down", form="plain")
    )


FORMAT = Format(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    library="transformers",
    mixers=(AttentionConfig,),
    read=read,
    write=write,
    outside=embeddings("wte.weight", "ln_f") | plain("wpe.weight", "positions.table"),
    block=block,
    prefixes=("transformer.",),
    skipped=(".attn.bias", ".attn.masked_bias"),
)
