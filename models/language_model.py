"""A language model of repeated blocks: a pattern may combine any mixers.

Blocks of one pattern position are stacked along a leading axis and run by `lax.scan`, so compile time does not grow
with depth. Layers that differ from the pattern (`layers`) split it: the repeats between them stay stacked and scanned.
A named remat policy selects what the backward pass recomputes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from engrax.errors import UserError
from engrax.layers import AttentionConfig, MixerConfig, TitansConfig
from engrax.layers.attention.rope import RopeScaling
from engrax.layers.common import lora, sequence
from engrax.layers.common.lora import LoraConfig
from engrax.layers.common.modules import projection
from engrax.layers.mixer import MixerOutput, as_mixer
from engrax.models.block_style import BlockStyleConfig, LearnedPositions, without_place
from engrax.models.contract import (
    LinearHead,
    Model,
    Output,
    compact,
    forward_in_turn,
    gathered,
    no_loss,
    split_rows,
)
from engrax.models.decoding import Opened, close_blocks, open_blocks, run_blocks
from engrax.models.layer_change import LayerChange, Stack, stretches_of
from engrax.models.model import MODELS, ModelConfig
from engrax.models.parameters import declare_roles, stack_axes
from engrax.models.remat import parse, remat
from engrax.models.shares import look_up, run_mixer, run_mlp


@MODELS.register("language_model")
@dataclasses.dataclass(frozen=True)
class LanguageModelConfig(ModelConfig):
    """Settings of a pattern language model; the number of blocks is repeat x len(mixers)."""

    splits_rows: ClassVar[bool] = True

    vocab_size: int = 256  # tokens
    dim: int = 128  # model width
    mixers: tuple[MixerConfig, ...] = (AttentionConfig(window=64), TitansConfig())  # one repeat of the pattern
    repeat: int = 2  # times the pattern is repeated
    mlp_hidden: int | None = None  # hidden width of the MLP; None = 8/3 dim rounded up to 16; 0 = no MLP
    remat: str = "none"  # none | dots | full | offload_dots | offload; by kind: "dots,titans=full,mlp=none"
    layout: BlockStyleConfig = BlockStyleConfig()  # norms, MLPs, learned positions, the head
    layers: tuple[LayerChange, ...] = ()  # layers with another mixer than the pattern's, or with a branch
    lora: LoraConfig = LoraConfig()  # adapters on the blocks' projections
    frozen: bool = False  # training changes only adapters and what `layers` adds

    def __post_init__(self):
        if not self.mixers:
            raise UserError("mixers is empty: a model needs at least one mixer in its pattern.")
        if len(self.layout.norm_places) not in (0, len(self.mixers)):
            raise UserError(
                f"layout.norm_places has {len(self.layout.norm_places)} entries for {len(self.mixers)} mixers."
            )
        _ = self.policies  # refuses unknown ones
        if (self.mlp_hidden or 0) < 0:
            raise UserError(f"mlp_hidden={self.mlp_hidden} must not be negative (0 = no MLPs).")
        for name in ("vocab_size", "dim", "repeat"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")
        _ = self.stacks  # raises for a layer that does not exist

    def build(self, *, rngs: nnx.Rngs) -> "LanguageModel":
        return LanguageModel(self, rngs=rngs)

    @classmethod
    def examples(cls) -> tuple["LanguageModelConfig", ...]:
        attention, titans = AttentionConfig.examples()[0], TitansConfig.examples()[0]
        sizes = dict(dim=8, repeat=2, mlp_hidden=12)
        imported = AttentionConfig(
            heads=2,
            kv_heads=1,
            head_dim=6,
            window=8,
            rope_scaling=RopeScaling("llama3", factor=8.0, original_context=16),
            bias="all",
            qk_norm_eps=1e-6,
        )
        layout = BlockStyleConfig(
            norm="layer",
            norm_eps=1e-5,
            norm_place="branch",
            mlp="plain",
            activation="gelu",
            mlp_bias=True,
            embed_dim=4,
            tied=False,
        )
        beside = LayerChange(at=(1,), branch=titans, gate=0.5)
        return (
            cls(vocab_size=16, mixers=(attention, titans), remat="full", **sizes),
            cls(vocab_size=12, mixers=(imported,), layout=layout, layers=(beside,), **sizes),
        )

    @property
    def exempt_from(self) -> dict[str, str]:
        """The exemptions of its mixers."""
        return {law: reason for stack in self.stacks for law, reason in stack.mixer.exempt_from.items()}

    @property
    def stretches(self) -> tuple[tuple[Stack, ...], ...]:
        """The stacks of blocks, by the scan that runs them, in the order of the layers; without `layers` one scan."""
        return stretches_of(self.mixers, self.repeat, self.layers, whole=bool(self.layout.norm_places))

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The stacks of blocks, as `LanguageModel.blocks` holds them."""
        return tuple(stack for stretch in self.stretches for stack in stretch)

    @property
    def policies(self) -> dict[str, str]:
        """{"": the remat policy of a repeat of the pattern, kind of layer: its own} (`engrax.models.remat`)."""
        return parse(self.remat, (*(stack.mixer.registered_name for stack in self.stacks), "mlp"))

    @property
    def num_layers(self) -> int:
        """Blocks in the whole network."""
        return self.repeat * len(self.mixers)

    @property
    def mlp_width(self) -> int:
        """The MLP's hidden width."""
        return -(-8 * self.dim // 3 // 16) * 16 if self.mlp_hidden is None else self.mlp_hidden

    def flops_per_token(self, seq_len: int) -> float:
        mixers = sum(len(stack.layers) * stack.mixer.flops_per_token(self.dim, seq_len) for stack in self.stacks)
        projections = {"gated": 3, "plain": 2}[self.layout.mlp]
        mlp = 2 * projections * self.dim * self.mlp_width * self.num_layers
        width = self.layout.embed_dim or self.dim
        narrow = 4 * self.dim * width if self.layout.embed_dim else 0
        adapters = 0
        if self.lora.rank:
            adapters = lora.adapter_flops(nnx.eval_shape(lambda: self.build(rngs=nnx.Rngs(0))))
        return mixers + mlp + narrow + adapters + 2 * width * self.vocab_size


class Block(nnx.Module):
    """x + mixer(norm(x)), then x + MLP(norm(x)); or norm(x + mixer(x)), and alike; or x + norm(mixer(x)), and alike."""

    def __init__(self, stack: Stack, config: LanguageModelConfig, *, layer: Any, rngs: nnx.Rngs):
        mixer, policies = stack.mixer, config.policies
        self.norm_place = config.layout.place_of(stack.layers[0] % len(config.mixers))
        # Remat policies of its layers; None: the pattern's holds for all.
        own = [policies.get(kind, policies[""]) for kind in (mixer.registered_name, "mlp")]
        self.mixer_remat, self.mlp_remat = own if len(policies) > 1 else (None, None)
        self.composes = mixer.composes
        self.mixer_norm = config.layout.build_norm(config.dim, rngs=rngs)
        self.mixer = as_mixer(mixer.build(config.dim, rngs=rngs, layer=layer, num_layers=config.num_layers))
        if config.mlp_width:
            self.mlp_norm = config.layout.build_norm(config.dim, rngs=rngs)
            scale = (2 * config.num_layers) ** -0.5
            self.mlp = config.layout.build_mlp(config.dim, config.mlp_width, rngs=rngs, out_scale=scale)
        self.adaptable = lora.attach(self, config.lora, rngs=rngs)  # parts added by a wrapper get no adapters
        if config.frozen:
            lora.freeze(self, skip=("mixer",) if stack.exchanged else ())

    def mixer_input(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The mixer's input, from the residual stream."""
        return self._norm("before", self.mixer_norm, x_BTD)

    def _norm(self, place: str, norm: nnx.Module, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return norm(x_BTD) if self.norm_place == place else x_BTD

    def __call__(
        self, x_BTD, state, segment_ids, *, collect: tuple[str, ...] = (), mute: tuple[str, ...] = ()
    ) -> tuple[Float[Array, "B T D"], MixerOutput]:
        """The residual stream after the block, and the mixer's output; mute: memory reads to remove."""
        x_BTD = split_rows(x_BTD)

        def mix(block, x_BTD, state, segment_ids):
            u_BTD = block.mixer_input(x_BTD)
            if sequence.is_split() and not block.composes:
                out = forward_in_turn(block.mixer, u_BTD, state, segment_ids, mute=mute)
            else:
                out = run_mixer(block.mixer, u_BTD, state, segment_ids, collect=collect, mute=mute)
            y_BTD = block._norm("branch", block.mixer_norm, out.y.astype(x_BTD.dtype))
            return block._norm("after", block.mixer_norm, x_BTD + y_BTD), out

        def mlp(block, x_BTD):
            y_BTD = run_mlp(block.mlp, block._norm("before", block.mlp_norm, x_BTD))
            x_BTD = x_BTD + block._norm("branch", block.mlp_norm, y_BTD)
            return block._norm("after", block.mlp_norm, x_BTD)

        x_BTD, out = self._layer(self.mixer_remat, mix, x_BTD, state, segment_ids)
        return self._layer(self.mlp_remat, mlp, x_BTD) if hasattr(self, "mlp") else x_BTD, out

    def _layer(self, policy: str | None, f: Callable, x_BTD: Float[Array, "B T D"], *args: Any) -> Any:
        """f(block, x, ...); where layers have their own remat policies, its parameters are gathered inside."""
        if policy is None:
            return f(self, x_BTD, *args)
        graphdef, params = nnx.split(self)

        def run(x_BTD, params, *args):
            return f(nnx.merge(graphdef, gathered(params)), x_BTD, *args)

        return remat(policy, run)(x_BTD, params, *args)


class LanguageModel(Model):
    """The module of LanguageModelConfig."""

    def __init__(self, config: LanguageModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        layout, width = config.layout, config.layout.embed_dim or config.dim
        init, shape, axes = jax.nn.initializers.normal(width**-0.5), (config.vocab_size, width), ("vocab", "embed")
        self.embedding = nnx.Param(init(rngs.params(), shape), axes=axes, role="embedding")
        self.blocks = nnx.List(self._stack(stack, rngs) for stack in config.stacks)
        if layout.norm_place != "after":
            self.norm = layout.build_norm(config.dim, rngs=rngs)
        if layout.positions:
            self.positions = LearnedPositions(layout, config.dim, rngs=rngs)
        if layout.embed_dim:
            self.project_in = projection(width, config.dim, ("embed", "embed"), rngs=rngs)
            self.project_out = projection(config.dim, width, ("embed", "embed"), rngs=rngs)
        if not layout.tied:
            self.output_embedding = nnx.Param(init(rngs.params(), shape), axes=axes, role="embedding")
        lora.check_targets(frozenset().union(*(block.adaptable for block in self.blocks)), config.lora)
        if config.frozen:
            lora.freeze(self, skip=("blocks",))  # blocks have marked their own; a wrapper may have added parts to them
        declare_roles(self)

    def _stack(self, stack: Stack, rngs: nnx.Rngs) -> Block:
        """The blocks of one stack; every parameter has a leading axis [repeat]."""
        config = self.config

        def build(key, layer):
            return Block(stack, config, layer=layer, rngs=nnx.Rngs(key))

        keys, layers = jax.random.split(rngs.params(), len(stack.layers)), jnp.array(np.array(stack.layers))
        template = nnx.eval_shape(lambda: build(jax.random.key(0), 0))
        params = jax.vmap(lambda key, layer: nnx.state(build(key, layer), nnx.Param))(keys, layers)
        nnx.update(template, params)
        stack_axes(template)
        return template

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        memory: Any = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        collect: tuple[str, ...] = (),
        mute: tuple[str, ...] = (),
    ) -> Output:
        """Returns the normalised hidden states before the head, and the memory after the last token.

        `memory` is a tuple over the stacks (without `layers` the pattern's positions) with leaves [repeat, B, ...],
        followed by the state of the learned positions, if any; None starts from an empty memory. `collect` and `mute`
        are registered names of mixers, or "*". `collect` returns their diagnostics as {"titans.lr_mean": [repeat,
        ...]}; the name has the stack's number if a mixer occurs twice. `mute` removes their memory reads.
        """
        rows = compact(segment_ids)
        x_BTD = self.embed(rows.gather(tokens_BT))
        return rows.scatter(self.encode(x_BTD, memory, segment_ids=rows.segment_ids, collect=collect, mute=mute))

    def embed(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The vectors of tokens."""
        x_BTD = split_rows(look_up(self.embedding[...], tokens_BT))
        return self.project_in(x_BTD) if hasattr(self, "project_in") else x_BTD

    def encode(
        self,
        x_BTD: Float[Array, "B T D"],
        memory: Any = None,
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        collect: tuple[str, ...] = (),
        mute: tuple[str, ...] = (),
    ) -> Output:
        """A call on vectors: embedded tokens, a prompt or a memory. Padding must follow a row's last vector."""
        calls = self._calls(collect, mute)
        opened = memory if isinstance(memory, Opened) else None
        memory = memory if opened is None else (*opened.blocks, *opened.place)
        x_BTD, memory, place, lost = self._add_positions(x_BTD, memory, segment_ids)

        def body(places, blocks, x, states):
            new, aux, collected = [], no_loss(x), {}
            for (label, asked, without), block, state in zip(calls[places], blocks, states):
                x, out = block(x, state, segment_ids, collect=asked, mute=without)
                new.append(out.state)
                aux = aux + out.aux
                collected |= {f"{label}.{key}": value for key, value in out.collected.items()}
            return x, (tuple(new), aux, collected)

        by_layer = len(self.config.policies) > 1
        x_BTD, memory, aux, collected = self._scan(body, x_BTD, memory, opened, by_layer=by_layer)
        hidden_BTD = split_rows(without_place(self.norm(x_BTD) if hasattr(self, "norm") else x_BTD, lost))
        memory = (*memory, *place) if opened is None else opened._replace(blocks=memory, place=place)
        return Output(hidden_BTD, memory, aux, collected)

    def _calls(self, collect: tuple[str, ...], mute: tuple[str, ...]) -> list[tuple[str, tuple, tuple]]:
        """(name of its diagnostics, what to collect, memory reads to remove) for every stack."""
        mixers = [stack.mixer for stack in self.config.stacks]
        names = [mixer.registered_name for mixer in mixers]
        return [
            (
                name if names.count(name) == 1 else f"{name}{i}",
                (name,) if _named(name, collect) else (),
                mixer.memory_reads if _named(name, mute) else (),
            )
            for i, (name, mixer) in enumerate(zip(names, mixers))
        ]

    def _add_positions(self, x_BTD, memory, segment_ids):
        """x with learned positions, the blocks' part of the memory, () or (the positions' state after x,), and the mask
        of tokens beyond the positions."""
        if not hasattr(self, "positions"):
            return x_BTD, memory, (), None
        blocks, place = (None, None) if memory is None else (memory[:-1], memory[-1])
        x_BTD, place, lost = self.positions(x_BTD, place, segment_ids)
        return x_BTD, blocks, (place,), lost

    def head(self, hidden_BTD: Float[Array, "B T D"]) -> LinearHead:
        """The vocabulary rows (of the embedding or of a separate head) and the hidden states in their width."""
        style = self.config.layout
        hidden_BTD = self.project_out(hidden_BTD) if hasattr(self, "project_out") else hidden_BTD
        table = self.embedding if style.tied else self.output_embedding
        return LinearHead(hidden_BTD, table[...], style.soft_cap, style.z_loss)

    @property
    def vocabulary(self) -> int:
        return self.config.vocab_size

    @property
    def least_call(self) -> int:
        return max(stack.mixer.least_call for stack in self.config.stacks)

    def open_memory(self, memory: Any) -> Opened:
        """The memory with a separate state for every block, in its mixer's form for single tokens."""
        params = tuple(nnx.split(block)[1] for block in self.blocks)
        return open_blocks([block.mixer for block in self.blocks], memory, params)

    def close_memory(self, memory: Opened) -> Any:
        return close_blocks([block.mixer for block in self.blocks], memory)

    def memory_axes(self, memory: Any) -> Any:
        """1: blocks are stacked along axis 0."""
        return jax.tree.map(lambda _: 1, memory)

    def init_memory(self, batch_size: int) -> Any:
        """The memory before the first token, in the structure that a call returns."""

        def body(places, blocks, x, states):
            return x, (tuple(block.mixer.init_state(batch_size) for block in blocks), x, {})

        _, states, _, _ = self._scan(body, jnp.zeros(()), None)
        return (*states, self.positions.init_state(batch_size)) if hasattr(self, "positions") else states

    def _scan(self, body, x, memory, opened: Opened | None = None, *, by_layer: bool = False):
        """Runs `body(places, blocks, x, states) -> (x, (states, aux, collected))` over the repeats of every stretch;
        places: which stacks these are. Returns (x, states, aux, collected).

        The states of a stack and what is collected are stacked along a first axis (those of an opened memory: a tuple);
        aux is summed. by_layer: every layer gathers its parameters and has a remat policy.
        """
        graphdefs, params = zip(*(nnx.split(block) for block in self.blocks))
        params = params if opened is None else opened.params
        memory = (None,) * len(params) if memory is None else memory
        found, total, collected, first = [], 0, {}, 0
        for stretch in self.config.stretches:
            places = slice(first, first + len(stretch))
            step = self._step(body, places, graphdefs[places], by_layer)
            run = jax.lax.scan if opened is None else run_blocks
            x, (new, aux, some) = run(step, x, (params[places], memory[places]))
            found, total, collected = (*found, *new), total + jnp.sum(aux, axis=0), collected | some
            first = places.stop
        return x, tuple(found), total, collected

    def _step(self, body, places: slice, graphdefs, by_layer: bool):
        """One repeat of a stretch, (x, (its blocks' parameters, their states)) -> (x, outputs), under the policy of
        `remat`."""

        def step(x, xs):
            params, states = xs
            params = params if by_layer else gathered(params)
            return body(places, [nnx.merge(g, p) for g, p in zip(graphdefs, params)], x, states)

        return step if by_layer else remat(self.config.policies[""], step)


def _named(name: str, names: tuple[str, ...]) -> bool:
    """Whether a mixer's registered name is in `names`; "*" matches all."""
    return name in names or "*" in names
