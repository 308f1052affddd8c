"""The forward contract of models and mixers, the objective, and the table of parameters."""

import dataclasses
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import engrax
from engrax import models
from engrax.errors import UserError
from engrax.layers import MIXERS, AttentionConfig, GatedDeltaNetConfig, LinearAttentionConfig, MoMConfig, TitansConfig
from engrax.models import MODELS, LanguageModelConfig, Output, RMTConfig
from engrax.models.block_style import BlockStyleConfig
from engrax.models.contract import Model, PlainModel, as_model
from engrax.models.parameters import ROLES, cast, decay_mask, declare_roles, role_of
from engrax.train.objective import score

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 16, (2, 20)), jnp.int32)
BATCH = {
    "tokens": TOKENS[:, :-1],
    "targets": jnp.where(jnp.arange(19) < 15, TOKENS[:, 1:], -1),
    "segment_ids": jnp.zeros((2, 19), jnp.int32),
}


def built(config):
    """The module of a model's config, made as one program."""
    graphdef = nnx.split(nnx.eval_shape(lambda: models.build(config, rngs=nnx.Rngs(0))), nnx.Param)[0]
    return nnx.merge(graphdef, jax.jit(lambda: nnx.state(models.build(config, rngs=nnx.Rngs(0)), nnx.Param))())


def small_model(*mixers, **fields):
    return LanguageModelConfig(vocab_size=16, dim=8, mixers=mixers, mlp_hidden=12, **({"repeat": 2} | fields))


def call(model, method=score, **options):
    graphdef, params = nnx.split(model, nnx.Param)
    return jax.jit(lambda p, b: method(nnx.merge(graphdef, p), b, **options))(params, BATCH)


# The objective.


def test_the_score_is_the_plain_cross_entropy(x64):
    """Values and gradients to 1e-10 of the form with all logits, with a soft cap and a z-loss."""
    style = BlockStyleConfig(tied=False, soft_cap=3.0, z_loss=0.1)
    model = built(small_model(AttentionConfig(heads=2, head_dim=4), repeat=1, layout=style))
    graphdef, params = nnx.split(model, nnx.Param)
    params = cast(params, jnp.float64)

    def plain(params):
        model = nnx.merge(graphdef, params)
        out = model(BATCH["tokens"], segment_ids=BATCH["segment_ids"])
        head = model.head(out.hidden)
        logits = 3.0 * jnp.tanh(jnp.einsum("BTE,VE->BTV", head.hidden, head.embedding) / 3.0)
        real, log_total = BATCH["targets"] >= 0, jax.nn.logsumexp(logits, axis=-1)
        at = jnp.take_along_axis(logits, jnp.maximum(BATCH["targets"], 0)[..., None], axis=-1)[..., 0]
        return jnp.sum(jnp.where(real, log_total - at + 0.1 * log_total**2, 0))

    def fused(params):
        scored = score(nnx.merge(graphdef, params), BATCH)
        return jnp.sum(scored.nats) + jnp.sum(scored.aux)

    found, wanted = (jax.jit(jax.value_and_grad(f))(params) for f in (fused, plain))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_a_model_that_only_has_logits_is_scored_in_blocks():
    model = built(small_model(AttentionConfig(heads=2, head_dim=4), repeat=1))

    class Old(nnx.Module):
        def __init__(self, inner):
            self.inner = inner

        def __call__(self, tokens, memory=None, *, segment_ids=None):
            out = self.inner(tokens, memory, segment_ids=segment_ids)
            return out.hidden, out.memory

        def logits(self, hidden):
            return self.inner.logits(hidden)

        def init_memory(self, batch_size):
            return self.inner.init_memory(batch_size)

    wrapped = as_model(Old(model))
    assert isinstance(wrapped, PlainModel) and as_model(model) is model
    found, wanted = call(wrapped), call(model)
    np.testing.assert_allclose(found.nats, wanted.nats, rtol=1e-5, atol=1e-6)
    assert np.array_equal(found.correct, wanted.correct) and np.all(found.aux == 0)


