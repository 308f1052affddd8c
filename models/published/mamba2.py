"""Mamba-2 of transformers: no MLP, one group of heads."""

import math
from typing import Any

from engrax.layers.linear.mamba2 import Mamba2Config
from engrax.models.block_style import BlockStyleConfig
from engrax.models.language_model import LanguageModelConfig
from engrax.models.published.common import of_layers
from engrax.models.published.fields import Fields
from engrax.models.published.tables import Format, Table, embeddings, linear, norm, plain, split, taps

NO_LIMIT = (None, [0.0, math.inf], [0.0, {"__float__": "Infinity"}])  # as json and transformers spell it


def read(fields: Fields) -> LanguageModelConfig:
    dim, eps = fields.take("hidden_size", 4096), float(fields.take("layer_norm_epsilon", 1e-5))
    heads, width = fields.take("num_heads", 128), fields.take("head_dim", 64)
    fields.require("expand", fields.take("expand", 2) * dim == heads * width, "num_heads x head_dim / hidden_size")
    groups = fields.take("n_groups", 8)
    fields.require("n_groups", groups == 1, "1: its norm is over each group's heads, engrax's over all")
    for name, wanted in (("use_bias", False), ("rms_norm", True), ("residual_in_fp32", True), ("hidden_act", "silu")):
        fields.demand(name, wanted)
    limit = fields.anything("time_step_limit")
    fields.require("time_step_limit", limit in NO_LIMIT, "absent: engrax has none")
    mixer = Mamba2Config(
        heads=1,
        value_heads=heads,
        head_dim=fields.take("state_size", 128),
        value_dim=width,
        conv_width=fields.take("conv_kernel", 4),
        conv_bias=fields.take("use_conv_bias", True),
        norm_eps=eps,
    )
    fields.ignore("chunk_size", "rescale_prenorm_residual", "intermediate_size")
    fields.ignore("time_step_min", "time_step_max", "time_step_floor", "time_step_rank")
    return of_layers(
        [mixer] * fields.layers(default=64),
        BlockStyleConfig(norm_eps=eps, tied=fields.take("tie_word_embeddings", False)),
        vocab_size=fields.take("vocab_size"),
        dim=dim,
        mlp_hidden=0,
    )


def write(config: LanguageModelConfig) -> dict[str, Any]:
    mixer = config.mixers[0]
    heads, width = mixer.values
    return {
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_heads": heads,
        "head_dim": width,
        "state_size": mixer.head_dim,
        "n_groups": mixer.heads,
        "expand": max(1, heads * width // config.dim),
        "conv_kernel": mixer.conv_width,
        "use_bias": False,
        "use_conv_bias": mixer.conv_bias,
        "layer_norm_epsilon": config.layout.norm_eps,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.layout.tied,
        "rms_norm": True,  # this and the next are asked for by SGLang
        "intermediate_size": heads * width,
    }


def block(config, place, stored) -> Table:
    widths = config.mixers[place].widths
    q, k, v = (split("mixer.qkv", widths, at) for at in range(3))
    joined = ("mixer.gate", v, k, q, "mixer.decay.project")  # z, x, B, C, dt
    return (
        norm("layers.{}.norm", "mixer_norm")
        | linear("layers.{}.mixer.in_proj", *joined)
        | taps("layers.{}.mixer.conv1d", *(split("mixer.conv", widths, at) for at in (2, 1, 0)))
        | plain("layers.{}.mixer.A_log", "mixer.decay.log_rate")
        | plain("layers.{}.mixer.dt_bias", "mixer.decay.bias", "flat")
        | plain("layers.{}.mixer.D", "mixer.skip")
        | norm("layers.{}.mixer.norm", "mixer.norm")
        | linear("layers.{}.mixer.out_proj", "mixer.out")
    )


FORMAT = Format(
    name="mamba2",
    architecture="Mamba2ForCausalLM",
    library="transformers",
    mixers=(Mamba2Config,),
    read=read,
    write=write,
    outside=embeddings("embeddings.weight", "norm_f"),
    block=block,
    prefixes=("backbone.",),
)
