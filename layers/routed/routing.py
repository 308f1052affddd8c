"""Routing tokens to memories: the choice, and layouts with the tokens of each memory together.

A token for J memories has J copies. Copies are laid out by memory and inside each memory in token order: a stable
counting sort. All shapes are static, nothing is dropped, and a copy's position in its memory's run depends only on
earlier tokens.

Axis letters here: J copies of a token, N memories, L places of a layout, M blocks of a layout, C places of a block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from engrax.layers.common import sequence
from engrax.pallas_kernels.grouped_matmul.grouping import BLOCK


class Choice(NamedTuple):
    """The router's decision for every token."""

    logits: Float[Array, "B T M"]  # float32 or wider
    memory: Int[Array, "B T J"]  # best first; ties go to the lowest index
    weight: Float[Array, "B T J"]  # sum to 1


def choose(logits_BTM: Float[Array, "B T M"], top_k: int) -> Choice:
    """The `top_k` best memories, weighted by the softmax over their logits (= the softmax over all, renormalised)."""
    best, memory = jax.lax.top_k(logits_BTM, top_k)
    return Choice(logits_BTM, memory, jax.nn.softmax(best, axis=-1))


def loads(choice: Choice, real_BT: Bool[Array, "B T"]) -> tuple[Float[Array, "B M"], Float[Array, "B M"]]:
    """Per row: the fraction of real tokens that chose each memory (sums to J), and the mean probabilities."""
    dtype, memories = choice.logits.dtype, choice.logits.shape[-1]
    real = real_BT[..., None].astype(dtype)
    tokens = jnp.maximum(_sum_of_row(real), 1)
    chosen = jnp.sum(jax.nn.one_hot(choice.memory, memories, dtype=dtype), axis=2)
    probability = jnp.where(real_BT[..., None], jax.nn.softmax(choice.logits, axis=-1), 0)
    return _sum_of_row(real * chosen) / tokens, _sum_of_row(probability) / tokens


def _sum_of_row(x: Shaped[Array, "B T *D"]) -> Shaped[Array, "B *D"]:
    return sequence.row_sum(jnp.sum(x, axis=1))


