"""What the models of flash-linear-attention (FLA) share: names, fields, and attention in some of their layers."""

import functools
from collections.abc import Callable
from typing import Any

from engrax.files import expect
from engrax.layers.attention.attention import AttentionConfig
from engrax.layers.mixer import MixerConfig
from engrax.models.block_style import BlockStyleConfig
from engrax.models.language_model import LanguageModelConfig
from engrax.models.published.common import of_kind, of_layers
from engrax.models.published.fields import CAPACITY, EPS_NOTE, Fields
from engrax.models.published.tables import Format, Table, embeddings, gated_mlp, linear, norm

# Settings of training and kernels.
NO_EFFECT = ("attn_mode", "fuse_norm", "fuse_swiglu", "fuse_cross_entropy", "fuse_linear_cross_entropy", "use_l2warp")


def head_widths(dim: int, mixer: Any) -> dict[str, float]:
    """`expand_k` and `expand_v`: all heads together against the model's width."""
    return {"expand_k": mixer.widths[0] / dim, "expand_v": mixer.widths[2] / dim}


def fla_format(
    name: str,
    architecture: str,
    mixer: type[MixerConfig],
    read: Callable[[Fields, int, float], MixerConfig],  # from the fields, the model's width and the eps of its norms
    write: Callable[[Any, int], dict[str, Any]],  # the mixer's fields, from it and the model's width
    table: Callable[[Any, bool], Table],  # its tensors in a layer; whether its norm is fused with the gate
    eps: str = "",  # the setting of the l2 norm's epsilon, if the mixer has it
    caveat: str = "",
) -> Format:
    """A format of FLA; the functions say what is special about its mixer."""
    return Format(
        name=name,
        architecture=architecture,
        library="fla",
        mixers=(mixer, AttentionConfig),
        read=functools.partial(_read, read=read),
        write=functools.partial(_write, kind=mixer, write=write),
        outside=embeddings("embeddings.weight", "norm"),
        block=functools.partial(_block, table=table),
        prefixes=("model.",),
        notes={f"{mixer.registered_name}.{eps}": EPS_NOTE} if eps else {},
        caveat=caveat,
    )


def _read(fields: Fields, read: Callable) -> LanguageModelConfig:
    dim, layers, eps = fields.take("hidden_size", 2048), fields.layers(), fields.take("norm_eps", 1e-6)
    capacity = min(fields.take("max_position_embeddings", 2048), CAPACITY)
    ratio = fields.take("hidden_ratio", 4)
    hidden = fields.optional("intermediate_size") or -(-int(dim * ratio * 2 / 3) // 256) * 256
    fields.ignore(*NO_EFFECT)
    fields.demand("elementwise_affine", True)
    layout = BlockStyleConfig(
        norm_eps=float(eps),
        activation=fields.choose("hidden_act", {"swish": "silu", "silu": "silu"}, "swish"),
        tied=fields.take("tie_word_embeddings", False),
    )
    vocab_size, attention = fields.take("vocab_size", 32000), _attention_layers(fields, dim, capacity)
    mixer = read(fields, dim, float(eps))
    mixers = [attention.get(i, mixer) for i in range(layers)]
    return of_layers(mixers, layout, vocab_size=vocab_size, dim=dim, mlp_hidden=hidden)


def _attention_layers(fields: Fields, dim: int, capacity: int) -> dict[int, AttentionConfig]:
    """The layers with attention, from `attn`: an object or a list of objects."""
    given, where = fields.anything("attn"), f"{fields.path}: attn"
    found = {}
    for one in [given] if isinstance(given, dict) else expect(given or [], list, where):
        own = Fields(expect(one, dict, where), where)
        layers, heads = own.take("layers", []), own.take("num_heads")
        own.require("layers", all(type(i) is int for i in layers), "a list of numbers")
        own.require("num_heads", dim % heads == 0, "a divisor of hidden_size")
        mixer = AttentionConfig(
            heads=heads,
            kv_heads=own.take("num_kv_heads", heads),
            head_dim=dim // heads,
            window=own.optional("window_size"),
            capacity=capacity,
            rope_base=float(own.take("rope_theta", 10000.0)),
            bias="qkv" if own.take("qkv_bias", False) else "none",
        )
        own.finish()
        found |= dict.fromkeys(layers, mixer)
    return found


def _write(config: LanguageModelConfig, kind: type[MixerConfig], write: Callable) -> dict[str, Any]:
    layout, mixer = config.layout, of_kind(config, kind)
    attention = of_kind(config, AttentionConfig)
    return (write(mixer, config.dim) if mixer is not None else {}) | {
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "intermediate_size": config.mlp_width,
        "hidden_act": "swish",
        "norm_eps": layout.norm_eps,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": attention.capacity if attention else 2048,
        "tie_word_embeddings": layout.tied,
        "attn": _attention_fields(config),
        "fuse_norm": True,
    }


def _attention_fields(config: LanguageModelConfig) -> Any:
    """`attn`: null, an object, or a list where layers differ."""
    layers = list(config.mixers) * config.repeat
    kinds = dict.fromkeys(mixer for mixer in layers if type(mixer) is AttentionConfig)
    found = [
        {
            "layers": [i for i, mixer in enumerate(layers) if mixer == kind],
            "num_heads": kind.heads,
            "num_kv_heads": kind.kv_heads or kind.heads,
            "qkv_bias": kind.bias == "qkv",
            "window_size": kind.window,
            "rope_theta": kind.rope_base,
        }
        for kind in kinds
    ]
    return found if len(found) > 1 else next(iter(found), None)


def _block(config, place: int, stored, table: Callable) -> Table:
    mixer = config.mixers[place]
    norms = norm("layers.{}.attn_norm", "mixer_norm") | norm("layers.{}.mlp_norm", "mlp_norm")
    return norms | gated_mlp("layers.{}.mlp") | _mixer(mixer, stored, table)


def _mixer(mixer: MixerConfig, stored, table: Callable) -> Table:
    if type(mixer) is AttentionConfig:
        ours = {"q": "q", "k": "k", "v": "v", "o": "out"}
        maps = (linear(f"layers.{{}}.attn.{theirs}_proj", f"mixer.{name}") for theirs, name in ours.items())
        return {name: tensor for one in maps for name, tensor in one.items()}
    is_fused = not any(name.endswith("attn.g_norm.weight") for name in stored)
    return {f"layers.{{}}.attn.{name}": tensor for name, tensor in table(mixer, is_fused).items()}
