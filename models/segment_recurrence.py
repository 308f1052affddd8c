"""Segment recurrence around any backbone: the shared part of HMT, RMT and ARMT.

A row is cut into segments of L tokens. The backbone reads every segment from its empty state; vectors around the tokens
carry the memory of earlier segments:

    [prefix | tokens | suffix]           or          [prefix | first tokens | infix | other tokens | suffix]

Its hidden states at the suffix become the new memory. A model defines the hooks (`prefix`, `infix`, `suffix`,
`update_memory`); `SegmentRunner` runs them over any number of tokens, from any position.

The segment grid is that of the row. A document that starts inside a segment reads the rest of that segment without a
prefix; to avoid this, set the experiment's `align` to the segment length. Padding (-1) takes no position in a segment:
a row that ends before the others keeps its incomplete segment and continues in it. A segment of filler (-2) writes no
memory.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from engrax.models.contract import LinearHead, Model, Output, compact
from engrax.models.model import ModelConfig
from engrax.models.segment_runner import Call, Read, Running, SegmentRunner


class SegmentRecurrent(Model):
    """Base class of the models; it uses the backbone's `embed`, `encode`, `init_memory` and `head`."""

    insert_at: int | None = None  # tokens of a segment before the infix
    start_axis: int = 0  # batch axis of the leaves of `start_memory`

    def __init__(self, config: ModelConfig, backbone: Model):
        self.config, self.backbone = config, backbone

    @property
    def width(self) -> int:
        """The width of the backbone's vectors."""
        return jax.eval_shape(lambda: self.backbone.embed(jnp.zeros((1, 1), jnp.int32))).shape[-1]

    @property
    def vocabulary(self) -> int:
        return self.config.vocab_size

    # The hooks. `memory` is that of the model; vectors are [B, S, D].

    def start_memory(self, batch_size: int) -> Any:
        """The memory at the start of a document."""
        raise NotImplementedError

    def prefix(self, memory: Any, recent: Int[Array, "B W"], ahead: Int[Array, "B A"]) -> tuple[Any, Array, Array]:
        """(memory, vectors before the segment's first token, mask of valid ones [B, S]); `ahead` are the tokens of the
        segment in this call, which a causal model must not use."""
        raise NotImplementedError

    def infix(self, memory: Any, recent: Int[Array, "B W"]) -> tuple[Any, Array]:
        """(memory, vectors after the first `insert_at` tokens)."""
        raise NotImplementedError

    def suffix(self, memory: Any) -> Array:
        """The vectors after the segment's last token."""
        raise NotImplementedError

    def update_memory(self, memory: Any, hidden_BSD: Float[Array, "B S D"], made: Any) -> Any:
        """The memory after a segment, from the backbone's hidden states at the suffix."""
        raise NotImplementedError

    def read(self, x_BSD, ids: Int[Array, "B S"], state: Any, memory: Any, owner: Int[Array, " B"], call: Call) -> Read:
        """Runs the backbone over vectors. The memory belongs to the document `owner`; the last `call.closing` vectors
        are the suffix."""
        out = self.backbone.encode(x_BSD, state, segment_ids=ids, collect=call.collect, mute=call.mute)
        return Read(out.hidden, out.memory, None, out.aux_loss, out.collected)

    def own_report(self, tokens_BT, segment_ids) -> dict[str, Array]:
        """Diagnostics of the memory between segments."""
        return {}

    # Shared by all segment-recurrent models.

    def init_memory(self, batch_size: int) -> Running:
        """The initial state of every row."""
        recent = jnp.full((batch_size, self.config.recent_tokens), -1, jnp.int32)
        none = jnp.zeros((batch_size,), jnp.int32)
        return Running(
            memory=self.start_memory(batch_size),
            backbone=self.backbone.init_memory(batch_size),
            recent=recent,
            offset=np.zeros(batch_size, np.int32),  # NumPy, so known when traced: the first call starts at 0
            has_tokens=none > 0,
            last_segment=none - 1,
            segments_since_cut=none,
        )

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        memory: Running | None = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        collect: tuple[str, ...] = (),
        mute: tuple[str, ...] = (),
    ) -> Output:
        """Returns the hidden states of the tokens and the state after the last one; None starts from an empty memory.

        `mute` removes the memory reads of the backbone's mixers and, under the model's own name (or "*"), the memory
        between segments. `collect` returns the backbone's diagnostics (means over whole segments; values per token
        stay per token) and, under the model's own name, those of the memory between segments, if rows start from an
        empty memory; if they continue, `{}`.
        """
        name, rows = self.config.registered_name, compact(segment_ids)
        tokens_BT, segment_ids = rows.gather(tokens_BT), rows.segment_ids
        run = SegmentRunner(
            self, len(tokens_BT), collect if memory is None else (), mute, padded=segment_ids is not None
        )
        state = run.start if memory is None else memory
        if segment_ids is None:
            segment_ids = jnp.broadcast_to(jnp.maximum(state.last_segment, 0)[:, None], tokens_BT.shape)
        hidden, state, aux, collected = run(state, tokens_BT, segment_ids)
        if run.call.collect and (name in collect or "*" in collect):
            collected = collected | self.own_report(tokens_BT, segment_ids)
        return rows.scatter(Output(hidden, state, aux, collected))

    def memory_axes(self, memory: Running) -> Running:
        """0, except for the backbone's leaves and those of a memory with one part per block."""
        zero = jax.tree.map(lambda _: 0, memory)
        own = jax.tree.map(lambda _: self.start_axis, memory.memory)
        backbone = None if memory.backbone is None else self.backbone.memory_axes(memory.backbone)
        return zero._replace(memory=own, backbone=backbone)

    def at_call_length(self, memory: Running, length: int) -> Running:
        """If all calls are whole segments without padding, as with streamed rows, all rows are at the start of a
        segment, and a single path is traced."""
        if length % self.config.segment_length:
            return memory
        return memory._replace(offset=np.zeros(memory.offset.shape, np.int32))

    def head(self, hidden_BTD: Float[Array, "B T D"]) -> LinearHead:
        """The head of the backbone."""
        return self.backbone.head(hidden_BTD)
