"""The mixer contract of all sequence mixers, and their registry.

A mixer is two things: a frozen config dataclass (its settings, registered under a name) and the Flax NNX module that
the config builds. The module maps `[B, T, dim]` to the same shape and carries an explicit state:

    config   = MIXERS["titans"]()
    mixer    = config.build(dim, rngs=nnx.Rngs(0))
    y, state = mixer(x)                       # from the start of every row
    y, state = mixer(x_more, state)           # continues at ANY position
    state    = mixer.init_state(batch_size)   # a pytree, every leaf [B, ...]

Blocks call `mixer.forward`, which can also remove memory reads and returns diagnostics and losses. The base class
`Mixer` defines it through the call; a module that is not a `Mixer` is wrapped (`as_mixer`).

Axis letters used across engrax: B batch rows, T tokens, D model width, H heads, K key width of a head, V value width
of a head (or vocabulary, in the models), W window or convolution width, P persistent tokens, L layers of a pattern.
Arrays carry them as a suffix (`x_BTD`), and the suffix is the einsum string.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from engrax.errors import UserError
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
    least_call: ClassVar[int] = 1  # tokens of a segment's start that one call must hold, if it has that many
    composes: ClassVar[bool] = False  # its module runs on rows split over devices; False = the devices take turns
    memory_reads: ClassVar[tuple[str, ...]] = ("read",)  # names of its memory reads; () = no memory
    state_fields: ClassVar[tuple[str, ...]] = (
        "head_dim",
        "value_dim",
        "hidden",
        "slots",
    )  # fields that grow with the state where states of several sizes are compared

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> nnx.Module:
        """Returns the module for model width `dim`; `layer` (from 0, may be traced) is its place among `num_layers`."""
        raise NotImplementedError(f"{type(self).__name__} must define build(dim, *, rngs, layer, num_layers).")

    @classmethod
    def examples(cls) -> tuple["MixerConfig", ...]:
        """Small settings that together use every code path, then the defaults; the laws run on all of them."""
        return (cls(),)

    def scaled(self, factor: float) -> "MixerConfig":
        """These settings with a larger or smaller state: `state_fields` times the factor, and all else equal.

        `engrax frontier` (`engrax.layers.sizing`) finds the factor for a number of bytes.
        """
        return self.with_fields_scaled(factor, self.state_fields)

    def with_fields_scaled(self, factor: float, names: tuple[str, ...]) -> "MixerConfig":
        """The integer fields in `names` times the factor, rounded to even numbers as rotations of pairs need; mixers
        inside this one are `scaled`."""
        changes = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, MixerConfig):
                changes[field.name] = value.scaled(factor)
            elif field.name in names and value is not None:
                changes[field.name] = max(2, 2 * round(value * factor / 2))
        return dataclasses.replace(self, **changes)

    def of_heads(self, shares: int) -> "MixerConfig | None":
        """The settings of one of `shares` devices that share the heads; None: the mixer cannot be cut by heads, because
        these see each other or their number is in its equations.

        A module that can is right with its config replaced by this one, and its parameters by those of its own heads:
        sizes come from the config, and each projection back to the model's width adds up the devices' products.
        """
        return None

    def with_heads_cut(self, shares: int, names: tuple[str, ...]) -> "MixerConfig":
        """These settings with the fields in `names` divided by `shares`. Raises UserError if one does not divide."""
        changes = {name: value for name in names if (value := getattr(self, name)) is not None}
        for name, value in changes.items():
            if value % shares:
                raise UserError(
                    f"{name}={value} of {self.registered_name} does not divide over parallel.tensor={shares} devices; "
                    f"choose {name}={value + -value % shares}, or a smaller parallel.tensor."
                )
        return dataclasses.replace(self, **{name: value // shares for name, value in changes.items()})

    def flops_per_token(self, dim: int, seq_len: int) -> float:
        """Forward FLOPs per token of a row of `seq_len` tokens (a multiply-add is 2), including the memory update."""
        raise NotImplementedError(f"{type(self).__name__} must define flops_per_token(dim, seq_len).")


class MixerOutput(NamedTuple):
    """The result of `Mixer.forward`."""

    y: Float[Array, "B T D"]
    state: Any  # after the last token
    aux: Float[Array, " B"]  # a loss per row, added per labelled token of the row; 0 for most mixers
    collected: dict[str, Array]  # diagnostics, {} unless requested


class Mixer(nnx.Module):
    """Base of the mixers' modules. A subclass defines `__call__(x, state, segment_ids) -> (y, state)` and `init_state`;
    the other methods are optional."""

    def init_state(self, batch_size: int) -> Any:
        """The initial state of every row and segment; every leaf is [B, ...]."""
        raise NotImplementedError(f"{type(self).__name__} must define init_state(batch_size).")

    def open_state(self, state: Any) -> Any:
        """The state in the form for many calls of one token without gradients, if the mixer has such a form."""
        return state

    def close_state(self, state: Any) -> Any:
        """An opened state in its usual form; the inverse of `open_state`."""
        return state

    def report(self, x_BTD: Float[Array, "B T D"], state: Any = None, segment_ids: Any = None) -> dict[str, Array]:
        """Diagnostics of a call: scalars, arrays, or [B, T] values of every token."""
        return {}

    def auxiliary_loss(self, x_BTD: Float[Array, "B T D"], segment_ids: Any = None) -> Float[Array, " B"]:
        """A loss per row, added in training per labelled token of the row (a router's balance loss)."""
        return jnp.zeros(len(x_BTD), jnp.promote_types(x_BTD.dtype, jnp.float32))

    def call_without(
        self, reads: tuple[str, ...], x_BTD: Float[Array, "B T D"], state: Any = None, segment_ids: Any = None
    ) -> tuple[Float[Array, "B T D"], Any]:
        """The call without the memory reads named in `reads`. By default the whole output is one read."""
        y, state = self(x_BTD, state, segment_ids)
        return jnp.zeros_like(y), state

    def forward(
        self,
        x_BTD: Float[Array, "B T D"],
        state: Any = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        collect: tuple[str, ...] = (),
        mute: tuple[str, ...] = (),
    ) -> MixerOutput:
        """Called by blocks. collect: if not empty, also return the diagnostics; mute: memory reads to remove."""
        if mute:
            y, after = self.call_without(mute, x_BTD, state, segment_ids)
        else:
            y, after = self(x_BTD, state, segment_ids)
        collected = self.report(x_BTD, state, segment_ids) if collect else {}
        return MixerOutput(y, after, self.auxiliary_loss(x_BTD, segment_ids), collected)


class PlainMixer(Mixer):
    """Wraps a module that is not a `Mixer`; uses its optional methods if it has them."""

    def __init__(self, module: nnx.Module):
        self.module = module

    def init_state(self, batch_size: int) -> Any:
        return self.module.init_state(batch_size)

    def __call__(self, x_BTD, state=None, segment_ids=None):
        return self.module(x_BTD, state, segment_ids)

    def report(self, x_BTD, state=None, segment_ids=None):
        own = getattr(self.module, "report", None)
        return own(x_BTD, state, segment_ids) if own else {}

    def auxiliary_loss(self, x_BTD, segment_ids=None):
        own = getattr(self.module, "auxiliary_loss", None)
        return own(x_BTD, segment_ids) if own else super().auxiliary_loss(x_BTD, segment_ids)


def as_mixer(module: nnx.Module) -> Mixer:
    """The module itself if it is a `Mixer`, else the module wrapped as one."""
    return module if isinstance(module, Mixer) else PlainMixer(module)
