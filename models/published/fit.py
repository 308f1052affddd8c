"""What a format can express of a config: its config.json is written and read back, and what differs is named."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from engrax.errors import UserError
from engrax.layers.attention.attention import AttentionConfig
from engrax.layers.attention.rope import RopeScaling
from engrax.layers.common.lora import LoraConfig
from engrax.layers.common.matrix_memory import MatrixMemoryConfig
from engrax.layers.delta.kda import KDAConfig
from engrax.layers.mixer import MixerConfig
from engrax.layers.routed.mom import MoMConfig
from engrax.models.block_style import BlockStyleConfig
from engrax.models.language_model import LanguageModelConfig
from engrax.models.published.fields import Fields
from engrax.models.published.tables import Format


class Fit(NamedTuple):
    """How a config fits a format."""

    misfits: list[str]  # what would have to differ; [] = it fits
    notes: list[str]  # what is written in another way
    fields: dict[str, Any]  # config.json, without the ids of tokens


def fit(config: LanguageModelConfig, form: Format) -> Fit:
    """Whether a format can express the config."""
    if config.layers:
        return Fit(["its layers would have to be () (no branches, no exchanged mixers)"], [], {})
    strange = {m.registered_name or type(m).__name__ for m in config.mixers if type(m) not in form.mixers}
    if strange:
        known = " or ".join(kind.registered_name for kind in form.mixers)
        return Fit([f"its mixers {', '.join(sorted(strange))} would have to be {known}"], [], {})
    if form.library == "fla" and not any(type(m) is form.mixers[0] for m in config.mixers):
        return Fit([f"one of its mixers would have to be {form.mixers[0].registered_name}"], [], {})
    try:
        written = form.write(config)
        back = form.read(Fields(written, form.name))
    except UserError as error:
        reason = str(error).removeprefix(f"{form.name}: ").rstrip(".").removesuffix("; restore the file")
        return Fit([reason], [], {})
    misfits, notes = [], []
    for difference in differences(config, back):
        note = form.notes.get(difference.setting)
        notes.append(note) if note else misfits.append(str(difference))
    written = {"architectures": [form.architecture], "model_type": form.name} | written
    return Fit(misfits, list(dict.fromkeys(notes)), written)


class Difference(NamedTuple):
    """A setting that differs."""

    path: str
    given: Any
    wanted: Any
    mixer: str = ""  # whose setting it is; "" = the model's

    @property
    def setting(self) -> str:
        """The path with the mixer's name in the place of its position: attention.window, mom.base.l2_eps."""
        return ".".join([self.mixer, *self.path.split(".")[2:]]) if self.mixer else self.path

    def __str__(self) -> str:
        return f"{self.path}={self.given!r} would have to be {self.wanted!r}"


def differences(config: LanguageModelConfig, wanted: LanguageModelConfig) -> Iterator[Difference]:
    """The settings in which two language models differ as functions or in their tensors."""
    given, other = plain_model(config), plain_model(wanted)
    yield from _differences(given, other, "")
    if config.num_layers != wanted.num_layers:
        repeats = wanted.num_layers / len(config.mixers)
        yield Difference("repeat", config.repeat, int(repeats) if repeats.is_integer() else repeats)
        return
    layers, said = list(wanted.mixers) * wanted.repeat, []
    places = [wanted.layout.place_of(i) for i in range(len(wanted.mixers))] * wanted.repeat
    for i in range(config.num_layers):
        at = i % len(config.mixers)
        pair, name = (plain_mixer(config.mixers[at]), plain_mixer(layers[i])), config.mixers[at].registered_name
        found = [difference._replace(mixer=name) for difference in _differences(*pair, f"mixers.{at}")]
        if config.layout.place_of(at) != places[i]:
            found.append(Difference(f"layout.norm_places.{at}", config.layout.place_of(at), places[i]))
        yield from (difference for difference in found if difference not in said)
        said += found


def _differences(given: Any, wanted: Any, path: str) -> Iterator[Difference]:
    if type(given) is not type(wanted) or not dataclasses.is_dataclass(given):
        if given != wanted:
            yield Difference(path, given, wanted)
        return
    for field in dataclasses.fields(given):
        where = f"{path}.{field.name}".lstrip(".")
        yield from _differences(getattr(given, field.name), getattr(wanted, field.name), where)


def plain_model(config: LanguageModelConfig) -> LanguageModelConfig:
    """The settings outside the mixers that change the function or the tensors, each in one spelling."""
    ends_with_norm = config.layout.norm_place != "after"
    place = "before" if ends_with_norm else "after"  # what the layers have is compared apart
    layout = dataclasses.replace(config.layout, norm_place=place, norm_places=(), z_loss=0.0)
    if config.mlp_width == 0:
        plain = BlockStyleConfig()
        layout = dataclasses.replace(layout, mlp=plain.mlp, activation=plain.activation, mlp_bias=plain.mlp_bias)
    if not layout.positions:
        layout = dataclasses.replace(layout, unused_positions=0)
    return LanguageModelConfig(
        vocab_size=config.vocab_size, dim=config.dim, mlp_hidden=config.mlp_width, layout=layout, lora=LoraConfig()
    )


def plain_mixer(mixer: MixerConfig) -> MixerConfig:
    """The settings of a mixer that change the function or the tensors, each in one spelling."""
    changes: dict[str, Any] = {}
    if isinstance(mixer, AttentionConfig):
        changes = {"kv_heads": mixer.kv_heads or mixer.heads, "capacity": 4096}
        if mixer.rope_base is None:
            changes["rope_fraction"] = 1.0
        if mixer.rope_base is None or mixer.rope_scaling.kind == "none":
            changes["rope_scaling"] = RopeScaling()
        if mixer.qk_norm_eps is None:
            changes["qk_norm"] = "head"
    if isinstance(mixer, MatrixMemoryConfig):
        heads, width = mixer.values
        changes = {"value_heads": heads, "value_dim": width, "chunk_size": 16, "implementation": None}
        changes["conv_bias"] = mixer.conv_bias and mixer.conv_width > 1
    if isinstance(mixer, KDAConfig):
        changes["gate_rank"] = mixer.rank
    if isinstance(mixer, MoMConfig):
        changes = {"base": plain_mixer(mixer.base), "balance_weight": 0.0, "z_weight": 0.0}
    return dataclasses.replace(mixer, **changes)
