"""The rule of a test-time memory, and which engine runs it."""

import dataclasses

from jaxtyping import Array, Float

from engrax.layers.test_time.structures import Structure

Matrices = dict[str, Float[Array, "..."]]  # one matrix [..., I, O] by name


@dataclasses.dataclass(frozen=True)
class Rule:
    """A test-time memory without its parameters; the fields are explained in `MemoryConfig`."""

    structure: Structure
    loss: str
    loss_power: float
    retention: str
    norm_power: float
    muon: bool
    momentum_order: int
    decayed: bool
    read_first: bool
    next_value: bool
    window: int
    chunk_size: int
    reset_every: int
    by_channel: bool  # the forget gate has a number for every key channel
    save_every: int
    implementation: str | None

    @property
    def linear(self) -> bool:
        """Whether the update is linear in the gradient, as the dual form requires."""
        return self.retention == "decay" and not self.muon

    @property
    def accumulates(self) -> bool:
        """Whether the steps of a chunk are added up until its end; Newton-Schulz takes the momentum itself."""
        return not self.linear and not (self.muon and self.momentum_order)

    @property
    def operation(self) -> bool:
        """Whether the operation `neural_memory` runs exactly this rule (`operation`); else `engine` does."""
        plain = self.structure.is_plain_mlp and self.loss == "l2" and self.linear and self.momentum_order <= 1
        each_token = self.window == 1 and not (self.by_channel or self.read_first or self.next_value)
        return plain and each_token and not self.reset_every
