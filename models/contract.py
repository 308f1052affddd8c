"""The forward contract: what every model returns, and how its arrays are placed on a mesh.

    out = model(tokens, memory=None, *, segment_ids=None, collect=(), mute=())       # [B, T] -> Output
    out.hidden [B, T, D], out.memory, out.aux_loss [B], out.collected
    model.head(hidden)          # LinearHead: hidden states and vocabulary rows, for the loss or the logits
    model.init_memory(rows)     # a pytree; model.memory_axes(memory) names the batch axis of every leaf

`collect` and `mute` are registered names of mixers: `collect` returns their diagnostics, `mute` removes their memory
reads.

In `segment_ids`, -1 is padding. It has no effect and may be before, inside and after a row's tokens. Mixers accept it
only after a row's last token, so `compact` moves it there. A caller whose rows already have this form declares it
(`padding_last`).

On a mesh the batch is split over `data` and `fsdp` in all layers (`split_rows`). Sharded parameters are gathered where
a layer uses them, not earlier (`gathering`, `gathered`).
"""

import contextvars
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int, Shaped

from engrax.errors import UserError
from engrax.layers.common import sequence
from engrax.layers.mixer import Mixer, MixerOutput
from engrax.models.tokens import as_tokens, taking_lists
from engrax.pallas_kernels.common.segments import PADDING

BATCH_AXES = ("data", "fsdp")  # the mesh axes that split the batch
GATHERED = "gathered parameter"  # the name of a gathered parameter in remat policies


class Output(NamedTuple):
    """The result of a model's call."""

    hidden: Float[Array, "B T D"]  # before the head
    memory: Any  # after the last token
    aux_loss: Float[Array, " B"]  # loss that mixers add per labelled token of a row, summed over blocks
    collected: dict[str, Array]  # {"titans.lr_mean": [repeat, ...]}, {} unless requested


class LinearHead(NamedTuple):
    """Logits as a product: soft_cap * tanh(hidden embedding^T / soft_cap); soft_cap None = no cap."""

    hidden: Float[Array, "B T E"]
    embedding: Float[Array, "V E"]
    soft_cap: float | None = None  # largest absolute logit (arXiv 2408.00118)
    z_loss: float = 0.0  # weight of log^2 of the sum of exponentials, added to the loss (arXiv 2204.02311)

    def logits(self) -> Float[Array, "B T V"]:
        """All logits, float32 or wider."""
        dtype = jnp.promote_types(self.hidden.dtype, jnp.float32)
        logits = jnp.einsum("BTE,VE->BTV", self.hidden, self.embedding, preferred_element_type=dtype)
        return logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)


