"""Associative recurrent memory transformer (ARMT; arXiv 2407.04841) around a pattern language model.

Each block has an associative memory (layers/routed/associative.py), written by earlier segments. All vectors of a
segment read from it before the block. m learned memory tokens follow the L tokens; the block's outputs at these tokens
are written at the end of the segment:

    h <- block(h + read(h)),   at the memory tokens: write(h)

The first segment reads nothing. There are no memory tokens before a segment: the matrices carry the memory.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from engrax.errors import UserError
from engrax.layers import AttentionConfig
from engrax.layers.common.segments import select_rows
from engrax.layers.routed.associative import ORDER, Association, AssociativeMemory
from engrax.models.contract import no_loss
from engrax.models.language_model import LanguageModel, LanguageModelConfig
from engrax.models.model import MODELS
from engrax.models.parameters import stack_axes
from engrax.models.segment_config import SegmentRecurrentConfig
from engrax.models.segment_recurrence import SegmentRecurrent
from engrax.models.segment_runner import Call, Read


@MODELS.register("armt")
@dataclasses.dataclass(frozen=True)
class ARMTConfig(SegmentRecurrentConfig):
    """Settings of ARMT; the backbone must be a pattern language model, whose blocks get the memories."""

    memory_tokens: int = 16  # m, vectors after the tokens of a segment
    key_dim: int = 64  # K, width of queries and keys before DPFP-3 maps them to 6 K features

    def __post_init__(self):
        if not isinstance(self.backbone, LanguageModelConfig):
            raise UserError(
                f"ARMT wraps the blocks of a pattern language model, not of {self.backbone.registered_name!r}; "
                "choose a language_model, or RMT or HMT, which wrap any model."
            )
        super().__post_init__()
        self.at_least(1, "memory_tokens", "key_dim")

    def build(self, *, rngs: nnx.Rngs) -> "ARMT":
        return ARMT(self, rngs=rngs)

    @classmethod
    def examples(cls) -> tuple["ARMTConfig", ...]:
        attention = AttentionConfig(heads=2, head_dim=4)
        small = LanguageModelConfig(vocab_size=16, dim=8, mixers=(attention,), repeat=2, mlp_hidden=12)
        return (cls(backbone=small, segment_length=4, memory_tokens=2, key_dim=4),)

    @property
    def extra_slots(self) -> int:
        return self.memory_tokens

    @property
    def exempt_from(self) -> dict[str, str]:
        return super().exempt_from | {"trainability.finite_differences": "the normaliser's correction has no gradient"}

    def flops_per_token(self, seq_len: int) -> float:
        dim, features = self.backbone.dim, 2 * ORDER * self.key_dim
        read = 2 * dim * self.key_dim + 2 * features * (dim + 1)
        write = 2 * dim * (self.key_dim + dim + 1) + 4 * features * (dim + 1)
        slots = 1 + self.memory_tokens / self.segment_length
        per_block = read * slots + write * self.memory_tokens / self.segment_length
        return super().flops_per_token(seq_len) + self.backbone.num_layers * per_block


class AssociativeLanguageModel(LanguageModel):
    """A pattern language model with an associative memory in each block."""

    def __init__(self, config: LanguageModelConfig, key_dim: int, *, rngs: nnx.Rngs):
        self.key_dim = key_dim
        super().__init__(config, rngs=rngs)

    def _stack(self, stack, rngs):
        """The blocks of one stack with their memories; every parameter has a leading axis [repeat]."""
        block, dim, key_dim = super()._stack(stack, rngs), self.config.dim, self.key_dim

        def build(key):
            return AssociativeMemory(dim, key_dim, rngs=nnx.Rngs(key))

        keys = jax.random.split(rngs.params(), len(stack.layers))
        block.associative = nnx.eval_shape(lambda: build(jax.random.key(0)))
        nnx.update(block.associative, jax.vmap(lambda key: nnx.state(build(key), nnx.Param))(keys))
        stack_axes(block.associative)
        return block

    def init_associations(self, batch_size: int) -> tuple[Association, ...]:
        """Empty memories: a tuple over the stacks, leaves [repeat, B, ...]."""

        def body(places, blocks, x, states):
            return x, (tuple(block.associative.init_state(batch_size) for block in blocks), x, {})

        return self._scan(body, jnp.zeros(()), None)[1]

    def read_segment(self, x_BSD, state, ids, associations, owner: Int[Array, " B"], call: Call) -> Read:
        """`encode`, with the memories of the documents `owner`; `made` are the memories after the suffix is written."""
        calls, closing = self._calls(call.collect, call.mute), call.closing
        x_BSD, states, place, _ = self._add_positions(x_BSD, state, ids)  # a segment never exceeds its positions
        states = (None,) * len(self.blocks) if states is None else states
        reads = ids == owner[:, None]
        goes_on = ids[:, -1] == owner  # else a new document has started, and its memory is empty

        def body(places, blocks, x, both):
            new, aux, collected = [], no_loss(x), {}
            for (label, asked, without), block, (state, memory) in zip(calls[places], blocks, both):
                x = x + block.associative.read(x, memory, reads)
                x, out = block(x, state, ids, collect=asked, mute=without)
                aux = aux + out.aux
                collected |= {f"{label}.{key}": value for key, value in out.collected.items()}
                if closing:
                    memory = select_rows(goes_on, memory, jax.tree.map(jnp.zeros_like, memory))
                    memory = block.associative.write(x[:, -closing:], memory)
                new.append((out.state, memory))
            return x, (tuple(new), aux, collected)

        x_BSD, both, aux, collected = self._scan(body, x_BSD, tuple(zip(states, associations)))
        states, associations = zip(*both)
        hidden = self.norm(x_BSD) if hasattr(self, "norm") else x_BSD
        return Read(hidden, (*states, *place), associations, aux, collected)


class ARMT(SegmentRecurrent):
    """The module of ARMTConfig; the memory is a tuple of Associations, leaves [repeat, B, ...]."""

    start_axis = 1

    def __init__(self, config: ARMTConfig, *, rngs: nnx.Rngs):
        super().__init__(config, AssociativeLanguageModel(config.fitted_backbone, config.key_dim, rngs=rngs))
        init = jax.nn.initializers.normal(self.width**-0.5)
        shape = (config.memory_tokens, self.width)
        self.memory_tokens = nnx.Param(init(rngs.params(), shape), axes=("persistent", "embed"), role="initial memory")

    def start_memory(self, batch_size: int) -> tuple[Association, ...]:
        return self.backbone.init_associations(batch_size)

    def prefix(self, memory, recent, ahead):
        nothing = jnp.zeros((len(recent), 0, self.width), self.memory_tokens.dtype)
        return memory, nothing, jnp.ones((len(recent), 0), bool)

    def suffix(self, memory) -> Float[Array, "B M D"]:
        return jnp.broadcast_to(self.memory_tokens[...], (memory[0].sum.shape[1], *self.memory_tokens.shape))

    def update_memory(self, memory, hidden_BSD, made: Any) -> tuple[Association, ...]:
        return made

    def read(self, x_BSD, ids, state, memory, owner, call):
        return self.backbone.read_segment(x_BSD, state, ids, memory, owner, call)
