"""HopfieldLayer: a trainable lookup (arXiv 2008.02217). The stored patterns are parameters, the input is the state.

    y_t = W_o sep(beta sim(W_q x_t, K)) V,   K [P, H, K] and V [P, H, V] learned

Tokens are independent of each other. `HopfieldLayer` takes any sets; `HopfieldLayerConfig` is the mixer.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from engrax.errors import UserError, require_positive
from engrax.layers.common.segments import last_segment_after
from engrax.layers.hopfield.association import AssociationConfig, Hopfield, Norm
from engrax.layers.mixer import MIXERS, Mixer, MixerConfig


class LookupState(NamedTuple):
    """A lookup has no state except the current segment."""

    last_segment: Int[Array, " B"]


@MIXERS.register("hopfield_layer")
@dataclasses.dataclass(frozen=True)
class HopfieldLayerConfig(AssociationConfig, MixerConfig):
    """Settings of the lookup; settings of the projections of stored patterns and values are not used."""

    state_norm: Norm = "none"
    patterns: int = 64  # learned stored patterns, in every head
    targets: Literal["learned", "patterns"] = "learned"  # the values: learned, or the patterns
    init_scale: float = 1.0  # standard deviation of patterns and targets, in units of head_dim^-1/2 and value_dim^-1/2

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, "patterns", "init_scale")
        if self.targets == "patterns" and self.value_dim not in (None, self.head_dim):
            raise UserError(f"targets='patterns' reads what is head_dim={self.head_dim} wide: leave value_dim out.")

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "LookupMixer":
        return LookupMixer(self, dim, rngs=rngs, num_layers=num_layers)

    @classmethod
    def examples(cls) -> tuple["HopfieldLayerConfig", ...]:
        small = cls(heads=2, head_dim=4, patterns=6, steps=3, beta=0.5)
        return (
            dataclasses.replace(
                small, value_dim=3, bias=True, bias_pattern=True, trainable_beta=True, space_norm="rms"
            ),
            dataclasses.replace(
                small, steps=None, tolerance=1e-2, max_steps=5, targets="patterns", state_norm="layer", similarity="l2"
            ),
            cls(),
        )

    def flops_per_token(self, dim: int, seq_len: int) -> float:
        return self.projection_flops(dim, 0, 0, dim)[0] + self.association_flops(self.patterns)


class HopfieldLayer(nnx.Module):
    """x [B, N, D] -> [B, N, O]: the lookup of every vector."""

    def __init__(
        self,
        config: HopfieldLayerConfig,
        dim: int,
        *,
        out_dim: int | None = None,
        rngs: nnx.Rngs,
        num_layers: int = 1,
    ):
        self.config = c = config
        self.association = Hopfield(c, dim, out_dim=out_dim, rngs=rngs, num_layers=num_layers, parts=("state",))
        axes = ("patterns", "heads", "kv")
        self.stored = nnx.Param(_draw(c, c.head_dim, rngs), axes=axes, role="initial memory")
        if c.targets == "learned":
            self.targets = nnx.Param(_draw(c, c.value_width // c.heads, rngs), axes=axes, role="initial memory")

    def __call__(self, x_BND: Float[Array, "B N D"]) -> Float[Array, "B N O"]:
        """Looks up every vector independently."""
        a, c = self.association, self.config
        q = a.states(x_BND)
        k = a.normed(self.stored[...].astype(q.dtype))
        v = self.targets[...].astype(q.dtype) if c.targets == "learned" else k
        # The patterns once for each row: rows that were merged into one could not be split over a mesh.
        return a.read(a.retrieve(q, *(jnp.broadcast_to(x, (len(q), *x.shape)) for x in (k, v))))


class LookupMixer(HopfieldLayer, Mixer):
    """The module of HopfieldLayerConfig: x [B, T, D] -> y [B, T, D], LookupState."""

    def init_state(self, batch_size: int) -> LookupState:
        """No segment yet."""
        return LookupState(jnp.full((batch_size,), -1, jnp.int32))

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        state: LookupState | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LookupState]:
        """Looks up every token independently; padding (-1) gives 0."""
        last = self.init_state(len(x_BTD)).last_segment if state is None else state.last_segment
        if segment_ids is None:
            return super().__call__(x_BTD), LookupState(jnp.maximum(last, 0))
        y = jnp.where((segment_ids >= 0)[..., None], super().__call__(x_BTD), 0)
        return y, LookupState(last_segment_after(last, segment_ids))


def _draw(c: HopfieldLayerConfig, width: int, rngs: nnx.Rngs):
    return c.init_scale * width**-0.5 * jax.random.normal(rngs.params(), (c.patterns, c.heads, width))
