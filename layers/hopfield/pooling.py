"""HopfieldPooling: learned states retrieve from a set (arXiv 2008.02217), and its causal form over a growing row.

    Z = sep(beta sim(S, norm(Y) W_k)) (norm(Y') W_v) W_o,   S [Q, H, K] learned

The states are learned in association space; a projection before them would be redundant. At every token the mixer pools
all tokens of its segment so far. With one softmax update this needs no cache: the state is the sums of exp(score) v and
exp(score), relative to the highest score so far:

    m_t = max(m_{t-1}, s_t),   A_t = e^(m_{t-1} - m_t) A_{t-1} + e^(s_t - m_t) [v_t, 1],   y_t = A_t[:V] / A_t[V]
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from engrax.errors import UserError
from engrax.layers.common.modules import projection
from engrax.layers.common.segments import last_segment_after, select_rows, starts_anew
from engrax.layers.hopfield.association import AssociationConfig, Hopfield, Norm
from engrax.layers.mixer import MIXERS, Mixer, MixerConfig
from engrax.pallas_kernels import linear_attention
from engrax.pallas_kernels.linear_attention import cost

NOTHING = -1e30  # the highest score of no token: finite, and so low that nothing carried from there counts


class HopfieldPooling(nnx.Module):
    """A set [B, M, D] -> [B, Q, O], one vector for each of the `queries` learned states."""

    def __init__(
        self,
        settings: AssociationConfig,
        dim: int,
        *,
        queries: int = 1,
        out_dim: int | None = None,
        rngs: nnx.Rngs,
        num_layers: int = 1,
    ):
        self.association = Hopfield(settings, dim, out_dim=out_dim, rngs=rngs, num_layers=num_layers, parts=("stored",))
        self.queries = _learned_states(settings, queries, rngs)

    def __call__(
        self,
        stored_BMD: Float[Array, "B M D"],
        values_BME: Float[Array, "B M E"] | None = None,
        *,
        mask: Bool[Array, "B M"] | None = None,
    ) -> Float[Array, "B Q O"]:
        """Pools; mask: True = an element of the set; others may have any value. An empty set gives 0 before the output
        projection."""
        q, k, v = self._spaces(stored_BMD, values_BME, mask)
        return self.association.read(self.association.retrieve(q, k, v, mask=mask))

    def weights(self, stored_BMD, *, mask=None) -> Float[Array, "B Q H M"]:
        """The weights of the last update, over the set and then the bias and zero patterns."""
        return self.association.weights_of(*self._spaces(stored_BMD, None, mask), mask=mask)

    def _spaces(self, stored, values, mask):
        k, v = self.association.memory(stored, values, mask)
        q = self.association.normed(self.queries[...].astype(k.dtype))
        return jnp.broadcast_to(q, (len(k), *q.shape)), k, v


class PoolingState(NamedTuple):
    """The running sums, for Q queries of each head. The size does not depend on T."""

    sums: Float[Array, "B R one V"]  # of exp(score - highest) [v, 1], R = queries x heads
    highest: Float[Array, "B R"]  # score so far
    last_segment: Int[Array, " B"]


@MIXERS.register("hopfield_pooling")
@dataclasses.dataclass(frozen=True)
class HopfieldPoolingConfig(AssociationConfig, MixerConfig):
    """Settings of running pooling; settings of the states' projection are not used."""

    stored_norm: Norm = "none"
    value_norm: Norm = "none"
    queries: int = 4  # learned states, in every head
    chunk_size: int = 16  # tokens worked on at once; changes rounding and speed, not the result

    def __post_init__(self):
        super().__post_init__()
        for name in ("queries", "chunk_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        if (self.steps, self.separation, self.similarity) != (1, "softmax", "dot"):
            raise UserError(
                "running pooling carries sums of one softmax update of dot products: leave steps, separation and "
                "similarity as they are, or pool whole sets with HopfieldPooling."
            )
        if self.bias_pattern or self.zero_pattern:
            raise UserError("running pooling has no bias_pattern and no zero_pattern: leave them out.")

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "RunningPooling":
        return RunningPooling(self, dim, rngs=rngs, num_layers=num_layers)

    @classmethod
    def examples(cls) -> tuple["HopfieldPoolingConfig", ...]:
        small = cls(heads=2, head_dim=4, queries=3, chunk_size=8, beta=1.5)
        return (
            dataclasses.replace(small, value_dim=6, trainable_beta=True, space_norm="rms", value_norm="layer"),
            dataclasses.replace(small, values="of_stored"),
            cls(),
        )

    def flops_per_token(self, dim: int, seq_len: int) -> float:
        project = self.projection_flops(dim, dim, dim, 0)[1] + 2 * self.queries * self.value_width * dim
        sizes = dict(heads=self.queries * self.heads, key=1, value=self.value_width // self.heads + 1)
        sums = cost.flops(batch=1, seq=seq_len, chunk_size=self.chunk_size, **sizes).forward / seq_len
        return project + 2 * self.queries * self.width + sums


class RunningPooling(Mixer):
    """The module of HopfieldPoolingConfig: x [B, T, D] -> y [B, T, D], PoolingState."""

    def __init__(self, config: HopfieldPoolingConfig, dim: int, *, rngs: nnx.Rngs, num_layers: int = 1):
        self.config = config
        inner = dataclasses.replace(config, project_output=False)
        self.association = Hopfield(inner, dim, rngs=rngs, parts=("stored",))
        self.queries = _learned_states(config, config.queries, rngs)
        width, scale = config.queries * config.value_width, (2 * num_layers) ** -0.5
        self.out = projection(width, dim, ("heads", "embed"), rngs=rngs, scale=scale, bias=config.bias)

    def init_state(self, batch_size: int) -> PoolingState:
        """No token pooled yet."""
        c, rows = self.config, self.config.queries * self.config.heads
        dtype = jnp.promote_types(self.queries[...].dtype, jnp.float32)
        return PoolingState(
            sums=jnp.zeros((batch_size, rows, 1, c.value_width // c.heads + 1), dtype),
            highest=jnp.full((batch_size, rows), NOTHING, dtype),
            last_segment=jnp.full((batch_size,), -1, jnp.int32),
        )

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        state: PoolingState | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], PoolingState]:
        """Pools the tokens of each segment up to every token. Padding (-1) gives 0."""
        B, T, _ = x_BTD.shape
        state = self.init_state(B) if state is None else state
        if segment_ids is None:
            last = jnp.maximum(state.last_segment, 0)
        else:
            last = last_segment_after(state.last_segment, segment_ids)
            anew = starts_anew(state.last_segment, segment_ids)
            state = select_rows(anew, self.init_state(B), state)
        score_BTR, v_BTRV = self._scores(x_BTD)
        if segment_ids is not None:
            score_BTR = jnp.where((segment_ids >= 0)[..., None], score_BTR, NOTHING)
        before, highest = _running_maximum(state, lax.stop_gradient(score_BTR), segment_ids)
        k = jnp.exp(score_BTR - highest)[..., None]
        v = jnp.concatenate([v_BTRV, jnp.ones((*v_BTRV.shape[:3], 1), v_BTRV.dtype)], axis=-1)
        sums, memory = linear_attention(
            jnp.ones_like(k),
            k,
            v.astype(k.dtype),
            g=before - highest,
            scale=1.0,
            initial_state=state.sums,
            segment_ids=segment_ids,
            chunk_size=self.config.chunk_size,
            implementation=self.config.implementation,
        )
        total = sums[..., -1:]
        pooled = sums[..., :-1] / jnp.where(total > 0, total, 1)
        y = self.out(pooled.reshape(B, T, -1).astype(x_BTD.dtype))
        if segment_ids is not None:
            y = jnp.where((segment_ids >= 0)[..., None], y, 0)
        return y, PoolingState(memory, highest[:, -1], last)

    def _scores(self, x_BTD):
        """beta S k_t [B, T, Q H] in float32 or wider, and values [B, T, Q H, V]."""
        a, c = self.association, self.config
        k = a.patterns(x_BTD)
        v = a.contents(x_BTD, k)
        dtype = jnp.promote_types(k.dtype, jnp.float32)
        states = a.normed(self.queries[...].astype(k.dtype)) * a.betas().astype(dtype)[:, None]
        score = jnp.einsum("QHK,BTHK->BTQH", states.astype(dtype), k.astype(dtype), precision=lax.Precision.HIGHEST)
        v = jnp.broadcast_to(v[:, :, None], (*v.shape[:2], c.queries, *v.shape[2:]))
        return score.reshape(*k.shape[:2], -1), v.reshape(*k.shape[:2], -1, v.shape[-1])


def _running_maximum(
    state: PoolingState, score_BTR, segment_ids
) -> tuple[Float[Array, "B T R"], Float[Array, "B T R"]]:
    """The highest score of the segment before every token (not above the next), and with it."""
    if segment_ids is None:
        segment_ids = jnp.zeros(score_BTR.shape[:2], jnp.int32)
        carried = segment_ids[:, :1]
    else:
        carried = state.last_segment[:, None]
    segment = lax.cummax(jnp.concatenate([carried, segment_ids], axis=1), axis=1)[
        ..., None
    ]  # padding has its neighbour's
    score = jnp.concatenate([state.highest[:, None], score_BTR], axis=1)

    def higher(a, b):
        return jnp.maximum(a[0], b[0]), jnp.where(a[0] == b[0], jnp.maximum(a[1], b[1]), b[1])

    segments = jnp.broadcast_to(segment, score.shape)
    _, highest = lax.associative_scan(higher, (segments, score), axis=1)
    return jnp.minimum(highest[:, :-1], highest[:, 1:]), highest[:, 1:]


def _learned_states(c: AssociationConfig, queries: int, rngs: nnx.Rngs) -> nnx.Param:
    draw = jax.random.normal(rngs.params(), (queries, c.heads, c.head_dim))
    return nnx.Param(draw, axes=("queries", "heads", "kv"), role="initial memory")
