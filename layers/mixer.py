"""The mixer contract: what every sequence mixer is, and the registry that finds it by name.

A mixer is two things: a frozen config dataclass (its settings, registered under a name) and the Flax NNX module that
the config builds. The module maps `[B, T, dim]` to the same shape and carries an explicit state:

    config   = MIXERS["titans"]()
    mixer    = config.build(dim, rngs=nnx.Rngs(0))
    y, state = mixer(x)                       # from the start of every row
    y, state = mixer(x_more, state)           # continues at ANY position
    state    = mixer.init_state(batch_size)   # a pytree, every leaf [B, ...]

Axis letters used across engrax: B batch rows, T tokens, D model width, H heads, K key width of a head, V value width
of a head (or vocabulary, in the models), W window or convolution width, P persistent tokens, L layers of a pattern.
Arrays carry them as a suffix (`x_BTD`), and the suffix is the einsum string.
"""

import dataclasses
from typing import Any, ClassVar

from flax import nnx

from engrax.registry import Registry

MIXERS = Registry("mixer", "engrax.layers")


@dataclasses.dataclass(frozen=True)
class MixerConfig:
    """Base of every mixer's settings. A subclass is a frozen dataclass, registered with `@engrax.register(name)`."""

    registry: ClassVar[Registry] = MIXERS
    registered_name: ClassVar[str] = ""
    exempt_from: ClassVar[
        dict[str, str]
    ] = {}  # {law or law.part: reason}; a test asserts that the exempt law really fails

    adds_loss: ClassVar[bool] = False  # whether the module has auxiliary_loss(x, segment_ids) -> [B], for the training

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> nnx.Module:
        """Returns the module for model width `dim`; `layer` (from 0, may be traced) is its place among `num_layers`."""
        raise NotImplementedError(f"{type(self).__name__} must define build(dim, *, rngs, layer, num_layers).")

    @classmethod
    def examples(cls) -> tuple["MixerConfig", ...]:
        """Small settings with every path switched on, then the defaults: the laws run on all of them."""
        return (cls(),)

    def flops_per_token(self, dim: int, seq_len: int) -> float:
        """Forward FLOPs per token of a row of `seq_len` tokens (a multiply-add is 2), the memory update included."""
        raise NotImplementedError(f"{type(self).__name__} must define flops_per_token(dim, seq_len).")
