"""Mixture of memories, MoM (arXiv 2502.13685): a router sends every token to k of M memories of one kind.

    s_t = softmax(x_t W_router),  the k largest are chosen,  a_tm = s_tm / (their sum)
    q_t = x_t W_q,  k_tm = x_t W_k^m,  v_tm = x_t W_v^m,  gates from x_t W_g^m,  for the chosen memories m
    M_m <- rule(M_m, k_tm, v_tm, gates),   o_tm = q_t M_m
    y_t = W_o (norm(sum_m a_tm o_tm + o_t,shared) * act(x_t W_gate))

The rule is that of any mixer with a matrix memory (`base`): linear attention, GLA, DeltaNet, Gated DeltaNet, KDA. A
memory that is not chosen does not change or decay. The short convolution runs over each memory's own tokens (padding is
skipped). The shared memory has weight 1 and sees every token. Common to all memories are queries, the convolution, the
rates and biases of gates, the norm, the output gate and W_o.

No token is dropped and no memory is padded: every row's copies are laid out by memory
(`engrax.layers.routed.routing`), the projections of a memory run over blocks of its copies, and the operation keeps a
separate state for each memory.

The router learns from the weights a_tm and from the losses that balance the memories (`auxiliary_loss`). With k = 1 the
weight is always 1, and only those losses train it.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from engrax.errors import UserError
from engrax.layers.common import sequence
from engrax.layers.common.gates import LowRank
from engrax.layers.common.matrix_memory import MatrixMemoryConfig
from engrax.layers.common.modules import projection
from engrax.layers.common.segments import first_segment_of_row, last_segment_after, select_rows, starts_anew
from engrax.layers.delta.gated_deltanet import GatedDeltaNetConfig
from engrax.layers.mixer import MIXERS, Mixer, MixerConfig
from engrax.layers.routed.routing import (
    Choice,
    RoutedLayout,
    balance_loss,
    choose,
    combine,
    dispatch,
    lay_out,
    loads,
    relayout,
    z_loss,
)
from engrax.pallas_kernels.common.segments import mask_tokens
from engrax.pallas_kernels.grouped_matmul.api import grouped_matmul


class MoMState(NamedTuple):
    """Everything the mixer needs to continue at any position; N memories, the shared one last."""

    memory: tuple[Float[Array, "B N HV K V"], ...]
    tail: Float[Array, "B N W C"]  # of each memory, its last conv_width - 1 projected tokens (q, k and v side by side)
    last_segment: Int[Array, " B"]


class Call(NamedTuple):
    """Intermediate results of a call, for the outputs and the report."""

    read: Float[Array, "B T HV V"]
    state: MoMState
    choice: Choice
    terms: dict[str, Any]  # of the operation, in runs
    runs: RoutedLayout


@MIXERS.register("mom")
@dataclasses.dataclass(frozen=True)
class MoMConfig(MixerConfig):
    """Settings of a mixture of memories."""

    composes: ClassVar[bool] = True

    base: MixerConfig = GatedDeltaNetConfig()  # the rule of every memory: a mixer with a matrix memory
    memories: int = 4  # memories that the router chooses from
    top_k: int = 2  # memories that a token goes to
    shared: bool = True  # whether one more memory sees every token
    own_projections: bool = True  # whether keys, values and gates are projected by each memory's own weights
    balance_weight: float = 0.01  # of the balance loss in the training loss; 0 = none
    z_weight: float = 0.0  # of the z-loss of the router in the training loss; 0 = none

    def __post_init__(self):
        if not getattr(self.base, "routable", False):
            names = sorted(n for n, config in MIXERS.items() if getattr(config, "routable", False))
            name = self.base.registered_name or type(self.base).__name__
            raise UserError(f"base={name} has no rule that tokens can be routed to; choose one of {', '.join(names)}.")
        if not 1 <= self.top_k <= self.memories:
            raise UserError(f"top_k={self.top_k} must lie between 1 and memories={self.memories}.")
        for name in ("balance_weight", "z_weight"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} must not be negative.")

    @property
    def exempt_from(self) -> dict[str, str]:
        """With top_k = 1 and without losses the router has no gradient: its weight is always 1."""
        return {} if self.top_k > 1 else {"trainability.gradients": "top-1 router: its own gradient"}

    @property
    def states(self) -> int:
        """Memories, the shared one included."""
        return self.memories + self.shared

    def of_heads(self, shares: int) -> "MoMConfig | None":
        base = self.base.of_heads(shares)
        return None if base is None else dataclasses.replace(self, base=base)

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "MoM":
        return MoM(self, dim, rngs=rngs, layer=layer, num_layers=num_layers)

    @classmethod
    def examples(cls) -> tuple["MoMConfig", ...]:
        small = dict(heads=2, value_heads=4, head_dim=4, value_dim=6, chunk_size=8)
        return cls(base=GatedDeltaNetConfig(**small)), cls(base=GatedDeltaNetConfig(chunk_size=8))

    def flops_per_token(self, dim: int, seq_len: int) -> float:
        base, copies = self.base, self.top_k + self.shared
        written = dim * sum(base.widths[1:]) + base.gate_multiplies(dim)
        project = dim * (base.widths[0] + self.memories) + base.output_multiplies(dim)
        project += written * (copies if self.own_projections else 1)
        if base.conv_width > 1:
            project += copies * base.conv_width * sum(base.widths)
        mix = self.top_k * base.widths[2]
        return 2 * (project + mix) + copies * base.memory_flops(seq_len)


class MoM(Mixer):
    """The module of MoMConfig: x [B, T, D] -> y [B, T, D], MoMState."""

    read_directly = ("router",)  # in float32 or wider; an adapter would change nothing

    def __init__(self, config: MoMConfig, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1):
        self.config = config
        base: MatrixMemoryConfig = config.base

        def parts(rngs):
            mixer = base.build(dim, rngs=rngs, layer=layer, num_layers=num_layers)
            widths = base.widths[1:]
            return mixer, projection(dim, sum(widths), ("embed", "heads"), rngs=rngs, widths=widths)

        self.router = projection(dim, config.memories, ("embed", "memory"), rngs=rngs)
        self.query = projection(dim, base.widths[0], ("embed", "heads"), rngs=rngs)
        self.base, self.key_value = parts(rngs)
        del self.base.qkv
        if config.own_projections:
            keys = jax.random.split(rngs.params(), config.states)
            kernels = jax.vmap(lambda key: [p.kernel[...] for p in _stacked(*parts(nnx.Rngs(key)))])(keys)
            for linear, kernel in zip(_stacked(self.base, self.key_value), kernels):
                widths = linear.kernel.get_metadata().get("widths")
                linear.kernel = nnx.Param(kernel, axes=("memory", "embed", "heads"), role="matrix", widths=widths)

    def init_state(self, batch_size: int) -> MoMState:
        """The state every row and every segment starts from: zero matrices."""
        c, base = self.config, self.config.base
        shapes = ((batch_size, c.states, m.heads, m.key, m.value) for m in base.matrices)
        tail = (batch_size, c.states, base.conv_width - 1, sum(base.widths))
        return MoMState(
            memory=tuple(jnp.zeros(shape, self.base.wide_dtype()) for shape in shapes),
            tail=jnp.zeros(tail, self.query.kernel.dtype),
            last_segment=jnp.full((batch_size,), -1, jnp.int32),
        )

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        state: MoMState | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], MoMState]:
        """Writes every token to its memories and reads them; a new segment starts from zero. Padding (-1) gives 0."""
        call = self._mix(x_BTD, state, segment_ids)
        y = self.base.project_read(x_BTD, call.read)
        return y if segment_ids is None else mask_tokens(segment_ids >= 0, y), call.state

    def auxiliary_loss(
        self, x_BTD: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, " B"]:
        """The weighted balance loss and z-loss of every row, added to its training loss.

        Each row has its own loss, so rows stay independent, and microbatches and devices do not change the result.
        """
        if not (self.config.balance_weight or self.config.z_weight):
            return super().auxiliary_loss(x_BTD)
        c, choice, real = self.config, self.route(x_BTD), _real(x_BTD, segment_ids)
        return c.balance_weight * balance_loss(choice, real) + c.z_weight * z_loss(choice, real)

    def report(self, x_BTD: Float[Array, "B T D"], state: MoMState | None = None, segment_ids=None) -> dict[str, Array]:
        """Diagnostics of one call: the base's, and of the router: load of each memory (shares of the routed copies,
        together 1) and the same of every token (NaN at padding), mean entropy in nats, how many memories no token
        chose, the balance loss (top_k at its best).
        """
        call, real = self._mix(x_BTD, state, segment_ids), _real(x_BTD, segment_ids)
        found = self.base.report_of(call.state.memory, call.terms, call.runs.memory >= 0)
        tokens = jnp.sum(real, axis=1)[:, None] / jnp.maximum(jnp.sum(real), 1)
        load = jnp.sum(tokens * loads(call.choice, real)[0], axis=0) / self.config.top_k
        chosen = jnp.sum(jax.nn.one_hot(call.choice.memory, self.config.memories), axis=2) / self.config.top_k
        log_p = jax.nn.log_softmax(call.choice.logits, axis=-1)
        entropy = jnp.where(real, -jnp.sum(jnp.exp(log_p) * log_p, axis=-1), 0)
        rows = jnp.sum(call.state.memory[0] ** 2, axis=(-2, -1))
        return found | {
            "load": load,
            "load_by_token": jnp.where(real[..., None], chosen, jnp.nan),
            "memory_norms": jnp.sqrt(jnp.mean(rows, axis=(0, 2))),
            "router_entropy": jnp.sum(entropy) / jnp.maximum(jnp.sum(real), 1),
            "dead_memories": jnp.sum(load == 0),
            "balance_loss": jnp.sum(tokens[:, 0] * balance_loss(call.choice, real)),
        }

    def route(self, x_BTD: Float[Array, "B T D"]) -> Choice:
        """The memories of every token, without the shared one."""
        wide = self.base.wide_dtype()
        kernel, highest = self.router.kernel[...].astype(wide), jax.lax.Precision.HIGHEST
        logits = jnp.einsum("BTD,DM->BTM", x_BTD.astype(wide), kernel, precision=highest)
        return choose(logits, self.config.top_k)

    def _mix(self, x_BTD, state: MoMState | None, segment_ids) -> Call:
        B = len(x_BTD)
        carries, state = state is not None, self.init_state(B) if state is None else state
        if segment_ids is None:
            first = last = jnp.maximum(state.last_segment, 0)
            document = jnp.broadcast_to(first[:, None], x_BTD.shape[:2])
        else:
            first, last = first_segment_of_row(segment_ids), last_segment_after(state.last_segment, segment_ids)
            state = select_rows(starts_anew(state.last_segment, segment_ids), self.init_state(B), state)
            document = segment_ids
        choice = self.route(x_BTD)
        memory, weight = self._with_shared(choice)
        ends = _documents_around(first, last, segment_ids)
        runs = lay_out(memory, document, ends[0], memories=self.config.states, lead=state.tail.shape[2])
        q, k, v, tail = self._project(x_BTD, state.tail if carries or sequence.is_split() else None, runs, ends)
        terms = self.base.gates(self._gate_logits(x_BTD, runs))
        packed = {"num_segments": self.config.states}
        if segment_ids is not None:
            packed["g"] = _forgetting(terms.get("g"), runs.begins, v)
        packed |= {"keep": _kept(runs, ends)} if sequence.is_split() else {}
        read, memory = self.base.apply_operation(q, k, v, terms | packed, state, runs.memory)
        if segment_ids is not None and not sequence.is_split():
            memory = tuple(jnp.where(_kept(runs, ends)[..., None, None, None], m, 0) for m in memory)
        copies = combine(read.reshape(*read.shape[:2], -1), runs.places).reshape(*weight.shape, *read.shape[2:])
        mixed = jnp.einsum("BTJ,BTJHV->BTHV", weight.astype(read.dtype), copies)
        return Call(mixed, MoMState(memory, tail.astype(state.tail.dtype), last), choice, terms, runs)

    def _with_shared(self, choice: Choice):
        """The memories and weights of all copies of a token, that for the shared memory last."""
        if not self.config.shared:
            return choice.memory, choice.weight
        at_end = ((0, 0), (0, 0), (0, 1))
        memory = jnp.pad(choice.memory, at_end, constant_values=self.config.memories)
        return memory, jnp.pad(choice.weight, at_end, constant_values=1)

    def _project(self, x_BTD, tail, runs: RoutedLayout, ends):
        """q, k and v of all copies in their runs, convolved where the base says so, and every memory's new tail."""
        base = self.config.base
        q, kv = dispatch(self.query(x_BTD), runs.places), self._written(self.key_value, x_BTD, runs)
        mixed, lead = jnp.concatenate([q, kv], axis=-1), base.conv_width - 1
        B, L, C = mixed.shape
        new = jnp.zeros((B, self.config.states, lead, C), mixed.dtype)
        if lead:
            if sequence.is_split():
                tail, new = _tails_around(tail.astype(mixed.dtype), _newest(mixed, runs, ends, lead), runs, ends)
            if tail is not None:
                behind = runs.start[..., None] - lead + jnp.arange(lead)
                mixed = jax.vmap(lambda row, i, t: row.at[i].set(t))(mixed, behind, tail.astype(mixed.dtype))
            if not sequence.is_split():
                new = _newest(mixed, runs, ends, lead)
            mixed, _ = self.base.conv(mixed, jnp.zeros((B, lead, C), mixed.dtype), runs.convolved)
        parts = jnp.split(mixed, [base.widths[0], sum(base.widths[:2])], axis=-1)
        heads = (base.heads, base.heads, base.values[0])
        q, k, v = (y.reshape(B, L, h, -1) for y, h in zip(parts, heads))
        return *self.base.features(q, k, v), new

    def _gate_logits(self, x_BTD, runs: RoutedLayout) -> dict[str, Array]:
        return {name: self._written(p, x_BTD, runs) for name, p in self.base.gate_projections().items()}

    def _written(self, project, x_BTD, runs: RoutedLayout) -> Float[Array, "B L E"]:
        """A projection of all copies in their runs: by each memory's own weights, or of the tokens."""
        if not self.config.own_projections:
            return dispatch(project(x_BTD), runs.places)
        B, M = runs.block_owner.shape
        y = dispatch(x_BTD, runs.blocks).reshape(B, M, -1, x_BTD.shape[-1])
        for linear in _linears(project):
            kernels = linear.kernel[...]
            dtype = jnp.promote_types(y.dtype, kernels.dtype)
            dtype = jnp.promote_types(dtype, jnp.float32) if linear.wide else dtype  # a gate's product stays wide
            y = grouped_matmul(y.astype(dtype), kernels.astype(dtype), runs.block_owner)
        return relayout(y.reshape(B, -1, y.shape[-1]), runs.blocks, runs.places)


