"""The published architectures: mapping of config.json fields to settings and of tensors to parameters."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engrax.errors import UserError
from engrax.files import expect, read_json, short
from engrax.layers.attention.attention import AttentionConfig, RopeScaling
from engrax.models.block_style import BlockStyleConfig
from engrax.models.imported.files import refuse_link
from engrax.models.language_model import LanguageModelConfig

MOST = 1 << 31  # limit of every count: no array has such an axis
CAPACITY = 4096  # default tokens of an imported model's cache; fewer if the model reads fewer
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Fields that do not change the forward pass: training (there is no dropout here), sampling, metadata.
IGNORED = {
    *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "prefix", "tokenizer_class"),
    *("initializer_range", "init_std", "dropout", "attention_dropout", "activation_dropout", "layerdrop"),
    *("resid_pdrop", "embd_pdrop", "attn_pdrop", "task_specific_params", "id2label", "label2id", "n_ctx"),
    *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
    *("predict_special_tokens", "reorder_and_upcast_attn", "pretraining_tp", "is_llama_config", "max_window_layers"),
    *("transformers.js_config", "sliding_window", "max_length", "temperature", "top_k", "top_p"),
}


class Fields:
    """The fields of a config.json, each taken once; a field that is neither taken nor IGNORED is an error."""

    def __init__(self, folder: Path):
        self.path = refuse_link(folder / "config.json")
        self._rest = read_json(self.path, "give the folder of a checkpoint")
        named = expect(self._rest.get("architectures") or [None], list, f"{self.path}: architectures")
        self.architecture = named[0]

    def take(self, name: str, default: Any = None) -> Any:
        """A field's value, of the default's type, or the default if it is absent or null; without a default, a count.

        Raises UserError if there is no default, for a value of another type, and for a number that is not positive.
        """
        value = self._rest.pop(name, None)
        if value is None and default is None:
            raise UserError(f"{self.path} lacks the field {name}.")
        if value is None:
            return default
        return self._sensible(value, int if default is None else type(default), name)

    def _sensible(self, value: Any, kind: type, name: str) -> Any:
        """The value, if it has this type; a number must be positive, and a whole number below MOST."""
        expect(value, kind, f"{self.path}: {name}")
        if kind in (int, float) and not 0 < value < (MOST if kind is int else math.inf):
            raise UserError(f"{self.path}: {name}={short(value)} makes no sense; restore the file.")
        return value

    def demand(self, name: str, wanted: Any, fields: dict[str, Any] | None = None) -> None:
        """Raises UserError if the field is present and not `wanted`, the only supported value.

        `fields` is the object inside the file that contains it; None = the top level.
        """
        if (value := (self._rest if fields is None else fields).pop(name, None)) not in (None, wanted):
            raise UserError(f"{self.path}: {name}={short(value)} is not supported (only {wanted!r} is).")

    def choose(self, name: str, known: dict[str, str], default: str) -> str:
        """The engrax name of a field's value."""
        value = self.take(name, default)
        if value not in known:
            raise UserError(f"{self.path}: {name}={value!r} is not supported (known: {', '.join(known)}).")
        return known[value]

    def finish(self) -> None:
        """Raises UserError naming the first field that is neither known, nor ignored, nor switched off."""
        for name, value in self._rest.items():
            if name not in IGNORED and value:
                raise UserError(f"{self.path}: the field {name[:60]}={short(value)} is not supported.")

    def rope(self) -> tuple[float, RopeScaling]:
        """The rotary base and scaling, from `rope_parameters`, or `rope_theta` and `rope_scaling` in older files."""
        theta, scaling = self._rest.pop("rope_theta", None) or 10_000.0, {}
        for name in ("rope_scaling", "rope_parameters"):
            scaling |= expect(self._rest.pop(name, None) or {}, dict, f"{self.path}: {name}")
        theta, old_kind = scaling.pop("rope_theta", theta), scaling.pop("type", "default")
        kind = scaling.pop("rope_type", old_kind)
        where = f"{self.path}: rope_scaling"
        if not isinstance(kind, str) or kind not in ("default", "linear", "llama3"):
            raise UserError(f"{where} kind {kind!r} is not supported (known: default, linear, llama3).")
        for fields in (None, scaling):  # transformers 5 writes it in rope_parameters
            self.demand("partial_rotary_factor", 1.0, fields)
        names = {"factor": "factor"} if kind != "default" else {}
        if kind == "llama3":
            names |= {"low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"}
            names |= {"original_max_position_embeddings": "original_context"}
        for name in names:
            if name not in scaling:
                raise UserError(f"{where} of kind {kind!r} lacks {name}.")
        for name in scaling:
            if name not in names:
                raise UserError(f"{where} of kind {kind!r} has the field {name}, which is not supported.")
        values = {new: float(self._sensible(scaling[old], float, f"rope_scaling.{old}")) for old, new in names.items()}
        if "original_context" in values:
            values["original_context"] = int(values["original_context"])
        return float(self._sensible(theta, float, "rope_theta")), RopeScaling(
            "none" if kind == "default" else kind, **values
        )


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One class name of config.json."""

    config: Callable[[Fields], LanguageModelConfig]  # from its fields
    tensors: dict[str, tuple[str, ...]]  # name ("{}" is the layer) -> parameters side by side along its outputs
    prefixes: tuple[str, ...]  # prefixes of all names except the head's: the current one first, then older ones
    outputs_first: bool = True  # matrices are stored [out, in]
    buffers: tuple[str, ...] = ()  # name endings of buffers, which are not parameters and are skipped


def _gpt2(fields: Fields) -> LanguageModelConfig:
    dim, heads = fields.take("n_embd"), fields.take("n_head")
    fields.demand("scale_attn_weights", True)
    fields.demand("scale_attn_by_inverse_layer_idx", False)
    positions = fields.take("n_positions")
    attention = AttentionConfig(
        heads=heads, head_dim=_head_dim(fields, dim, heads), capacity=positions, rope_base=None, bias="all"
    )
    layout = BlockStyleConfig(
        norm="layer",
        norm_eps=float(fields.take("layer_norm_epsilon", 1e-5)),
        mlp="plain",
        activation=fields.choose("activation_function", ACTIVATIONS, "gelu_new"),
        mlp_bias=True,
        positions=positions,
        tied=fields.take("tie_word_embeddings", True),
    )
    return LanguageModelConfig(
        vocab_size=fields.take("vocab_size"),
        dim=dim,
        mixers=(attention,),
        repeat=fields.take("n_layer"),
        mlp_hidden=fields.take("n_inner", 4 * dim),
        layout=layout,
    )


def _opt(fields: Fields) -> LanguageModelConfig:
    dim, heads = fields.take("hidden_size"), fields.take("num_attention_heads")
    fields.demand("layer_norm_elementwise_affine", True)
    fields.demand("_remove_final_layer_norm", False)
    positions, bias = fields.take("max_position_embeddings"), fields.take("enable_bias", True)
    width = fields.take("word_embed_proj_dim", dim)
    attention = AttentionConfig(
        heads=heads,
        head_dim=_head_dim(fields, dim, heads),
        capacity=positions,
        rope_base=None,
        bias="all" if bias else "none",
    )
    layout = BlockStyleConfig(
        norm="layer",
        norm_eps=1e-5,
        norm_place="before" if fields.take("do_layer_norm_before", True) else "after",
        mlp="plain",
        activation=fields.choose("activation_function", ACTIVATIONS, "relu"),
        mlp_bias=bias,
        positions=positions,
        unused_positions=2,
        embed_dim=None if width == dim else width,
        tied=fields.take("tie_word_embeddings", True),
    )
    return LanguageModelConfig(
        vocab_size=fields.take("vocab_size"),
        dim=dim,
        mixers=(attention,),
        repeat=fields.take("num_hidden_layers"),
        mlp_hidden=fields.take("ffn_dim"),
        layout=layout,
    )


def _llama(fields: Fields) -> LanguageModelConfig:
    biased = fields.take("attention_bias", False)
    return _rotary(fields, bias="all" if biased else "none", mlp_bias=fields.take("mlp_bias", False))


def _qwen2(fields: Fields) -> LanguageModelConfig:
    _demand_full_attention(fields)
    return _rotary(fields, bias="qkv")


def _qwen3(fields: Fields) -> LanguageModelConfig:
    _demand_full_attention(fields)
    biased = fields.take("attention_bias", False)
    return _rotary(fields, bias="all" if biased else "none", head_dim=128, qk_norm=True)


def _demand_full_attention(fields: Fields) -> None:
    fields.demand("use_sliding_window", False)
    kinds = fields.take("layer_types", ["full_attention"])
    if any(kind != "full_attention" for kind in kinds):
        raise UserError(f"{fields.path}: layer_types={short(kinds)} is not supported (only full_attention is).")


def _rotary(
    fields: Fields, *, bias: str, mlp_bias: bool = False, head_dim: int | None = None, qk_norm: bool = False
) -> LanguageModelConfig:
    """Settings shared by Llama and related models; `head_dim` is the family's default, None = dim / heads."""
    dim, heads = fields.take("hidden_size"), fields.take("num_attention_heads")
    eps, (base, scaling) = float(fields.take("rms_norm_eps", 1e-6)), fields.rope()
    attention = AttentionConfig(
        heads=heads,
        kv_heads=fields.take("num_key_value_heads", heads),
        head_dim=_head_dim(fields, dim, heads, head_dim),
        capacity=min(fields.take("max_position_embeddings", CAPACITY), CAPACITY),
        rope_base=base,
        rope_scaling=scaling,
        bias=bias,
        qk_norm_eps=eps if qk_norm else None,
    )
    layout = BlockStyleConfig(
        norm_eps=eps,
        activation=fields.choose("hidden_act", ACTIVATIONS, "silu"),
        mlp_bias=mlp_bias,
        tied=fields.take("tie_word_embeddings", False),
    )
    return LanguageModelConfig(
        vocab_size=fields.take("vocab_size"),
        dim=dim,
        mixers=(attention,),
        repeat=fields.take("num_hidden_layers"),
        mlp_hidden=fields.take("intermediate_size"),
        layout=layout,
    )


