"""The parts of a language model around its mixers: norms, MLPs, learned positions, embedding and head.

The defaults are engrax's; the other settings reproduce published checkpoints (GPT-2, OPT, Llama, Qwen, OLMo).
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from engrax.errors import UserError
from engrax.layers.common import sequence
from engrax.layers.common.matrix_memory import positions_in_segment
from engrax.layers.common.modules import MLPS, NORMS
from engrax.layers.common.segments import last_segment_after

Place = Literal["before", "after", "branch"]


@dataclasses.dataclass(frozen=True)
class BlockStyleConfig:
    """Settings of the parts around the mixers."""

    norm: Literal["rms", "layer"] = "rms"  # RMSNorm or LayerNorm
    norm_eps: float = 1e-6  # added to the variance
    norm_place: Place = "before"  # of each mixer and MLP: before it, after its sum with the residual, on its branch
    norm_places: tuple[Place, ...] = ()  # the same for every position of the pattern; () = norm_place everywhere
    mlp: Literal["gated", "plain"] = "gated"  # three projections or two
    activation: Literal["silu", "relu", "gelu", "gelu_tanh"] = "silu"  # of the MLP
    mlp_bias: bool = False  # the MLP's projections have biases
    positions: int = 0  # learned positions per segment; 0 = none
    unused_positions: int = 0  # rows of the table before the first position (OPT has 2)
    embed_dim: int | None = None  # width of the embedding, projected to the model's and back; None = the model's
    tied: bool = True  # the head is the embedding
    soft_cap: float | None = None  # of the logits, in nats; None = no cap
    z_loss: float = 0.0  # weight of the squared log of the sum of exponentials in the training loss

    def __post_init__(self):
        if self.positions < 0 or self.unused_positions < 0:
            raise UserError(
                f"layout.positions={self.positions} and unused_positions={self.unused_positions} must not be negative."
            )
        if (self.soft_cap is not None and self.soft_cap <= 0) or self.z_loss < 0:
            raise UserError(f"layout.soft_cap={self.soft_cap} must be above 0 and z_loss={self.z_loss} not negative.")

    def place_of(self, position: int) -> Place:
        """Where the norms of the blocks at a position of the pattern stand."""
        return self.norm_places[position] if self.norm_places else self.norm_place

    def build_norm(self, dim: int, *, rngs: nnx.Rngs) -> nnx.Module:
        """A norm over the last axis."""
        return NORMS[self.norm](dim, rngs=rngs, eps=self.norm_eps)

    def build_mlp(self, dim: int, hidden: int, *, rngs: nnx.Rngs, out_scale: float) -> nnx.Module:
        """The MLP of a block."""
        return MLPS[self.mlp](
            dim, hidden, rngs=rngs, out_scale=out_scale, activation=self.activation, bias=self.mlp_bias
        )


class PositionState(NamedTuple):
    """Position within the row's last segment; the leading axis matches that of the block states."""

    count: Int[Array, "1 B"]  # real tokens of the segment so far
    last_segment: Int[Array, "1 B"]  # its id, -1 before the first real token


class LearnedPositions(nnx.Module):
    """A vector for each position of a segment. Positions count real tokens and restart with every segment."""

    def __init__(self, config: BlockStyleConfig, dim: int, *, rngs: nnx.Rngs):
        self.config = config
        init = jax.nn.initializers.normal(dim**-0.5)
        rows = config.positions + config.unused_positions
        self.table = nnx.Param(init(rngs.params(), (rows, dim)), axes=("position", "embed"), role="embedding")

    def init_state(self, batch_size: int) -> PositionState:
        """The state before the first token."""
        return PositionState(jnp.zeros((1, batch_size), jnp.int32), jnp.full((1, batch_size), -1, jnp.int32))

    def __call__(
        self, x_BTD: Float[Array, "B T D"], state: PositionState | None, segment_ids: Int[Array, "B T"] | None
    ) -> tuple[Float[Array, "B T D"], PositionState, Bool[Array, "B T"]]:
        """Returns x with position vectors added, the new state, and a mask of tokens beyond the table.

        Raises UserError if T tokens of one segment exceed the table. If a segment exceeds it inside jit, the tokens get
        its last vector, which is finite: NaN would reach other segments through masked attention (0 * NaN).
        `without_place` sets the model's outputs for those tokens to NaN.
        """
        B, T, _ = x_BTD.shape
        if segment_ids is None and sequence.count() * T > self.config.positions:
            raise UserError(
                f"{sequence.count() * T} tokens exceed the {self.config.positions} learned positions of the model; use "
                "shorter rows."
            )
        state = self.init_state(B) if state is None else state
        count, last = state.count[0], state.last_segment[0]
        places, count = positions_in_segment(count, last, segment_ids, T)  # -1 at padding
        last = jnp.maximum(last, 0) if segment_ids is None else last_segment_after(last, segment_ids)
        end = self.config.positions
        vectors = self.table[...][jnp.clip(places, 0, end - 1) + self.config.unused_positions]
        return x_BTD + vectors.astype(x_BTD.dtype), PositionState(count[None], last[None]), places >= end


def without_place(x_BTD: Float[Array, "B T D"], lost_BT: Bool[Array, "B T"] | None) -> Float[Array, "B T D"]:
    """x with NaN at tokens beyond the learned positions; lost_BT None = the model has no learned positions."""
    return x_BTD if lost_BT is None else jnp.where(lost_BT[..., None], jnp.nan, x_BTD)
