"""A mixer to start from: a running sum per channel, which a learned decay forgets.

    s_t = a s_{t-1} + (1 - a) W_in x_t,   y_t = W_out s_t,   a = sigmoid(b)

Copy this file, change the equation, and run `engrax check FILE`: every law runs on it.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

import engrax
from engrax.layers.common.modules import projection
from engrax.layers.mixer import Mixer


@engrax.register("decaying_sum")  # its name in configs, flags and run folders: choose your own
@dataclasses.dataclass(frozen=True)
class DecayingSumConfig(engrax.MixerConfig):
    """Settings: numbers, texts, tuples and other configs. Each becomes a flag."""

    head_dim: int = 32  # channels of the sum

    def build(self, dim, *, rngs, layer=0, num_layers=1):
        return DecayingSum(self, dim, rngs=rngs)

    def flops_per_token(self, dim, seq_len):
        return 4 * dim * self.head_dim + 3 * self.head_dim  # a multiply-add is 2


class DecayingSum(Mixer):
    """x [B, T, dim] -> y [B, T, dim], {"sum": [B, N], "last": [B]}."""

    def __init__(self, config, dim, *, rngs):
        self.config = config
        self.into = projection(dim, config.head_dim, ("embed", "heads"), rngs=rngs)
        self.out = projection(config.head_dim, dim, ("heads", "embed"), rngs=rngs)
        self.decay = nnx.Param(jnp.full((config.head_dim,), 2.0), axes=("heads",), role="gate")

    def init_state(self, batch_size):
        dtype = jnp.promote_types(self.out.kernel.dtype, jnp.float32)  # a state sums many tokens: never bfloat16
        return {
            "sum": jnp.zeros((batch_size, self.config.head_dim), dtype),
            "last": jnp.full((batch_size,), -1, jnp.int32),
        }

    def __call__(self, x, state=None, segment_ids=None):
        """Continues `state` at any position; a new segment (a document) starts from zero; -1 is padding."""
        state = self.init_state(len(x)) if state is None else state
        if segment_ids is None:  # all tokens continue the row's last segment
            segment_ids = jnp.broadcast_to(jnp.maximum(state["last"], 0)[:, None], x.shape[:2])
        keep = jax.nn.sigmoid(self.decay[...].astype(state["sum"].dtype))

        def token(state, inputs):
            new, segment = inputs
            real = segment >= 0
            held = jnp.where((segment == state["last"])[:, None], state["sum"], 0)
            after = keep * held + (1 - keep) * new
            state = {
                "sum": jnp.where(real[:, None], after, state["sum"]),
                "last": jnp.where(real, segment, state["last"]),
            }
            return state, jnp.where(real[:, None], after, 0)

        inputs = self.into(x).astype(state["sum"].dtype).swapaxes(0, 1), segment_ids.T
        state, sums = jax.lax.scan(token, state, inputs)
        return self.out(sums.swapaxes(0, 1).astype(x.dtype)), state
