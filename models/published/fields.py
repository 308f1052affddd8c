"""The fields of a config.json, each taken once: what no one takes is an error."""

import math
from pathlib import Path
from typing import Any

from engrax.errors import UserError
from engrax.files import expect, short
from engrax.layers.attention.rope import RopeScaling

MOST = 1 << 31  # limit of every count: no array has such an axis
MOST_LAYERS = 1 << 12  # limit of the number of layers, which are listed one by one
EPS_NOTE = "queries and keys are divided by the root of their squared length + 1e-6 there"
SMALL_EPS = 1e-6  # of the l2 norm of queries and keys in every published delta rule, inside the root
CAPACITY = 4096  # default tokens of an imported model's cache; fewer if the model reads fewer
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# Fields that do not change the forward pass: training (there is no dropout here), sampling, metadata, kernels.
IGNORED = {
    *("architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "prefix", "tokenizer_class"),
    *("initializer_range", "init_std", "dropout", "attention_dropout", "activation_dropout", "layerdrop"),
    *("resid_pdrop", "embd_pdrop", "attn_pdrop", "task_specific_params", "id2label", "label2id", "n_ctx"),
    *("summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj"),
    *("predict_special_tokens", "reorder_and_upcast_attn", "pretraining_tp", "is_llama_config", "max_window_layers"),
    *("transformers.js_config", "sliding_window", "max_length", "temperature", "top_k", "top_p"),
}
SCALINGS: dict[str, dict[str, str]] = {  # kind -> {its field: the field of RopeScaling}; all numbers
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_context",
    },
    "yarn": {
        "factor": "factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "magnitude",
        "original_max_position_embeddings": "original_context",
    },
    "longrope": {
        "short_factor": "short_factors",
        "long_factor": "long_factors",
        "attention_factor": "magnitude",
        "original_max_position_embeddings": "original_context",
    },
}
DEFAULTS = {"yarn": {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}}