LARGE = r"""
    import dataclasses, re, jax, jax.numpy as jnp, numpy as np
    from flax import nnx
    from engrax.evals import scoring, streaming
    from engrax.layers import AttentionConfig
    from engrax.models import LanguageModelConfig
    from engrax.tests.experiments import tiny
    from engrax.train.trainer import Trainer
    B, T, D, V = 16, 512, 32, 128_256
    mixer = AttentionConfig(heads=1, head_dim=32, window=64)
    e = tiny(model=LanguageModelConfig(vocab_size=V, dim=D, mixers=(mixer,), repeat=1), batch_size=B)
    e = dataclasses.replace(e, data=dataclasses.replace(e.data, seq_len=T))
    trainer = Trainer(e)
    batch = {k: jax.ShapeDtypeStruct((B, T), np.int32) for k in ("tokens", "targets", "segment_ids")}
    state = trainer.abstract_state()
    scorer = scoring.Scorer(e, nnx.merge(trainer.graphdef, state["params"]))
    stream = streaming.Stream.read(trainer.graphdef)
    memory = jax.eval_shape(lambda p: nnx.merge(trainer.graphdef, p).init_memory(B), state["params"])
    programs = {
        "training": trainer.train_step.lower(state, batch),
        "validation": trainer.eval_step.lower(state["params"], batch),
        "evaluation": scorer._score.lower(state["params"], batch, mute=()),
        "streaming": stream.lower(state["params"], batch["tokens"], batch["targets"], memory),
    }
    bound = 2 * max(B * T * 1024, V * D)
    for name, lowered in programs.items():
        program = lowered.compile()
        shapes = re.findall(r"\w+\[([\d,]+)\]", program.as_text())
        sizes = [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]
        temporary = program.memory_analysis().temp_size_in_bytes / 1e9
        print(name, max(sizes) <= bound, B * T * V in sizes, temporary < 0.3, round(temporary, 3))
"""


def test_no_program_holds_the_logits_of_a_large_vocabulary(run_python):
    """Vocabulary 128,256, 16 x 512 tokens: no buffer above 2 x max(B T chunk, V D), temporaries at most 0.3 GB."""
    output = run_python(textwrap.dedent(LARGE), devices=1)
    lines = output.strip().splitlines()
    assert [line.split()[0] for line in lines] == ["training", "validation", "evaluation", "streaming"]
    assert all(line.split()[1:4] == ["True", "False", "True"] for line in lines), output


# What is passed on: auxiliary losses, diagnostics, muted reads.


@pytest.mark.deep
def test_wrapped_models_pass_losses_and_diagnostics_on():
    mixer = MoMConfig(base=LinearAttentionConfig(heads=1, head_dim=4), balance_weight=0.5)
    backbone = small_model(mixer)
    direct = call(built(backbone), collect=("mom",))
    wrapped = call(built(RMTConfig(backbone=backbone, segment_length=8, memory_tokens=1)), collect=("*",))
    assert np.all(direct.aux > 15 * 2 * 0.5 * 1.9) and np.all(wrapped.aux > 15 * 2 * 0.5 * 1.9)  # two layers, top-2
    assert set(direct.collected) == set(wrapped.collected) and "mom.load" in direct.collected
    for name, values in direct.collected.items():
        assert values.shape == wrapped.collected[name].shape, name
    assert call(built(backbone)).collected == {}


MUTED = [pytest.param(name, marks=pytest.mark.deep) for name in ("titans_mac", "titans_mal", "infini_attention")]
MUTED += ["titans_mag", "transformer_xl", "memorizing"]


@pytest.mark.parametrize("name", MUTED)
def test_muting_leaves_attention(name):
    """Without its memory reads a mixer still attends: its output changes, and is not 0."""
    config = MIXERS[name].examples()[0]
    module = jax.jit(lambda: nnx.split(config.build(8, rngs=nnx.Rngs(0)))[1])()
    graphdef = nnx.split(nnx.eval_shape(lambda: config.build(8, rngs=nnx.Rngs(0))))[0]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 30, 8)), jnp.float32)
    run = jax.jit(lambda p, mute: nnx.merge(graphdef, p).forward(x, mute=mute).y, static_argnums=1)
    whole, muted = run(module, ()), run(module, config.memory_reads)
    assert config.memory_reads and np.all(np.any(muted != 0, axis=-1)) and not np.allclose(whole, muted)
    if name in ("transformer_xl", "memorizing"):  # in the first segment there is nothing to recall
        first = config.segment_length
        np.testing.assert_allclose(muted[:, :first], whole[:, :first], rtol=1e-5, atol=1e-6)


