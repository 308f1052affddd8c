"""FLA's gated slot attention."""

from typing import Any

from engrax.layers.linear.gsa import GSAConfig
from engrax.models.published.common import qkv, share_of
from engrax.models.published.fields import Fields
from engrax.models.published.fla import fla_format
from engrax.models.published.tables import Table, linear, norm

NORM_EPS = 1e-5  # of the read, whatever config.json says


def read(fields: Fields, dim: int, eps: float) -> GSAConfig:
    heads = fields.take("num_heads", 4)
    fields.demand("num_kv_heads", heads)
    fields.demand("feature_map", "swish")
    fields.demand("use_norm", True)
    fields.demand("use_short_conv", False)  # with it FLA applies SiLU twice
    fields.ignore("conv_size", "use_output_gate")  # the layer never uses the gate
    misspelt = [fields.take(f"exapnd_{axis}", 1.0) for axis in "kv"]  # as FLA's constructor has it
    key, value = (share_of(fields, f"expand_{axis}", given, dim, heads) for axis, given in zip("kv", misspelt))
    return GSAConfig(
        heads=heads,
        head_dim=key,
        value_dim=value,
        slots=fields.take("num_slots", 64),
        gate_temperature=float(fields.take("gate_logit_normalizer", 8)),
        norm_eps=NORM_EPS,
    )


def write(mixer: GSAConfig, dim: int) -> dict[str, Any]:
    expand = {f"{word}_{axis}": mixer.widths[2 * (axis == "v")] / dim for word in ("expand", "exapnd") for axis in "kv"}
    return expand | {
        "num_heads": mixer.heads,
        "num_slots": mixer.slots,
        "gate_logit_normalizer": round(mixer.gate_temperature),
    }


def table(mixer: GSAConfig, is_fused: bool) -> Table:
    return qkv(mixer) | linear("f_proj", "mixer.forget") | norm("g_norm", "mixer.norm") | linear("o_proj", "mixer.out")


FORMAT = fla_format("gsa", "GSAForCausalLM", GSAConfig, read, write, table)
