"""Structures of a test-time memory: small networks whose matrices are trained by gradient descent on the tokens.

A structure computes M(x) with a callback `linear(name, x)`, the product of x and the named matrix. The engine supplies
either the matrix itself, or the dual form of the matrix after each token. Each name is used once.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from engrax.pallas_kernels.neural_memory.types import ACTIVATIONS

Linear = Callable[[str, Array], Array]
Extra = dict[str, Float[Array, " V"]]  # parameters of a head that only the outer loop learns: the norm's scale and bias


@dataclasses.dataclass(frozen=True)
class Structure:
    """Settings of M. key, value: widths of its input and output; hidden: of what lies between (rank, if factorised)."""

    kind: str
    key: int
    value: int
    hidden: int
    depth: int
    activation: str
    bias: bool
    normed: bool

    def widths(self) -> dict[str, tuple[int, int]]:
        """Returns [in, out] of every matrix by name; a bias is one more input row, whose input is 1."""
        K, V, F = self.key, self.value, self.hidden
        if self.kind == "linear":
            shapes = {"w1": (K, V)}
        elif self.kind == "factorised":
            shapes = {"w1": (K, F), "w2": (F, V)}
        elif self.kind == "swiglu":
            shapes = {"gate": (K, F), "up": (K, F), "down": (F, V)}
        else:
            inner = [K, *[F] * (self.depth - 1), V]
            shapes = {f"w{i + 1}": shape for i, shape in enumerate(zip(inner[:-1], inner[1:]))}
        return {name: (i + self.bias, o) for name, (i, o) in shapes.items()}

    @property
    def is_plain_mlp(self) -> bool:
        """Whether M is an MLP as the operation `neural_memory` takes it: 1 to 4 matrices, and nothing else."""
        depth = {"linear": 1, "mlp": self.depth}.get(self.kind, 0)
        return 1 <= depth <= 4 and not (self.bias or self.normed)

    def apply(self, linear: Linear, x: Float[Array, "S K"], extra: Extra) -> Float[Array, "S V"]:
        """Returns M(x)."""
        f = ACTIVATIONS[self.activation]

        def layer(name, x):
            return linear(name, jnp.concatenate([x, jnp.ones_like(x[:, :1])], axis=1) if self.bias else x)

        if self.kind == "swiglu":
            y = layer("down", jax.nn.silu(layer("gate", x)) * layer("up", x))
        elif self.kind == "factorised":
            y = layer("w2", layer("w1", x))
        else:
            y = layer("w1", x)
            for i in range(1, len(self.widths())):
                y = layer(f"w{i + 1}", f(y))
        if self.normed:
            y = _layer_norm(y) * extra["norm_scale"] + extra["norm_bias"]
        return x + y if self.kind == "residual_mlp" else y

    def flops_per_token(self) -> float:
        """FLOPs of one M(x)."""
        return sum(2.0 * i * o for i, o in self.widths().values())


def _layer_norm(y: Float[Array, "S V"], eps: float = 1e-6) -> Float[Array, "S V"]:
    centred = y - jnp.mean(y, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)


KINDS = ("linear", "mlp", "residual_mlp", "swiglu", "factorised")


def initial_matrices(
    structure: Structure, heads: int, key: Array, last_scale: float
) -> dict[str, Float[Array, "H _ _"]]:
    """Returns normal matrices [H, in, out] of standard deviation in^-1/2, the last one's times `last_scale`."""
    shapes = structure.widths()
    keys = jax.random.split(key, len(shapes))
    scales = [2**0.5] * (len(shapes) - 1) + [last_scale]
    return {
        name: scale * jax.random.normal(k, (heads, *shape)) * shape[0] ** -0.5
        for (name, shape), k, scale in zip(shapes.items(), keys, scales)
    }
