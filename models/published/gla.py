"""FLA's gated linear attention."""

from typing import Any

from engrax.layers.linear.gla import GLAConfig
from engrax.models.published.common import qkv, share_of
from engrax.models.published.fields import Fields
from engrax.models.published.fla import fla_format, head_widths
from engrax.models.published.tables import Table, linear, norm, plain


def read(fields: Fields, dim: int, eps: float) -> GLAConfig:
    heads, conv_width = fields.take("num_heads", 4), fields.take("conv_size", 4)
    fields.demand("num_kv_heads", heads)
    fields.ignore("use_gk", "use_gv")
    return GLAConfig(
        heads=heads,
        head_dim=share_of(fields, "expand_k", 0.5, dim, heads),
        value_dim=share_of(fields, "expand_v", 1.0, dim, heads),
        conv_width=conv_width if fields.take("use_short_conv", False) else 1,
        output_gate=fields.take("use_output_gate", True),
        norm_eps=eps,
    )


def write(mixer: GLAConfig, dim: int) -> dict[str, Any]:
    return head_widths(dim, mixer) | {
        "num_heads": mixer.heads,
        "use_short_conv": mixer.conv_width > 1,
        "conv_size": max(mixer.conv_width, 2),
        "use_output_gate": mixer.output_gate,
    }


def table(mixer: GLAConfig, is_fused: bool) -> Table:
    gated = "g_norm_swish_gate" if is_fused and mixer.output_gate else "g_norm"
    return (
        qkv(mixer)
        | linear("g_proj", "mixer.gate")
        | linear("gk_proj.0", "mixer.forget.down")
        | linear("gk_proj.1", "mixer.forget.up")
        | plain("gk_proj.1.bias", "mixer.forget_bias", "flat")
        | norm(gated, "mixer.norm")
        | linear("o_proj", "mixer.out")
    )


FORMAT = fla_format("gla", "GLAForCausalLM", GLAConfig, read, write, table)
