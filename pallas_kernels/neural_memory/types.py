"""The state of a neural memory, its activations, and the letters used for axes.

| letter | axis |
|---|---|
| B, T, H | batch row, token, head |
| K, V | features of keys and queries, features of values |
| N, S | block of the chunk grid, slot (token) inside a block |
| I, O | input and output features of one layer of the memory |
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int

Layers = tuple[Float[Array, "..."], ...]  # one matrix [..., I, O] per layer of the memory


class NeuralMemoryState(NamedTuple):
    """What a neural memory carries from one call to the next; its size does not depend on T.

    weights, momentum, anchor: tuples with one `[B, H, I, O]` array per memory layer: the memory, its momentum S, and
    the memory as it stood at the start of the current chunk, where gradients are taken.
    phase: int32 `[B]` in [0, chunk_size): tokens already spent in the current chunk. At 0 the anchor given is ignored.
    """

    weights: tuple[Float[Array, "B H _ _"], ...]
    momentum: tuple[Float[Array, "B H _ _"], ...]
    anchor: tuple[Float[Array, "B H _ _"], ...]
    phase: Int[Array | np.ndarray, "B"]

    @classmethod
    def start(cls, weights: Layers, batch_size: int, momentum: Layers | None = None) -> "NeuralMemoryState":
        """Returns the state at phase 0 whose every row holds `weights` and `momentum` (default zero), `[H, I, O]` each.

        The phase is a NumPy array, known when a program is traced, which spares `neural_memory` a block (see there).
        """
        momentum = tuple(jnp.zeros_like(w) for w in weights) if momentum is None else tuple(momentum)
        rows = [tuple(jnp.broadcast_to(m, (batch_size, *m.shape)) for m in layers) for layers in (weights, momentum)]
        return cls(rows[0], rows[1], rows[0], np.zeros(batch_size, np.int32))


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)  # the tanh form: erf does not lower in kernels


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu,
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
}


def derivative(f: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Returns the derivative of an elementwise function."""
    return lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1]


class Shapes(NamedTuple):
    """What a kernel is asked to serve. layers: (I, O) of every memory layer; group: as in `vjp.Plan`."""

    dtype: DTypeLike
    layers: tuple[tuple[int, int], ...]
    slots: int
    group: int


GRADIENT_AT = ("anchor", "decayed")
