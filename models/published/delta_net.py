"""FLA's DeltaNet."""

from typing import Any

from engrax.layers.delta.deltanet import DeltaNetConfig
from engrax.models.published.common import qkv, share_of
from engrax.models.published.fields import SMALL_EPS, Fields
from engrax.models.published.fla import fla_format, head_widths
from engrax.models.published.tables import Table, linear, norm


def read(fields: Fields, dim: int, eps: float) -> DeltaNetConfig:
    heads, conv_width = fields.take("num_heads", 16), fields.take("conv_size", 4)
    for name, wanted in (("use_beta", True), ("qk_norm", "l2"), ("qk_activation", "silu"), ("use_output_norm", True)):
        fields.demand(name, wanted)
    return DeltaNetConfig(
        heads=heads,
        head_dim=share_of(fields, "expand_k", 1.0, dim, heads),
        value_dim=share_of(fields, "expand_v", 1.0, dim, heads),
        conv_width=conv_width if fields.take("use_short_conv", True) else 1,
        output_gate=fields.take("use_gate", False),
        max_beta=2.0 if fields.take("allow_neg_eigval", False) else 1.0,
        norm_eps=eps,
        l2_eps=SMALL_EPS,
    )


def write(mixer: DeltaNetConfig, dim: int) -> dict[str, Any]:
    return head_widths(dim, mixer) | {
        "num_heads": mixer.heads,
        "use_short_conv": mixer.conv_width > 1,
        "conv_size": max(mixer.conv_width, 2),
        "use_gate": mixer.output_gate,
        "allow_neg_eigval": mixer.max_beta == 2,
    }


def table(mixer: DeltaNetConfig, is_fused: bool) -> Table:
    return (
        qkv(mixer)
        | linear("b_proj", "mixer.beta")
        | linear("g_proj", "mixer.gate")
        | norm("o_norm", "mixer.norm")
        | linear("o_proj", "mixer.out")
    )


FORMAT = fla_format("delta_net", "DeltaNetForCausalLM", DeltaNetConfig, read, write, table, "l2_eps")
