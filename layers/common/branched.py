"""A mixer with a second one beside it, behind a gate: y = main(x) + tanh(gate) * branch(x).

With the gate at 0, where it starts in a pretrained model, y is main(x) to the bit (arXiv 2204.14198, section 3.1.2). It
has no registered name: a language model builds it from its `layers` (`engrax.models.layer_change`).
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from engrax.layers.mixer import Mixer, MixerConfig, as_mixer


class BranchedState(NamedTuple):
    """The states of both mixers."""

    main: Any
    branch: Any


@dataclasses.dataclass(frozen=True)
class BranchedConfig(MixerConfig):
    """Settings of a mixer with a branch."""

    main: MixerConfig
    branch: MixerConfig
    gate: float = 0.0  # the gate of every channel at the start

    @property
    def registered_name(self) -> str:
        """The branch's, under which its diagnostics appear and its memory is removed."""
        return self.branch.registered_name

    @property
    def memory_reads(self) -> tuple[str, ...]:
        """The branch's."""
        return self.branch.memory_reads

    @property
    def exempt_from(self) -> dict[str, str]:
        """The exemptions of both."""
        return {**self.main.exempt_from, **self.branch.exempt_from}

    @property
    def least_call(self) -> int:
        """The larger one."""
        return max(self.main.least_call, self.branch.least_call)

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "Branched":
        return Branched(self, dim, rngs=rngs, layer=layer, num_layers=num_layers)

    def flops_per_token(self, dim: int, seq_len: int) -> float:
        return sum(each.flops_per_token(dim, seq_len) for each in (self.main, self.branch)) + 2 * dim


class Branched(Mixer):
    """The module of BranchedConfig: x [B, T, D] -> y [B, T, D], BranchedState."""

    added = ("branch", "gate")  # parts that `frozen` leaves trainable

    def __init__(self, config: BranchedConfig, dim: int, *, rngs: nnx.Rngs, layer: Any, num_layers: int):
        self.main = as_mixer(config.main.build(dim, rngs=rngs, layer=layer, num_layers=num_layers))
        self.branch = as_mixer(config.branch.build(dim, rngs=rngs, layer=layer, num_layers=num_layers))
        self.gate = nnx.Param(jnp.full((dim,), config.gate), axes=("embed",), role="gate")

    def init_state(self, batch_size: int) -> BranchedState:
        return BranchedState(self.main.init_state(batch_size), self.branch.init_state(batch_size))

    def open_state(self, state: BranchedState) -> BranchedState:
        return BranchedState(self.main.open_state(state.main), self.branch.open_state(state.branch))

    def close_state(self, state: BranchedState) -> BranchedState:
        return BranchedState(self.main.close_state(state.main), self.branch.close_state(state.branch))

    def __call__(self, x_BTD, state: BranchedState | None = None, segment_ids=None):
        return self._call(x_BTD, state, segment_ids, ())

    def call_without(self, reads, x_BTD, state=None, segment_ids=None):
        return self._call(x_BTD, state, segment_ids, reads)

    def _call(self, x_BTD, state, segment_ids, mute) -> tuple[Float[Array, "B T D"], BranchedState]:
        """Both mixers on the same input; mute: memory reads to remove from the branch."""
        state = BranchedState(None, None) if state is None else state
        y, main = self.main(x_BTD, state.main, segment_ids)
        branch = self.branch.forward(x_BTD, state.branch, segment_ids, mute=mute)
        open_by = jnp.tanh(self.gate[...])
        return y + (open_by * branch.y).astype(y.dtype), BranchedState(main, branch.state)

    def report(self, x_BTD, state=None, segment_ids=None) -> dict[str, Array]:
        """The branch's diagnostics, and how far its gate is open: the mean of |tanh(gate)|."""
        found = self.branch.report(x_BTD, None if state is None else state.branch, segment_ids)
        return found | {"branch_open": jnp.mean(jnp.abs(jnp.tanh(self.gate[...])))}

    def auxiliary_loss(self, x_BTD, segment_ids=None) -> Float[Array, " B"]:
        return self.main.auxiliary_loss(x_BTD, segment_ids) + self.branch.auxiliary_loss(x_BTD, segment_ids)