class Model(nnx.Module):
    """Base of the models' modules. A subclass defines `__call__`, `head` and `init_memory`.

    Its call accepts padding anywhere: a model inside it does, and `compact` handles it for its own layers. A call also
    takes tokens as lists, and one row as one sequence. Outside jit it refuses ids beyond `vocabulary`.
    """

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "__call__" in cls.__dict__:
            cls.__call__ = taking_lists(cls.__call__)

    @property
    def vocabulary(self) -> int | None:
        """The number of tokens in the vocabulary; None: unknown, or the model reads no tokens."""
        return None

    @property
    def least_call(self) -> int:
        """Tokens at the start of a text that one call must hold, if the text is that long."""
        return 1

    def logits_of(self, tokens: Any) -> Float[Array, "B T V"]:
        """The logits after each token, float32 or wider, in one compiled call; tokens are lists, [T] or [B, T]."""
        graphdef, params = nnx.split(self, nnx.Param)
        return _logits_of(graphdef, params, as_tokens(tokens, self.vocabulary))

    def head(self, hidden_BTD: Float[Array, "B T D"]) -> LinearHead:
        """The head's operands for the model's hidden states."""
        raise NotImplementedError(f"{type(self).__name__} must define head(hidden) -> engrax.LinearHead.")

    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Logits of hidden states, float32 or wider."""
        return self.head(hidden_BTD).logits()

    def init_memory(self, batch_size: int) -> Any:
        """The memory before the first token."""
        raise NotImplementedError(f"{type(self).__name__} must define init_memory(batch_size).")

    def memory_axes(self, memory: Any) -> Any:
        """The batch axis of every leaf of a memory, by default 0."""
        return jax.tree.map(lambda _: 0, memory)

    def open_memory(self, memory: Any) -> Any:
        """The memory in the form for many calls of one token without gradients: batch axes first, updated in place.

        In this form, segment ids only mark padding (-1); other ids continue the row's segment.
        """
        return memory

    def close_memory(self, memory: Any) -> Any:
        """An opened memory in its usual form; the inverse of `open_memory`."""
        return memory

    def at_call_length(self, memory: Any, length: int) -> Any:
        """The same memory for a caller whose calls all have `length` tokens, so a model may trace a single path."""
        return memory


class PlainModel(Model):
    """Wraps a module that is not a `Model`: its call returns (hidden, memory), its `logits(hidden)` all logits.

    The loss is computed over blocks of tokens, so the logits of a whole row are never in memory.
    """

    def __init__(self, module: nnx.Module):
        self.module = module

    def __call__(self, tokens_BT, memory=None, *, segment_ids=None, collect=(), mute=()) -> Output:
        rows = compact(segment_ids)
        found = self.module(rows.gather(tokens_BT), memory, segment_ids=rows.segment_ids)
        if not isinstance(found, Output):
            hidden, memory = found
            found = Output(hidden, memory, no_loss(hidden), {})
        return rows.scatter(found)

    def logits(self, hidden_BTD):
        return self.module.logits(hidden_BTD)

    def init_memory(self, batch_size: int):
        return self.module.init_memory(batch_size)


@functools.partial(jax.jit, static_argnums=0)
def _logits_of(graphdef: nnx.GraphDef, params: Any, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T V"]:
    model = nnx.merge(graphdef, params)
    return model.logits(model(tokens_BT).hidden)


def as_model(module: nnx.Module) -> Model:
    """The module itself if it is a `Model`, else the module wrapped as one."""
    return module if isinstance(module, Model) else PlainModel(module)


def no_loss(x_BTD: Float[Array, "B T *D"]) -> Float[Array, " B"]:
    """The auxiliary loss of a model without auxiliary losses: zeros."""
    return jnp.zeros(len(x_BTD), jnp.promote_types(x_BTD.dtype, jnp.float32))


# Padding.


class Rows(NamedTuple):
    """Rows whose padding follows their last token, and the way back to the caller's rows."""

    segment_ids: Int[Array, "B T"] | None
    order: Int[Array, "B T"] | None  # the caller's position of every place; None: nothing moved
    place: Int[Array, "B T"] | None  # its inverse: the place of every position of the caller

    def gather(self, x_BT: Shaped[Array, "B T"]) -> Shaped[Array, "B T"]:
        """The caller's tokens, moved to their places."""
        return x_BT if self.order is None else _take(x_BT, self.order)

    def scatter(self, out: Output) -> Output:
        """The output with hidden states and diagnostics per token [repeat, B, T, ...] at the caller's positions."""
        if self.place is None:
            return out
        collected = {
            name: jax.vmap(_take, (0, None))(values, self.place) if values.shape[1:3] == self.place.shape else values
            for name, values in out.collected.items()
        }
        return out._replace(hidden=_take(out.hidden, self.place), collected=collected)


def _take(x: Shaped[Array, "B T *D"], index: Int[Array, "B T"]) -> Shaped[Array, "B T *D"]:
    return jax.vmap(lambda row, i: row.at[i].get(mode="promise_in_bounds", unique_indices=True))(x, index)


