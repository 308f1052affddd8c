"""MoM against its base layer, against the masked-dense form, and memory by memory; its routing, losses and report."""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engrax.errors import UserError
from engrax.layers import MIXERS, GatedDeltaNetConfig, MoMConfig
from engrax.layers.routed.routing import Choice, balance_loss, choose, z_loss
from engrax.models import LanguageModelConfig
from engrax.tests.modules import build
from engrax.train import train_step

DIM, ROWS, LENGTH = 8, 2, 20
SMALL = dict(heads=2, value_heads=4, head_dim=4, value_dim=6, chunk_size=4, conv_width=3, output_gate=True)
BASES = {
    "gated_deltanet": {},
    "linear_attention": {},
    "gla": dict(gate_rank=3),
    "deltanet": {},
    "kda": dict(gate_rank=3),
}


def bases(fast, *marks):
    """All bases, of which one is not long: each test takes another. marks: of that one."""
    return [pytest.param(name, marks=[pytest.mark.long] if name != fast else marks) for name in BASES]


IDS = np.array([[0] * 5 + [1] * 9 + [3] * 6, [-1] * 2 + [2] * 8 + [-1] + [5] * 5 + [7] + [-1] * 3], np.int32)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def base_config(name, **settings):
    return MIXERS[name](**SMALL | BASES[name] | settings)


def built(rng, base, **settings):
    """The mixture in float64, every parameter moved away from where it starts."""
    return moved(build(MoMConfig(base=base, **settings), DIM), rng)


def moved(module, rng):
    graphdef, params = nnx.split(module, nnx.Param)
    move = lambda p: jnp.asarray(np.asarray(p, np.float64) + 0.3 * rng.standard_normal(p.shape))  # noqa: E731
    return nnx.merge(graphdef, jax.tree.map(move, params))


def inputs(rng, rows=ROWS, length=LENGTH):
    return jnp.asarray(rng.standard_normal((rows, length, DIM)))


def compiled(module, method="__call__"):
    """module.method, compiled once for all calls of the same shapes; parameters may change between them."""
    graphdef = nnx.split(module)[0]
    run = jax.jit(lambda params, *args: getattr(nnx.merge(graphdef, params), method)(*args))
    return lambda *args: run(nnx.split(module)[1], *args)


def close(found, wanted, tolerance=1e-11):
    wanted = np.asarray(wanted)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * max(1.0, np.abs(wanted).max()))


def memory_alone(mixture, n):
    """The base layer with the weights that memory n of the mixture has."""
    base = mixture.config.base.build(DIM, rngs=nnx.Rngs(0))
    params = jax.tree.map(lambda p: p[...], nnx.to_pure_dict(nnx.state(mixture.base, nnx.Param)))

    def own(path, p):
        where = jax.tree_util.keystr(path)
        return p[n] if p.ndim == 3 and "kernel" in where else p

    nnx.update(base, jax.tree_util.tree_map_with_path(own, params))
    key_value = mixture.key_value.kernel[...]
    key_value = key_value[n] if key_value.ndim == 3 else key_value
    base.qkv.kernel = nnx.Param(jnp.concatenate([mixture.query.kernel[...], key_value], axis=1))
    return base


# --- what MoM must equal ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", bases("gla", pytest.mark.deep))
def test_one_memory_is_the_base_layer(name, x64, rng):
    mixture = built(rng, base_config(name), memories=1, top_k=1, shared=False)
    base, x = memory_alone(mixture, 0), inputs(rng)
    ids = jnp.asarray(IDS)

    def pull(module):
        graphdef, params = nnx.split(module)
        run = lambda x: nnx.merge(graphdef, params)(x, None, ids)  # noqa: E731
        weights = np.cos(np.arange(x.size)).reshape(x.shape)
        return jax.jit(lambda x: (run(x)[0], run(x)[1].memory[0], jax.grad(lambda x: jnp.sum(weights * run(x)[0]))(x)))(
            x
        )

    (y, memory, x_bar), (y_base, memory_base, x_bar_base) = pull(mixture), pull(base)
    close(y, y_base)
    close(memory[:, 0], memory_base)
    close(x_bar, x_bar_base)


