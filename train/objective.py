"""The objective of next-token prediction: the only code that turns hidden states into a loss.

Training, validation, evaluation and benchmarks call `score`. The loss is that of the data, in nats. Auxiliary losses of
mixers and head (a router's balance loss, a z-loss) are returned separately.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from engrax.models.contract import Model, PlainModel, padding_last
from engrax.pallas_kernels.linear_cross_entropy.api import linear_cross_entropy_terms

Batch = dict[str, Array]  # {"tokens", "targets", "segment_ids"}: int [B, T]; a target of -1 is no label
TOKENS_AT_ONCE = 64  # block of tokens of a row, for models whose `logits` returns the full vocabulary


class Score(NamedTuple):
    """The scores of a batch."""

    nats: Float[Array, "B T"]  # -log p(target), 0 without a label
    correct: Bool[Array, "B T"]  # the target has the largest logit
    aux: Float[Array, " B"]  # auxiliary loss of mixers and head in training, summed over a row
    memory: Any  # after the last token
    collected: dict[str, Array]  # diagnostics


def score(
    model: Model, batch: Batch, memory: Any = None, *, collect: tuple[str, ...] = (), mute: tuple[str, ...] = ()
) -> Score:
    """Scores the labelled tokens of a batch; `memory` continues earlier tokens, None starts from an empty memory.

    The batch has rows of a data set, so padding (-1 in `segment_ids`) follows their last token.

    collect: registered names of mixers whose diagnostics are returned. mute: names of those whose memory reads are
    replaced by zeros.
    """
    segment_ids = batch.get("segment_ids")
    with padding_last(segment_ids):
        out = model(batch["tokens"], memory, segment_ids=segment_ids, collect=collect, mute=mute)
    targets = batch["targets"]
    labels = jnp.sum(targets >= 0, axis=1)
    if isinstance(model, PlainModel):
        nats, correct = _by_blocks(model, out.hidden, targets)
        return Score(nats, correct, out.aux_loss * labels, out.memory, out.collected)
    head = model.head(out.hidden)
    nats, correct, log_total = linear_cross_entropy_terms(head.hidden, head.embedding, targets, soft_cap=head.soft_cap)
    aux = out.aux_loss * labels
    if head.z_loss:
        aux = aux + head.z_loss * jnp.sum(log_total**2, axis=1)
    return Score(nats, correct, aux, out.memory, out.collected)


def _by_blocks(
    model: PlainModel, hidden_BTD: Float[Array, "B T D"], targets_BT: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Loss and correctness from a model's `logits`, in blocks of TOKENS_AT_ONCE tokens per row."""
    B, T, D = hidden_BTD.shape
    size = min(TOKENS_AT_ONCE, T)
    missing = -T % size
    hidden = jnp.pad(hidden_BTD, ((0, 0), (0, missing), (0, 0))).reshape(B, -1, size, D)
    targets = jnp.pad(targets_BT, ((0, 0), (0, missing)), constant_values=-1).reshape(B, -1, size)

    @jax.checkpoint
    def block(block):
        hidden, targets = block
        logits = model.logits(hidden).astype(jnp.promote_types(hidden.dtype, jnp.float32))
        at_target = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        real = targets >= 0
        nats = jnp.where(real, jax.nn.logsumexp(logits, axis=-1) - at_target, 0)
        return nats, real & (jnp.argmax(logits, axis=-1) == targets)

    found = jax.lax.map(block, (hidden.swapaxes(0, 1), targets.swapaxes(0, 1)))
    return tuple(x.swapaxes(0, 1).reshape(B, -1)[:, :T] for x in found)
