"""Hopfield association as a causal mixer: every token retrieves from the tokens of its segment up to itself.

With one update it is attention without positions; with several, a token's state moves towards earlier patterns.
The cache is attention's: a queue of window - 1 tokens, or a declared capacity.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from engrax.errors import UserError
from engrax.layers.attention.attention import Attention, AttentionState, in_blocks, out_of_blocks
from engrax.layers.hopfield.association import AssociationConfig, Hopfield, Norm
from engrax.layers.mixer import MIXERS, MixerConfig
from engrax.pallas_kernels.common.segments import row_lengths


@MIXERS.register("hopfield")
@dataclasses.dataclass(frozen=True)
class HopfieldConfig(AssociationConfig, MixerConfig):
    """Settings of the causal Hopfield mixer. It does not normalise its input, which blocks have already normalised."""

    state_norm: Norm = "none"
    stored_norm: Norm = "none"
    value_norm: Norm = "none"
    window: int | None = None  # tokens a state sees, itself included; None = all
    capacity: int = 4096  # tokens a row may hold without a window; more raise

    def __post_init__(self):
        super().__post_init__()
        if self.window is not None and self.window < 1:
            raise UserError(f"window={self.window} must be at least 1 token (None sees everything).")
        if self.capacity < 1:
            raise UserError(f"capacity={self.capacity} must be at least 1 token.")

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "CausalHopfield":
        return CausalHopfield(self, dim, rngs=rngs, num_layers=num_layers)

    @classmethod
    def examples(cls) -> tuple["HopfieldConfig", ...]:
        small = cls(heads=2, head_dim=4, window=8, beta=0.5)
        every = dict(state_norm="rms", stored_norm="layer", value_norm="layer", space_norm="rms")
        return (
            dataclasses.replace(
                small, steps=3, value_dim=6, bias=True, bias_pattern=True, trainable_beta=True, **every
            ),
            dataclasses.replace(
                small, steps=None, tolerance=1e-2, max_steps=5, values="of_stored", zero_pattern=True, similarity="l2"
            ),
            dataclasses.replace(small, steps=2, separation="entmax", beta=(0.3, 0.003)),
            cls(),
        )

    def scaled(self, factor: float) -> "HopfieldConfig":
        """With a window, which stands for the capacity where there is none, times the factor."""
        return dataclasses.replace(self, window=max(2, round((self.window or self.capacity) * factor)))

    def flops_per_token(self, dim: int, seq_len: int) -> float:
        seen = (seq_len + 1) / 2 if self.window is None else min(self.window, (seq_len + 1) / 2)
        return sum(self.projection_flops(dim, dim, dim, dim)) + self.association_flops(seen)


class CausalHopfield(Attention):
    """The module of HopfieldConfig: x [B, T, D] -> y [B, T, D], AttentionState, the same cache as attention's."""

    def __init__(self, config: HopfieldConfig, dim: int, *, rngs: nnx.Rngs, num_layers: int = 1):
        self.config = config
        self.association = Hopfield(config, dim, rngs=rngs, num_layers=num_layers)

    def init_state(self, batch_size: int) -> AttentionState:
        """An empty cache, in the dtype of the parameters."""
        c = self.config
        slots = c.capacity if c.window is None else c.window - 1
        dtype = self._dtype()
        return AttentionState(
            keys=jnp.zeros((batch_size, slots, c.heads, c.head_dim), dtype),
            values=jnp.zeros((batch_size, slots, c.heads, c.value_width // c.heads), dtype),
            segments=jnp.full((batch_size, slots), -1, jnp.int32),
            tail=jnp.zeros((batch_size, 0, c.width), dtype),
            position=jnp.zeros((batch_size,), jnp.int32),
            last_segment=jnp.full((batch_size,), -1, jnp.int32),
        )

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        state: AttentionState | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], AttentionState]:
        """Retrieves within each segment; without `segment_ids` all tokens continue the row's last segment.

        Raises ValueError if T exceeds the capacity; a cache that overflows inside jit gives NaN for that row.
        """
        q, k, v, seen, state = self._see(x_BTD, state, segment_ids)
        y = self.association.retrieve(q, k, v, **seen)
        y, ids = (out_of_blocks(x, *x_BTD.shape[:2]) for x in (y, seen["segment_ids"]))
        y = jnp.where((ids >= 0)[..., None, None], y, 0)  # padding sees the bias pattern
        if self.config.window is None:
            y = jnp.where((state.position <= self.config.capacity)[:, None, None, None], y, jnp.nan)
        y = self.association.read(y)
        return jnp.where((ids >= 0)[..., None], y, 0) if self.config.bias else y, state

    def report(self, x_BTD, state: AttentionState | None = None, segment_ids=None) -> dict[str, Array]:
        """Energy of the tokens' states before the first update (where the similarity has one) and the number of
        patterns that hold 90 % of the last weights, means over tokens; the inverse temperatures."""
        a, c = self.association, self.config
        q, k, v, seen, _ = self._see(x_BTD, state, segment_ids)
        weights = a.weights_of(q, k, v, **seen)
        real = jnp.broadcast_to((seen["segment_ids"] >= 0)[..., None], weights.shape[:3])
        falling = -jnp.sort(-weights, axis=-1)
        held = 1 + jnp.sum(jnp.cumsum(falling, axis=-1) < 0.9, axis=-1)
        found = {"patterns_of_90_percent": jnp.mean(held, where=real), "beta": a.betas()}
        if c.similarity in ("dot", "l2"):
            found["hopfield_energy"] = jnp.mean(a.energy_of(q, k, v, **seen), where=real)
        return found

    def _see(self, x_BTD, state: AttentionState | None, segment_ids):
        """States, patterns, values, what the states see as the operation's arguments, and the new state; long rows in
        blocks. The patterns end with those of the states."""
        B, T, _ = x_BTD.shape
        c, a = self.config, self.association
        if c.window is None and T > c.capacity:
            raise UserError(
                f"{T} tokens exceed the Hopfield cache's capacity={c.capacity}; raise `capacity` or set a `window`."
            )
        fresh = state is None
        state = self.init_state(B) if fresh else state
        lengths = None if segment_ids is None else row_lengths(segment_ids)
        if segment_ids is None:
            segment_ids = jnp.broadcast_to(jnp.maximum(state.last_segment, 0)[:, None], (B, T))
        position_BT = state.position[:, None] + jnp.arange(T)
        q, k, v = a.spaces(x_BTD, None, None)
        *slots, _, new = self._extend(state, k, v, segment_ids, position_BT, fresh, lengths)
        if c.window is None and not fresh and T > 1:  # the written cache has the call's tokens at each row's own place
            own = zip((state.keys, state.values, state.segments), (k, v, segment_ids))
            slots = [jnp.concatenate([old, x.astype(old.dtype)], axis=1) for old, x in own]
        (q, ids), (keys, values, segments) = in_blocks(c.window, [q, segment_ids], slots)
        seen = dict(causal=True, window=c.window, segment_ids=ids)
        seen["stored_segment_ids"] = None if segments is ids else segments
        return q, keys.astype(q.dtype), values.astype(q.dtype), seen, new

    def _dtype(self):
        """The dtype of the parameters, or without parameters the widest that JAX allows, which fits any tokens."""
        leaves = jax.tree.leaves(nnx.state(self.association, nnx.Param))
        return leaves[0].dtype if leaves else jnp.result_type(float)