@pytest.mark.deep
def test_muting_a_model_mutes_memories_alone():
    """Muted attention and convolutions stay; a memory's whole output goes."""
    model = built(small_model(AttentionConfig(heads=2, head_dim=4), GatedDeltaNetConfig(heads=2, head_dim=4)))
    whole, attention, memory = (call(model, mute=m).nats for m in ((), ("attention",), ("gated_deltanet",)))
    assert np.array_equal(whole, attention) and not np.allclose(whole, memory)
    assert MIXERS["gated_convolution"].memory_reads == () == AttentionConfig.memory_reads


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].__module__.startswith("engrax.")])
def test_a_memory_declares_its_batch_axis(name):
    config = MODELS[name].examples()[0]
    found = {}

    def memory(rows):
        model = models.build(config, rngs=nnx.Rngs(0))
        found["memory"] = model.init_memory(rows)
        found["axes"] = model.memory_axes(found["memory"])
        return jax.tree.map(jnp.asarray, found["memory"])

    shapes = [jax.eval_shape(lambda rows=rows: memory(rows)) for rows in (2, 3)]
    for two, three, axis in zip(*map(jax.tree.leaves, (*shapes, found["axes"])), strict=True):
        assert (two.shape[axis], three.shape[axis]) == (2, 3)


# The table of parameters.


def of_every_mixer():
    for name, config in MIXERS.items():
        if not config.__module__.startswith("engrax."):
            continue
        for i, example in enumerate(config.examples()):
            model = LanguageModelConfig(vocab_size=16, dim=32, mixers=(example,), repeat=2)
            yield f"{name}{i}", model
    for name, config in MODELS.items():
        if config.__module__.startswith("engrax."):
            yield name, config.examples()[0]


def test_every_kernel_of_every_mixer_and_model_is_decayed():
    """Every parameter named kernel, or with two axes of channels, decays, apart from roles with a reason."""
    for name, config in of_every_mixer():
        params = nnx.state(nnx.eval_shape(lambda c=config: models.build(c, rngs=nnx.Rngs(0))), nnx.Param)
        decays = decay_mask(params)
        flat = zip(nnx.to_flat_state(params), nnx.to_flat_state(decays))
        for (path, variable), (_, decayed) in flat:
            role = role_of(variable)
            assert bool(decayed.get_value()) == role.decayed
            assert role.decayed or role.why_not_decayed, path
            if path[-1] == "kernel" and "conv" not in path:
                assert role.decayed, (name, path)
            axes = variable.get_metadata()["axes"]
            stacked = "blocks" in map(str, path)
            assert (axes[:1] == ("layers",)) == stacked, (name, path)


def test_gates_norms_and_biases_stay_float32_in_a_bfloat16_forward_pass():
    wanted = {"gate", "norm", "bias", "constant"}
    for name, config in of_every_mixer():
        params = nnx.state(nnx.eval_shape(lambda c=config: models.build(c, rngs=nnx.Rngs(0))), nnx.Param)
        lower = jax.eval_shape(lambda p: cast(p, jnp.bfloat16), params)
        for path, variable in nnx.to_flat_state(lower):
            dtype = jnp.float32 if variable.get_metadata()["role"] in wanted else jnp.bfloat16
            assert variable.dtype == dtype, (name, path)
    assert not any(ROLES[role].compute_dtype for role in wanted)


