"""FLA's mixture of memories over gated DeltaNet."""

from typing import Any

from engrax.errors import UserError
from engrax.layers.delta.gated_deltanet import GatedDeltaNetConfig
from engrax.layers.routed.mom import MoMConfig
from engrax.models.published.common import share_of
from engrax.models.published.fields import SMALL_EPS, Fields
from engrax.models.published.fla import fla_format
from engrax.models.published.tables import Part, Table, linear, norm, plain, split, taps

UNSTABLE = "FLA 0.6 sorts tokens by memory and may swap those of one memory; it then computes something else"


def read(fields: Fields, dim: int, eps: float) -> MoMConfig:
    heads, width = fields.take("num_heads", 4), fields.take("head_dim", 256)
    fields.demand("mom_backend", "gated_deltanet")
    fields.demand("use_short_conv", True)
    fields.ignore("aux_loss_scale", "use_layer_wise_balance", "capacity")  # of training
    base = GatedDeltaNetConfig(
        heads=heads,
        head_dim=width,
        value_dim=share_of(fields, "expand_v", 1.0, width),
        conv_width=fields.take("conv_size", 4),
        output_gate=fields.take("use_output_gate", True),
        norm_eps=eps,
        l2_eps=SMALL_EPS,
    )
    return MoMConfig(
        base=base,
        memories=fields.take("num_memories", 4),
        top_k=fields.take("topk", 2),
        shared=fields.take("shared_mem", True),
        own_projections=not fields.take("single_kv_proj", False),
    )


def write(mixer: MoMConfig, dim: int) -> dict[str, Any]:
    base = mixer.base
    if type(base) is not GatedDeltaNetConfig:
        raise UserError(f"base={base.registered_name} would have to be gated_deltanet")
    return {
        "num_heads": base.heads,
        "head_dim": base.head_dim,
        "expand_v": base.values[1] / base.head_dim,
        "conv_size": base.conv_width,
        "use_short_conv": True,
        "use_output_gate": base.output_gate,
        "num_memories": mixer.memories,
        "topk": mixer.top_k,
        "shared_mem": mixer.shared,
        "single_kv_proj": not mixer.own_projections,
        "mom_backend": "gated_deltanet",
        "aux_loss_scale": mixer.balance_weight,
    }


def table(mixer: MoMConfig, is_fused: bool) -> Table:
    widths, found = mixer.base.widths, linear("q_proj", "mixer.query") | linear("gate", "mixer.router")
    if mixer.own_projections:
        sets = {f"{{}}_proj.{memory}": (memory,) for memory in range(mixer.memories)}
        sets |= {"shared_{}": (mixer.memories,)} if mixer.shared else {}
    else:
        sets = {"shared_{}": ()}
    for name, index in sets.items():
        found |= linear(name.format("k"), split("mixer.key_value", widths[1:], 0, index))
        found |= linear(name.format("v"), split("mixer.key_value", widths[1:], 1, index))
        found |= linear(name.format("a"), Part("mixer.base.decay.project", None, index))
        found |= linear(name.format("b"), Part("mixer.base.beta", None, index))
    for at, letter in enumerate("qkv"):
        found |= taps(f"{letter}_conv1d", split("mixer.base.conv", widths, at))
    return (
        found
        | plain("A_log", "mixer.base.decay.log_rate")
        | plain("dt_bias", "mixer.base.decay.bias", "flat")
        | linear("g_proj", "mixer.base.gate")
        | norm("o_norm", "mixer.base.norm")
        | linear("o_proj", "mixer.base.out")
    )


FORMAT = fla_format("mom", "MomForCausalLM", MoMConfig, read, write, table, eps="base.l2_eps", caveat=UNSTABLE)
