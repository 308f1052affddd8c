"""Settings shared by the segment-recurrent models."""

import dataclasses
from typing import Any

from engrax.errors import UserError
from engrax.layers import AttentionConfig
from engrax.models.language_model import LanguageModelConfig
from engrax.models.model import ModelConfig
from engrax.models.remat import REMAT
from engrax.registry import did_you_mean


@dataclasses.dataclass(frozen=True)
class SegmentRecurrentConfig(ModelConfig):
    """Settings shared by the segment-recurrent models."""

    backbone: ModelConfig = LanguageModelConfig(mixers=(AttentionConfig(),))
    segment_length: int = 256  # L, tokens
    bptt_segments: int | None = None  # segments that gradients flow through; None = all of a call
    remat: str = "none"  # none | dots | full | offload_dots: values that a segment's forward pass saves

    def __post_init__(self):
        known = [name for name in REMAT if name != "offload"]  # a segment's input is a memory, which may be large
        if self.remat not in known:
            raise UserError(
                f"unknown remat {self.remat!r}{did_you_mean(self.remat, known)} (known: {', '.join(known)})."
            )
        self.at_least(1, "segment_length")
        if isinstance(self.backbone, SegmentRecurrentConfig):
            raise UserError(
                f"{self.backbone.registered_name} is segment-recurrent itself and cannot be a backbone; wrap the "
                "language model inside it."
            )
        if self.bptt_segments is not None:
            self.at_least(1, "bptt_segments")

    def at_least(self, bound: int, *names: str) -> None:
        """Raises UserError for the first named field below the bound."""
        for name in names:
            if getattr(self, name) < bound:
                raise UserError(f"{name}={getattr(self, name)} must be at least {bound}.")

    @property
    def vocab_size(self) -> int:
        """The vocabulary size of the backbone."""
        return self.backbone.vocab_size

    @property
    def extra_slots(self) -> int:
        """Number of vectors around the tokens of a segment."""
        raise NotImplementedError

    @property
    def recent_tokens(self) -> int:
        """Number of recent tokens kept in the state."""
        return 0

    @property
    def exempt_from(self) -> dict[str, str]:
        """The exemptions of the backbone, and those due to truncated gradients."""
        truncated = (
            {} if self.bptt_segments is None else {"trainability.finite_differences": "truncated backpropagation"}
        )
        return dict(self.backbone.exempt_from) | truncated

    @property
    def fitted_backbone(self) -> ModelConfig:
        """The backbone with caches of one segment. Raises UserError if its learned positions do not suffice."""
        slots, layout = self.segment_length + self.extra_slots, getattr(self.backbone, "layout", None)
        if layout is not None and 0 < layout.positions < slots:
            raise UserError(
                f"a segment of {self.segment_length} tokens and {self.extra_slots} vectors around them exceeds the "
                f"backbone's {layout.positions} learned positions; choose a shorter segment_length."
            )
        return fit_capacity(self.backbone, self.segment_length + self.extra_slots)

    def flops_per_token(self, seq_len: int) -> float:
        slots = self.segment_length + self.extra_slots
        layout = getattr(self.backbone, "layout", None)
        width = layout and layout.embed_dim or self.backbone.dim
        head = 2 * width * self.vocab_size  # the slots around the tokens need no logits
        per_slot = self.fitted_backbone.flops_per_token(slots) - head
        return per_slot * slots / self.segment_length + head


def fit_capacity(config: Any, tokens: int) -> Any:
    """A backbone's config with attention caches no larger than a segment of `tokens` slots."""
    if isinstance(config, (tuple, list)):
        return type(config)(fit_capacity(item, tokens) for item in config)
    if not dataclasses.is_dataclass(config):
        return config
    changes = {}
    for field in dataclasses.fields(config):
        old = getattr(config, field.name)
        new = min(old, tokens) if field.name == "capacity" else fit_capacity(old, tokens)
        if field.init and new is not old and new != old:
            changes[field.name] = new
    return dataclasses.replace(config, **changes) if changes else config
