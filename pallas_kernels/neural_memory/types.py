"""The state of a neural memory, its activations and the axis letters.

| letter | axis |
|---|---|
| B, T, H | batch row, token, head |
| K, V | features of keys and queries, features of values |
| N, S | block of the chunk grid, slot (token) inside a block |
| I, O | input and output features of one layer of the memory |
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int

OP = "neural_memory"
Layers = tuple[Float[Array, "..."], ...]  # one matrix [..., I, O] per layer of the memory


class NeuralMemoryState(NamedTuple):
    """The state of a neural memory between calls; its size does not depend on T.

    weights, momentum, anchor: tuples with one `[B, H, I, O]` array per memory layer: the memory, its momentum S, and
    the memory at the start of the current chunk, where gradients are taken.
    phase: int32 `[B]` in [0, chunk_size): tokens already seen in the current chunk. At 0 the given anchor is ignored.
    """

    weights: tuple[Float[Array, "B H _ _"], ...]
    momentum: tuple[Float[Array, "B H _ _"], ...]
    anchor: tuple[Float[Array, "B H _ _"], ...]
    phase: Int[Array | np.ndarray, "B"]

    @classmethod
    def start(cls, weights: Layers, batch_size: int, momentum: Layers | None = None) -> "NeuralMemoryState":
        """Returns the state at phase 0 with `weights` and `momentum` (default zero), `[H, I, O]` each, in every row.

        The phase is a NumPy array. It is known at tracing time, which saves `neural_memory` one block (see there).
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


# The derivatives of the tanh form contain (1 - tanh^2) x^3 and, in the second derivative, x^5. Where tanh is near 1, a
# few units in its last place become errors of 2e-5, more than all other roundings of the dual form together. Here
# 1 - tanh^2 comes from an exponential, whose relative error is small however small the value.


def _gelu_parts(x: Array):
    """Returns x, s, s (1 - s), 1 - 2 s, w' and w'' of gelu(x) = x s with s = 1 / (1 + exp(-w))."""
    x = jnp.clip(x, -9, 9)  # beyond, s is 0 or 1 up to 1e-29; nothing overflows
    scale, cubic = math.sqrt(8 / math.pi), 0.044715
    e = jnp.exp(-scale * x * (1 + cubic * x * x))
    s = 1 / (1 + e)
    return x, s, e * s * s, (e - 1) * s, scale * (1 + 3 * cubic * x * x), 6 * scale * cubic * x


def _gelu_value(x: Array) -> Array:
    return x * _gelu_parts(x)[1]


def _gelu_first(x: Array) -> Array:
    x, s, product, _, w1, _ = _gelu_parts(x)
    return s + x * w1 * product


def _gelu_second(x: Array) -> Array:
    x, _, product, odd, w1, w2 = _gelu_parts(x)
    return product * (2 * w1 + x * (w2 + odd * w1 * w1))


# Written by hand because GPU kernels cannot lower the sums that automatic differentiation produces here.


def _silu_first(x: Array) -> Array:
    s = jax.nn.sigmoid(x)
    return s + x * s * (1 - s)


def _silu_second(x: Array) -> Array:
    s = jax.nn.sigmoid(x)
    return s * (1 - s) * (2 + x * (1 - 2 * s))


def with_derivatives(activation: str) -> tuple[Callable[[Array], Array], ...]:
    """Returns an activation and its first two derivatives, all elementwise, as the dual form computes them."""
    if activation == "gelu":
        return _gelu_value, _gelu_first, _gelu_second
    if activation == "silu":
        return ACTIVATIONS[activation], _silu_first, _silu_second
    f = ACTIVATIONS[activation]
    return f, _derivative(f), _derivative(_derivative(f))


def _derivative(f: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda x: jax.jvp(f, (x,), (jnp.ones_like(x),))[1]


class MemoryShapes(NamedTuple):
    """The shapes of a call that a kernel has to serve.

    dtype: of the computation. tokens: dtype of the caller's q, k and v. layers: (I, O) of each layer. group: as in
    `vjp.ScanPlan`. blocks: number of blocks of the chunk grid. aligned: rows are known to be at phase 0. segments:
    tokens may start from the reset state.
    """

    dtype: DTypeLike
    layers: tuple[tuple[int, int], ...]
    slots: int
    group: int
    tokens: DTypeLike
    batch: int
    heads: int
    blocks: int
    aligned: bool
    segments: bool


GRADIENT_AT = ("anchor", "decayed")
