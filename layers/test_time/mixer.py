"""The general test-time memory as a mixer: structure x inner loss x retention x inner optimiser x schedule.

The framework is MIRAS (arXiv 2504.13173): a memory M is a small network. Every token is a step of gradient descent on
an inner loss of its key and value, balanced by retention. In plain form, per head,

    S_t = eta_t S_{t-1} - theta_t grad loss(M(k_t), v_t),     W_t = retain(W_{t-1}) + S_t,     y_t = M_t(q_t).

`presets` registers published memories under their names.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from engrax.errors import UserError, require_positive
from engrax.layers.common.segments import newest
from engrax.layers.mixer import MIXERS, MixerConfig
from engrax.layers.test_time import engine
from engrax.layers.test_time.base import TestTimeMixerBase, default_lr_bound, logit
from engrax.layers.test_time.coefficients import Gates
from engrax.layers.test_time.features import feature_count, polynomial_features
from engrax.layers.test_time.losses import LOSSES
from engrax.layers.test_time.retention import RETENTIONS
from engrax.layers.test_time.rule import Matrices, Rule
from engrax.layers.test_time.structures import KINDS, Structure, initial_matrices
from engrax.pallas_kernels.common.segments import row_lengths, segment_starts
from engrax.pallas_kernels.neural_memory import cost
from engrax.pallas_kernels.neural_memory.types import ACTIVATIONS
from engrax.registry import did_you_mean

CHOICES = {
    "structure": KINDS,
    "activation": tuple(ACTIVATIONS),
    "loss": LOSSES,
    "target": ("value", "residual", "next"),
    "retention": RETENTIONS,
    "forgetting": ("none", "token", "channel", "head"),
    "gradient_at": ("anchor", "decayed"),
    "optimizer": ("sgd", "momentum", "muon"),
    "order": ("write_then_read", "read_then_write"),
}


@MIXERS.register("test_time_memory")
@dataclasses.dataclass(frozen=True)
class MemoryConfig(MixerConfig):
    """Settings of a test-time memory. Meaningless combinations are refused with the reason."""

    heads: int = 4  # independent memories
    head_dim: int = 32  # key and value width of a head
    structure: str = "mlp"  # linear | mlp | residual_mlp | swiglu | factorised
    depth: int = 2  # layers of an mlp or residual_mlp
    hidden: int = 64  # width inside the memory, per head; the rank of a factorised one
    activation: str = "gelu"  # inside an mlp
    bias: bool = False  # the memory's matrices have biases
    normed: bool = False  # layer norm of the memory's output, its scale and bias learned in the outer loop
    loss: str = "l2"  # l2 | dot | lp | huber
    loss_power: float = 3.0  # p of lp, at least 2
    target: str = "value"  # value | residual (v - k) | next (the key stores the next token's value)
    retention: str = "decay"  # decay | row_norm | q_norm | softmax; all but decay act at chunk ends
    norm_power: float = 4.0  # q of q_norm, above 2 or 2 itself (no normalisation)
    forgetting: str = "token"  # none | token | channel (per token and key channel) | head (a learned constant)
    gradient_at: str = "anchor"  # anchor | decayed: (1 - forget) times it
    optimizer: str = "momentum"  # sgd | momentum | muon (Newton-Schulz at chunk ends)
    momentum_order: int = 1  # with momentum or muon: how many momenta follow one another; muon may have none
    order: str = "write_then_read"  # read_then_write: a token does not see its own write
    window: int = 1  # tokens whose gradients make one step (Omega rule)
    feature_degree: int = 1  # highest degree of polynomial features of keys and queries
    chunk_size: int = 16  # tokens whose gradients are taken at one anchor
    reset_every: int = 0  # chunks after which the memory is reset; 0 = never
    conv_width: int = 4  # taps of the short convolution; 1 = none
    output_gate: bool = True  # whether the read is gated by a projection of the input
    persistent_tokens: int = 0  # learned tokens written into the memory before every segment
    max_lr: float | None = None  # upper bound of theta / (1 - eta), per token; None: see `lr_bound`
    lr_init: float = 0.5  # theta at the start, as a fraction of that bound
    forget_init: float = 0.001  # alpha at the start, per token (the middle head's)
    save_every: int = 1  # chunks between saved states in the backward pass; more = less memory, more recomputation
    implementation: str | None = None  # of the operation neural_memory: reference | xla | ...; None = by platform

    def __post_init__(self):
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise UserError(
                    f"unknown {name} {value!r}{did_you_mean(str(value), known)} (known: {', '.join(known)})."
                )
        at_least_one = ("heads", "head_dim", "depth", "hidden", "window", "feature_degree", "chunk_size", "conv_width")
        for name in (*at_least_one, "save_every"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("lr_init", "forget_init"):
            if not 0 < getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must lie between 0 and 1, both excluded.")
        for name in ("momentum_order", "reset_every", "persistent_tokens"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must not be negative.")
        require_positive(self, "loss_power")
        if self.max_lr is not None and self.max_lr <= 0:
            raise UserError(f"max_lr={self.max_lr} must be positive; None chooses it.")
        for condition, reason in self._meaningless():
            if condition:
                raise UserError(reason)

    def _meaningless(self):
        """Pairs of a condition and the reason why such settings are refused."""
        degree_one = self.feature_degree == 1
        yield self.loss == "lp" and self.loss_power < 2, "loss_power below 2: its gradient has no finite derivative."
        yield self.norm_power < 2, "norm_power below 2 divides by a norm that vanishes; it must be at least 2."
        yield (
            self.structure == "residual_mlp" and not degree_one,
            "structure='residual_mlp' adds its input to its output and needs equal widths: feature_degree must be 1.",
        )
        yield (
            self.forgetting == "channel" and (self.structure != "linear" or self.bias or not self.rule().linear),
            "forgetting='channel' gates the key channels of one matrix: it needs structure='linear' without bias, and "
            "an update that is linear in the gradient (retention='decay', no muon).",
        )
        yield (
            self.gradient_at == "decayed" and (self.window > 1 or not self.rule().linear),
            "gradient_at='decayed' is defined for one token's own step: window=1, retention='decay', no muon.",
        )
        yield (
            self.optimizer == "momentum" and self.momentum_order == 0,
            "optimizer='momentum' needs momentum_order of at least 1; choose optimizer='sgd' for none.",
        )
        yield (
            self.optimizer == "sgd" and self.momentum_order > 1,
            f"optimizer='sgd' has no momentum, and momentum_order={self.momentum_order} asks for some.",
        )
        yield (
            self.target == "next" and self.persistent_tokens == 1,
            "target='next' stores a token's successor: one persistent token alone writes nothing; choose 0 or 2.",
        )
        yield (
            self.gradient_at == "decayed" and self.structure == "linear" and self.loss == "dot" and not self.normed,
            "the gradient of a linear memory's dot loss does not depend on the memory: leave gradient_at at 'anchor'.",
        )
        yield (
            self.forgetting == "none" and self.gradient_at == "decayed",
            "gradient_at='decayed' without forgetting is the anchor itself: leave it at 'anchor'.",
        )
        yield (
            (self.implementation is not None or self.save_every > 1) and not self.rule().operation,
            "implementation and save_every are those of the operation neural_memory, which does not have this rule: it "
            "has a plain mlp or matrix, loss='l2', retention='decay', at most one momentum, window=1 and reads after "
            "the write; leave implementation at None and save_every at 1.",
        )

    @property
    def orders(self) -> int:
        """How many momenta follow one another."""
        return 0 if self.optimizer == "sgd" else self.momentum_order

    @property
    def lr_bound(self) -> float:
        """Upper bound of theta / (1 - eta), or of theta with muon, whose step is normalised.

        The default is `default_lr_bound`, divided among the tokens of a window. A normed output has length
        head_dim^1/2 instead of about 1, and its gradients are larger by the same factor.
        """
        layers = self.depth if self.structure.endswith("mlp") else 1
        sharers = self.window * (self.head_dim if self.normed else 1)
        return self.max_lr or default_lr_bound(self.chunk_size, layers) / sharers

    @property
    def gate_widths(self) -> dict[str, int]:
        """How many numbers a head's gates take from every token, by name."""
        widths = {"lr": 1, "momentum": self.orders}
        widths["forget"] = {"token": 1, "channel": self.head_dim_of_keys}.get(self.forgetting, 0)
        return widths | {"delta": int(self.loss == "huber"), "weight": int(self.window > 1)}

    @property
    def head_dim_of_keys(self) -> int:
        """Width of a head's keys as the memory gets them."""
        return feature_count(self.head_dim, self.feature_degree)

    def rule(self) -> Rule:
        """Returns the memory's rule without its parameters."""
        structure = Structure(
            kind=self.structure,
            key=self.head_dim_of_keys,
            value=self.head_dim,
            hidden=self.hidden,
            depth=self.depth,
            activation=self.activation,
            bias=self.bias,
            normed=self.normed,
        )
        return Rule(
            structure=structure,
            loss=self.loss,
            loss_power=self.loss_power,
            retention=self.retention,
            norm_power=self.norm_power,
            muon=self.optimizer == "muon",
            momentum_order=self.orders,
            decayed=self.gradient_at == "decayed",
            read_first=self.order == "read_then_write",
            next_value=self.target == "next",
            window=self.window,
            chunk_size=self.chunk_size,
            reset_every=self.reset_every,
            by_channel=self.forgetting == "channel",
            save_every=self.save_every,
            implementation=self.implementation,
        )

    def of_heads(self, shares: int) -> "MemoryConfig":
        return self.with_heads_cut(shares, ("heads",))

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "TestTimeMemory":
        return TestTimeMemory(self, dim, rngs=rngs, num_layers=num_layers)

    @classmethod
    def examples(cls) -> tuple["MemoryConfig", ...]:
        small = cls(heads=2, head_dim=4, hidden=6, chunk_size=8, persistent_tokens=3)
        change = dataclasses.replace
        return (
            change(
                small, structure="swiglu", loss="huber", target="next", momentum_order=2, forgetting="head", window=3
            ),
            change(
                small,
                structure="linear",
                target="residual",
                forgetting="channel",
                order="read_then_write",
                feature_degree=2,
            ),
            change(small, structure="factorised", loss="dot", retention="row_norm", optimizer="muon", reset_every=2),
            change(
                small, target="residual", forgetting="head", gradient_at="decayed", feature_degree=2, output_gate=False
            ),
        )

    def flops_per_token(self, dim: int, seq_len: int) -> float:
        inner, rule = self.heads * self.head_dim, self.rule()
        widths = (4 + self.output_gate) * inner + self.heads * sum(self.gate_widths.values())
        project = 2 * dim * widths + 2 * self.conv_width * 3 * inner
        if not rule.operation:
            return project + self.heads * self._flops_of_engine(rule, min(self.chunk_size, seq_len))
        memory = cost.flops(
            batch=1,
            seq=seq_len,
            heads=self.heads,
            key=self.head_dim_of_keys,
            value=self.head_dim,
            hidden=self.hidden,
            depth=len(rule.structure.widths()),
            chunk_size=self.chunk_size,
            segments=True,  # rows are packed
        )
        return project + memory.forward / seq_len

    def _flops_of_engine(self, rule: Rule, slots: int) -> float:
        """Forward FLOPs per token and head of `engine`, in blocks of so many slots."""
        once, widths, bases = rule.structure.flops_per_token(), rule.structure.widths().values(), 2  # rows are packed
        # Keys forward and backward and the update; what queries and carries take of every base.
        memory = once * (2 * bases + 1 + self.orders + bases * (1 + (self.orders if rule.linear else 0)))
        if rule.linear:
            memory += sum(2.0 * (slots + self.window - 1) * (i + o) for i, o in widths)
        if rule.muon:
            for i, o in widths:  # five products of each kind, once a chunk
                small, large = min(i, o), max(i, o)
                memory += 5 * (4.0 * small * small * large + 2.0 * small**3) / slots
        return memory