def _head_dim(fields: Fields, dim: int, heads: int, default: int | None = None) -> int:
    if default is None and dim % heads:
        raise UserError(f"{fields.path}: {heads} heads do not divide the width {dim}.")
    return fields.take("head_dim", default or dim // heads)


def _projection(tensor: str, *params: str) -> dict[str, tuple[str, ...]]:
    """Weight and bias of a linear map."""
    return {
        f"{tensor}.weight": tuple(f"{name}.kernel" for name in params),
        f"{tensor}.bias": tuple(f"{name}.bias" for name in params),
    }


def _norm(tensor: str, param: str) -> dict[str, tuple[str, ...]]:
    return {f"{tensor}.weight": (f"{param}.scale",), f"{tensor}.bias": (f"{param}.bias",)}


MIXER, MLP = "blocks.0.mixer", "blocks.0.mlp"
GPT2 = (
    {"wte.weight": ("embedding",), "wpe.weight": ("positions.table",), "lm_head.weight": ("output_embedding",)}
    | _norm("h.{}.ln_1", "blocks.0.mixer_norm")
    | _projection("h.{}.attn.c_attn", f"{MIXER}.q", f"{MIXER}.k", f"{MIXER}.v")
    | _projection("h.{}.attn.c_proj", f"{MIXER}.out")
    | _norm("h.{}.ln_2", "blocks.0.mlp_norm")
    | _projection("h.{}.mlp.c_fc", f"{MLP}.up")
    | _projection("h.{}.mlp.c_proj", f"{MLP}.down")
    | _norm("ln_f", "norm")
)
OPT = (
    {"embed_tokens.weight": ("embedding",), "embed_positions.weight": ("positions.table",)}
    | {"project_in.weight": ("project_in.kernel",), "project_out.weight": ("project_out.kernel",)}
    | _projection("layers.{}.self_attn.q_proj", f"{MIXER}.q")
    | _projection("layers.{}.self_attn.k_proj", f"{MIXER}.k")
    | _projection("layers.{}.self_attn.v_proj", f"{MIXER}.v")
    | _projection("layers.{}.self_attn.out_proj", f"{MIXER}.out")
    | _norm("layers.{}.self_attn_layer_norm", "blocks.0.mixer_norm")
    | _projection("layers.{}.fc1", f"{MLP}.up")
    | _projection("layers.{}.fc2", f"{MLP}.down")
    | _norm("layers.{}.final_layer_norm", "blocks.0.mlp_norm")
    | _norm("final_layer_norm", "norm")
    | {"lm_head.weight": ("output_embedding",)}
)
LLAMA = (
    {"embed_tokens.weight": ("embedding",), "norm.weight": ("norm.scale",), "lm_head.weight": ("output_embedding",)}
    | {"layers.{}.input_layernorm.weight": ("blocks.0.mixer_norm.scale",)}
    | {"layers.{}.post_attention_layernorm.weight": ("blocks.0.mlp_norm.scale",)}
    | _projection("layers.{}.self_attn.q_proj", f"{MIXER}.q")
    | _projection("layers.{}.self_attn.k_proj", f"{MIXER}.k")
    | _projection("layers.{}.self_attn.v_proj", f"{MIXER}.v")
    | _projection("layers.{}.self_attn.o_proj", f"{MIXER}.out")
    | {"layers.{}.self_attn.q_norm.weight": (f"{MIXER}.q_norm.scale",)}
    | {"layers.{}.self_attn.k_norm.weight": (f"{MIXER}.k_norm.scale",)}
    | _projection("layers.{}.mlp.gate_proj", f"{MLP}.gate")
    | _projection("layers.{}.mlp.up_proj", f"{MLP}.up")
    | _projection("layers.{}.mlp.down_proj", f"{MLP}.down")
)
BUFFERS = (".attn.bias", ".attn.masked_bias"), (".rotary_emb.inv_freq",)
ARCHITECTURES = {
    "GPT2LMHeadModel": Architecture(_gpt2, GPT2, ("transformer.",), outputs_first=False, buffers=BUFFERS[0]),
    "OPTForCausalLM": Architecture(_opt, OPT, ("model.decoder.", "decoder.")),
    "LlamaForCausalLM": Architecture(_llama, LLAMA, ("model.",), buffers=BUFFERS[1]),
    "Qwen2ForCausalLM": Architecture(_qwen2, LLAMA, ("model.",), buffers=BUFFERS[1]),
    "Qwen3ForCausalLM": Architecture(_qwen3, LLAMA, ("model.",), buffers=BUFFERS[1]),
}


def architecture(fields: Fields) -> Architecture:
    """The architecture named in a config.json; raises UserError if it is not supported."""
    if not isinstance(fields.architecture, str) or fields.architecture not in ARCHITECTURES:
        raise UserError(
            f"{fields.path}: the architecture {short(fields.architecture)} is not supported "
            f"(known: {', '.join(ARCHITECTURES)})."
        )
    return ARCHITECTURES[fields.architecture]


def read_config(folder: str | Path) -> LanguageModelConfig:
    """The language model described by the config.json of a folder.

    Raises UserError naming a field that is missing or has an unsupported value.
    """
    fields = Fields(Path(folder))
    config = architecture(fields).config(fields)
    fields.finish()
    return config
