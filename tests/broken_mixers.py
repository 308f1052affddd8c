"""Small mixers with one fault each, and what `engrax check` must say of them; the one without a fault obeys every law.

c_t = u_t + 0.5 u_{t-1} + 0.25 u_{t-2},  u_t = x_t W        a short convolution with a tail
h_t = sigmoid(x_t A + b) h_{t-1} + c_t,  y_t = h_t V        a gated decay
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from engrax.layers import MixerConfig
from engrax.layers.common.modules import projection

WIDTH = 4  # channels of the memory
DISTANT = 40  # tokens from which the distant leak comes


class Fault(NamedTuple):
    """What `engrax check` must find."""

    law: str  # the part, "family.part"
    position: str  # a pattern that the position matches
    sizes: tuple[float, float]  # between which the size lies; (0, 0): nothing is measured, or 0


FAULTS = {
    "next token": Fault("causality.finite_change", r"row \d, token 0", (1e-3, 1e3)),
    "distant token": Fault("causality.finite_change", r"row \d, token 0", (1e-6, 1e-1)),
    "rows mixed": Fault("independence.rows", r"row \d, token \d+", (1e-6, 1.0)),
    "tail forgotten": Fault("state_carry.steps", r"row \d, token \d+", (1e-2, 1e2)),
    "growing state": Fault("state.shapes", r"state \['seen'\]", (0, 0)),
    "documents leak": Fault("packing.slow_decay", r"row \d, token \d+", (1e-9, 1e2)),
    "dead parameter": Fault("trainability.gradients", r"\['spare'\]\[0\]", (0, 0)),
    "padding written": Fault("padding.content", r"row \d, token \d+", (1e-3, 1e3)),
    # Other members of the same kinds.
    "maximum over time": Fault("causality.finite_change", r"row \d, token \d+", (1e-9, 1e2)),
    "one channel leaks": Fault("causality.finite_change", r"row \d, token \d+", (1e-9, 1.0)),
    "leak from 1500 tokens": Fault("causality.distance", r"row 0, token 1571", (1e-9, 1e-1)),
    "gradient from the future": Fault("causality.jacobian", r"row \d, token \d+", (1e-9, 1e2)),
    "batch norm": Fault("independence.rows", r"row \d, token \d+", (1e-9, 1e2)),
    "rows mixed in the state": Fault("independence.rows", r"state \['h'\]\[\d, \d\] of rows \[1, 2\]", (1e-9, 1e2)),
    "gradient across rows": Fault("independence.gradients", r"row \d, token \d+", (1e-9, 1e2)),
    "row 0 read by all": Fault("independence.rows", r"row 1, token 0", (1e-9, 1.0)),
    "segment forgotten": Fault("state_carry.steps", r"row \d, token \d+", (1e-6, 1e3)),
    "Python int in the state": Fault("state.shapes", r"state \['count'\]", (0, 0)),
    "dtype of the state changes": Fault("state.shapes", r"state \['h'\]", (0, 0)),
    "parameter dead in part": Fault("trainability.gradients", r"\['spare'\]\[0\]", (0, 0)),
    "NaN at padding": Fault("padding.content", r"row \d, token \d+", (0, 0)),
    "padding fills the tail": Fault("padding.nothing", r"\['tail'\]\[\d, \d, \d\]", (1e-3, 1e2)),
}
BRIEF = tuple(name for name in tuple(FAULTS)[:8] if name != "documents leak")  # of each kind; that one takes longest


@dataclasses.dataclass(frozen=True)
class GatedDecayConfig(MixerConfig):
    """Settings; registered nowhere."""

    fault: str = ""  # a key of FAULTS, or none

    def build(self, dim, *, rngs, layer=0, num_layers=1):
        return GatedDecay(self, dim, rngs=rngs)


class GatedDecay(nnx.Module):
    """The module of GatedDecayConfig."""

    def __init__(self, config: GatedDecayConfig, dim: int, *, rngs: nnx.Rngs):
        self.fault = config.fault
        self.write = projection(dim, WIDTH, ("embed", "heads"), rngs=rngs)
        self.gate = projection(dim, WIDTH, ("embed", "heads"), rngs=rngs)
        slow = -30.0 if self.fault == "documents leak" else 1.0  # forgets at once, as it begins
        self.bias = nnx.Param(jnp.full(WIDTH, slow), role="gate")
        self.read = projection(WIDTH, dim, ("heads", "embed"), rngs=rngs)
        self.spare = nnx.Param(jnp.ones(WIDTH), role="bias")

    def init_state(self, batch_size: int) -> dict[str, Any]:
        dtype = jnp.promote_types(self.bias.dtype, jnp.float32)
        state = {
            "h": jnp.zeros((batch_size, WIDTH), dtype),
            "tail": jnp.zeros((batch_size, 2, WIDTH), dtype),
            "last": jnp.full(batch_size, -1, jnp.int32),
        }
        if self.fault == "growing state":
            state["seen"] = jnp.zeros((batch_size, 1), dtype)
        if self.fault == "Python int in the state":
            state["count"] = 0
        return state

    def __call__(self, x, state=None, segment_ids=None):
        state = self.init_state(len(x)) if state is None else state
        before = state["last"]
        ids = jnp.broadcast_to(jnp.maximum(before, 0)[:, None], x.shape[:2]) if segment_ids is None else segment_ids
        if self.fault == "padding written":
            ids = jax.lax.cummax(jnp.maximum(ids, before[:, None]), axis=1)
        wide = self.init_state(1)["h"].dtype
        u, a = self._leaking(self.write(x).astype(wide)), self._decay(self.gate(x).astype(wide) + self.bias[...])
        carry = (state["h"], state["tail"], before)
        carry, h = jax.lax.scan(self._token, carry, (u.swapaxes(0, 1), a.swapaxes(0, 1), ids.T))
        h = h.swapaxes(0, 1)
        y = self.read(h * self._spare()).astype(x.dtype)
        pad = jnp.nan if self.fault == "NaN at padding" else 0
        return jnp.where((ids >= 0)[..., None], y, pad), self._after(carry, state, x)

    def _token(self, carry, inputs):
        """One token: (h, tail, last segment) -> the same after it, and h where it is read."""
        h, tail, last = carry
        u, a, segment = inputs
        real = segment >= 0
        anew = (real & (last >= 0) & (segment != last))[:, None]
        tail = jnp.where(anew[..., None], 0, tail)
        kept = h if self.fault.startswith("documents leak") else jnp.where(anew, 0, h)
        written = (a * kept + u + 0.5 * tail[:, 1] + 0.25 * tail[:, 0]).astype(h.dtype)
        shifted = jnp.concatenate([tail[:, 1:], u[:, None]], axis=1)
        if self.fault == "padding fills the tail":
            tail = jnp.where(real[:, None, None], shifted, jnp.roll(tail, -1, axis=1).at[:, -1].set(0))
        tail = jnp.where(real[:, None, None], shifted, tail)
        return (jnp.where(real[:, None], written, h), tail, jnp.where(real, segment, last)), written

    def _leaking(self, u):
        """The inputs [B, T, C] with what the fault adds to them."""
        later = lambda n: jnp.pad(u, ((0, 0), (0, n), (0, 0)))[:, n:]  # noqa: E731
        if self.fault == "next token":
            return later(1)
        if self.fault == "distant token":
            return u + 1e-4 * later(DISTANT)
        if self.fault == "leak from 1500 tokens":
            return u + 1e-4 * later(1500)
        if self.fault == "maximum over time":
            return u + 1e-3 * jnp.max(u, axis=1, keepdims=True)
        if self.fault == "one channel leaks":
            return u.at[..., 1].add(1e-4 * later(3)[..., 1])
        if self.fault == "gradient from the future":
            return u + (later(1) - jax.lax.stop_gradient(later(1)))
        if self.fault == "rows mixed":
            return u + 1e-4 * jnp.roll(u, 1, axis=0)
        if self.fault == "row 0 read by all":
            return u + 1e-4 * u[:1]
        if self.fault == "batch norm":
            return u / (1 + jnp.std(u, axis=0, keepdims=True))
        if self.fault == "gradient across rows":
            mean = jnp.mean(u, axis=0, keepdims=True)
            return u + (mean - jax.lax.stop_gradient(mean))
        return u

    def _decay(self, logits):
        return jax.nn.sigmoid(logits)

    def _spare(self):
        if self.fault == "dead parameter":
            return jnp.ones(WIDTH)
        if self.fault == "parameter dead in part":
            return self.spare[...].at[0].set(1.0)
        return self.spare[...]

    def _after(self, carry, state, x):
        """The state after a call."""
        h, tail, last = carry
        after = state | {"h": h, "tail": tail, "last": last}
        if self.fault == "tail forgotten":
            after["tail"] = jnp.zeros_like(tail)
        if self.fault == "growing state":
            after["seen"] = x[..., 0].astype(h.dtype)
        if self.fault == "rows mixed in the state":
            after["h"] = h + 1e-4 * jnp.mean(h, axis=0)
        if self.fault == "segment forgotten":
            after["last"] = jnp.full_like(last, -1)
        if self.fault == "Python int in the state":
            after["count"] = x.shape[1]
        if self.fault == "dtype of the state changes":
            after["h"] = h.astype(jnp.float16)
        return after