class TestTimeMemory(TestTimeMixerBase):
    """The module of MemoryConfig: x [B, T, D] -> y [B, T, D], ShellState."""

    __test__ = False  # no test, whatever its name says

    def __init__(self, config: MemoryConfig, dim: int, *, rngs: nnx.Rngs, num_layers: int = 1):
        gates = config.heads * sum(config.gate_widths.values())
        super().__init__(config, dim, gates=gates, rngs=rngs, num_layers=num_layers)

    def _add_memory(self, rngs: nnx.Rngs) -> None:
        c, rule = self.config, self.config.rule()
        # eta = 0.5 and alpha = forget_init at the start, spread over the heads so that they differ in time scale.
        spread = jnp.linspace(-1.0, 1.0, c.heads)
        starts = {"lr": jnp.full(c.heads, logit(c.lr_init)), "momentum": spread}
        starts |= {"forget": logit(c.forget_init) + spread, "delta": jnp.zeros(c.heads), "weight": jnp.zeros(c.heads)}
        bias = [jnp.tile(starts[name], (width, 1)) for name, width in c.gate_widths.items()]
        self.gate_bias = nnx.Param(jnp.concatenate(bias), axes=("gate", "heads"), role="gate")
        if c.forgetting == "head":
            self.forget_bias = nnx.Param(starts["forget"], axes=("heads",), role="gate")
        # The last matrix starts at zero, so reads do not contain the initial function. It starts random if matrices are
        # kept at a norm, or if output or steps are normalised: the derivative of a normalised 0 is almost infinite.
        last = 1.0 if c.normed or rule.muon or c.retention in ("row_norm", "q_norm") else 0.0
        self._add_matrices(rngs, last)
        if c.feature_degree > 1:  # phi(q) . phi(k) begins as sum_d (q . k)^d / d! (arXiv 2505.23735)
            degrees = jnp.arange(1, c.feature_degree + 1)
            self.features = nnx.Param(jnp.exp(-0.5 * jax.lax.lgamma(degrees + 1.0)), axes=("degree",), role="gate")
        if c.normed:
            self.norm_scale = nnx.Param(jnp.ones((c.heads, c.head_dim)), axes=("heads", "norm"), role="norm")
            self.norm_bias = nnx.Param(jnp.zeros((c.heads, c.head_dim)), axes=("heads", "norm"), role="norm")

    def _add_matrices(self, rngs: nnx.Rngs, last_scale: float) -> None:
        """Adds the initial matrices, the last one's scaled."""
        c, axes = self.config, ("heads", "memory_in", "memory_out")
        matrices = initial_matrices(c.rule().structure, c.heads, rngs.params(), last_scale)
        self.initial = nnx.Dict({name: nnx.Param(w, axes=axes, role="initial memory") for name, w in matrices.items()})

    def _learned_matrices(self) -> Matrices:
        return {name: w[...] for name, w in self.initial.items()}

    def _gates(self, x_BTD) -> Gates:
        c, dtype = self.config, self._state_dtype()
        widths = c.gate_widths
        shape = (*x_BTD.shape[:2], sum(widths.values()), c.heads)
        logits = self.gates(x_BTD).astype(dtype).reshape(shape) + self.gate_bias[...]
        bounds = [sum(list(widths.values())[:i]) for i in range(1, len(widths))]
        by_name = dict(zip(widths, jnp.split(jnp.swapaxes(logits, -1, -2), bounds, axis=-1)))
        momentum, forget = jax.nn.sigmoid(by_name["momentum"]), jax.nn.sigmoid(by_name["forget"])
        if not widths["forget"]:
            constant = (
                jax.nn.sigmoid(self.forget_bias[...].astype(dtype))
                if c.forgetting == "head"
                else jnp.zeros(c.heads, dtype)
            )
            forget = jnp.broadcast_to(constant[:, None], (*x_BTD.shape[:2], c.heads, 1))
        lr = c.lr_bound * jax.nn.sigmoid(by_name["lr"][..., 0])
        if c.optimizer == "momentum":
            lr = lr * jnp.prod(1 - momentum, axis=-1)  # a write acts 1 / (1 - momentum) times
        ones = jnp.ones_like(lr)
        delta = jax.nn.softplus(by_name["delta"][..., 0]) if widths["delta"] else ones
        weight = jax.nn.sigmoid(by_name["weight"][..., 0]) if widths["weight"] else ones
        return Gates(lr, momentum, forget, delta, weight)

    def _memory(self, q, k, v, gates: Gates, memory, reset, segment_ids):
        c, rule, dtype = self.config, self.config.rule(), v.dtype
        q, k, v = (x.astype(self._state_dtype()) for x in (q, k, v))
        if c.target == "residual":
            v = v - k
        if c.feature_degree > 1:
            q, k = (polynomial_features(x, self.features[...].astype(x.dtype)) for x in (q, k))
        if rule.operation:
            q, k, v = (x.astype(dtype) for x in (q, k, v))  # kernels take the tokens in the compute dtype
        if c.target == "next":
            k, gates, memory = _previous_key(k, gates, memory, segment_ids)
        extra = {}
        if c.normed:
            extra = {
                "norm_scale": self.norm_scale[...].astype(q.dtype),
                "norm_bias": self.norm_bias[...].astype(q.dtype),
            }
        out, memory = self._engine.run(rule, q, k, v, gates, memory, reset, segment_ids, extra)
        return out.astype(dtype), memory

    def _written(self, k, v):
        if self.config.target == "residual":
            return k, v - k
        if self.config.target == "next":
            return jnp.concatenate([k[:, :1], k[:, :-1]], axis=1), v
        return k, v

    def report(self, x_BTD, state=None, segment_ids=None) -> dict[str, Array]:
        """Diagnostics of one call: gate means, fraction of saturated gates, the memory's norms after it, and [B, T] the
        error of each token's write before and after it."""
        _, after, (_, _, _, gates) = self._mix(x_BTD, state, segment_ids)
        found = self.errors_by_token(x_BTD, state, segment_ids)
        found |= {"lr_mean": jnp.mean(gates.lr), "forget_mean": jnp.mean(gates.forget)}
        found["forget_saturated"] = jnp.mean((gates.forget < 0.01) | (gates.forget > 0.99))
        if self.config.orders:
            found["momentum_mean"] = jnp.mean(gates.momentum)
        for name, matrices in zip(("memory_norm", "momentum_norm"), self._engine.matrices(after.memory)):
            leaves = jax.tree.leaves(matrices)
            if leaves:
                found[name] = jnp.sqrt(sum(jnp.mean(jnp.sum(w * w, axis=(-2, -1))) for w in leaves))
        return found


def _previous_key(k, gates: Gates, memory: engine.MemoryState, segment_ids):
    """Shifts keys by one token, so a key stores the next token's value when that token arrives.

    A segment's first token, and a token after padding, writes nothing. A periodic reset does not start a segment.
    """
    before, real = memory.previous, jnp.ones(k.shape[:2], bool)
    begins, lengths = jnp.zeros(k.shape[:2], bool), None
    if segment_ids is not None:
        real, begins, lengths = segment_ids >= 0, segment_starts(segment_ids), row_lengths(segment_ids)
    real = jnp.concatenate([jnp.asarray(before.there)[:, None], real], axis=1)
    keys = jnp.concatenate([before.k[:, None], k], axis=1)
    there = real[:, :-1] & ~begins
    lr, weight = (jnp.where(there[..., None], gate, 0) for gate in (gates.lr, gates.weight))
    gates = gates._replace(lr=lr, weight=weight)
    last = engine.Previous(*(newest(x, 1, lengths)[:, 0] for x in (keys, real)))
    return keys[:, :-1], gates, memory._replace(previous=last)
