"""Memory as context (MAC; Titans, arXiv 2501.00663, section 4.1), causal.

The row is cut into segments of C tokens. With M the memory before segment t, p learned persistent tokens and * a read
without a write (eq. 21 to 25):

    h = M*(x W_Q),   y = attention([p; h; x]),   M <- write(M, y),   o = y (x) M*(y)

As printed, a token attends to vectors retrieved by later tokens of its segment, and its gate is a memory that has seen
the whole segment. Both leak in a language model. Mode "causal": token i attends only to h_j with j <= i, and its gate
is the token-level memory after its own write. Mode "paper": as printed.

(x) is norm(y) 2 sigmoid(M(y)): an empty memory passes the attention unchanged.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from engrax.errors import UserError, require_positive
from engrax.layers.attention.attention import masked_attention
from engrax.layers.attention.rope import rotate
from engrax.layers.common.conv import ShortConv
from engrax.layers.common.modules import l2_normalise, projection, rms_norm
from engrax.layers.common.segment_blocks import BlockIndex, block_index, conv_in_block
from engrax.layers.common.segments import last_segment_after, select_rows, starts_anew
from engrax.layers.mixer import MIXERS, Mixer, MixerConfig
from engrax.layers.test_time.titans import TitansConfig
from engrax.pallas_kernels import NeuralMemoryState
from engrax.pallas_kernels.common.segments import row_lengths
from engrax.pallas_kernels.neural_memory.types import ACTIVATIONS, Layers


class Segment(NamedTuple):
    """The cache of the current segment, by place: keys and values of its tokens and of their retrieved vectors."""

    keys: Float[Array, "B C H K"]
    values: Float[Array, "B C H K"]
    recalled_keys: Float[Array, "B C H K"]
    recalled_values: Float[Array, "B C H K"]
    ids: Int[Array, "B C"]  # segment id of each token, -1 = none yet, or padding


class MACState(NamedTuple):
    """Everything the mixer needs to continue at any position; its size does not depend on T."""

    memory: NeuralMemoryState
    frozen: Layers  # the weights at the start of the segment of C tokens (or of the document in it)
    segment: Segment
    tail: Float[Array, "B W N"]  # of the convolution of q, k, v and the retrieval's query
    memory_tail: Float[Array, "B W M"]  # of the memory's own convolution
    place: Int[Array, " B"]  # tokens of the current segment so far
    last_segment: Int[Array, " B"]


@MIXERS.register("titans_mac")
@dataclasses.dataclass(frozen=True)
class MACConfig(MixerConfig):
    """Settings of memory as context."""

    memory_reads: ClassVar[tuple[str, ...]] = ("retrieved", "gate")

    memory: TitansConfig = TitansConfig()
    chunk_size: int = 64  # tokens of a segment, a multiple of the memory's chunk
    heads: int = 4  # of the attention
    head_dim: int = 32  # width of one of them, even
    persistent_tokens: int = 4  # learned tokens that every token attends to
    conv_width: int = 4  # taps of the short convolution on the attention's q, k and v; 1 = none
    rope_base: float = 10_000.0  # longest rotary wavelength / 2 pi, in tokens
    mode: str = "causal"  # causal | paper (leaks future tokens of the segment)

    def __post_init__(self):
        require_positive(self, "rope_base")
        if self.chunk_size % self.memory.chunk_size:
            raise UserError(
                f"chunk_size={self.chunk_size} of the segment is not a multiple of memory.chunk_size="
                f"{self.memory.chunk_size}; choose one."
            )
        if self.head_dim % 2 or self.head_dim < 2:
            raise UserError(f"head_dim={self.head_dim}: rotary positions need pairs of channels; choose an even width.")
        if self.mode not in ("causal", "paper"):
            raise UserError(f"unknown mode {self.mode!r} (known: causal, paper).")
        if self.persistent_tokens < 0 or min(self.heads, self.conv_width, self.chunk_size) < 1:
            raise UserError("persistent_tokens must not be negative; heads, conv_width and chunk_size at least 1.")

    @property
    def exempt_from(self) -> dict[str, str]:
        if self.mode == "causal":
            return {}
        return {"causality": "the paper mode sees its whole segment"}

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "MAC":
        return MAC(self, dim, rngs=rngs, num_layers=num_layers)

    @classmethod
    def examples(cls) -> tuple["MACConfig", ...]:
        memory = TitansConfig(heads=2, head_dim=4, hidden=6, chunk_size=4, persistent_tokens=3)
        return (cls(memory=memory, chunk_size=8, heads=2, head_dim=4, persistent_tokens=2),)

    def flops_per_token(self, dim: int, seq_len: int) -> float:
        inner, retrieved = self.heads * self.head_dim, self.memory.heads * self.memory.head_dim
        project = 2 * dim * (6 * inner + 2 * retrieved + dim) + 2 * self.conv_width * (3 * inner + retrieved)
        seen = self.persistent_tokens + 2 * (self.chunk_size + 1) / 2
        widths = self.memory.layer_widths
        read = 2.0 * self.memory.heads * sum(a * b for a, b in zip(widths[:-1], widths[1:]))
        return project + 4 * inner * seen + 2 * read + self.memory.flops_per_token(dim, seq_len)


class MAC(Mixer):
    """The module of MACConfig: x [B, T, D] -> y [B, T, D], MACState."""

    def __init__(self, config: MACConfig, dim: int, *, rngs: nnx.Rngs, num_layers: int = 1):
        self.config = config
        inner, retrieved = config.heads * config.head_dim, config.memory.heads * config.memory.head_dim
        self.qkv = projection(dim, 3 * inner, ("embed", "heads"), rngs=rngs, widths=(inner,) * 3)
        self.query = projection(dim, retrieved, ("embed", "heads"), rngs=rngs)
        self.conv = ShortConv(3 * inner + retrieved, config.conv_width, rngs=rngs)
        self.recalled_norm = rms_norm(config.memory.head_dim, rngs=rngs)
        self.recalled = projection(retrieved, dim, ("heads", "embed"), rngs=rngs)
        self.recalled_kv = projection(dim, 2 * inner, ("embed", "heads"), rngs=rngs, widths=(inner,) * 2)
        if config.persistent_tokens:
            self.persistent = nnx.Param(
                jax.random.normal(rngs.params(), (config.persistent_tokens, dim)),
                axes=("persistent", "embed"),
                role="initial memory",
            )
        self.attended = projection(inner, dim, ("heads", "embed"), rngs=rngs)
        self.memory = config.memory.build(dim, rngs=rngs, num_layers=num_layers)
        self.norm = rms_norm(dim, rngs=rngs)
        self.out = projection(dim, dim, ("embed", "embed"), rngs=rngs, scale=(2 * num_layers) ** -0.5)

    def init_state(self, batch_size: int) -> MACState:
        """The state every row starts from, at place 0."""
        c, dtype = self.config, self.qkv.kernel.dtype
        start = self.memory.init_state(batch_size)
        empty = jnp.zeros((batch_size, c.chunk_size, c.heads, c.head_dim), dtype)
        ids = jnp.full((batch_size, c.chunk_size), -1, jnp.int32)
        return MACState(
            memory=start.memory,
            frozen=start.memory.weights,
            segment=Segment(empty, empty, empty, empty, ids),
            tail=self.conv.init_tail(batch_size, dtype),
            memory_tail=start.tail,
            place=np.zeros(batch_size, np.int32),
            last_segment=start.last_segment,
        )

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        state: MACState | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        without: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "B T D"], MACState]:
        """Attends within the segment of C tokens and to the memory's recalled vectors. Padding (-1) gives 0; `without`:
        memory reads to remove, of the retrieved vectors and the gate."""
        B, T, _ = x_BTD.shape
        packed = segment_ids is not None
        lengths = row_lengths(segment_ids) if packed else None
        place = np.zeros(B, np.int32) if state is None else state.place
        layout = block_index(place, T, self.config.chunk_size, lengths)
        reset = self.memory.reset_state() if packed or not layout.is_full else None  # of documents; holes need one too
        state = self.init_state(B) if state is None else state
        if packed:
            anew = starts_anew(state.last_segment, segment_ids)
            state = state._replace(tail=jnp.where(anew[:, None, None], 0, state.tail))
            x_BTD = jnp.where((segment_ids >= 0)[..., None], x_BTD, 0)  # padding may hold anything, NaN included
        else:
            segment_ids = jnp.broadcast_to(jnp.maximum(state.last_segment, 0)[:, None], (B, T))
        inner = self.config.heads * self.config.head_dim
        projected = jnp.concatenate([self.qkv(x_BTD), self.query(x_BTD)], axis=-1)
        mixed, tail = self.conv(projected, state.tail, segment_ids if packed else None)
        q, k, v, query = jnp.split(mixed, [inner, 2 * inner, 3 * inner], axis=-1)
        arrays = [self._heads(y) for y in (q, k, v)] + [self._queries(query), segment_ids]
        blocks = (layout.blocks, *jax.tree.map(layout.to_blocks, tuple(arrays)))
        carry = (tuple(state.memory[:3]), state.frozen, state.segment, state.memory_tail, state.last_segment)
        carry, out = self._scan(carry, blocks, reset, layout.is_aligned, without)
        (memory, frozen, segment, memory_tail, last), chunk = carry, self.config.memory.chunk_size
        place = (jnp.asarray(state.place) + (lengths if packed else T)) % self.config.chunk_size
        state = MACState(
            memory=NeuralMemoryState(*memory, place % chunk),
            frozen=frozen,
            segment=segment,
            tail=tail,
            memory_tail=memory_tail,
            place=place,
            last_segment=last,
        )
        return self.out(layout.from_blocks(out)), state

    def report(self, x_BTD, state=None, segment_ids=None) -> dict[str, Array]:
        """Diagnostics of one call: the memory's norms after it, and its distance from the memory at the chunk start."""
        _, after = self(x_BTD, state, segment_ids)
        norm = lambda xs: jnp.sqrt(sum(jnp.mean(jnp.sum(x * x, axis=(-2, -1))) for x in xs))  # noqa: E731
        moved = [a - b for a, b in zip(after.memory.weights, after.frozen)]
        return {
            "memory_norm": norm(after.memory.weights),
            "momentum_norm": norm(after.memory.momentum),
            "moved_in_segment": norm(moved),
        }

    def _heads(self, y):
        return y.reshape(*y.shape[:2], self.config.heads, self.config.head_dim)

    def _queries(self, y):
        c = self.config.memory
        return l2_normalise(jax.nn.silu(y.reshape(*y.shape[:2], c.heads, c.head_dim)))

    def call_without(self, reads, x_BTD, state=None, segment_ids=None):
        return self(x_BTD, state, segment_ids, without=reads)

    def _scan(self, carry, blocks, reset, aligned: bool, without: tuple[str, ...]):
        """Returns the carry after all blocks and their mixed tokens [N, B, S, D]. Unless rows are `aligned`, the first
        block may continue a segment; every other one begins it, and the memory's chunk."""
        found = []
        if not aligned:
            first, blocks = (jax.tree.map(lambda x, part=part: x[part], blocks) for part in (0, slice(1, None)))
            carry, out = self._block(carry, *first, reset, False, without)
            found.append(out[None])
        if len(blocks[1]):
            carry, out = jax.lax.scan(lambda *xs: self._block(xs[0], *xs[1], reset, True, without), carry, blocks)
            found.append(out)
        return carry, jnp.concatenate(found) if len(found) > 1 else found[0]

    def _block(self, carry, places: BlockIndex, q, k, v, query, ids, reset, at_start: bool, without: tuple[str, ...]):
        """One segment, or a token of it: returns the carry and the mixed tokens [B, S, D]."""
        memory, frozen, segment, memory_tail, last = carry
        begins = places.count * (places.first == 0) > 0
        frozen = select_rows(begins, memory[0], frozen)
        segment = segment._replace(ids=jnp.where(begins[:, None], -1, segment.ids))
        ids = jnp.where(places.holds, ids, -1)
        anew = (last >= 0)[:, None] & (ids >= 0) & (ids != last[:, None])  # tokens of documents that began since
        h = self._recall(frozen, reset, query, anew)
        k_h, v_h = (self._heads(y) for y in jnp.split(self.recalled_kv(h), 2, axis=-1))
        place = places.place
        turn = lambda y: rotate(y, place, self.config.rope_base)  # noqa: E731
        segment = places.merge(segment, Segment(turn(k), v, turn(k_h), v_h, ids))
        y = self._attend(turn(q), segment, ids, place, "retrieved" not in without)
        y = jnp.where((ids >= 0)[..., None], y, 0)
        begun = starts_anew(last, ids)
        memory_tail = jnp.where(begun[:, None, None], 0, memory_tail)
        if reset is not None:
            memory = select_rows(begun, tuple(reset[:3]), memory)
            frozen = select_rows(jnp.any(anew, axis=1), reset.weights, frozen)
        last = last_segment_after(last, ids)
        m, memory, memory_tail = self._write_and_read(y, memory, memory_tail, places, ids, reset, at_start, last)
        y = self.norm(y)
        if "gate" not in without:
            y = y * (2 * jax.nn.sigmoid(m)).astype(y.dtype)
        return (memory, frozen, segment, memory_tail, last), y

    def _recall(self, frozen: Layers, reset, query, anew: Bool[Array, "B S"]) -> Float[Array, "B S D"]:
        """The read of each query from the memory at the segment's start, or at a later document's start."""
        dtype = query.dtype
        found = _apply(frozen, query.astype(frozen[0].dtype), self.config.memory.activation)
        if reset is not None:
            empty = _apply(reset.weights, query.astype(frozen[0].dtype), self.config.memory.activation)
            found = jnp.where(anew[..., None, None], empty, found)
        return self.recalled(self.recalled_norm(found.astype(dtype)).reshape(*query.shape[:2], -1))

    def _attend(self, q, segment: Segment, ids, place, recalls: bool = True) -> Float[Array, "B S D"]:
        """Softmax attention over persistent tokens, retrieved vectors, and the segment's tokens."""
        (B, S), c = ids.shape, self.config
        keys, values = [segment.recalled_keys, segment.keys], [segment.recalled_values, segment.values]
        same = (segment.ids[:, None] == ids[:, :, None]) & (ids >= 0)[:, :, None]
        places = jnp.arange(c.chunk_size)
        causal = same & (places <= place[..., None])
        itself = places == place[..., None]  # holes and padding see themselves: no empty softmax
        recalled = causal if c.mode == "causal" else same
        visible = [recalled & recalls, causal | itself]
        if c.persistent_tokens:
            _, k, v = jnp.split(self.qkv(self.persistent[...][None]), 3, axis=-1)
            keys.insert(0, jnp.broadcast_to(self._heads(k), (B, c.persistent_tokens, *keys[0].shape[2:])))
            values.insert(0, jnp.broadcast_to(self._heads(v), keys[0].shape))
            visible.insert(0, jnp.ones((B, S, c.persistent_tokens), bool))
        keys, values = (jnp.concatenate([y.astype(q.dtype) for y in ys], axis=1) for ys in (keys, values))
        y = masked_attention(q, keys, values, jnp.concatenate(visible, axis=2))
        return self.attended(y.reshape(B, S, -1))

    def _write_and_read(self, y, memory, tail, places: BlockIndex, ids, reset, at_start: bool, last):
        """Writes y into the memory. Returns the tokens' gates [B, S, D], the memory and its convolution's tail."""
        titans, c = self.memory, self.config.memory
        mixed, tail = conv_in_block(titans.conv, titans.qkv(y), tail, places, ids)
        q, k, v = titans._activate(mixed)
        tokens = (q, k, v, titans._gates(y), ids)
        tokens = tokens if at_start else places.to_front(tokens)
        phase = np.zeros(len(y), np.int32) if at_start else places.first % c.chunk_size
        masked_ids = None if reset is None else tokens[4]
        read, after = titans._memory(*tokens[:4], NeuralMemoryState(*memory, phase), reset, masked_ids)
        read = read if at_start else places.from_front(read)
        if self.config.mode == "paper":  # of the row's last document the memory after the whole segment
            of_last = (ids == last[:, None])[..., None, None]
            read = jnp.where(of_last, _apply(after.weights, q.astype(memory[0][0].dtype), c.activation), read)
        return titans._project_read(y, read.astype(y.dtype)), tuple(after[:3]), tail


def _apply(weights: Layers, x: Float[Array, "B S H K"], activation: str) -> Float[Array, "B S H V"]:
    """M(x) with the weights [B, H, I, O] of every row, or [1, H, I, O] of all."""
    for i, w in enumerate(weights):
        w = jnp.broadcast_to(w, (len(x), *w.shape[1:]))
        x = jnp.einsum("bshi,bhio->bsho", ACTIVATIONS[activation](x) if i else x, w)
    return x
