"""Recurrent memory transformer (RMT; arXiv 2207.06881) around any backbone.

A segment has m memory vectors before and after its L tokens. The backbone's outputs at the vectors after them are the
memory of the next segment:

    [_, hidden, M_n] = backbone([M_{n-1} | H_n | M_{n-1}])

The initial M of a document is learned. With one vector, RMT equals HMT with recall="last" and no sensory tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from engrax.layers import AttentionConfig
from engrax.models.contract import as_model
from engrax.models.language_model import LanguageModelConfig
from engrax.models.model import MODELS
from engrax.models.segment_config import SegmentRecurrentConfig
from engrax.models.segment_recurrence import SegmentRecurrent


@MODELS.register("rmt")
@dataclasses.dataclass(frozen=True)
class RMTConfig(SegmentRecurrentConfig):
    """Settings of RMT."""

    memory_tokens: int = 8  # m, vectors

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "memory_tokens")

    def build(self, *, rngs: nnx.Rngs) -> "RMT":
        return RMT(self, rngs=rngs)

    @classmethod
    def examples(cls) -> tuple["RMTConfig", ...]:
        attention = AttentionConfig(heads=2, head_dim=4)
        small = LanguageModelConfig(vocab_size=16, dim=8, mixers=(attention,), repeat=2, mlp_hidden=12)
        return (cls(backbone=small, segment_length=4, memory_tokens=2),)

    @property
    def extra_slots(self) -> int:
        return 2 * self.memory_tokens


class RMT(SegmentRecurrent):
    """The module of RMTConfig; the memory is [B, m, D]."""

    def __init__(self, config: RMTConfig, *, rngs: nnx.Rngs):
        super().__init__(config, as_model(config.fitted_backbone.build(rngs=rngs)))
        init = jax.nn.initializers.normal(self.width**-0.5)
        shape = (config.memory_tokens, self.width)
        self.initial = nnx.Param(init(rngs.params(), shape), axes=("persistent", "embed"), role="initial memory")

    def start_memory(self, batch_size: int) -> Float[Array, "B M D"]:
        return jnp.broadcast_to(self.initial[...], (batch_size, *self.initial.shape))

    def prefix(self, memory, recent, ahead):
        return memory, memory, jnp.ones(memory.shape[:2], bool)

    def suffix(self, memory):
        return memory

    def update_memory(self, memory, hidden_BSD, made):
        return hidden_BSD.astype(memory.dtype)
