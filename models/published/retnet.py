"""FLA's RetNet."""

from typing import Any

from engrax.layers.linear.retnet import RetNetConfig
from engrax.models.published.common import qkv, share_of
from engrax.models.published.fields import Fields
from engrax.models.published.fla import fla_format, head_widths
from engrax.models.published.tables import Table, linear, norm


def read(fields: Fields, dim: int, eps: float) -> RetNetConfig:
    heads = fields.take("num_heads", 8)
    fields.demand("num_kv_heads", heads)
    fields.ignore("use_short_conv", "conv_size")  # the layer never gets them
    return RetNetConfig(
        heads=heads,
        head_dim=share_of(fields, "expand_k", 1.0, dim, heads),
        value_dim=share_of(fields, "expand_v", 2.0, dim, heads),
        output_gate=fields.take("use_output_gate", True),
        norm_eps=eps,
    )


def write(mixer: RetNetConfig, dim: int) -> dict[str, Any]:
    return head_widths(dim, mixer) | {"num_heads": mixer.heads, "use_output_gate": mixer.output_gate}


def table(mixer: RetNetConfig, is_fused: bool) -> Table:
    gated = "g_norm_swish_gate" if is_fused and mixer.output_gate else "g_norm"
    return qkv(mixer) | linear("g_proj", "mixer.gate") | norm(gated, "mixer.norm") | linear("o_proj", "mixer.out")


FORMAT = fla_format("retnet", "RetNetForCausalLM", RetNetConfig, read, write, table)
