"""Small mixers as users write them, each in a way of its own, that obey every law."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from engrax.layers import MixerConfig

WIDTH = 4  # channels or features of each memory


@dataclasses.dataclass(frozen=True)
class GoodConfig(MixerConfig):
    """Settings of one of KINDS; registered nowhere."""

    kind: str = "pointwise"
    capacity: int = 64  # tokens of the attention's cache

    def build(self, dim, *, rngs, layer=0, num_layers=1):
        return KINDS[self.kind](self, dim, rngs=rngs)


class Good(nnx.Module):
    """Two projections around a memory that a subclass says token by token."""

    def __init__(self, config: GoodConfig, dim: int, *, rngs: nnx.Rngs):
        self.config = config
        self.write = nnx.Linear(dim, WIDTH, rngs=rngs)
        self.read = nnx.Linear(WIDTH, dim, rngs=rngs)

    def init_state(self, batch_size: int) -> Any:
        zeros = jnp.zeros((batch_size, WIDTH), self.write.kernel.dtype)
        return {"memory": zeros, "last": jnp.full(batch_size, -1, jnp.int32)}

    def __call__(self, x, state=None, segment_ids=None):
        state = self.init_state(x.shape[0]) if state is None else state
        last = jnp.maximum(state["last"], 0)[:, None]
        ids = jnp.broadcast_to(last, x.shape[:2]) if segment_ids is None else segment_ids

        def token(state, inputs):
            x_t, id_t = inputs
            real, begins = id_t >= 0, (id_t >= 0) & (state["last"] >= 0) & (id_t != state["last"])
            fresh = self.init_state(x.shape[0])
            state = jax.tree.map(lambda a, b: jnp.where(begins.reshape(-1, *[1] * (b.ndim - 1)), a, b), fresh, state)
            new, y = self.step(state, x_t)
            new = {**new, "last": id_t}
            keep = lambda a, b: jnp.where(real.reshape(-1, *[1] * (b.ndim - 1)), a, b).astype(b.dtype)  # noqa: E731
            return jax.tree.map(keep, new, state), y

        state, y = jax.lax.scan(token, state, (self.write(x).swapaxes(0, 1), ids.T))
        return self.read(y.swapaxes(0, 1).astype(x.dtype)), state

    def step(self, state, x):
        """(the state after a token x [B, WIDTH], what is read [B, WIDTH])."""
        raise NotImplementedError


class Pointwise(nnx.Module):
    """No memory at all: an empty state, and what it gives at padding is nobody's business."""

    def __init__(self, config, dim, *, rngs):
        self.up, self.down = nnx.Linear(dim, WIDTH, rngs=rngs), nnx.Linear(WIDTH, dim, rngs=rngs)

    def init_state(self, batch_size):
        return ()

    def __call__(self, x, state=None, segment_ids=None):
        return self.down(jnp.tanh(self.up(x))), ()


class Float32(Good):
    """A leaky average in float32, whatever it is given."""

    def init_state(self, batch_size):
        return super().init_state(batch_size) | {"memory": jnp.zeros((batch_size, WIDTH), jnp.float32)}

    def step(self, state, x):
        memory = jnp.float32(0.9) * state["memory"] + x.astype(jnp.float32)
        return state | {"memory": memory}, memory


class Shift(Good):
    """Each token reads the one before it, and not itself."""

    def step(self, state, x):
        return state | {"memory": x}, state["memory"]


class LearnedStart(Good):
    """A gated average whose memory begins, in every document, with a parameter."""

    def __init__(self, config, dim, *, rngs):
        super().__init__(config, dim, rngs=rngs)
        self.start = nnx.Param(0.1 * jnp.ones(WIDTH))
        self.rate = nnx.Param(jnp.linspace(-1.0, 1.0, WIDTH))

    def init_state(self, batch_size):
        start = jnp.broadcast_to(self.start[...], (batch_size, WIDTH))
        return super().init_state(batch_size) | {"memory": start}

    def step(self, state, x):
        keep = jax.nn.sigmoid(self.rate[...])
        memory = (keep * state["memory"] + (1 - keep) * x).astype(state["memory"].dtype)
        return state | {"memory": memory}, memory


class Rare(Good):
    """A parameter that matters from a document's 200th token on alone."""

    def __init__(self, config, dim, *, rngs):
        super().__init__(config, dim, rngs=rngs)
        self.late = nnx.Param(0.5 * jnp.ones(WIDTH))

    def init_state(self, batch_size):
        return super().init_state(batch_size) | {"count": jnp.zeros(batch_size, jnp.int32)}

    def step(self, state, x):
        memory, late = 0.5 * state["memory"] + x, (state["count"] >= 200)[:, None]
        return state | {"memory": memory, "count": state["count"] + 1}, memory * jnp.where(late, self.late[...], 1)


class Attention(nnx.Module):
    """Softmax attention over a cache of declared capacity, written without a loop over tokens."""

    def __init__(self, config, dim, *, rngs):
        self.capacity = config.capacity
        self.q, self.k, self.v = (nnx.Linear(dim, WIDTH, use_bias=False, rngs=rngs) for _ in range(3))
        self.out = nnx.Linear(WIDTH, dim, rngs=rngs)

    def init_state(self, batch_size):
        zeros = jnp.zeros((batch_size, self.capacity, WIDTH), self.q.kernel.dtype)
        ids, last = jnp.full((batch_size, self.capacity), -1, jnp.int32), jnp.full(batch_size, -1, jnp.int32)
        return {"k": zeros, "v": zeros, "ids": ids, "count": jnp.zeros(batch_size, jnp.int32), "last": last}

    def __call__(self, x, state=None, segment_ids=None):
        if x.shape[1] > self.capacity:
            raise ValueError(f"{x.shape[1]} tokens exceed the capacity of {self.capacity}.")
        state = self.init_state(x.shape[0]) if state is None else state
        last = jnp.maximum(state["last"], 0)[:, None]
        ids = jnp.broadcast_to(last, x.shape[:2]) if segment_ids is None else segment_ids
        real = ids >= 0
        slot = jnp.where(real, state["count"][:, None] + jnp.cumsum(real, axis=1) - 1, self.capacity)
        put = jax.vmap(lambda cache, at, new: cache.at[at].set(new.astype(cache.dtype), mode="drop"))
        k, v, stored = (put(state[n], slot, new) for n, new in (("k", self.k(x)), ("v", self.v(x)), ("ids", ids)))
        scores = jnp.einsum("btk,bck->btc", self.q(x), k.astype(x.dtype))
        seen = (stored[:, None] == ids[..., None]) & (jnp.arange(self.capacity) <= slot[..., None]) & real[..., None]
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e9), axis=-1)
        count, last = state["count"] + jnp.sum(real, axis=1), jnp.maximum(state["last"], ids.max(axis=1))
        y = self.out(jnp.einsum("btc,bck->btk", weights, v.astype(x.dtype)))
        return y, {"k": k, "v": v, "ids": stored, "count": count.astype(jnp.int32), "last": last}


KINDS = {
    "pointwise": Pointwise,
    "float32": Float32,
    "shift": Shift,
    "learned start": LearnedStart,
    "rare": Rare,
    "attention": Attention,
}