@pytest.mark.parametrize("name", bases("gated_deltanet", pytest.mark.deep))
def test_packed_is_masked_dense(name, x64, rng, root):
    """Values, and gradients of every parameter and input."""
    spec = importlib.util.spec_from_file_location("benchmarks_mom", root / "benchmarks" / "mom.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    mixture, x = built(rng, base_config(name, conv_width=1)), inputs(rng)
    graphdef, params = nnx.split(mixture)
    weights = rng.standard_normal(x.shape)

    def pull(run):
        def total(params, x):
            y = run(nnx.merge(graphdef, params), x)
            return jnp.sum(weights * y), y

        return jax.jit(jax.grad(total, argnums=(0, 1), has_aux=True))(params, x)

    (found, y), (wanted, y_dense) = pull(lambda m, x: m(x)[0]), pull(benchmark.masked_dense)
    close(y, y_dense)
    for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted)):
        assert np.abs(want).max() > 0, path
        close(got, want, 1e-10)


@pytest.mark.parametrize("name", bases("linear_attention"))
@pytest.mark.parametrize("own", [True, pytest.param(False, marks=pytest.mark.long)])
def test_each_memory_is_the_base_layer_on_its_own_tokens(name, own, x64, rng):
    """Convolution, documents and padding included: the base runs on the tokens that were sent to a memory, alone."""
    mixture, x = built(rng, base_config(name), own_projections=own), inputs(rng)
    c, choice = mixture.config, mixture.route(x)
    graphdef = nnx.split(memory_alone(mixture, 0))[0]
    run = jax.jit(lambda params, x, ids: nnx.merge(graphdef, params)._mix(x, None, ids)[:2])
    read, memories = 0.0, []
    for n in range(c.states):
        weight = (
            jnp.sum(jnp.where(choice.memory == n, choice.weight, 0), axis=-1)
            if n < c.memories
            else jnp.ones(x.shape[:2])
        )
        order = np.argsort((np.asarray(weight) == 0) | (IDS < 0), axis=1, kind="stable")[..., None]  # its tokens first
        ids = jnp.where(weight > 0, IDS, -1)
        params = nnx.split(memory_alone(mixture, n))[1]
        taken = (jnp.take_along_axis(y, order[..., 0], axis=1) for y in (weight, ids))
        own_weight, own_ids = taken
        y, state = run(params, jnp.take_along_axis(x, order, axis=1), own_ids)
        y = jnp.take_along_axis(y * own_weight[..., None, None], np.argsort(order, axis=1)[..., None], axis=1)
        read = read + y
        of_last = (state.last_segment == IDS.max(axis=1))[:, None, None, None]
        memories.append(jnp.where(of_last, state.memory[0], 0))
    call = compiled(mixture, "_mix")(x, None, jnp.asarray(IDS))
    close(call.read, read)
    close(call.state.memory[0], jnp.stack(memories, axis=1))


def test_order_of_the_memories_changes_rounding_only(x64, rng):
    mixture, x, order = built(rng, base_config("gated_deltanet")), inputs(rng), np.array([2, 0, 3, 1])
    run, ids = compiled(mixture), jnp.asarray(IDS)
    wanted, before = run(x, None, ids)
    everywhere = np.append(order, 4)
    mixture.router.kernel[...] = mixture.router.kernel[...][:, order]
    for linear in (mixture.key_value, mixture.base.beta, mixture.base.decay.project):
        linear.kernel[...] = linear.kernel[...][everywhere]
    found, after = run(x, None, ids)
    close(found, wanted)
    close(after.memory[0], before.memory[0][:, everywhere])
    mixture.router.kernel[...] = mixture.router.kernel[...][:, order]
    assert np.abs(run(x, None, ids)[0] - wanted).max() > 1e-3


# --- state, rows, time ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", bases("deltanet"))
def test_prefill_in_chunks_is_one_pass(name, x64, rng):
    """Cuts on and off the chunk, at a boundary of documents and inside one."""
    mixture, x, ids = built(rng, base_config(name)), inputs(rng), jnp.asarray(IDS)
    run, state, pieces = compiled(mixture), mixture.init_state(ROWS), []
    wanted, after = run(x, state, ids)
    for a in range(0, LENGTH, 5):
        y, state = run(x[:, a : a + 5], state, ids[:, a : a + 5])
        pieces.append(y)
    close(jnp.concatenate(pieces, axis=1), wanted)
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(after)):
        close(got, want)


