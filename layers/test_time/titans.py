"""Titans neural memory as a token mixer (arXiv 2501.00663, sections 3 and 4.4).

Keys, values and queries are projected, convolved, passed through SiLU and l2-normalised. Gates per token and head
control the memory. Its read is normalised, gated and projected:

    eta_t = sigmoid(x_t w_eta),  alpha_t = sigmoid(x_t w_alpha),  theta_t = max_lr sigmoid(x_t w_theta) (1 - eta_t)
    S_t = eta_t S_{t-1} - theta_t grad 1/2 ||M(k_t) - v_t||^2        (eq. 14; the gradient at the chunk's anchor)
    M_t = (1 - alpha_t) M_{t-1} + S_t                                (eq. 13)
    y_t = W_o (norm(M_t(q_t)) * silu(x_t W_g))                       (eq. 15)

The paper does not give a range for theta. A key repeated in a chunk of b tokens is written b times against one anchor,
and momentum multiplies each write by 1 / (1 - eta). If b theta / (1 - eta) times the curvature of the inner loss
exceeds about 2, the inner gradient descent diverges. Therefore theta has the factor (1 - eta_t), max_lr is 1 / 2b by
default, and values have unit length: long values cause large weights, and large weights a large curvature (without it a
byte-level run diverged at step 41). The norm of the read makes its length irrelevant. Each layer between two hidden
layers adds to the curvature, so it halves the default; docs/titans.md has the measurements.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from engrax.errors import UserError
from engrax.layers.mixer import MIXERS, MixerConfig
from engrax.layers.test_time.base import ShellState, TestTimeMixerBase, default_lr_bound, logit
from engrax.pallas_kernels import NeuralMemoryState, neural_memory
from engrax.pallas_kernels.neural_memory import cost, decode
from engrax.pallas_kernels.neural_memory.types import ACTIVATIONS
from engrax.registry import did_you_mean


@MIXERS.register("titans")
@dataclasses.dataclass(frozen=True)
class TitansConfig(MixerConfig):
    """Settings of the Titans neural memory."""

    heads: int = 4  # independent memories
    head_dim: int = 32  # key and value width of a head
    hidden: int = 64  # width of the memory MLP's inner layers, per head
    depth: int = 2  # layers of the memory MLP, 1 (a matrix) to 4
    chunk_size: int = 16  # tokens whose gradients are taken at one anchor
    conv_width: int = 4  # taps of the short convolution; 1 = none
    persistent_tokens: int = 0  # learned tokens written into the memory before every segment
    max_lr: float | None = None  # upper bound of theta / (1 - eta), per token; None: see `lr_bound`
    lr_init: float = 0.5  # theta at the start, as a fraction of that bound
    forget_init: float = 0.001  # alpha at the start, per token, of the middle head
    momentum: bool = True  # False: eta = 0
    forgetting: bool = True  # False: alpha = 0
    activation: str = "gelu"  # activation of the memory MLP
    save_every: int = 1  # chunks between saved states in the backward pass; more = less memory, more recomputation
    implementation: str | None = (
        None  # of the operation neural_memory: reference | xla | ...; None = chosen by platform
    )

    def __post_init__(self):
        if not 1 <= self.depth <= 4:
            raise UserError(f"depth={self.depth} of the memory MLP must be 1 to 4.")
        for name in ("heads", "head_dim", "hidden", "chunk_size", "conv_width", "save_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("lr_init", "forget_init"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must lie between 0 and 1, both excluded.")
        if self.persistent_tokens < 0:
            raise UserError(f"persistent_tokens={self.persistent_tokens} must not be negative.")
        if self.activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            near = did_you_mean(self.activation, ACTIVATIONS)
            raise UserError(f"unknown activation {self.activation!r}{near} (known: {known}).")
        if self.max_lr is not None and self.max_lr <= 0:
            raise UserError(f"max_lr={self.max_lr} must be positive; None chooses it.")

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "Titans":
        return Titans(self, dim, rngs=rngs, num_layers=num_layers)

    @classmethod
    def examples(cls) -> tuple["TitansConfig", ...]:
        small = cls(heads=2, head_dim=4, hidden=6, chunk_size=8, persistent_tokens=3)
        return (
            small,
            dataclasses.replace(small, depth=1, persistent_tokens=0, conv_width=1),
            dataclasses.replace(small, depth=4, momentum=False, forgetting=False, chunk_size=4),
            cls(),
        )

    @property
    def layer_widths(self) -> tuple[int, ...]:
        """Widths between the memory's layers: (head_dim, hidden, ..., head_dim)."""
        return (self.head_dim, *[self.hidden] * (self.depth - 1), self.head_dim)

    @property
    def lr_bound(self) -> float:
        """Upper bound of theta / (1 - eta): `max_lr`, or a default without overshoot for a key that fills its chunk."""
        return self.max_lr or default_lr_bound(self.chunk_size, self.depth)

    @property
    def gates(self) -> int:
        """Gates per head: the learning rate and, if enabled, momentum and forgetting."""
        return 1 + self.momentum + self.forgetting

    def flops_per_token(self, dim: int, seq_len: int) -> float:
        inner = self.heads * self.head_dim
        project = 2 * dim * (5 * inner + self.gates * self.heads) + 2 * self.conv_width * 3 * inner
        memory = cost.flops(
            batch=1,
            seq=seq_len,
            heads=self.heads,
            key=self.head_dim,
            value=self.head_dim,
            hidden=self.hidden,
            depth=self.depth,
            chunk_size=self.chunk_size,
            segments=True,  # rows are packed
        )
        return project + memory.forward / seq_len


