"""Gated short convolution, Based's third kind of layer (arXiv 2402.18668):

    [a, b]_t = x_t W_in,   y_t = W_out (silu(conv(a)_t) * b_t)

It combines a token with a few previous ones and has no other memory.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from engrax.errors import UserError
from engrax.layers.common.conv import ShortConv
from engrax.layers.common.modules import projection
from engrax.layers.common.segments import last_segment_after, select_rows, starts_anew
from engrax.layers.mixer import MIXERS, Mixer, MixerConfig


class GatedConvolutionState(NamedTuple):
    """The last conv_width - 1 inputs of the convolution."""

    tail: Float[Array, "B W N"]
    last_segment: Int[Array, " B"]


@MIXERS.register("gated_convolution")
@dataclasses.dataclass(frozen=True)
class GatedConvolutionConfig(MixerConfig):
    """Settings of the gated short convolution."""

    memory_reads: ClassVar[tuple[str, ...]] = ()  # a window of a few tokens, and no memory

    state_fields: ClassVar[tuple[str, ...]] = ("conv_width",)
    composes: ClassVar[bool] = True

    expand: int = 2  # inner width / model width
    conv_width: int = 3  # taps

    def __post_init__(self):
        for name, least in (("expand", 1), ("conv_width", 2)):
            if getattr(self, name) < least:
                raise UserError(f"{name}={getattr(self, name)} must be at least {least}.")

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "GatedConvolution":
        return GatedConvolution(self, dim, rngs=rngs, num_layers=num_layers)

    def flops_per_token(self, dim: int, seq_len: int) -> float:
        return 2 * self.expand * dim * (3 * dim + self.conv_width)


class GatedConvolution(Mixer):
    """The module of GatedConvolutionConfig: x [B, T, D] -> y [B, T, D], GatedConvolutionState."""

    def __init__(self, config: GatedConvolutionConfig, dim: int, *, rngs: nnx.Rngs, num_layers: int = 1):
        self.config, inner = config, config.expand * dim
        self.project_in = projection(dim, 2 * inner, ("embed", "mlp"), rngs=rngs, widths=(inner,) * 2)
        self.conv = ShortConv(inner, config.conv_width, rngs=rngs)
        self.out = projection(inner, dim, ("mlp", "embed"), rngs=rngs, scale=(2 * num_layers) ** -0.5)

    def init_state(self, batch_size: int) -> GatedConvolutionState:
        """The state every row and every segment starts from."""
        tail = self.conv.init_tail(batch_size, self.out.kernel.dtype)
        return GatedConvolutionState(tail, jnp.full((batch_size,), -1, jnp.int32))

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        state: GatedConvolutionState | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], GatedConvolutionState]:
        """A tap in another segment reads 0. Padding (-1) gives 0."""
        start = self.init_state(len(x_BTD))
        state = start if state is None else state
        if segment_ids is None:
            last = jnp.maximum(state.last_segment, 0)
        else:
            last = last_segment_after(state.last_segment, segment_ids)
            state = select_rows(starts_anew(state.last_segment, segment_ids), start, state)
        a, b = jnp.split(self.project_in(x_BTD), 2, axis=-1)
        mixed, tail = self.conv(a, state.tail, segment_ids)
        y_BTD = self.out(jax.nn.silu(mixed) * b)
        if segment_ids is not None:
            y_BTD = jnp.where((segment_ids >= 0)[..., None], y_BTD, 0)
        return y_BTD, GatedConvolutionState(tail, last)
