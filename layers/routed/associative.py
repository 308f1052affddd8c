"""The associative memory of ARMT (arXiv 2407.04841): a delta-rule matrix, written once per segment.

With phi = DPFP-3, A the matrix and z its normaliser:

    read    h <- h + phi(W_q h) A / (phi(W_q h) . z + eps)
    write   k = phi(W_k m),  v = W_v m,  b = sigmoid(w_b . m),  v' = k A / (k . z + eps)
            A <- A + sum b k (v - v')^T,   z <- z + sum SG(clip(1 - z . k / |k|^2, 0, 1)) k

over the memory tokens m of the segment, all at once. W_v starts at zero: an untrained memory gives nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from engrax.layers.common.modules import projection

ORDER = 3  # of DPFP
EPSILON = 1e-5  # added to the normaliser


class Association(NamedTuple):
    """The state of an associative memory; F = 6 K features."""

    matrix: Float[Array, "*L B F D"]
    sum: Float[Array, "*L B F"]


def dpfp(x: Float[Array, "*B K"]) -> Float[Array, "*B F"]:
    """Deterministic parameter-free projection (arXiv 2102.11174): r_i r_{i-n} for n = 1 ... 3, r = relu([x, -x])."""
    r = jax.nn.relu(jnp.concatenate([x, -x], axis=-1))
    return jnp.concatenate([r * jnp.roll(r, n, axis=-1) for n in range(1, ORDER + 1)], axis=-1)


class AssociativeMemory(nnx.Module):
    """Reads and writes an Association for vectors [B, S, D]; keys are `key_dim` wide before phi."""

    def __init__(self, dim: int, key_dim: int, *, rngs: nnx.Rngs):
        self.query = projection(dim, key_dim, ("embed", "heads"), rngs=rngs)
        self.key = projection(dim, key_dim, ("embed", "heads"), rngs=rngs)
        self.value = projection(dim, dim, ("embed", "embed"), rngs=rngs, scale=0.0)
        self.beta = projection(dim, 1, ("embed", "heads"), rngs=rngs, wide=True)

    def init_state(self, batch_size: int) -> Association:
        """An empty memory, float32 or wider."""
        dim, key_dim = self.query.kernel.shape
        features = 2 * ORDER * key_dim
        dtype = self._wide(self.query.kernel)
        return Association(jnp.zeros((batch_size, features, dim), dtype), jnp.zeros((batch_size, features), dtype))

    def read(
        self, x_BSD: Float[Array, "B S D"], memory: Association, reads_BS: Bool[Array, "B S"]
    ) -> Float[Array, "B S D"]:
        """The memory's contribution to each vector; 0 for vectors that do not read."""
        found = self._recall(dpfp(self.query(x_BSD).astype(memory.sum.dtype)), memory)
        return jnp.where(reads_BS[..., None], found, 0).astype(x_BSD.dtype)

    def write(self, x_BSD: Float[Array, "B S D"], memory: Association) -> Association:
        """The memory after the vectors were written, all at once."""
        dtype = memory.sum.dtype
        key = dpfp(self.key(x_BSD).astype(dtype))
        beta = jax.nn.sigmoid(self.beta(x_BSD).astype(dtype))
        error = beta * (self.value(x_BSD).astype(dtype) - self._recall(key, memory))
        known = jnp.einsum("BSF,BF->BS", key, memory.sum) / (jnp.sum(key * key, axis=-1) + EPSILON)
        new = jax.lax.stop_gradient(jnp.clip(1 - known, 0, 1))
        return Association(
            memory.matrix + jnp.einsum("BSF,BSD->BFD", key, error), memory.sum + jnp.einsum("BS,BSF->BF", new, key)
        )

    def _recall(self, features: Float[Array, "B S F"], memory: Association) -> Float[Array, "B S D"]:
        normaliser = jnp.einsum("BSF,BF->BS", features, memory.sum)[..., None]
        return jnp.einsum("BSF,BFD->BSD", features, memory.matrix) / (normaliser + EPSILON)

    @staticmethod
    def _wide(kernel) -> jnp.dtype:
        return jnp.promote_types(kernel.dtype, jnp.float32)