def test_memories_that_are_not_chosen_keep_every_bit(x64, rng):
    """Token by token; of their convolution's tail too."""
    mixture, x = built(rng, base_config("gated_deltanet")), inputs(rng)
    run, state = compiled(mixture), mixture.init_state(ROWS)
    chosen = np.asarray(mixture.route(x).memory)
    for t in range(8):
        _, after = run(x[:, t : t + 1], state)
        pairs = ((state.memory[0], after.memory[0]), (state.tail, after.tail))
        for row, n in np.ndindex(ROWS, 5):
            same = [np.array_equal(a[row, n], b[row, n]) for a, b in pairs]
            assert same == [n != 4 and n not in chosen[row, t]] * 2
        state = after


@pytest.mark.deep
@pytest.mark.parametrize("base", [base_config("gated_deltanet", conv_width=4)])
def test_training_neither_sees_the_future_nor_other_rows(base, rng):
    """In the pass that training differentiates, float32, with the convolution: not one bit of earlier outputs."""
    mixture = MoMConfig(base=base).build(DIM, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(mixture, nnx.Param)
    x = np.asarray(inputs(rng, length=200), np.float32)

    def loss(params, x):
        module = nnx.merge(graphdef, params)
        y, _ = module(x)
        return jnp.mean(y * y) + jnp.mean(module.auxiliary_loss(x)), (y, module.route(x).memory)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, (before, memory)), _ = step(params, x)
    rerouted = 0
    for t in range(0, 200, 9):
        other = x.copy()
        other[:, t] = 3 * rng.standard_normal((ROWS, DIM)) - other[:, t]
        (_, (after, memory_after)), _ = step(params, other)
        rerouted += np.any(memory_after != memory)
        np.testing.assert_array_equal(after[:, :t], before[:, :t])
        assert np.any(np.asarray(after[:, t:]) != np.asarray(before[:, t:]))
    assert rerouted > 5
    other = x.copy()
    other[1] = rng.standard_normal(other[1].shape)
    np.testing.assert_array_equal(step(params, other)[0][1][0][0], before[0])


# --- routing, losses, report ------------------------------------------------------------------------------------------


def test_balance_loss_is_k_at_perfect_balance_and_grows_with_collapse(x64):
    """Token t prefers memories t, t + 1, ...: all are alike on the whole."""
    M, T = 4, 12
    real = jnp.ones((1, T), bool)
    cyclic = jnp.asarray([[[-float((m - t) % M) for m in range(M)] for t in range(T)]])
    for k in (1, 2, 3):
        np.testing.assert_allclose(balance_loss(choose(cyclic, k), real), k, rtol=1e-12)
    collapsed = cyclic + jnp.asarray([3.0, 0, 0, 0])
    assert balance_loss(choose(collapsed, 2), real) > 2.2
    half = real.at[:, 6:].set(False)  # padding does not count
    np.testing.assert_allclose(
        balance_loss(choose(collapsed, 2), half), balance_loss(choose(collapsed[:, :6], 2), half[:, :6]), rtol=1e-12
    )
    pull = jax.jit(jax.grad(lambda logits: balance_loss(choose(logits, 2), real)[0]))(collapsed)
    assert np.all(pull[..., 0] > 0)  # a step against the gradient sends less to the memory that has too much
    np.testing.assert_allclose(z_loss(choose(0 * cyclic, 2), real), np.log(4) ** 2, rtol=1e-12)


def test_ties_go_to_the_lowest_index_and_weights_are_the_renormalised_softmax(x64, rng):
    logits = jnp.asarray(rng.standard_normal((1, 5, 4))).at[:, 0].set(0.0)
    choice = choose(logits, 2)
    assert choice.memory[0, 0].tolist() == [0, 1]
    p = np.asarray(jax.nn.softmax(logits, axis=-1))
    best = np.take_along_axis(p, np.asarray(choice.memory), axis=-1)
    close(choice.weight, best / best.sum(axis=-1, keepdims=True), 1e-14)
    assert isinstance(choice, Choice)


