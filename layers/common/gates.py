"""Gates of the mixers with a matrix memory: low-rank projections and the learned decay of Mamba-2 and its kin."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from engrax.layers.common.modules import projection

LARGEST_LOG_RATE = 9.0  # exp(9) per step forgets everything; more would only overflow
RATES = (1.0, 16.0)  # of the decay at the start, and of its steps (arXiv 2405.21060)
STEPS = (1e-3, 1e-1)


class LowRank(nnx.Module):
    """x W_1 W_2 with `rank` channels between them."""

    def __init__(self, dim: int, rank: int, features: int, *, rngs: nnx.Rngs, scale: float = 1.0, wide: bool = False):
        self.down = projection(dim, rank, ("embed", "rank"), rngs=rngs)
        self.up = projection(rank, features, ("rank", "heads"), rngs=rngs, scale=scale, wide=wide)

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T N"]:
        return self.up(self.down(x_BTD))


class DecayGate(nnx.Module):
    """log decay = -exp(log_rate) * step, step = softplus(x W + bias): one rate per head, `channels` steps each.

    At the start rates are uniform in `RATES` and steps log-uniform in `STEPS`, as published; W is low-rank where `rank`
    is given.
    """

    def __init__(self, dim: int, heads: int, *, rngs: nnx.Rngs, channels: int = 1, rank: int | None = None):
        rates, steps = jax.random.uniform(rngs.params(), (heads,)), jax.random.uniform(rngs.params(), (heads, channels))
        step = STEPS[0] * (STEPS[1] / STEPS[0]) ** steps
        self.log_rate = nnx.Param(jnp.log(RATES[0] + (RATES[1] - RATES[0]) * rates), axes=("heads",), role="gate")
        self.bias = nnx.Param(jnp.log(jnp.expm1(step)), axes=("heads", "gate"), role="gate")
        if rank is None:
            self.project = projection(dim, heads * channels, ("embed", "heads"), rngs=rngs, scale=0.1, wide=True)
        else:
            self.project = LowRank(dim, rank, heads * channels, rngs=rngs, scale=0.1, wide=True)

    def __call__(self, x_BTD: Float[Array, "B T D"], dtype) -> tuple[Float[Array, "B T H N"], Float[Array, "B T H N"]]:
        """Returns the log decays and the steps, per head and channel, in the dtype given."""
        return self.from_logits(self.project(x_BTD), dtype)

    def from_logits(
        self, logits: Float[Array, "B T HN"], dtype
    ) -> tuple[Float[Array, "B T H N"], Float[Array, "B T H N"]]:
        """The same, from x W."""
        bias_HN = self.bias[...].astype(dtype)
        step = jax.nn.softplus(logits.astype(dtype).reshape(*logits.shape[:2], *bias_HN.shape) + bias_HN)
        rate_H = jnp.exp(jnp.minimum(self.log_rate[...].astype(dtype), LARGEST_LOG_RATE))
        return -rate_H[:, None] * step, step
