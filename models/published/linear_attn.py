"""FLA's linear attention without a normaliser; the learned feature map, its default, is not in engrax."""

from typing import Any

from engrax.errors import UserError
from engrax.layers.linear.linear_attention import LinearAttentionConfig
from engrax.models.published.common import qkv, share_of
from engrax.models.published.fields import Fields
from engrax.models.published.fla import fla_format, head_widths
from engrax.models.published.tables import Table, linear, norm

MAPS = {"elu": "elu+1", "relu": "relu", "identity": "identity"}


def read(fields: Fields, dim: int, eps: float) -> LinearAttentionConfig:
    heads = fields.take("num_heads", 4)
    fields.demand("num_kv_heads", heads)
    fields.ignore("tie_feature_map_qk")  # these maps have no parameters
    return LinearAttentionConfig(
        heads=heads,
        head_dim=share_of(fields, "expand_k", 1.0, dim, heads),
        value_dim=share_of(fields, "expand_v", 1.0, dim, heads),
        feature_map=fields.choose("feature_map", MAPS, "elementwise_product"),
        normalise=False,
        norm_eps=eps,
    )


def write(mixer: LinearAttentionConfig, dim: int) -> dict[str, Any]:
    theirs = {ours: name for name, ours in MAPS.items()}
    if mixer.feature_map not in theirs:
        raise UserError(f"feature_map={mixer.feature_map!r} would have to be one of {', '.join(theirs)}")
    return head_widths(dim, mixer) | {"num_heads": mixer.heads, "feature_map": theirs[mixer.feature_map]}


def table(mixer: LinearAttentionConfig, is_fused: bool) -> Table:
    return qkv(mixer) | norm("norm", "mixer.norm") | linear("o_proj", "mixer.out")


FORMAT = fla_format("linear_attn", "LinearAttentionForCausalLM", LinearAttentionConfig, read, write, table)