def test_report_tells_how_the_memories_are_used(rng):
    mixture = MoMConfig(base=base_config("gated_deltanet")).build(DIM, rngs=nnx.Rngs(0))
    x = jnp.asarray(inputs(rng), jnp.float32)
    run = compiled(mixture, "report")
    report = run(x, None, jnp.asarray(IDS))
    memory = np.asarray(mixture.route(x).memory)[IDS >= 0]
    np.testing.assert_allclose(report["load"], np.bincount(memory.ravel(), minlength=4) / memory.size, rtol=1e-6)
    by_token = np.asarray(report["load_by_token"])
    assert np.array_equal(np.isnan(by_token).all(axis=2), IDS < 0) and set(by_token[IDS >= 0].ravel()) == {0, 0.5}
    np.testing.assert_allclose(by_token[IDS >= 0].mean(axis=0), report["load"], rtol=1e-6)
    assert report["memory_norms"].shape == (5,) and 0 < report["router_entropy"] < np.log(4)
    assert report["dead_memories"] == 0 and {"beta_mean", "decay_mean", "memory_norm"} <= set(report)
    mixture.router.kernel[...] = 0 * mixture.router.kernel[...]  # everything ties
    report = run(x, None, jnp.zeros_like(IDS))
    assert report["load"].tolist() == [0.5, 0.5, 0.0, 0.0] and report["dead_memories"] == 2
    np.testing.assert_allclose([report["router_entropy"], report["balance_loss"]], [np.log(4), 2], rtol=1e-5)
    assert np.all(report["memory_norms"][2:4] == 0)


@pytest.mark.deep
def test_a_top_1_router_learns_from_the_balance_loss_alone(x64, rng):
    config = MoMConfig(base=base_config("gated_deltanet"), top_k=1, z_weight=1e-3)
    assert "top-1" in config.exempt_from["trainability.gradients"] and not MoMConfig().exempt_from
    mixture = moved(config.build(DIM, rngs=nnx.Rngs(0)), rng)
    graphdef, params = nnx.split(mixture, nnx.Param)
    x = inputs(rng)

    def pull(f):
        grads = jax.jit(jax.grad(lambda params: jnp.sum(f(nnx.merge(graphdef, params)))))(params)
        return np.abs(grads["router"]["kernel"][...]).max(), np.abs(grads["key_value"]["kernel"][...]).max()

    router, key_value = pull(lambda m: m(x)[0])
    assert router == 0 < key_value
    router, key_value = pull(lambda m: m.auxiliary_loss(x))
    assert router > 0 == key_value


def test_flops_are_those_of_the_parts():
    """k + 1 writes for every token, one query, one gate and one output."""
    base = GatedDeltaNetConfig(heads=4, head_dim=64, value_dim=64, conv_width=1, chunk_size=64)
    plain, once = base.flops_per_token(256, 1024), 2 * 256 * 256
    mixture = MoMConfig(base=base).flops_per_token(256, 1024)
    router_and_mix = 2 * 256 * 4 + 2 * 2 * 256
    assert mixture == 3 * plain - 2 * 3 * once + router_and_mix
    shared = dataclasses.replace(MoMConfig(base=base), own_projections=False).flops_per_token(256, 1024)
    assert shared == mixture - 2 * (2 * once + 2 * 2 * 256 * 4)


@pytest.mark.parametrize(
    "wrong, word",
    [
        (dict(base=MIXERS["retnet"](head_dim=4)), "base=retnet"),
        (dict(base=MIXERS["attention"]()), "base=attention"),
        (dict(top_k=5), "top_k=5"),
        (dict(top_k=0), "top_k=0"),
        (dict(balance_weight=-1.0), "balance_weight"),
        (dict(z_weight=-1.0), "z_weight"),
    ],
)
def test_wrong_settings_are_named(wrong, word):
    with pytest.raises(UserError, match=word):
        MoMConfig(**wrong)


# --- devices, padding, training --------------------------------------------------------------------------------------

