"""A language model made of a repeated pattern of blocks: any mixer composes with any other.

Blocks of one pattern position are stacked along a leading axis and run by `lax.scan`, so compile time does not grow
with depth; a named remat policy says what the backward pass recomputes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from engrax.errors import UserError
from engrax.layers import AttentionConfig, MixerConfig, TitansConfig
from engrax.layers.modules import GatedMLP, rms_norm
from engrax.models.model import MODELS, ModelConfig
from engrax.registry import did_you_mean

REMAT = {  # name -> what the forward pass of a pattern saves for the backward pass
    "none": None,  # everything: fastest
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # the results of projections
    "full": jax.checkpoint_policies.nothing_saveable,  # the pattern's input alone: smallest
}


@MODELS.register("language_model")
@dataclasses.dataclass(frozen=True)
class LanguageModelConfig(ModelConfig):
    """Settings of a pattern language model; the number of blocks is repeat x len(mixers)."""

    vocab_size: int = 256  # tokens
    dim: int = 128  # model width
    mixers: tuple[MixerConfig, ...] = (AttentionConfig(window=64), TitansConfig())  # one repeat of the pattern
    repeat: int = 2  # times the pattern is repeated
    mlp_hidden: int | None = None  # hidden width of the gated MLP; None = 8/3 dim rounded up to 16; 0 = no MLP
    remat: str = "none"  # none | dots | full

    def __post_init__(self):
        if self.remat not in REMAT:
            raise UserError(
                f"unknown remat {self.remat!r}{did_you_mean(self.remat, REMAT)} (known: {', '.join(REMAT)})."
            )
        if not self.mixers:
            raise UserError("mixers is empty: a model needs at least one mixer in its pattern.")
        for name in ("vocab_size", "dim", "repeat"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")

    def build(self, *, rngs: nnx.Rngs) -> "LanguageModel":
        return LanguageModel(self, rngs=rngs)

    @classmethod
    def examples(cls) -> tuple["LanguageModelConfig", ...]:
        attention, titans = AttentionConfig.examples()[0], TitansConfig.examples()[0]
        return (cls(vocab_size=16, dim=8, mixers=(attention, titans), repeat=2, mlp_hidden=12, remat="full"),)

    @property
    def exempt_from(self) -> dict[str, str]:
        """What its mixers are exempt from."""
        return {law: reason for mixer in self.mixers for law, reason in mixer.exempt_from.items()}

    @property
    def num_layers(self) -> int:
        """Blocks in the whole network."""
        return self.repeat * len(self.mixers)

    @property
    def mlp_width(self) -> int:
        """The gated MLP's hidden width."""
        return -(-8 * self.dim // 3 // 16) * 16 if self.mlp_hidden is None else self.mlp_hidden

    def flops_per_token(self, seq_len: int) -> float:
        pattern = sum(mixer.flops_per_token(self.dim, seq_len) for mixer in self.mixers)
        mlp = 6 * self.dim * self.mlp_width * len(self.mixers)
        return self.repeat * (pattern + mlp) + 2 * self.dim * self.vocab_size


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, mixer: MixerConfig, config: LanguageModelConfig, *, layer: Any, rngs: nnx.Rngs):
        self.mixer_norm = rms_norm(config.dim, rngs=rngs)
        self.mixer = mixer.build(config.dim, rngs=rngs, layer=layer, num_layers=config.num_layers)
        if config.mlp_width:
            self.mlp_norm = rms_norm(config.dim, rngs=rngs)
            self.mlp = GatedMLP(config.dim, config.mlp_width, rngs=rngs, out_scale=(2 * config.num_layers) ** -0.5)

    def __call__(self, x_BTD, state, segment_ids, muted: bool):
        y, state = self.mixer(self.mixer_norm(x_BTD), state, segment_ids)
        x_BTD = x_BTD if muted else x_BTD + y.astype(x_BTD.dtype)
        if hasattr(self, "mlp"):
            x_BTD = x_BTD + self.mlp(self.mlp_norm(x_BTD))
        return x_BTD, state