def balance_loss(choice: Choice, real_BT: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """M sum_m f_m P_m of every row (arXiv 2101.03961 for J = 1): J at perfect balance, more if memories collapse.

    f_m is the fraction of tokens that chose m, without gradient; P_m is the mean probability of m.
    """
    share, probability = loads(choice, real_BT)
    return choice.logits.shape[-1] * jnp.sum(share * probability, axis=-1)


def z_loss(choice: Choice, real_BT: Bool[Array, "B T"]) -> Float[Array, " B"]:
    """Mean square of log sum exp(logits) over every row's tokens (arXiv 2202.08906): keeps logits small."""
    squares = jnp.square(jax.nn.logsumexp(choice.logits, axis=-1))
    return _sum_of_row(jnp.where(real_BT, squares, 0)) / jnp.maximum(_sum_of_row(real_BT), 1)


class Places(NamedTuple):
    """A layout of copies and its inverse."""

    place: Int[Array, "B TJ"]  # of every copy; L where it has none (padding)
    copy: Int[Array, "B L"]  # in every place; TJ where there is none


class RoutedLayout(NamedTuple):
    """The copies of all memories in contiguous runs, each after `lead` free places (for inputs before the call), and
    the same copies in blocks of one memory each.
    """

    places: Places
    owner: Int[Array, "B L"]  # the memory whose run, or lead, the place is in; N after the last
    begins: Bool[Array, "B L"]  # a document's first copy in its memory's run, the row's first document apart
    document: Int[Array, "B L"]  # the lead has the row's first; -1 after the last run
    start: Int[Array, "B N"]  # the place of each run's first copy, behind its lead
    end: Int[Array, "B N"]  # the place after each run
    blocks: Places
    block_owner: Int[Array, "B M"]  # the memory of every block

    @property
    def memory(self) -> Int[Array, "B L"]:
        """The memory of every copy, -1 where a place holds none."""
        return jnp.where(self.places.copy < self.places.place.shape[1], self.owner, -1)

    @property
    def convolved(self) -> Int[Array, "B L"]:
        """Ids of the pieces that a short convolution must not look beyond: of one memory and document each."""
        changes = (self.owner != _before(self.owner, -1)) | self.begins
        return jnp.where(self.document >= 0, jnp.cumsum(changes, axis=1, dtype=jnp.int32), -1)


def lay_out(
    memory: Int[Array, "B T J"], document: Int[Array, "B T"], first: Int[Array, " B"], *, memories: int, lead: int
) -> RoutedLayout:
    """Lays out the copies of tokens. document: -1 = padding, which is skipped; first: the row's first document."""
    B, T, J = memory.shape
    real = document >= 0
    chosen = jnp.sum(jax.nn.one_hot(memory, memories, dtype=jnp.int32), axis=2) * real[..., None]
    count = jnp.sum(chosen, axis=1)
    rank = jnp.take_along_axis(jnp.cumsum(chosen, axis=1) - chosen, memory, axis=2)
    end = jnp.cumsum(count + lead, axis=1)
    places = _place(memory, rank, end - count, real, T * J + memories * lead)

    block = min(BLOCK, T)
    used = -(-count // block)
    block_end = jnp.cumsum(used, axis=1)
    most = (T * J + min(memories, T * J) * (block - 1)) // block
    blocks = _place(memory, rank, (block_end - used) * block, real, most * block)

    owner = _owner(end, places.copy.shape[1])
    at = jnp.minimum(places.copy // J, T - 1)
    holds, lead_of = places.copy < T * J, jnp.where(owner < memories, first[:, None], -1)
    document = jnp.where(holds, jnp.take_along_axis(document, at, axis=1), lead_of)
    alike = owner == _before(owner, -1)
    begins = holds & (document != jnp.where(alike, _before(document, -1), first[:, None]))
    block_owner = jnp.minimum(_owner(block_end, most), memories - 1)
    return RoutedLayout(places, owner, begins, document, end - count, end, blocks, block_owner)


def _place(memory, rank, start, real, length) -> Places:
    """The layout with memory m's copies at start[m], start[m] + 1, ..."""
    B, copies = memory.shape[0], memory[0].size
    start = jnp.take_along_axis(start, memory.reshape(B, -1), axis=1)
    place = jnp.where(real[..., None], start.reshape(memory.shape) + rank, length).reshape(B, -1)
    index = jnp.broadcast_to(jnp.arange(copies, dtype=jnp.int32), (B, copies))
    empty = jnp.full((B, length), copies, jnp.int32)
    copy = jax.vmap(lambda row, i, values: row.at[i].set(values, mode="drop"))(empty, place, index)
    return Places(place, copy)


def _owner(end: Int[Array, "B N"], length: int) -> Int[Array, "B L"]:
    """Which of the runs that end before `end` each place is in."""
    return jnp.sum(jnp.arange(length)[None, :, None] >= end[:, None, :], axis=-1, dtype=jnp.int32)


def _before(x: Int[Array, "B L"], first: int) -> Int[Array, "B L"]:
    return jnp.pad(x, ((0, 0), (1, 0)), constant_values=first)[:, :-1]


# Moving tokens between layouts. Every move is a gather, and so is its derivative: nothing scatters.


def dispatch(x: Shaped[Array, "B T F"], places: Places) -> Shaped[Array, "B L F"]:
    """Copies every token to the places of its copies; free places are zero."""
    B, T, _ = x.shape
    copies = places.place.reshape(B, T, -1)
    return _gather(x, places.copy // copies.shape[2], copies)


def combine(y: Shaped[Array, "B L F"], places: Places) -> Shaped[Array, "B TJ F"]:
    """Returns the values at the places of all copies; zeros for padding."""
    return _gather(y, places.place, places.copy[..., None])


def relayout(y: Shaped[Array, "B L F"], source: Places, target: Places) -> Shaped[Array, "B L2 F"]:
    """Takes copies from one layout to another."""
    return _gather(y, _take(source.place, target.copy, -1), _take(target.place, source.copy, -1)[..., None])


@jax.custom_vjp
def _gather(x, index, users):
    """x[b, index[b, l]], zero where the index is out of range; users [B, T, J]: the places that took each x[b, t]."""
    return _take(x, index, 0)


def _gather_bwd(saved, bar):
    _, users = saved
    taken = (_take(bar, users[..., j], 0) for j in range(users.shape[2]))
    return sum(taken), None, None


_gather.defvjp(lambda x, index, users: (_gather(x, index, users), (index, users)), _gather_bwd)


def _take(x, index, fill):
    """Rows x[b, index[b]]; `fill` where the index is out of range or negative."""
    index = jnp.where(index < 0, x.shape[1], index)
    return jax.vmap(lambda row, i: row.at[i].get(mode="fill", fill_value=fill))(x, index)