MESH = """
import jax, jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from engrax.layers import GatedDeltaNetConfig, MoMConfig

config = MoMConfig(base=GatedDeltaNetConfig(heads=2, head_dim=4, value_dim=4, chunk_size=8))
graphdef, params = nnx.split(config.build(8, rngs=nnx.Rngs(0)), nnx.Param)
x = jax.random.normal(jax.random.key(0), (4, 40, 8))
step = jax.value_and_grad(lambda params, x: jnp.mean(nnx.merge(graphdef, params)(x)[0] ** 2))
wanted = jax.jit(step)(params, x)
mesh = jax.make_mesh((4, 1, 1, 1), ("data", "fsdp", "tensor", "sequence"), axis_types=(AxisType.Auto,) * 4)
whole, rows = (NamedSharding(mesh, spec) for spec in (PartitionSpec(), PartitionSpec(("data", "fsdp"))))
with jax.set_mesh(mesh):
    compiled = jax.jit(step, in_shardings=(whole, rows)).lower(params, x).compile()
found = compiled(params, jax.device_put(x, rows))
print(max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(*map(jax.tree.leaves, (found, wanted)))))
print(compiled.as_text().count("all-gather("))
"""


@pytest.mark.long
def test_devices_compute_their_own_rows(run_python):
    """Block after block is a loop: without a word to the partitioner it would gather all rows on every device."""
    error, gathers = run_python(MESH, devices=4).split()
    assert float(error) < 1e-5 and int(gathers) <= 1


@pytest.mark.parametrize("routed", [True, False])
def test_padding_may_hold_anything(routed, rng):
    """When padding holds NaN, then its outputs are 0 and those of tokens are what they were, under the gate too."""
    base = base_config("gla")
    module = moved((MoMConfig(base=base) if routed else base).build(DIM, rngs=nnx.Rngs(0)), rng)
    x, padding = np.asarray(inputs(rng), np.float32), IDS < 0
    graphdef, params = nnx.split(module, nnx.Param)
    run = jax.jit(lambda p, x: nnx.merge(graphdef, p)(x, None, jnp.asarray(IDS))[0])
    clean, dirty = (np.asarray(run(params, jnp.asarray(np.where(padding[..., None], v, x)))) for v in (0.0, np.nan))
    assert np.all(clean[padding] == 0) and np.array_equal(clean, dirty)


@pytest.mark.deep
def test_the_balance_loss_is_in_the_training_loss(rng):
    """The loss of a batch is its nats and each row's balance losses, of all layers, times its labelled tokens."""
    mixer = MoMConfig(base=base_config("linear_attention"), balance_weight=0.5)
    config = LanguageModelConfig(vocab_size=16, dim=DIM, mixers=(mixer,), repeat=2, mlp_hidden=0)
    params = jax.jit(lambda: nnx.state(config.build(rngs=nnx.Rngs(0)), nnx.Param))()
    tokens = rng.integers(0, 16, (ROWS, LENGTH)).astype(np.int32)
    targets = np.where(np.arange(LENGTH) < np.array([[20], [7]]), np.roll(tokens, -1, axis=1), -1).astype(np.int32)
    batch = jax.tree.map(jnp.asarray, {"tokens": tokens, "targets": targets, "segment_ids": IDS})

    def graph(weight):
        weighted = dataclasses.replace(config, mixers=(dataclasses.replace(mixer, balance_weight=weight),))
        return nnx.split(nnx.eval_shape(lambda: weighted.build(rngs=nnx.Rngs(0))), nnx.Param)[0]

    def parts(params, weight, differentiate=lambda f: f):
        loss = train_step.make_loss(graph(weight), np.float32)
        found = differentiate(lambda params: loss(params, batch, None)[0])(params)
        model = nnx.merge(graph(weight), params)
        return found, model(batch["tokens"], segment_ids=batch["segment_ids"]).aux_loss

    nats, none = jax.jit(lambda params: parts(params, 0.0))(params)
    (whole, grads), added = jax.jit(lambda params: parts(params, 0.5, jax.value_and_grad))(params)
    assert np.all(none == 0) and np.all(added > 2 * 0.5 * 1.9)  # two layers, top-2
    assert whole - nats == pytest.approx(float(added @ np.array([20, 7])), rel=1e-4)
    assert np.all(grads["blocks"][0]["mixer"]["router"]["kernel"][...] != 0)