def _real(x_BTD, segment_ids):
    return jnp.ones(x_BTD.shape[:2], bool) if segment_ids is None else segment_ids >= 0


def _linears(project: nnx.Module) -> list[nnx.Linear]:
    """The linear maps of a projection, in their order."""
    return [project.down, project.up] if isinstance(project, LowRank) else [project]


def _stacked(base: nnx.Module, key_value: nnx.Linear) -> list[nnx.Linear]:
    """The linear maps of which every memory has its own."""
    return [key_value, *(linear for p in base.gate_projections().values() for linear in _linears(p))]


def _forgetting(g, begins_BL, v_BLHV):
    """Log decays that forget everything where a document begins in its memory."""
    if g is None:
        g = jnp.zeros(v_BLHV.shape[:3], jnp.promote_types(v_BLHV.dtype, jnp.float32))
    return jnp.where(begins_BL.reshape(begins_BL.shape + (1,) * (g.ndim - 2)), -jnp.inf, g)


def _documents_around(first_B, last_B, segment_ids):
    """The document that the state before a call belongs to, and that of its last token; -1 if the row is all padding.

    first, last: the same of the row, which may be split over devices.
    """
    if segment_ids is None or not sequence.is_split():
        return first_B, jnp.where(first_B < 0, first_B, last_B)
    own = jnp.max(segment_ids, axis=1)
    before, _ = sequence.chain(jnp.maximum, first_B, own)
    return before, jnp.maximum(before, own)