def compact(segment_ids: Int[Array, "B T"] | None) -> Rows:
    """Moves each row's tokens and filler to its front, in their order, and its padding behind them.

    Nothing is moved, and nothing added to the program, without ids, in a call of one token, or if the caller declares
    that the rows already have this form (`padding_last`).
    """
    if segment_ids is None or segment_ids.shape[1] == 1 or segment_ids is _padding_last.get():
        return Rows(segment_ids, None, None)
    if sequence.is_split():
        raise ValueError("padding moves between devices: declare `padding_last` for rows split by parallel.sequence.")
    padding = segment_ids == PADDING
    kept = jnp.cumsum(~padding, axis=1, dtype=jnp.int32)
    behind = kept[:, -1:] + jnp.cumsum(padding, axis=1, dtype=jnp.int32)
    order = jnp.argsort(padding, axis=1, stable=True)
    return Rows(_take(segment_ids, order), order, jnp.where(padding, behind, kept) - 1)


_padding_last: contextvars.ContextVar[Any] = contextvars.ContextVar("padding_last", default=None)


@contextmanager
def padding_last(segment_ids: Int[Array, "B T"] | None) -> Iterator[None]:
    """In this context, models trust that no padding (-1) precedes a token or filler in this array, as in the rows of a
    data set. If padding does, outputs and memory are wrong; rows are checked when they are read
    (`engrax.data.config.check_rows`). The claim is only about this array, not about ids that a model derives from
    it."""
    token = _padding_last.set(segment_ids)
    try:
        yield
    finally:
        _padding_last.reset(token)


# Placement of arrays on a mesh.


def split_rows(x: Float[Array, "B ..."] | Int[Array, "B ..."]) -> Array:
    """x with its rows split over the batch axes of the current mesh; x itself without a mesh, or if the axes do not
    divide its rows. Inside `jax.shard_map` the axes are manual and rows are already split."""
    axes = row_axes(x.shape[0])
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes)) if axes else x


def row_axes(rows: int) -> tuple[str, ...]:
    """The axes of the current mesh over which so many rows are split; () for none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    axes = tuple(
        name for name, kind in zip(mesh.axis_names, mesh.axis_types) if name in BATCH_AXES and kind == AxisType.Auto
    )
    parts = math.prod(mesh.shape[name] for name in axes)
    return () if parts == 1 or rows % parts else axes


def forward_in_turn(
    mixer: Mixer,
    x_BTD: Float[Array, "B T D"],
    state: Any,
    segment_ids: Int[Array, "B T"] | None,
    *,
    mute: tuple[str, ...] = (),
) -> MixerOutput:
    """`mixer.forward` on the pieces of rows split over devices, one after the other (`sequence.in_turn`); as many rows
    at once as the batch axes of the mesh split."""
    rows = len(x_BTD)
    if type(mixer).auxiliary_loss is not Mixer.auxiliary_loss:
        raise UserError(
            f"{type(mixer).__name__} has an auxiliary loss of whole rows, which parallel.sequence splits; set "
            "--parallel.sequence 1."
        )

    def call(x, state, ids):
        out = mixer.forward(x, state, ids, mute=mute)
        return out.y, out.state

    mesh = jax.sharding.get_abstract_mesh()
    parts = math.prod(mesh.shape[name] for name in row_axes(rows))
    state = mixer.init_state(rows) if state is None else state
    y, state = sequence.in_turn(call, x_BTD, state, segment_ids, rows // parts)
    return MixerOutput(y, state, no_loss(x_BTD), {})


_gather: contextvars.ContextVar[Callable[[nnx.Variable], Array] | None] = contextvars.ContextVar("gather", default=None)


@contextmanager
def gathering(gather: Callable[[nnx.Variable], Array] | None) -> Iterator[None]:
    """In this context, models call `gather(variable)` for the whole value of a parameter where they use it; None =
    parameters are already whole."""
    token = _gather.set(gather)
    try:
        yield
    finally:
        _gather.reset(token)


def is_gathering() -> bool:
    """Whether parameters are gathered where they are used."""
    return _gather.get() is not None


def gathered(params: Any) -> Any:
    """A tree of variables with whole values. The backward pass gathers again if the remat policy does not save them."""
    gather = _gather.get()
    if gather is None:
        return params

    def one(variable):
        return variable.replace(checkpoint_name(gather(variable), GATHERED))

    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, nnx.Variable))