class LanguageModel(nnx.Module):
    """The module of LanguageModelConfig."""

    def __init__(self, config: LanguageModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        init = jax.nn.initializers.normal(config.dim**-0.5)
        self.embedding = nnx.Param(init(rngs.params(), (config.vocab_size, config.dim)), axes=("vocab", "embed"))
        self.blocks = nnx.List(self._stack(i, mixer, rngs) for i, mixer in enumerate(config.mixers))
        self.norm = rms_norm(config.dim, rngs=rngs)

    def _stack(self, place: int, mixer: MixerConfig, rngs: nnx.Rngs) -> Block:
        """The blocks of one pattern position, every parameter with a leading axis [repeat]."""
        config = self.config

        def build(key, layer):
            return Block(mixer, config, layer=layer, rngs=nnx.Rngs(key))

        keys = jax.random.split(rngs.params(), config.repeat)
        layers = place + len(config.mixers) * jnp.arange(config.repeat)
        template = nnx.eval_shape(lambda: build(jax.random.key(0), 0))
        params = jax.vmap(lambda key, layer: nnx.state(build(key, layer), nnx.Param))(keys, layers)
        nnx.update(template, params)
        return template

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        memory: Any = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mute: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Returns the hidden states before the head, normalised, and the memory after the last token.

        `memory` (a tuple over the pattern, leaves [repeat, B, ...]) continues earlier tokens; None starts anew.
        The reads of mixers registered under a name in `mute` are left out of the residual stream.
        """
        return self.encode(self.embed(tokens_BT), memory, segment_ids=segment_ids, mute=mute)

    def embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The vectors of tokens."""
        return self.embedding[...][tokens_BT]

    def encode(
        self,
        x_BTD: Float[Array, "B T D"],
        memory: Any = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mute: tuple[str, ...] = (),
    ) -> tuple[Float[Array, "B T D"], Any]:
        """What a call does with its tokens' vectors: any others, a prompt's or a memory's, may stand among them."""
        muted = [mixer.registered_name in mute for mixer in self.config.mixers]

        def body(blocks, x, states):
            new = []
            for block, state, silent in zip(blocks, states, muted):
                x, state = block(x, state, segment_ids, silent)
                new.append(state)
            return x, tuple(new)

        x_BTD, memory = self._scan(body, x_BTD, memory)
        return self.norm(x_BTD), memory

    def report(
        self, tokens_BT: Int[Array, "B T"], *, segment_ids: Int[Array, "B T"] | None = None
    ) -> dict[str, Float[Array, " layers ..."]]:
        """Diagnostics of every mixer that reports on itself: {"titans.lr_mean": [repeat, ...]}; the pattern position
        is added to the name where a mixer stands twice in the pattern."""
        names = [mixer.registered_name for mixer in self.config.mixers]

        def body(blocks, x, states):
            found = {}
            for i, (block, state) in enumerate(zip(blocks, states)):
                if hasattr(block.mixer, "report"):
                    name = names[i] if names.count(names[i]) == 1 else f"{names[i]}{i}"
                    values = block.mixer.report(block.mixer_norm(x), state, segment_ids)
                    found |= {f"{name}.{key}": value for key, value in values.items()}
                x, _ = block(x, state, segment_ids, False)
            return x, found

        return self._scan(body, self.embed(tokens_BT), None)[1]

    def logits(self, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Tied-embedding logits, float32 or wider."""
        dtype = jnp.promote_types(hidden_BTD.dtype, jnp.float32)
        return jnp.einsum("BTD,VD->BTV", hidden_BTD, self.embedding[...], preferred_element_type=dtype)

    def init_memory(self, batch_size: int) -> Any:
        """The memory before the first token: a tuple over the pattern, leaves [repeat, B, ...]."""

        def body(blocks, x, states):
            return x, tuple(block.mixer.init_state(batch_size) for block in blocks)

        return self._scan(body, jnp.zeros(()), None)[1]

    def _scan(self, body, x, memory):
        """Runs `body(blocks, x, states) -> (x, outputs)` over the repeats; outputs are stacked along a first axis."""
        graphdefs, params = zip(*(nnx.split(block) for block in self.blocks))

        def step(x, xs):
            params, states = xs
            states = (None,) * len(graphdefs) if states is None else states
            return body([nnx.merge(g, p) for g, p in zip(graphdefs, params)], x, states)

        policy = REMAT[self.config.remat]
        step = step if policy is None else jax.checkpoint(step, policy=policy, prevent_cse=False)
        return jax.lax.scan(step, x, (params, memory))