def _kept(runs: RoutedLayout, ends) -> Bool[Array, "B N"]:
    """Whether a memory after the call is of the last token's document; the others are zero."""
    first, last = ends
    document = jax.vmap(lambda row, i: row[i])(runs.document, runs.end - 1)
    return jnp.where(runs.end > runs.start, document, first[:, None]) == last[:, None]


def _newest(mixed_BLC, runs: RoutedLayout, ends, lead: int) -> Float[Array, "B N W C"]:
    """The newest `lead` inputs of every run, zero for those of other documents than the last token's."""
    at, index = jax.vmap(lambda row, i: row[i]), runs.end[..., None] - lead + jnp.arange(lead)
    return jnp.where((at(runs.document, index) == ends[1][:, None, None])[..., None], at(mixed_BLC, index), 0)


def _tails_around(tail_BNWC, own_BNWC, runs: RoutedLayout, ends):
    """The tails before this piece of rows split over devices and those after the row.

    tail: before the row. own: the newest inputs of this piece's runs, zero where a run is shorter.
    """
    lead = own_BNWC.shape[2]
    count = jnp.minimum(runs.end - runs.start, lead)[..., None]
    slot, same = jnp.arange(lead), ends[0] == ends[1]

    def step(tail, piece):
        own, count, same = piece
        earlier = jnp.take_along_axis(tail, jnp.minimum(slot + count, lead - 1)[..., None], axis=2)
        earlier = jnp.where((slot < lead - count)[..., None] & same[:, None, None, None], earlier, 0)
        return earlier + own

    return sequence.chain(step, tail_BNWC, (own_BNWC, count, same))