class Fields:
    """The fields of a config.json, each taken once; a field that is neither taken nor IGNORED is an error."""

    def __init__(self, fields: dict[str, Any], path: Path | str):
        self.path = path
        self._rest = dict(fields)
        named = expect(self._rest.get("architectures") or [None], list, f"{path}: architectures")
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

    def layers(self, name: str = "num_hidden_layers", default: int | None = None) -> int:
        """The number of layers."""
        found = self.take(name, default)
        self.require(name, found <= MOST_LAYERS, f"at most {MOST_LAYERS}")
        return found

    def optional(self, name: str) -> int | None:
        """A count, None if the field is absent or null."""
        return self.take(name) if self._rest.get(name) is not None else None

    def anything(self, name: str) -> Any:
        """A field's value, of any type, None if it is absent."""
        return self._rest.pop(name, None)

    def has(self, name: str) -> bool:
        """Whether the field is there, null or not."""
        return name in self._rest

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

    def require(self, name: str, holds: bool, wanted: str) -> None:
        """Raises UserError naming the field and what it must be, unless it holds."""
        if not holds:
            raise UserError(f"{self.path}: {name} is not supported as it is; it would have to be {wanted}.")

    def choose(self, name: str, known: dict[str, str], default: str) -> str:
        """The engrax name of a field's value."""
        value = self.take(name, default)
        if value not in known:
            raise UserError(f"{self.path}: {name}={value!r} is not supported (known: {', '.join(known)}).")
        return known[value]

    def ignore(self, *names: str) -> None:
        """Drops fields that do not change this architecture's forward pass."""
        for name in names:
            self._rest.pop(name, None)

    def finish(self) -> None:
        """Raises UserError naming the first field that is neither known, nor ignored, nor switched off."""
        for name, value in self._rest.items():
            if name not in IGNORED and value:
                raise UserError(f"{self.path}: the field {name[:60]}={short(value)} is not supported.")

    def kinds(self, layers: int, known: tuple[str, ...], every: tuple[str, ...] | None = None) -> list[str]:
        """`layer_types`: the kind of each layer, one of `known`; if the field is absent, those of `every`."""
        found = self.take("layer_types", list(every or known[:1] * layers))
        if len(found) != layers or any(kind not in known for kind in found):
            raise UserError(
                f"{self.path}: layer_types={short(found)} is not supported: "
                f"it must name one of {', '.join(known)} for each of {layers} layers."
            )
        return found

    def rope(self, width: int, fraction: float | None = None, *, can_be_none: bool = False) -> dict[str, Any]:
        """The rotary settings of attention with heads of `width`, from `rope_parameters`, or `rope_theta` and
        `rope_scaling` in older files.

        fraction: the family's share of rotated channels, None = all, and no other is supported.
        """
        theta, scaling = self._rest.pop("rope_theta", None) or 10_000.0, {}
        for name in ("rope_scaling", "rope_parameters"):
            scaling |= expect(self._rest.pop(name, None) or {}, dict, f"{self.path}: {name}")
        theta, old_kind = scaling.pop("rope_theta", theta), scaling.pop("type", "default")
        kind = scaling.pop("rope_type", old_kind)
        if fraction is None:
            for fields in (None, scaling):  # transformers 5 writes it in rope_parameters
                self.demand("partial_rotary_factor", 1.0, fields)
        else:
            share = scaling.pop("partial_rotary_factor", None) or self.take("partial_rotary_factor", fraction)
            fraction = float(self._sensible(share, float, "partial_rotary_factor"))
        if theta is None and not can_be_none:
            raise UserError(f"{self.path}: rope_theta=None (no rotary positions) is not supported.")
        found = {"rope_base": None if theta is None else float(self._sensible(theta, float, "rope_theta"))}
        found |= {"rope_fraction": 1.0 if fraction is None else fraction}
        return found | {"rope_scaling": self._scaling(kind, scaling, int(width * found["rope_fraction"]) // 2)}

    def _scaling(self, kind: Any, scaling: dict[str, Any], pairs: int) -> RopeScaling:
        where = f"{self.path}: rope_scaling"
        if not isinstance(kind, str) or kind not in SCALINGS:
            raise UserError(f"{where} kind {kind!r} is not supported (known: {', '.join(SCALINGS)}).")
        scaling, names = DEFAULTS.get(kind, {}) | scaling, SCALINGS[kind]
        if kind in ("yarn", "longrope"):
            self._complete(kind, scaling)
        values: dict[str, Any] = {}
        if kind == "yarn":
            values["truncate"] = expect(scaling.pop("truncate"), bool, f"{where}.truncate")
        for name in names:
            if name not in scaling:
                raise UserError(f"{where} of kind {kind!r} lacks {name}.")
        for name in scaling:
            if name not in names:
                raise UserError(f"{where} of kind {kind!r} has the field {name}, which is not supported.")
        for old, new in names.items():
            value, place = scaling[old], f"rope_scaling.{old}"
            if new.endswith("factors"):
                numbers = expect(value, list, f"{where}.{old}")
                if len(numbers) != pairs:
                    raise UserError(f"{where}.{old} has {len(numbers)} numbers for {pairs} pairs of channels.")
                values[new] = tuple(float(self._sensible(number, float, place)) for number in numbers)
            else:
                values[new] = float(self._sensible(value, float, place))
        if "original_context" in values:
            values["original_context"] = int(values["original_context"])
        return RopeScaling("none" if kind == "default" else kind, **values)

    def _complete(self, kind: str, scaling: dict[str, Any]) -> None:
        """Fills in what transformers computes from other fields: the first context, and the factor of the rotated
        channels. `max_position_embeddings` must not have been taken."""

        def number(name: str, value: Any) -> float:
            return float(self._sensible(value, float, name))

        place, longest = "original_max_position_embeddings", self._rest.get("max_position_embeddings")
        original = self._rest.pop(place, None)
        original = scaling.get(place) or original or longest
        scaling[place] = original = number(place, original)
        self.require(place, original > 1, "more than 1 token")
        factor = scaling.pop("factor", None)
        factor = number("max_position_embeddings", longest) / original if factor is None else number("factor", factor)
        if kind == "yarn":
            scaling["factor"] = factor
        scales = [scaling.pop(name, None) for name in ("mscale", "mscale_all_dim")]
        if scaling.get("attention_factor") is None:
            if kind == "longrope":
                scaling["attention_factor"] = math.sqrt(1 + max(math.log(factor), 0) / math.log(original))
            elif all(scales):
                over, under = (_growth(factor, number("mscale", scale)) for scale in scales)
                scaling["attention_factor"] = over / under
            else:
                scaling["attention_factor"] = _growth(factor, 1.0)


def _growth(factor: float, scale: float) -> float:
    """Yarn's factor of queries and keys for a context `factor` times as long."""
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def rope_fields(attention: Any) -> dict[str, Any]:
    """`rope_parameters` of an attention with rotary positions, as transformers 5 writes it."""
    scaling = attention.rope_scaling
    kind = "default" if scaling.kind == "none" else scaling.kind
    values = {old: getattr(scaling, new) for old, new in SCALINGS[kind].items()}
    if kind == "yarn":
        values["truncate"] = scaling.truncate
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    base = {"rope_type": kind, "rope_theta": attention.rope_base}
    partial = {"partial_rotary_factor": attention.rope_fraction} if attention.rope_fraction != 1 else {}
    return {"rope_parameters": base | partial | values}
