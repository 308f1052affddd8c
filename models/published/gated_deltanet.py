"""FLA's gated DeltaNet, with attention in some layers: windows, and beta to 2."""

from typing import Any

from engrax.layers.delta.gated_deltanet import GatedDeltaNetConfig
from engrax.models.published.common import qkv, share_of
from engrax.models.published.fields import SMALL_EPS, Fields
from engrax.models.published.fla import fla_format
from engrax.models.published.tables import Table, linear, norm, plain


def read(fields: Fields, dim: int, eps: float) -> GatedDeltaNetConfig:
    heads, width = fields.take("num_heads", 6), fields.take("head_dim", 256)
    fields.choose("output_gate_activation", {"swish": "silu", "silu": "silu"}, "swish")
    conv_width = fields.take("conv_size", 4)
    return GatedDeltaNetConfig(
        heads=heads,
        value_heads=fields.take("num_v_heads", heads),
        head_dim=width,
        value_dim=share_of(fields, "expand_v", 2.0, width),
        conv_width=conv_width if fields.take("use_short_conv", True) else 1,
        output_gate=fields.take("use_gate", True),
        max_beta=2.0 if fields.take("allow_neg_eigval", False) else 1.0,
        norm_eps=eps,
        l2_eps=SMALL_EPS,
    )


def write(mixer: GatedDeltaNetConfig, dim: int) -> dict[str, Any]:
    return {
        "num_heads": mixer.heads,
        "num_v_heads": mixer.values[0],
        "head_dim": mixer.head_dim,
        "expand_v": mixer.values[1] / mixer.head_dim,
        "use_short_conv": mixer.conv_width > 1,
        "conv_size": max(mixer.conv_width, 2),
        "use_gate": mixer.output_gate,
        "allow_neg_eigval": mixer.max_beta == 2,
    }


def table(mixer: GatedDeltaNetConfig, is_fused: bool) -> Table:
    return (
        qkv(mixer)
        | linear("a_proj", "mixer.decay.project")
        | linear("b_proj", "mixer.beta")
        | linear("g_proj", "mixer.gate")
        | plain("A_log", "mixer.decay.log_rate")
        | plain("dt_bias", "mixer.decay.bias", "flat")
        | norm("o_norm", "mixer.norm")
        | linear("o_proj", "mixer.out")
    )


FORMAT = fla_format("gated_deltanet", "GatedDeltaNetForCausalLM", GatedDeltaNetConfig, read, write, table, "l2_eps")