class Titans(TestTimeMixerBase):
    """The module of TitansConfig: x [B, T, D] -> y [B, T, D], ShellState with a NeuralMemoryState."""

    def __init__(self, config: TitansConfig, dim: int, *, rngs: nnx.Rngs, num_layers: int = 1):
        super().__init__(config, dim, gates=config.gates * config.heads, rngs=rngs, num_layers=num_layers)

    def _add_memory(self, rngs: nnx.Rngs) -> None:
        config, H = self.config, self.config.heads
        # eta = 0.5 and alpha = forget_init at the start, spread over the heads so that they differ in time scale.
        spread = jnp.linspace(-1.0, 1.0, H)
        bias = [jnp.full(H, logit(config.lr_init))]
        bias += [spread] if config.momentum else []
        bias += [logit(config.forget_init) + spread] if config.forgetting else []
        self.gate_bias = nnx.Param(jnp.stack(bias), axes=("gate", "heads"), role="gate")
        # The last layer starts at zero, so reads do not contain the initial function.
        widths = config.layer_widths
        scales = [*[2**0.5] * (config.depth - 1), 0.0]
        self.initial = nnx.List(
            nnx.Param(
                s * jax.random.normal(rngs.params(), (H, a, b)) * a**-0.5,
                axes=("heads", "memory_in", "memory_out"),
                role="initial memory",
            )
            for s, a, b in zip(scales, widths[:-1], widths[1:])
        )

    def _learned_memory(self) -> NeuralMemoryState:
        return NeuralMemoryState.start(tuple(w[...].astype(self._state_dtype()) for w in self.initial), 1)

    def _closed(self, memory: NeuralMemoryState) -> NeuralMemoryState:
        return memory._replace(anchor=memory.weights, phase=np.zeros(1, np.int32))

    def _broadcast(self, memory: NeuralMemoryState, batch_size: int) -> NeuralMemoryState:
        return NeuralMemoryState.start(*_of_one_row(memory, batch_size))

    def open_state(self, state: ShellState) -> ShellState:
        if self.config.implementation not in (None, "xla"):
            return state
        return state._replace(memory=decode.open_memory(state.memory, self.config.chunk_size))

    def close_state(self, state: ShellState) -> ShellState:
        if not isinstance(state.memory, decode.DecodingMemory):
            return state
        return state._replace(memory=decode.close_memory(state.memory))

    def _goes_on(self, memory) -> bool:
        return isinstance(memory, decode.DecodingMemory)

    def _at_place_of(self, memory, other):
        return memory._replace(phase=other.phase)

    def _gates(self, x_BTD) -> dict[str, Array]:
        c = self.config
        shape = (*x_BTD.shape[:2], c.gates, c.heads)
        logits = self.gates(x_BTD).reshape(shape).astype(self._state_dtype()) + self.gate_bias[...]
        lr, *others = jnp.moveaxis(jax.nn.sigmoid(logits), 2, 0)
        momentum = others.pop(0) if c.momentum else jnp.zeros_like(lr)
        forget = others.pop(0) if c.forgetting else jnp.zeros_like(lr)
        lr = c.lr_bound * lr * (1 - momentum)
        return {"lr": lr, "momentum": momentum, "forget": forget}

    def _memory(self, q, k, v, gates, memory, reset, segment_ids):
        c = self.config
        if isinstance(memory, decode.DecodingMemory):
            options = dict(activation=c.activation, chunk_size=c.chunk_size, segment_ids=segment_ids)
            return decode.decode(q, k, v, memory=memory, **gates, **options)
        if segment_ids is not None:
            weights, _, momentum = _of_one_row(reset)
            reset = weights, momentum
        return neural_memory(
            q,
            k,
            v,
            state=memory,
            reset=None if segment_ids is None else reset,
            segment_ids=segment_ids,
            activation=c.activation,
            chunk_size=c.chunk_size,
            save_every=c.save_every,
            implementation=c.implementation,
            **gates,
        )

    def report(
        self, x_BTD: Float[Array, "B T D"], state: ShellState | None = None, segment_ids=None
    ) -> dict[str, Array]:
        """Diagnostics of one call: gate means, fraction of saturated gates, surprise before and memory norms after it,
        and [B, T] the error of each token's write before and after it."""
        before = self.init_state(x_BTD.shape[0]) if state is None else state
        _, after, (_, k, v, gates) = self._mix(x_BTD, state, segment_ids)
        saturated = lambda g: jnp.mean((g < 0.01) | (g > 0.99))  # noqa: E731
        norm = lambda xs: jnp.sqrt(sum(jnp.mean(jnp.sum(x * x, axis=(-2, -1))) for x in xs))  # noqa: E731
        no_write = jax.tree.map(jnp.zeros_like, gates)
        found = {}
        for when, memory in (("before", before.memory), ("after", after.memory)):
            nothing = jax.tree.map(jnp.zeros_like, memory.momentum)
            held = self._closed(memory._replace(momentum=nothing))._replace(phase=np.zeros(len(x_BTD), np.int32))
            predicted, _ = self._memory(k, k, v, no_write, held, held, None)
            found[f"surprise_{when}"] = 0.5 * jnp.mean(jnp.sum((predicted - v) ** 2, axis=-1).astype(jnp.float32))
        found |= self.errors_by_token(x_BTD, state, segment_ids)
        return found | {
            "lr_mean": jnp.mean(gates["lr"]),
            "momentum_mean": jnp.mean(gates["momentum"]),
            "forget_mean": jnp.mean(gates["forget"]),
            "forget_saturated": saturated(gates["forget"]),
            "memory_norm": norm(after.memory.weights),
            "momentum_norm": norm(after.memory.momentum),
        }


def _of_one_row(memory: NeuralMemoryState, batch_size: int = 1):
    """Returns (weights, batch_size, momentum) of the first row, `[H, in, out]` each: the arguments of `start`."""
    return tuple(w[0] for w in memory.weights), batch_size, tuple(s[0] for s in memory.momentum)
