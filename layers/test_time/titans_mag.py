"""Memory as gate (MAG) and memory as layer (MAL; Titans, arXiv 2501.00663, sections 4.2 and 4.3).

MAG, eq. 26 to 28: a sliding window sees the recent past; the memory sees the distant past and gates the window,

    y = attention([p; x]),   o = norm(y) (x) sigma(norm(M([p; x])))

where the persistent tokens p are visible to every query and written into the memory before every segment; attention and
memory have separate ones. sigma is 2 sigmoid: an empty memory passes the attention unchanged.

MAL, eq. 29 to 31: the attention reads the memory's output, o = attention([p; norm(M([p; x]))]).
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from engrax.errors import UserError
from engrax.layers.attention.attention import AttentionConfig
from engrax.layers.common.modules import projection, rms_norm
from engrax.layers.mixer import MIXERS, Mixer, MixerConfig, as_mixer
from engrax.layers.test_time.titans import TitansConfig
from engrax.pallas_kernels.common.tensor import to_shares


class PairState(NamedTuple):
    """The states of the memory and of the attention."""

    memory: Any
    attention: Any


@dataclasses.dataclass(frozen=True)
class _PairConfig(MixerConfig):
    memory_reads: ClassVar[tuple[str, ...]] = ("memory",)
    memory: MixerConfig = TitansConfig(persistent_tokens=4)
    attention: AttentionConfig = AttentionConfig(window=64, persistent_tokens=4)

    def __post_init__(self):
        if self.attention.window is None:
            raise UserError("attention.window=None sees everything, and nothing is left to the memory; set a window.")

    def of_heads(self, shares: int) -> "_PairConfig | None":
        memory, attention = self.memory.of_heads(shares), self.attention.of_heads(shares)
        return None if memory is None else dataclasses.replace(self, memory=memory, attention=attention)

    @property
    def exempt_from(self) -> dict[str, str]:
        """The exemptions of its parts."""
        return {**self.memory.exempt_from, **self.attention.exempt_from}

    @classmethod
    def examples(cls):
        memory = TitansConfig(heads=2, head_dim=4, hidden=6, chunk_size=8, persistent_tokens=3)
        attention = AttentionConfig(heads=2, head_dim=4, window=6, conv_width=4, persistent_tokens=2)
        return (cls(memory=memory, attention=attention),)

    def flops_per_token(self, dim: int, seq_len: int) -> float:
        return self.memory.flops_per_token(dim, seq_len) + self.attention.flops_per_token(dim, seq_len)


@MIXERS.register("titans_mag")
@dataclasses.dataclass(frozen=True)
class MAGConfig(_PairConfig):
    """Settings of memory as gate: the memory's and the sliding window's."""

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "MAG":
        return MAG(self, dim, rngs=rngs, layer=layer, num_layers=num_layers)

    def flops_per_token(self, dim: int, seq_len: int) -> float:
        return super().flops_per_token(dim, seq_len) + 2 * dim * dim


@MIXERS.register("titans_mal")
@dataclasses.dataclass(frozen=True)
class MALConfig(_PairConfig):
    """Settings of memory as layer: the memory's and the sliding window's."""

    def build(self, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1) -> "MAL":
        return MAL(self, dim, rngs=rngs, layer=layer, num_layers=num_layers)


class _Pair(Mixer):
    def __init__(self, config: _PairConfig, dim: int, *, rngs: nnx.Rngs, layer: Any, num_layers: int):
        self.config = config
        self.memory = as_mixer(config.memory.build(dim, rngs=rngs, layer=layer, num_layers=num_layers))
        self.attention = config.attention.build(dim, rngs=rngs, layer=layer, num_layers=num_layers)
        self.memory_norm = rms_norm(dim, rngs=rngs)

    def init_state(self, batch_size: int) -> PairState:
        """The initial states of every row."""
        return PairState(self.memory.init_state(batch_size), self.attention.init_state(batch_size))

    def open_state(self, state: PairState) -> PairState:
        return PairState(self.memory.open_state(state.memory), self.attention.open_state(state.attention))

    def close_state(self, state: PairState) -> PairState:
        return PairState(self.memory.close_state(state.memory), self.attention.close_state(state.attention))

    def call_without(self, reads, x_BTD, state=None, segment_ids=None):
        return self(x_BTD, state, segment_ids, without=reads)

    def report(self, x_BTD, state=None, segment_ids=None) -> dict[str, Array]:
        """Diagnostics of the memory, if it has any."""
        return self.memory.report(x_BTD, None if state is None else state.memory, segment_ids)


class MAG(_Pair):
    """The module of MAGConfig: x [B, T, D] -> y [B, T, D], PairState."""

    def __init__(self, config: MAGConfig, dim: int, *, rngs: nnx.Rngs, layer: Any = 0, num_layers: int = 1):
        super().__init__(config, dim, rngs=rngs, layer=layer, num_layers=num_layers)
        self.norm = rms_norm(dim, rngs=rngs)
        self.out = projection(dim, dim, ("embed", "embed"), rngs=rngs, scale=(2 * num_layers) ** -0.5)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        state: PairState | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        without: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "B T D"], PairState]:
        """Runs attention and memory in parallel. Padding (-1) gives 0; without the memory the gate is 1."""
        state = PairState(None, None) if state is None else state
        m, memory = self.memory(x_BTD, state.memory, segment_ids)
        y, attention = self.attention(x_BTD, state.attention, segment_ids)
        y = self.norm(y)
        if "memory" not in without:
            y = y * (2 * jax.nn.sigmoid(self.memory_norm(m))).astype(y.dtype)
        return self.out(y), PairState(memory, attention)


class MAL(_Pair):
    """The module of MALConfig: x [B, T, D] -> y [B, T, D], PairState."""

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        state: PairState | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        *,
        without: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "B T D"], PairState]:
        """Runs the memory, then attention on its output. Padding (-1) gives 0; without the memory the attention reads
        the input."""
        state = PairState(None, None) if state is None else state
        m, memory = self.memory(x_BTD, state.memory, segment_ids)
        m = x_BTD if "memory" in without else m
        m = to_shares(self.memory_norm(m).astype(x_BTD.dtype))
        y, attention = self.attention(m, state.attention, segment_ids)
        return y, PairState(memory, attention)