def test_gate_logits_accumulate_in_float32_and_norms_keep_the_dtype():
    for config in (TitansConfig(heads=2, head_dim=4, chunk_size=4), GatedDeltaNetConfig(heads=2, head_dim=4)):
        graphdef, params = nnx.split(built(small_model(config, repeat=1)), nnx.Param)

        def gates(params, config=config, graphdef=graphdef):
            model = nnx.merge(graphdef, cast(params, jnp.bfloat16))
            state = nnx.state(model.blocks[0])
            block = nnx.merge(nnx.graphdef(model.blocks[0]), jax.tree.map(lambda x: x[0], state))
            x = jnp.ones((1, 8, 8), jnp.bfloat16)
            mixer = block.mixer
            logits = mixer.gates(x) if isinstance(config, TitansConfig) else mixer.beta(x)
            return logits, block.mixer_norm(x), mixer(x)[0]

        logits, normed, y = jax.eval_shape(gates, params)
        assert logits.dtype == jnp.float32 and normed.dtype == y.dtype == jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class BareConfig(engrax.MixerConfig):
    """A mixer with a parameter that declares no role."""

    role: str | None = None

    def build(self, dim, *, rngs, layer=0, num_layers=1):
        return Bare(dim, self.role)


class Bare(nnx.Module):
    def __init__(self, dim, role):
        metadata = {} if role is None else {"role": role}
        self.scale = nnx.Param(jnp.ones(dim), **metadata)
        self.linear = nnx.Linear(dim, dim, rngs=nnx.Rngs(0))

    def init_state(self, batch_size):
        return {"none": jnp.zeros((batch_size,))}

    def __call__(self, x, state=None, segment_ids=None):
        return self.linear(x) * self.scale, self.init_state(len(x)) if state is None else state


def test_a_bare_parameter_is_refused_with_the_line_to_change():
    source = open(__file__).read().splitlines()
    line = 1 + next(i for i, text in enumerate(source) if "self.scale = nnx.Param" in text)
    with pytest.raises(UserError, match=rf"test_contract.py, line {line}: the parameter 'scale' of Bare has no role"):
        models.build(small_model(BareConfig()), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="unknown role 'gatee'"):
        models.build(small_model(BareConfig(role="gatee")), rngs=nnx.Rngs(0))
    model = built(small_model(BareConfig(role="gate")))
    roles = {path[-1]: v.get_metadata()["role"] for path, v in nnx.to_flat_state(nnx.state(model.blocks[0].mixer))}
    assert roles == {"scale": "gate", "kernel": "matrix", "bias": "bias"}
    assert role_of(nnx.state(declare_roles(Bare(4, None), strict=False))["scale"]) == ROLES["bias"]


def test_a_module_that_is_no_mixer_works_in_a_model():
    scored = call(built(small_model(BareConfig(role="gate"))), collect=("*",))
    assert np.all(np.isfinite(scored.nats)) and scored.collected == {}


def test_output_is_what_every_model_returns():
    for name in MODELS:
        if MODELS[name].__module__.startswith("engrax."):
            config = MODELS[name].examples()[0]

            def run(config=config):
                model = models.build(config, rngs=nnx.Rngs(0))
                assert isinstance(model, Model)
                return model(TOKENS % config.vocab_size)

            out = jax.eval_shape(run)
            assert isinstance(out, Output) and out.aux_loss.shape == (2,) and out.collected == {}, name


def products(jaxpr):
    """The number of dot_general in a jaxpr and all that it calls."""
    found = 0
    for equation in jaxpr.eqns:
        found += equation.primitive.name == "dot_general"
        for value in equation.params.values():
            for part in value if isinstance(value, (tuple, list)) else [value]:
                inner = getattr(part, "jaxpr", part)
                found += products(inner) if hasattr(inner, "eqns") else 0
    return found


def test_remat_of_dots_recomputes_no_projection():
    def count(remat):
        mixer = LinearAttentionConfig(heads=2, head_dim=8, chunk_size=8)
        config = LanguageModelConfig(vocab_size=16, dim=16, mixers=(mixer,), repeat=2, remat=remat)
        graphdef, params = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))), nnx.Param)
        loss = lambda p: jnp.sum(nnx.merge(graphdef, p)(jnp.zeros((2, 16), jnp.int32)).hidden ** 2)  # noqa: E731
        return products(jax.make_jaxpr(jax.grad(loss))(params).jaxpr)

    every, dots, least = (count(remat) for remat in ("full", "dots", "none"))
    assert least < dots == every - 4, (every, dots, least)  # those whose results its derivative needs
