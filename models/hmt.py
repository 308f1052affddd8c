"""Hierarchical memory transformer (HMT; arXiv 2405.06067) around any backbone.

The row is cut into segments H_n of L tokens. T is a learned summary prompt, BBM the backbone's last hidden state:

    S_n = BBM([T | j tokens | T])                                        summary of the segment
    P_n = softmax((S_n W_q) (M_{n-N..n-1} W_k)^T / sqrt(d_h)) M_{n-N..n-1}    recall: one head, no value projection
    hidden = backbone([P_n | last k tokens of H_{n-1} | H_n | P_n])      sensory memory: tokens
    M_n = the hidden state at the last slot                              written to a cache of the newest N

A document's first segment has nothing to recall: P_0 is a learned vector. As published, S_n summarises the first half
of the segment to be predicted, and P_n precedes that segment: this leaks the future. The modes are

    previous_segment   S_n summarises the last j tokens before the segment
    delayed_prefix     S_n summarises the first j tokens; P_n follows them: [.. | j tokens | P_n | ..]
    paper              as printed; its numbers depend on where calls end, and the trainer refuses it
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from engrax.errors import UserError
from engrax.layers import AttentionConfig, TitansConfig
from engrax.layers.common.modules import projection
from engrax.models.contract import as_model
from engrax.models.language_model import LanguageModelConfig
from engrax.models.model import MODELS
from engrax.models.segment_config import SegmentRecurrentConfig
from engrax.models.segment_recurrence import SegmentRecurrent
from engrax.models.segment_runner import SegmentRunner
from engrax.pallas_kernels.common.segments import FILLER
from engrax.registry import did_you_mean

MODES = ("previous_segment", "delayed_prefix", "paper")
RECALLS = ("attention", "last", "off")


@MODELS.register("hmt")
@dataclasses.dataclass(frozen=True)
class HMTConfig(SegmentRecurrentConfig):
    """Settings of HMT; the paper uses summary_tokens = L / 2, 32 sensory tokens, 300 memories, recall width 4096."""

    summary_tokens: int = 128  # j, tokens summarised in the recall query; at most L
    sensory_tokens: int = 32  # k, last tokens of the previous segment, prepended; at most L
    cache_size: int = 64  # N, memories kept
    recall_width: int = 128  # d_h, width of recall queries and keys
    mode: str = "previous_segment"  # previous_segment | delayed_prefix | paper: what the recall query summarises
    recall: str = "attention"  # attention | last (P_n = M_{n-1}, training's first stage) | off (P_n = P_0)

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "summary_tokens", "cache_size", "recall_width")
        self.at_least(0, "sensory_tokens")
        for name, values in (("mode", MODES), ("recall", RECALLS)):
            value = getattr(self, name)
            if value not in values:
                raise UserError(f"unknown {name} {value!r}{did_you_mean(value, values)} (known: {', '.join(values)}).")
        for name in ("summary_tokens", "sensory_tokens"):
            most = self.segment_length - (name == "summary_tokens" and self.mode == "delayed_prefix")
            if getattr(self, name) > most:
                raise UserError(
                    f"{name}={getattr(self, name)} must be at most {most} with segment_length={self.segment_length}"
                    f" and mode={self.mode!r}."
                )

    def build(self, *, rngs: nnx.Rngs) -> "HMT":
        return HMT(self, rngs=rngs)

    @classmethod
    def examples(cls) -> tuple["HMTConfig", ...]:
        attention, titans = AttentionConfig(heads=2, head_dim=4), TitansConfig.examples()[0]
        small = LanguageModelConfig(vocab_size=16, dim=8, mixers=(attention,), repeat=2, mlp_hidden=12)
        mixed = dataclasses.replace(small, mixers=(AttentionConfig.examples()[0], titans), repeat=1)
        sizes = dict(segment_length=4, summary_tokens=2, cache_size=3, recall_width=5)
        return (
            cls(backbone=small, sensory_tokens=3, remat="full", **sizes),
            cls(backbone=mixed, sensory_tokens=0, mode="delayed_prefix", **sizes),
        )

    @property
    def extra_slots(self) -> int:
        return self.sensory_tokens + 2

    @property
    def recent_tokens(self) -> int:
        return max(self.summary_tokens, self.sensory_tokens)

    @property
    def exempt_from(self) -> dict[str, str]:
        leaks = (
            {"causality": "in the paper mode recall sees the segment's first tokens"} if self.mode == "paper" else {}
        )
        return super().exempt_from | leaks

    def flops_per_token(self, seq_len: int) -> float:
        recall = 0.0
        if self.recall == "attention":
            slots = self.summary_tokens + 2
            head = 2 * self.backbone.dim * self.vocab_size
            recall = (self.fitted_backbone.flops_per_token(slots) - head) * slots
            recall += 2 * self.backbone.dim * self.recall_width * (1 + self.cache_size)
            recall += 2 * self.cache_size * (self.recall_width + self.backbone.dim)
        return super().flops_per_token(seq_len) + recall / self.segment_length


class Recall(NamedTuple):
    """The long-term memory and the last vector recalled from it."""

    cache: Float[Array, "B N D"]  # the newest memories, oldest first, in the last `count` slots
    count: Int[Array, " B"]
    recalled: Float[Array, "B D"]  # P_n
    weights: Float[Array, "B N"]  # of the recall over the cache; zero for empty slots


class HMT(SegmentRecurrent):
    """The module of HMTConfig: 2 D + 2 D d_h parameters in addition to the backbone's."""

    def __init__(self, config: HMTConfig, *, rngs: nnx.Rngs):
        super().__init__(config, as_model(config.fitted_backbone.build(rngs=rngs)))
        width = self.width
        init = jax.nn.initializers.normal(width**-0.5)
        self.summary_prompt = nnx.Param(init(rngs.params(), (width,)), axes=("embed",), role="initial memory")
        self.initial = nnx.Param(init(rngs.params(), (width,)), axes=("embed",), role="initial memory")
        self.query = projection(width, config.recall_width, ("embed", "heads"), rngs=rngs)
        self.key = projection(width, config.recall_width, ("embed", "heads"), rngs=rngs)

    @property
    def insert_at(self) -> int | None:
        return self.config.summary_tokens if self.config.mode == "delayed_prefix" else None

    def start_memory(self, batch_size: int) -> Recall:
        c, first = self.config, self.initial[...]
        return Recall(
            cache=jnp.zeros((batch_size, c.cache_size, len(first)), first.dtype),
            count=jnp.zeros((batch_size,), jnp.int32),
            recalled=jnp.broadcast_to(first, (batch_size, len(first))),
            weights=jnp.zeros((batch_size, c.cache_size), first.dtype),
        )

    def prefix(self, memory: Recall, recent, ahead):
        c = self.config
        sensory = recent[:, recent.shape[1] - c.sensory_tokens :]
        vectors, counts = [self._embed(sensory)], [sensory >= 0]
        if c.mode != "delayed_prefix":
            missing = max(c.summary_tokens - ahead.shape[1], 0)
            known = jnp.pad(ahead, ((0, 0), (0, missing)), constant_values=-1)[:, : c.summary_tokens]
            about = known if c.mode == "paper" else recent[:, recent.shape[1] - c.summary_tokens :]
            memory = self._recall(memory, about)
            vectors.insert(0, memory.recalled[:, None].astype(vectors[0].dtype))
            counts.insert(0, jnp.ones((len(recent), 1), bool))
        return memory, jnp.concatenate(vectors, axis=1), jnp.concatenate(counts, axis=1)

    def infix(self, memory: Recall, recent):
        memory = self._recall(memory, recent[:, recent.shape[1] - self.config.summary_tokens :])
        return memory, self.suffix(memory)

    def suffix(self, memory: Recall):
        return memory.recalled[:, None]

    def update_memory(self, memory: Recall, hidden_BSD, made) -> Recall:
        cache = jnp.concatenate([memory.cache[:, 1:], hidden_BSD.astype(memory.cache.dtype)], axis=1)
        return memory._replace(cache=cache, count=jnp.minimum(memory.count + 1, self.config.cache_size))

    def _embed(self, tokens):
        return self.backbone.embed(jnp.maximum(tokens, 0))

    def _recall(self, memory: Recall, about: Int[Array, "B J"]) -> Recall:
        """P_n and its weights for a query that summarises the tokens `about`."""
        c, cache = self.config, memory.cache
        wide = jnp.promote_types(cache.dtype, jnp.float32)
        there = jnp.arange(c.cache_size) >= c.cache_size - memory.count[:, None]
        if c.recall == "attention":
            q = self.query(self._summary(about)).astype(wide)
            scores = jnp.einsum("BK,BNK->BN", q, self.key(cache).astype(wide)) * c.recall_width**-0.5
            any_there = there | (memory.count == 0)[:, None]  # no empty softmax
            weights = jnp.where(there, jax.nn.softmax(jnp.where(any_there, scores, -jnp.inf), axis=-1), 0)
        else:
            newest = (jnp.arange(c.cache_size) == c.cache_size - 1) & (c.recall == "last")
            weights = (there & newest).astype(wide)
        recalled = jnp.einsum("BN,BND->BD", weights, cache.astype(wide))
        nothing = (memory.count == 0)[:, None] | (c.recall == "off")
        recalled = jnp.where(nothing, self.initial[...], recalled.astype(cache.dtype))
        return memory._replace(recalled=recalled, weights=weights.astype(memory.weights.dtype))

    def _summary(self, about: Int[Array, "B J"]) -> Float[Array, "B D"]:
        """S_n: the backbone's hidden state after [T | tokens | T]."""
        x = self._embed(about)
        prompt = jnp.broadcast_to(self.summary_prompt[...], (len(x), 1, x.shape[-1])).astype(x.dtype)
        ids = jnp.pad(jnp.where(about >= 0, 0, FILLER).astype(jnp.int32), ((0, 0), (1, 1)))
        return self.backbone.encode(jnp.concatenate([prompt, x, prompt], axis=1), segment_ids=ids).hidden[:, -1]

    def own_report(self, tokens_BT: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> dict[str, Array]:
        """Diagnostics of recall over the whole segments of the rows, averaged over rows with at least one memory:

        hmt.recall [1, segments, segments]: weight of each past segment (column) at the start of a segment (row);
        hmt.recall_entropy [1, segments], nats; hmt.recall_age [1, segments]: mean age of the recalled memories, in
        segments; hmt.cache_age: age of the oldest memory; hmt.entropy and hmt.age [1]: means over segments.
        """
        c, (B, T) = self.config, tokens_BT.shape
        n = T // c.segment_length
        if not n:
            return {}
        run = SegmentRunner(self, B)
        state = run.start._replace(backbone=None, offset=jnp.zeros(B, jnp.int32))
        xs = [x[:, : n * c.segment_length].reshape(B, n, -1).swapaxes(0, 1) for x in (tokens_BT, segment_ids)]
        _, (weights, counts) = jax.lax.scan(lambda s, x: _watched(run, s, *x), state, tuple(xs))
        return _recall_report(weights.astype(jnp.float32), counts)


def _watched(run: SegmentRunner, state, tokens, ids):
    """One segment: (state, (recall weights, number of memories)); no weights in rows that do not complete it."""
    count = run.count(ids)
    begun = run.enter(state, ids[:, 0], count > 0)
    after, _ = run.segment(state, tokens, ids)
    return after, (jnp.where((count == run.length)[:, None], after.memory.weights, 0), begun.memory.count)


def _recall_report(weights: Float[Array, "S B N"], counts: Int[Array, "S B"]) -> dict[str, Array]:
    """The diagnostics of `HMT.own_report`; a memory in slot N - a is a segments old."""
    S, _, N = weights.shape
    recalls = (jnp.sum(weights, axis=-1) > 0).astype(weights.dtype)  # 0 if another document has started

    def mean(values):  # over the rows that recalled
        return jnp.sum(recalls * values, axis=1) / jnp.maximum(recalls.sum(axis=1), 1)

    age = N - jnp.arange(N)
    entropy = mean(-jnp.sum(weights * jnp.log(jnp.maximum(weights, 1e-30)), axis=-1))
    recalled_age = mean(jnp.sum(weights * age, axis=-1))
    by_slot = jnp.sum(recalls[..., None] * weights, axis=1) / jnp.maximum(recalls.sum(axis=1), 1)[:, None]
    past = jnp.arange(S)[:, None] - age  # segment stored in each slot
    where = jnp.where(past >= 0, past, S)
    heat = jnp.zeros((S, S + 1)).at[jnp.arange(S)[:, None], where].add(by_slot)[:, :S]
    some = jnp.maximum(jnp.sum(recalls.max(axis=1)), 1)
    return {
        "hmt.recall": heat[None],
        "hmt.recall_entropy": entropy[None],
        "hmt.recall_age": recalled_age[None],
        "hmt.cache_age": mean(counts.astype(weights.dtype))[None],
        "hmt.entropy": (jnp.sum(entropy) / some)[None],
        "hmt.age": (jnp.sum(recalled_age) / some)[None],
    }
