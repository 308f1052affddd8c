"""FLA's HGRN2 without lower bounds: where it has them, they are one parameter of all layers together."""

from typing import Any

from engrax.layers.linear.hgrn2 import HGRN2Config
from engrax.models.published.common import qkv
from engrax.models.published.fields import Fields
from engrax.models.published.fla import fla_format
from engrax.models.published.tables import Table, linear, norm

NORM_EPS = 1e-5  # of the read, whatever config.json says


def read(fields: Fields, dim: int, eps: float) -> HGRN2Config:
    given = fields.optional("num_heads")
    width = fields.take("expand_ratio", dim // given if given else 128)
    fields.require("expand_ratio", dim % width == 0, "a divisor of hidden_size")
    bounded = fields.take("use_lower_bound", True)
    fields.require("use_lower_bound", not bounded, "false: bounds there are tied over the layers")
    conv_width = fields.take("conv_size", 4)
    return HGRN2Config(
        heads=dim // width,
        head_dim=width,
        conv_width=conv_width if fields.take("use_short_conv", False) else 1,
        bounded=False,
        norm_eps=NORM_EPS,
    )


def write(mixer: HGRN2Config, dim: int) -> dict[str, Any]:
    return {
        "num_heads": mixer.heads,
        "expand_ratio": mixer.head_dim,
        "use_lower_bound": False,
        "use_short_conv": mixer.conv_width > 1,
        "conv_size": max(mixer.conv_width, 2),
    }


def table(mixer: HGRN2Config, is_fused: bool) -> Table:
    return qkv(mixer, "qfi") | norm("g_norm", "mixer.norm") | linear("o_proj", "mixer.out")


FORMAT = fla_format("hgrn2", "HGRN2ForCausalLM", HGRN2Config, read, write, table)
