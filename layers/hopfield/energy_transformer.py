"""Energy Transformer block (arXiv 2302.07253): a set of tokens descends one energy, the same weights at every step.

    g = gamma (x - mean(x)) / sqrt(var(x) + eps) + delta        (gamma one number, delta [D])
    E_attention = sum_{h,C} -1/beta log sum_{B != C} exp(beta K_hB . Q_hC),   K = W_K g,  Q = W_Q g
    E_memory    = sum_B -1/2 sum_mu relu(xi_mu . g_B)^2
    x <- x - step_size dE/dg   (steps times)

g is the gradient of a Lagrangian of x that is convex where gamma > 0, so that the energy falls along the flow. A token
is moved both as a query and as a key, so it sees later tokens: the block is for sets and not a language-model mixer.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from engrax.errors import UserError
from engrax.layers.common.modules import projection
from engrax.pallas_kernels import hopfield_energy


@dataclasses.dataclass(frozen=True)
class EnergyTransformerConfig:
    """Settings of the block."""

    heads: int = 4
    head_dim: int = 32  # width of a head's queries and keys
    memories: int = 256  # rows xi of the memory term
    steps: int = 12  # of descent
    step_size: float = 0.1
    beta: float | None = None  # inverse temperature of the attention term; None = head_dim^-1/2
    sees_itself: bool = False  # whether a token's query sees its own key

    def __post_init__(self):
        for name in ("heads", "head_dim", "memories", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.step_size <= 0 or (self.beta is not None and self.beta <= 0):
            raise UserError(f"step_size={self.step_size} and beta={self.beta} must be positive.")

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "EnergyTransformer":
        """Returns the module for width `dim`."""
        return EnergyTransformer(self, dim, rngs=rngs)


class EnergyTransformer(nnx.Module):
    """x [B, N, D] -> [B, N, D]; the block uses no order of the tokens."""

    def __init__(self, config: EnergyTransformerConfig, dim: int, *, rngs: nnx.Rngs):
        self.config = config
        inner = config.heads * config.head_dim
        self.q = projection(dim, inner, ("embed", "heads"), rngs=rngs)
        self.k = projection(dim, inner, ("embed", "heads"), rngs=rngs)
        self.memory = projection(dim, config.memories, ("embed", "mlp"), rngs=rngs)
        self.gain = nnx.Param(jnp.ones(()), axes=(), role="norm")
        self.shift = nnx.Param(jnp.zeros(dim), axes=("norm",), role="norm")

    def __call__(
        self, x_BND: Float[Array, "B N D"], *, mask: Bool[Array, "B N"] | None = None
    ) -> Float[Array, "B N D"]:
        """The tokens after the descent. mask: True = a token; the others have no effect and do not move."""
        return self.descend(x_BND, mask=mask)[0]

    def descend(
        self, x_BND: Float[Array, "B N D"], *, mask: Bool[Array, "B N"] | None = None
    ) -> tuple[Float[Array, "B N D"], Float[Array, "steps B"]]:
        """Returns the tokens after the descent, and the energy of every row before each step.

        Between steps tokens are float32 or wider: in fewer bits a small step would be lost.
        """

        @jax.checkpoint
        def step(x, _):
            energy, pull = jax.vjp(lambda g: self.energy_of(g, mask), self.normalised(x))
            (slope,) = pull(jnp.ones_like(energy))
            return x - self.config.step_size * slope.astype(x.dtype), energy

        start = _shown(x_BND.astype(jnp.promote_types(x_BND.dtype, jnp.float32)), mask)
        x, energies = jax.lax.scan(step, start, length=self.config.steps)
        x = x.astype(x_BND.dtype)
        return (x if mask is None else jnp.where(mask[..., None], x, x_BND)), energies

    def energy(self, x_BND: Float[Array, "B N D"], *, mask: Bool[Array, "B N"] | None = None) -> Float[Array, " B"]:
        """The energy of every row of tokens, up to a constant of the number of tokens."""
        return self.energy_of(self.normalised(_shown(x_BND, mask)), mask)

    def normalised(self, x_BND: Float[Array, "B N D"]) -> Float[Array, "B N D"]:
        """g, in float32 or wider."""
        x = x_BND.astype(jnp.promote_types(x_BND.dtype, jnp.float32))
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        return self.gain[...] * x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) + self.shift[...]

    def energy_of(self, g_BND: Float[Array, "B N D"], mask: Bool[Array, "B N"] | None = None) -> Float[Array, " B"]:
        """The energy as a function of g."""
        c, g_BND = self.config, _shown(g_BND, mask)
        shown = jnp.ones(g_BND.shape[:2], bool) if mask is None else mask
        q, k = (p(g_BND).reshape(*g_BND.shape[:2], c.heads, c.head_dim) for p in (self.q, self.k))
        sees = jnp.broadcast_to(shown[:, None], (*shown.shape, shown.shape[1]))
        if not c.sees_itself:
            sees = sees & ~jnp.eye(shown.shape[1], dtype=bool)
        beta = c.head_dim**-0.5 if c.beta is None else c.beta
        # The energy of retrieval holds its states back by 1/2 |q|^2; here the normalisation does.
        attention = hopfield_energy(q, k, beta=beta, mask=sees) - 0.5 * jnp.sum(q * q, axis=-1)
        memory = -0.5 * jnp.sum(jax.nn.relu(self.memory(g_BND)) ** 2, axis=-1)
        return jnp.sum(jnp.where(shown, jnp.sum(attention, axis=-1) + memory, 0), axis=-1)


def _shown(x_BND, mask):
    """Replaces masked tokens by zeros: they may have any value, and 0 times it must be 0 in the gradient."""
    return x_BND if mask is None else jnp.where(mask[..., None], x_BND, 0)
