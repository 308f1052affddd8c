"""FLA's Kimi Delta Attention."""

from typing import Any

from engrax.layers.delta.kda import KDAConfig
from engrax.models.published.common import qkv, share_of
from engrax.models.published.fields import SMALL_EPS, Fields
from engrax.models.published.fla import fla_format
from engrax.models.published.tables import Part, Table, Tensor, linear, norm, plain


def read(fields: Fields, dim: int, eps: float) -> KDAConfig:
    heads, width, conv_width = fields.take("num_heads", 16), fields.take("head_dim", 128), fields.take("conv_size", 4)
    fields.demand("safe_gate", False)
    value = share_of(fields, "expand_v", 1.0, width)
    return KDAConfig(
        heads=heads,
        value_heads=fields.take("num_v_heads", heads),
        head_dim=width,
        value_dim=value,
        gate_rank=value,
        conv_width=conv_width if fields.take("use_short_conv", True) else 1,
        max_beta=2.0 if fields.take("allow_neg_eigval", False) else 1.0,
        norm_eps=eps,
        l2_eps=SMALL_EPS,
        output_gate=True,
    )


def write(mixer: KDAConfig, dim: int) -> dict[str, Any]:
    return {
        "num_heads": mixer.heads,
        "num_v_heads": mixer.values[0],
        "head_dim": mixer.head_dim,
        "expand_v": mixer.values[1] / mixer.head_dim,
        "use_short_conv": mixer.conv_width > 1,
        "conv_size": max(mixer.conv_width, 2),
        "allow_neg_eigval": mixer.max_beta == 2,
    }


def table(mixer: KDAConfig, is_fused: bool) -> Table:
    return (
        qkv(mixer)
        | linear("b_proj", "mixer.beta")
        | linear("f_proj.0", "mixer.decay.project.down")
        | linear("f_proj.1", "mixer.decay.project.up")
        | plain("A_log", "mixer.decay.log_rate")
        | plain("dt_bias", "mixer.decay.bias", "flat")
        | linear("g_proj.0", "mixer.gate.down")
        | linear("g_proj.1", "mixer.gate.up")
        | {"g_proj.1.bias": Tensor((Part(None, (0, mixer.widths[2])),))}
        | norm("o_norm", "mixer.norm")
        | linear("o_proj", "mixer.out")
    )


FORMAT = fla_format("kda", "KDAForCausalLM", KDAConfig, read, write, table, "l2_eps")
