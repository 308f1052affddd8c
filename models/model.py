"""The model contract and its registry.

A model config builds a Flax NNX module with

    hidden, memory = model(tokens, memory=None, *, segment_ids=None)   # [B, T] -> [B, T, D]
    logits         = model.logits(hidden)                              # [B, T, V], float32 or wider
    memory         = model.init_memory(batch_size)                     # a pytree

so that a loss may skip materialising logits, and generation carries the memory by hand.
"""

import dataclasses
from typing import ClassVar

from flax import nnx

from engrax.registry import Registry

MODELS = Registry("model", "engrax.models")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Base of every model's settings. A subclass is a frozen dataclass, registered with `@engrax.register(name)`."""

    registry: ClassVar[Registry] = MODELS
    registered_name: ClassVar[str] = ""
    exempt_from: ClassVar[dict[str, str]] = {}  # {law or law.part: reason}, as for mixers

    def build(self, *, rngs: nnx.Rngs) -> nnx.Module:
        """Returns the module with freshly initialised parameters."""
        raise NotImplementedError(f"{type(self).__name__} must define build(*, rngs).")

    @classmethod
    def examples(cls) -> tuple["ModelConfig", ...]:
        """Small settings with every path switched on: the laws run on all of them."""
        return (cls(),)

    def flops_per_token(self, seq_len: int) -> float:
        """Forward FLOPs per token of a row of `seq_len` tokens (a multiply-add counts 2), memory updates included."""
        raise NotImplementedError(f"{type(self).__name__} must define flops_per_token(seq_len).")
