"""Softmax attention: full or sliding window, grouped heads, rotary positions, and a cache of declared capacity.

Its settings also cover the attention of published checkpoints: biases, normalised queries and keys, a gate, scaled
rotary frequencies, rotation of a part of a head or none.

Calls without a state, as in training, are the operation `softmax_attention`, which has kernels. Calls that continue a
state attend to its cache under a mask, by `jax.nn.dot_product_attention`; with a window, long ones are cut into blocks,
which see themselves and the previous block.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from engrax.errors import UserError, require_positive
from engrax.layers.attention.ring import attention_in_pieces
from engrax.layers.attention.rope import RopeScaling, rotate
from engrax.layers.common import sequence
from engrax.layers.common.conv import ShortConv
from engrax.layers.common.modules import projection, rms_norm
from engrax.layers.common.segments import last_segment_after, newest, starts_anew
from engrax.layers.mixer import MIXERS, Mixer, MixerConfig
from engrax.pallas_kernels import softmax_attention
from engrax.pallas_kernels.common.segments import mask_tokens, row_lengths
from engrax.pallas_kernels.softmax_attention.api import merge_attention, softmax_attention_terms
from engrax.pallas_kernels.softmax_attention.reference import attend

SMALLEST_BLOCK = 32  # minimal tokens of a sliding window's block


class AttentionState(NamedTuple):
    """The keys and values that later tokens may attend to; C = window - 1 or the capacity.

    With a window the cache is a queue (oldest first); without one, token i of the row is in slot i.
    """

    keys: Float[Array, "B C G K"]  # rotated
    values: Float[Array, "B C G K"]
    segments: Int[Array, "B C"]  # segment id of each slot, -1 = empty or padding
    tail: Float[Array, "B W N"]  # the last conv_width - 1 projected tokens (q, k and v side by side)
    position: Int[Array, " B"]  # tokens of the row seen so far, filler (-2) included
    last_segment: Int[Array, " B"]


@MIXERS.register("attention")
@dataclasses.dataclass(frozen=True)
class AttentionConfig(MixerConfig):
    """Causal softmax attention with rotary positions (arXiv 2104.09864) and grouped heads (arXiv 2305.13245)."""

    memory_reads: ClassVar[tuple[str, ...]] = ()
    composes: ClassVar[bool] = True

    heads: int = 4  # query heads
    kv_heads: int | None = None  # key/value heads, a divisor of heads; None = heads
    head_dim: int = 32  # width of one head, even
    window: int | None = None  # tokens a query sees, itself included; None = all
    capacity: int = 4096  # tokens a row may hold without a window; more raise an error
    rope_base: float | None = 10_000.0  # longest rotary wavelength / 2 pi, in tokens; None = no rotary positions
    conv_width: int = 1  # taps of a short convolution on q, k and v; 1 = none
    persistent_tokens: int = 0  # learned tokens that every token attends to, also outside the window
    rope_scaling: RopeScaling = RopeScaling()
    bias: Literal["none", "qkv", "all"] = "none"  # projections with a bias
    qk_norm_eps: float | None = None  # eps of an RMSNorm of queries and keys; None = no norm
    qk_norm: Literal["head", "all"] = "head"  # over each head's query and key, or over all heads together
    rope_fraction: float = 1.0  # share of a head's channels that are rotated, from the first on
    output_gate: bool = False  # whether the read is multiplied by the sigmoid of a projection of the input

    def __post_init__(self):
        require_positive(self, "heads", "kv_heads", "head_dim", "capacity", "rope_base")
        if self.heads % (self.kv_heads or self.heads):
            raise UserError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}; choose a divisor.")
        if self.rope_base is not None and not (0 < self.rope_fraction <= 1 and self.rope_width):
            raise UserError(f"rope_fraction={self.rope_fraction} must lie in (0, 1] and leave a pair of channels.")
        if self.rope_base is not None and self.rope_width % 2:
            raise UserError(
                f"head_dim={self.rope_width} is odd; rotary positions need pairs of channels, choose an even width."
            )
        if self.window is not None and self.window < 1:
            raise UserError(f"window={self.window} must be at least 1 token (None sees everything).")
        if self.conv_width < 1:
            raise UserError(f"conv_width={self.conv_width} must be at least 1 (1 = no convolution).")
        if self.persistent_tokens < 0:
            raise UserError(f"persistent_tokens={self.persistent_tokens} must not be negative.")

    @property
    def rope_width(self) -> int:
        """The rotated channels of a head."""
        return int(self.head_dim * self.rope_fraction)

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "Attention":
        return Attention(self, dim, rngs=rngs, num_layers=num_layers)

    @classmethod
    def examples(cls) -> tuple["AttentionConfig", ...]:
        return (
            cls(heads=4, kv_heads=2, head_dim=4, window=8, conv_width=4, persistent_tokens=2),
            cls(heads=2, head_dim=4, window=2),
            cls(heads=2, head_dim=4, capacity=64),
            cls(
                heads=4,
                kv_heads=2,
                head_dim=6,
                window=8,
                persistent_tokens=2,
                rope_scaling=RopeScaling("llama3", factor=8.0, original_context=16),
                bias="all",
                qk_norm_eps=1e-6,
                qk_norm="all",
                rope_fraction=0.7,
                output_gate=True,
            ),
            cls(),
        )

    def of_heads(self, shares: int) -> "AttentionConfig":
        return self.with_heads_cut(shares, ("heads", "kv_heads"))

    def scaled(self, factor: float) -> "AttentionConfig":
        """With a window, which stands for the capacity where there is none, times the factor."""
        return dataclasses.replace(self, window=max(2, round((self.window or self.capacity) * factor)))

    def flops_per_token(self, dim: int, seq_len: int) -> float:
        groups = self.kv_heads or self.heads
        project = 2 * dim * self.head_dim * ((2 + self.output_gate) * self.heads + 2 * groups)
        if self.conv_width > 1:
            project += 2 * self.conv_width * self.head_dim * (self.heads + 2 * groups)
        seen = (seq_len + 1) / 2 if self.window is None else min(self.window, (seq_len + 1) / 2)
        return project + 4 * self.heads * self.head_dim * (seen + self.persistent_tokens)


def masked_attention(
    q_BTHK: Float[Array, "B T H K"],
    k_BSGK: Float[Array, "B S G K"],
    v_BSGK: Float[Array, "B S G V"],
    mask_BTS: Bool[Array, "B T S"],
    scale: float | None = None,
) -> Float[Array, "B T H V"]:
    """softmax(scale q k^T) v over the visible slots, scale K^-1/2 by default; every query must see at least one.

    In float64, where the library has an error of 1e-7, it is an einsum.
    """
    scale = q_BTHK.shape[-1] ** -0.5 if scale is None else scale
    if q_BTHK.dtype != jnp.float64:
        width = v_BSGK.shape[-1]  # the library wants values as wide as keys
        v_BSGK = jnp.pad(v_BSGK, ((0, 0),) * 3 + ((0, q_BTHK.shape[-1] - width),))
        y = jax.nn.dot_product_attention(q_BTHK, k_BSGK, v_BSGK, mask=mask_BTS[:, None], scale=scale)
        return y[..., :width]
    return attend(q_BTHK, k_BSGK, v_BSGK, mask_BTS, scale)[0]


def in_blocks(
    window: int | None, tokens: Sequence[Shaped[Array, "B T ..."]], slots: Sequence[Shaped[Array, "B S ..."]]
) -> tuple[list[Shaped[Array, "N L ..."]], list[Shaped[Array, "N M ..."]]]:
    """Cuts long rows into blocks of L tokens, each with the M = 2L slots of itself and the previous block.

    A window of at most L tokens reaches no further, so the work grows with T, not T^2. The slots end with the call's
    tokens, S - T < window. Fill values are -1 (segments and positions) or 0. N = B * ceil(T / L). Rows are not cut
    without a window, or if blocks would not see less.
    """
    T, S = tokens[0].shape[1], slots[0].shape[1]
    size = max(window or 0, SMALLEST_BLOCK)
    after = -T % size
    if window is None or (T + after) * 2 * size >= T * S:
        return list(tokens), list(slots)

    def blocks(x, before):
        widths = ((0, 0), (before, after)) + ((0, 0),) * (x.ndim - 2)
        x = jnp.pad(x, widths, constant_values=-1 if jnp.issubdtype(x.dtype, jnp.integer) else 0)
        return x.reshape(len(x), -1, size, *x.shape[2:])

    def rows(x):
        return x.reshape(-1, *x.shape[2:])

    slots = [blocks(x, size - (S - T)) for x in slots]
    pairs = [jnp.concatenate([x[:, :-1], x[:, 1:]], axis=2) for x in slots]
    return [rows(blocks(x, 0)) for x in tokens], [rows(x) for x in pairs]


def out_of_blocks(y: Shaped[Array, "N L ..."], batch: int, length: int) -> Shaped[Array, "B T ..."]:
    """The rows, joined again after `in_blocks`."""
    return y.reshape(batch, -1, *y.shape[2:])[:, :length]


class Attention(Mixer):
    """The module of AttentionConfig: x [B, T, D] -> y [B, T, D], AttentionState."""

    def __init__(self, config: AttentionConfig, dim: int, *, rngs: nnx.Rngs, num_layers: int = 1):
        self.config = config
        groups = config.kv_heads or config.heads
        bias = config.bias != "none"
        self.q = projection(dim, config.heads * config.head_dim, ("embed", "heads"), rngs=rngs, bias=bias)
        self.k = projection(dim, groups * config.head_dim, ("embed", "heads"), rngs=rngs, bias=bias)
        self.v = projection(dim, groups * config.head_dim, ("embed", "heads"), rngs=rngs, bias=bias)
        if config.qk_norm_eps is not None:
            heads, axis = ((config.heads, groups), "heads") if config.qk_norm == "all" else ((1, 1), "norm")
            self.q_norm, self.k_norm = (
                rms_norm(n * config.head_dim, rngs=rngs, eps=config.qk_norm_eps, axis=axis) for n in heads
            )
        if config.conv_width > 1:
            widths = tuple(heads * config.head_dim for heads in (config.heads, groups, groups))
            self.conv = ShortConv(sum(widths), config.conv_width, rngs=rngs, widths=widths)
        self.out = projection(
            config.heads * config.head_dim,
            dim,
            ("heads", "embed"),
            rngs=rngs,
            scale=(2 * num_layers) ** -0.5,
            bias=config.bias == "all",
        )
        if config.output_gate:
            self.gate = projection(dim, config.heads * config.head_dim, ("embed", "heads"), rngs=rngs, bias=bias)
        if config.persistent_tokens:
            self.persistent = nnx.Param(
                jax.random.normal(rngs.params(), (config.persistent_tokens, dim)),
                axes=("persistent", "embed"),
                role="initial memory",
            )

    def init_state(self, batch_size: int) -> AttentionState:
        """An empty cache, in the dtype of the parameters."""
        c = self.config
        slots = c.capacity if c.window is None else c.window - 1
        groups = c.kv_heads or c.heads
        shape = (batch_size, slots, groups, c.head_dim)
        dtype = self.k.kernel.dtype
        return AttentionState(
            keys=jnp.zeros(shape, dtype),
            values=jnp.zeros(shape, dtype),
            segments=jnp.full((batch_size, slots), -1, jnp.int32),
            tail=jnp.zeros((batch_size, c.conv_width - 1, (c.heads + 2 * groups) * c.head_dim), dtype),
            position=jnp.zeros((batch_size,), jnp.int32),
            last_segment=jnp.full((batch_size,), -1, jnp.int32),
        )

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        state: AttentionState | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], AttentionState]:
        """Attends within each segment; without `segment_ids` all tokens continue the row's last segment.

        Raises ValueError if T exceeds the capacity; a cache that overflows inside jit gives NaN for that row.
        """
        B, T, _ = x_BTD.shape
        c, row = self.config, T * sequence.count()
        if c.window is None and row > c.capacity:
            raise UserError(
                f"{row} tokens exceed the attention cache's capacity={c.capacity}; raise `capacity` or set a `window`."
            )
        given = state
        state = self.init_state(B) if given is None else given
        ids = segment_ids
        if ids is None:
            ids = jnp.broadcast_to(jnp.maximum(state.last_segment, 0)[:, None], (B, T))
        position_BT = state.position[:, None] + sequence.index() * T + jnp.arange(T)
        plain_q, k, v, state = self._project(x_BTD, state, segment_ids)
        q = plain_q
        if c.rope_base is not None:
            length = c.capacity if c.window is None else None
            q, k = (
                rotate(y, position_BT, c.rope_base, c.rope_scaling, width=c.rope_width, length=length) for y in (q, k)
            )
        added = [sequence.whole(x) for x in (k, v, ids, position_BT)]
        lengths = None if segment_ids is None else row_lengths(added[2])
        *slots, state = self._extend(state, *added, given is None, lengths)
        if sequence.is_split():
            y = self._attend_in_pieces(q, plain_q, k, v, ids, given)
        elif given is None:
            y = self._attend_within(q, plain_q, *slots[:2], segment_ids)  # in the cache's precision
        else:
            y = self._attend_to_cache(q, plain_q, ids, position_BT, slots)
        y = mask_tokens(ids >= 0, y)
        if c.window is None:
            y = jnp.where((state.position <= c.capacity)[:, None, None, None], y, jnp.nan)
        y = y.reshape(B, T, -1)
        y = self.out(y * jax.nn.sigmoid(self.gate(x_BTD)) if c.output_gate else y)
        return (y if c.bias != "all" else mask_tokens(ids >= 0, y)), state

    def _attend_within(self, q, plain_q, k, v, segment_ids):
        """The attention of a row's tokens to one another, and to the persistent tokens; y [B, T, H, K]."""
        options = dict(window=self.config.window, segment_ids=segment_ids)
        if not self.config.persistent_tokens:
            return softmax_attention(q, k, v, **options)
        return merge_attention(softmax_attention_terms(q, k, v, **options), self._attend_to_persistent(plain_q))

    def _attend_in_pieces(self, q, plain_q, k, v, ids, given: AttentionState | None):
        """`_attend_within` or `_attend_to_cache` of rows split over devices."""
        cache = None if given is None else (given.keys, given.values, given.segments)
        parts = attention_in_pieces(q, k, v, ids, self.config.window, cache)
        if self.config.persistent_tokens:
            parts.append(self._attend_to_persistent(plain_q))
        return merge_attention(*parts)

    def _attend_to_cache(self, q, plain_q, segment_ids, position_BT, slots):
        """The attention of tokens to the slots of `_extend` and to the persistent tokens; y [B, T, H, K]."""
        c = self.config
        batch, length = q.shape[:2]
        if c.window is None:
            position_BT = jnp.minimum(position_BT, c.capacity - 1)  # padding may be after the last slot
        tokens, slots = in_blocks(c.window, [q, plain_q, segment_ids, position_BT], slots)
        (q, plain_q, ids, position), (keys, values, segments, slot_position) = tokens, slots
        age = position[:, :, None] - slot_position[:, None, :]
        visible = (age >= 0) & (segments[:, None, :] == ids[:, :, None])
        if c.window is not None:
            visible &= age < c.window
        visible |= age == 0  # padding sees itself: no empty softmax
        if c.persistent_tokens:
            own = attend(q, keys.astype(q.dtype), values.astype(q.dtype), visible, c.head_dim**-0.5)
            y = merge_attention(own, self._attend_to_persistent(plain_q))
        else:
            y = masked_attention(q, keys, values, visible)
        return out_of_blocks(y, batch, length)

    def _attend_to_persistent(self, plain_q):
        """The attention to the persistent tokens, and the log of its softmax's sum. They have no position and are
        compared with the unrotated query."""
        x_1PD = self.persistent[...][None]
        k, v = (p(x_1PD).reshape(*x_1PD.shape[:2], -1, self.config.head_dim) for p in (self.k, self.v))
        k = self._normed(k, "k_norm")
        k, v = (jnp.broadcast_to(y.astype(plain_q.dtype), (len(plain_q), *y.shape[1:])) for y in (k, v))
        return attend(plain_q, k, v, jnp.ones((1, 1, k.shape[1]), bool), self.config.head_dim**-0.5)

    def _project(self, x_BTD, state: AttentionState, segment_ids):
        """q [B, T, H, K], k and v [B, T, G, K], convolved where the config says so, and the state with the new tail."""
        c = self.config
        q_k_v = [self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)]
        if c.conv_width > 1:
            tail = state.tail
            if segment_ids is not None:
                tail = jnp.where(starts_anew(state.last_segment, segment_ids)[:, None, None], 0, tail)
            mixed, tail = self.conv(jnp.concatenate(q_k_v, axis=-1), tail, segment_ids)
            widths = [q_k_v[0].shape[-1], q_k_v[0].shape[-1] + q_k_v[1].shape[-1]]
            q_k_v, state = jnp.split(mixed, widths, axis=-1), state._replace(tail=tail)
        q, k, v = (y.reshape(*x_BTD.shape[:2], -1, c.head_dim) for y in q_k_v)
        return self._normed(q, "q_norm"), self._normed(k, "k_norm"), v, state

    def _normed(self, y: Float[Array, "B T H K"], name: str) -> Float[Array, "B T H K"]:
        """Queries or keys after the norm of that name, if there is one."""
        if self.config.qk_norm_eps is None:
            return y
        norm = getattr(self, name)
        if self.config.qk_norm == "head":
            return norm(y)
        return norm(y.reshape(*y.shape[:2], -1)).reshape(y.shape)

    def _extend(self, state: AttentionState, k, v, segment_ids, position_BT, fresh: bool, lengths=None):
        """Returns the keys, values, segments and positions to attend to [B, S, ...], and the state after the call.

        lengths [B]: how many of the call's tokens are kept (`row_lengths`); None: all.
        """
        T, slots = k.shape[1], state.keys.shape[1]
        new = state._replace(
            position=state.position + (T if lengths is None else lengths),
            last_segment=last_segment_after(state.last_segment, segment_ids),
        )
        if self.config.window is None:
            k, v = k.astype(state.keys.dtype), v.astype(state.values.dtype)
            write = jax.vmap(lambda cache, x, start: jax.lax.dynamic_update_slice_in_dim(cache, x, start, axis=0))
            at = state.position
            if lengths is not None:
                write = jax.vmap(lambda cache, x, slot: cache.at[slot].set(x, mode="drop"))
                at = jnp.where(jnp.arange(T) < lengths[:, None], position_BT, slots)  # padding is dropped
            cache = [
                write(old, x, at) for old, x in ((state.keys, k), (state.values, v), (state.segments, segment_ids))
            ]
            new = new._replace(keys=cache[0], values=cache[1], segments=cache[2])
            if fresh:  # the cache is empty: attend to the call's tokens, not to the whole capacity
                return k, v, segment_ids, position_BT, new
            return *cache, jnp.broadcast_to(jnp.arange(slots), (k.shape[0], slots)), new
        queue = [
            jnp.concatenate([old.astype(x.dtype), x], axis=1)
            for old, x in ((state.keys, k), (state.values, v), (state.segments, segment_ids))
        ]
        old = (state.keys, state.values, state.segments)
        tail = [newest(x, slots, lengths).astype(o.dtype) for x, o in zip(queue, old)]
        new = new._replace(keys=tail[0], values=tail[1], segments=tail[2])
        if fresh:
            return k, v, segment_ids, position_BT, new
        before = state.position[:, None] - slots + jnp.arange(slots)
        return *queue, jnp.concatenate([before, position_BT], axis=1), new
