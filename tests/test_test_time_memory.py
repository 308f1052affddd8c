"""The general test-time memory: against its rule written out token by token, and against its simpler relatives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engrax.errors import UserError
from engrax.layers import MIXERS, AtlasConfig, LaCTConfig, MemoryConfig, TitansConfig, TTTLinearConfig
from engrax.layers.test_time import engine
from engrax.layers.test_time.coefficients import Gates
from engrax.layers.test_time.features import feature_count, polynomial_features
from engrax.layers.test_time.losses import inner_loss
from engrax.layers.test_time.retention import effective, newton_schulz, retain
from engrax.layers.test_time.structures import initial_matrices
from engrax.pallas_kernels import NeuralMemoryState, gated_delta_rule, linear_attention, neural_memory
from engrax.tests.modules import build, compiled, outputs, same_parameters

B, T, H, K = 2, 13, 2, 4
BASE = MemoryConfig(heads=H, head_dim=K, hidden=6, chunk_size=4)


def problem(config, seed=0, length=T):
    """Random (q, k, v), gates, matrices [H, I, O] and the outer parameters of a norm."""
    rng, rule = np.random.default_rng(seed), config.rule()
    width = rule.structure.key

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape))

    def uniform(*shape):
        return jnp.asarray(rng.uniform(0, 1, shape))

    q, k = (
        x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        for x in (normal(B, length, H, width), normal(B, length, H, width))
    )
    channels = K if config.forgetting == "channel" else 1
    gates = Gates(
        lr=0.2 * uniform(B, length, H),
        momentum=uniform(B, length, H, config.orders),
        forget=0.3 * uniform(B, length, H, channels),
        delta=0.1 + uniform(B, length, H),
        weight=uniform(B, length, H),
    )
    matrices = initial_matrices(rule.structure, H, jax.random.key(seed), 1.0)
    extra = {"norm_scale": 1 + 0.1 * normal(H, K), "norm_bias": normal(H, K)} if config.normed else {}
    return (q, k, normal(B, length, H, K)), gates, jax.tree.map(lambda w: w.astype(q.dtype), matrices), extra


def literal(rule, q, k, v, gates, weights, extra):
    """One row and head, one token after the other, every gradient by autodiff."""
    apply = lambda w, x: rule.structure.apply(lambda name, u: u @ w[name], x[None], extra)  # noqa: E731
    read_from = lambda w: jax.tree.map(lambda m: effective(rule.retention, m, rule.norm_power), w)  # noqa: E731

    def gradient(w, i):
        loss = lambda w: inner_loss(rule.loss, apply(w, k[i]), v[i][None], gates.delta[i][None], rule.loss_power)[0]  # noqa: E731
        return jax.grad(loss)(w)

    add = lambda a, b, s=1.0: jax.tree.map(lambda x, y: s * x + y, a, b)  # noqa: E731
    zero = jax.tree.map(jnp.zeros_like, weights)
    stored, momenta, first, outputs = weights, [zero] * rule.momentum_order, 0, []
    for t in range(len(q)):
        if t % rule.chunk_size == 0:
            if rule.reset_every and t % (rule.chunk_size * rule.reset_every) == 0:
                stored, momenta, first = weights, [zero] * rule.momentum_order, t
            anchor, pending, kept, rate = read_from(stored), zero, 1.0, 0.0
        before, keep = stored, 1 - gates.forget[t]
        at = jax.tree.map(lambda m, keep=keep: keep[:, None] * m, anchor) if rule.decayed else anchor
        step = zero
        for i in range(max(first, t - rule.window + 1), t + 1):
            step = add(gradient(at, i), step, gates.weight[i] if rule.window > 1 else 1.0)
        step = jax.tree.map(lambda g, t=t: -gates.lr[t] * g, step)
        for m in range(rule.momentum_order):
            step = momenta[m] = add(momenta[m], step, gates.momentum[t, m])
        if rule.linear:
            stored = jax.tree.map(lambda w, s, keep=keep: keep[:, None] * w + s, stored, step)
        else:
            pending, kept, rate = add(pending, step, keep[0]), kept * keep[0], rate + gates.lr[t] / rule.chunk_size
            if (t + 1) % rule.chunk_size == 0:
                steps = momenta[-1] if rule.muon and momenta else pending
                steps = jax.tree.map(lambda s, rate=rate: rate * newton_schulz(s), steps) if rule.muon else steps
                stored = jax.tree.map(lambda w, s, kept=kept: retain(rule.retention, w, kept, s), stored, steps)
        outputs.append(apply(read_from(before if rule.read_first else stored), q[t])[0])
    return jnp.stack(outputs)


CASES = {
    "titans": {},
    "deep": dict(depth=3, activation="silu"),
    "two momenta": dict(momentum_order=2, structure="residual_mlp", loss="huber"),
    "window": dict(window=3, optimizer="sgd", structure="swiglu"),
    "window longer than the chunk": dict(window=6, structure="linear", forgetting="none"),
    "channels": dict(structure="linear", forgetting="channel", order="read_then_write"),
    "decayed channels": dict(structure="linear", forgetting="channel", gradient_at="decayed", optimizer="sgd"),
    "decayed": dict(gradient_at="decayed", loss="lp"),
    "norm and bias": dict(structure="residual_mlp", depth=2, bias=True, normed=True, optimizer="sgd"),
    "factorised": dict(structure="factorised", loss="dot", order="read_then_write"),
    "reset": dict(reset_every=2, structure="linear", momentum_order=1),
    "muon": dict(optimizer="muon", structure="swiglu"),
    "muon without momentum": dict(optimizer="muon", momentum_order=0, structure="linear", window=2),
    "row norm": dict(retention="row_norm", loss="dot", order="read_then_write"),
    "q norm": dict(retention="q_norm", loss="lp", optimizer="sgd"),
    "softmax": dict(retention="softmax", structure="linear", bias=True, reset_every=2, window=3),
}


@functools.partial(jax.jit, static_argnames=("config", "cuts"))
def run(config, tokens, gates, matrices, extra, cuts=()):
    rule = config.rule()
    reset = engine.start_state(rule, matrices, 1)
    state, found = engine.start_state(rule, matrices, B), []
    for a, b in zip((0, *cuts), (*cuts, tokens[0].shape[1])):
        part = jax.tree.map(lambda x, a=a, b=b: x[:, a:b], (tokens, gates))
        y, state = engine.run(rule, *part[0], part[1], state, reset, None, extra)
        found.append(y)
    return jnp.concatenate(found, axis=1), state


FAST = ("softmax",)  # a matrix with windows, resets and a retention of its own


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.deep] * (n not in FAST)) for n in CASES])
def test_equals_the_rule_token_by_token(name, x64):
    config = dataclasses.replace(BASE, **CASES[name])
    tokens, gates, matrices, extra = problem(config)

    by_head = jax.vmap(lambda *args: literal(config.rule(), *args), in_axes=(1, 1, 1, 1, 0, 0), out_axes=1)
    by_row = jax.jit(jax.vmap(by_head, in_axes=(0, 0, 0, 0, None, None)))
    wanted = by_row(*tokens, gates, matrices, extra)
    for cuts in ((), (3, 4, 9)):
        found, _ = run(config, tokens, gates, matrices, extra, cuts)
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10)


def mixed(module, ids=None):
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 21, 8)))
    return outputs(module, x, None, ids)


IDS = jnp.asarray([[0] * 6 + [-1] + [1] * 7 + [4] * 7, [2] * 13 + [3] * 8])
SMALL = dict(heads=2, head_dim=4, hidden=6, chunk_size=4, persistent_tokens=2)


@pytest.mark.deep
def test_atlas_of_one_token_without_features_and_muon_is_titans(x64):
    atlas = AtlasConfig(**SMALL, window=1, feature_degree=1, optimizer="momentum", max_lr=None)
    a, b = same_parameters(TitansConfig(**SMALL), atlas)
    np.testing.assert_allclose(mixed(b, IDS), mixed(a, IDS), rtol=1e-9, atol=1e-10)


@functools.partial(jax.jit, static_argnames="config")
def by_op(config, tokens, gates, matrices):
    """The same rule through the operation neural_memory."""
    state = NeuralMemoryState.start(tuple(matrices.values()), B)
    momentum = gates.momentum[..., 0] if config.orders else jnp.zeros_like(gates.lr)
    given = dict(lr=gates.lr, momentum=momentum, forget=gates.forget[..., 0], state=state)
    return neural_memory(*tokens, **given, chunk_size=config.chunk_size)[0]


def test_yaad_without_a_threshold_and_moneta_of_squares_are_titans(x64):
    yaad = dataclasses.replace(BASE, loss="huber", optimizer="sgd")
    tokens, gates, matrices, _ = problem(yaad)
    found = run(yaad, tokens, gates._replace(delta=gates.delta + 1e6), matrices, {})[0]
    np.testing.assert_allclose(found, by_op(yaad, tokens, gates, matrices), rtol=1e-10, atol=1e-11)
    moneta = dataclasses.replace(
        BASE, loss="lp", loss_power=2.0, retention="q_norm", norm_power=2.0, optimizer="sgd", chunk_size=1
    )
    found = run(moneta, tokens, gates, matrices, {})[0]
    np.testing.assert_allclose(found, by_op(moneta, tokens, gates, matrices), rtol=1e-10, atol=1e-11)


def test_a_matrix_at_the_decayed_memory_is_the_gated_delta_rule(x64):
    config = dataclasses.replace(BASE, structure="linear", optimizer="sgd", gradient_at="decayed", chunk_size=1)
    tokens, gates, matrices, _ = problem(config)
    start = jnp.broadcast_to(matrices["w1"], (B, H, K, K))
    for forget in (gates.forget, 0 * gates.forget):  # without forgetting: DeltaNet
        found = run(config, tokens, gates._replace(forget=forget), matrices, {})[0]
        wanted, _ = gated_delta_rule(
            *tokens, beta=gates.lr, g=jnp.log1p(-forget[..., 0]), scale=1.0, initial_state=start, chunk_size=4
        )
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("forgetting", ["none", "token", "channel"])
@pytest.mark.parametrize("chunk_size", [1, 4, 13])
def test_a_matrix_with_the_dot_loss_is_linear_attention(forgetting, chunk_size, x64):
    config = dataclasses.replace(
        BASE, structure="linear", loss="dot", optimizer="sgd", forgetting=forgetting, chunk_size=chunk_size
    )
    (q, k, v), gates, matrices, _ = problem(config)
    gates = gates._replace(forget=gates.forget * (forgetting != "none"))
    g = jnp.log1p(-gates.forget) if forgetting == "channel" else jnp.log1p(-gates.forget[..., 0])
    start = jnp.broadcast_to(matrices["w1"], (B, H, K, K))
    wanted, _ = linear_attention(q, k, gates.lr[..., None] * v, g=g, scale=1.0, initial_state=start, chunk_size=4)
    np.testing.assert_allclose(run(config, (q, k, v), gates, matrices, {})[0], wanted, rtol=1e-10, atol=1e-11)


def test_lact_with_rate_zero_applies_its_first_memory(x64):
    config = LaCTConfig(heads=H, head_dim=K, hidden=6, chunk_size=4)
    tokens, gates, matrices, _ = problem(config)
    found = run(config, tokens, gates._replace(lr=0 * gates.lr, forget=0 * gates.forget), matrices, {})[0]
    gate, up, down = (matrices[name] for name in ("gate", "up", "down"))
    inner = jax.nn.silu(jnp.einsum("bthk,hkf->bthf", tokens[0], gate)) * jnp.einsum("bthk,hkf->bthf", tokens[0], up)
    np.testing.assert_allclose(found, jnp.einsum("bthf,hfv->bthv", inner, down), rtol=1e-10, atol=1e-11)


def test_ttt_linear_is_the_published_formula(x64):
    """Z = k W + b, gradient through LN(Z) - (v - k), dual form with the lower triangle of eta q k^T (TTT-LM-JAX)."""
    config = TTTLinearConfig(heads=H, head_dim=K, chunk_size=4)
    (q, k, v), gates, matrices, extra = problem(config)
    gates = gates._replace(forget=0 * gates.forget)
    found = run(config, (q, k, v), gates, matrices, extra)[0]

    def norm(z, h):
        centred = z - z.mean(-1, keepdims=True)
        return (
            centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * extra["norm_scale"][h]
            + extra["norm_bias"][h]
        )

    for b, h in np.ndindex(B, H):
        w, bias = matrices["w1"][h, :-1], matrices["w1"][h, -1]
        for t in range(0, T, 4):
            s = slice(t, min(t + 4, T))
            x_q, x_k, eta = q[b, s, h], k[b, s, h], gates.lr[b, s, h]
            target = v[b, s, h] - x_k
            z = x_k @ w + bias
            grad = jax.grad(lambda z, target=target, h=h: 0.5 * jnp.sum((norm(z, h) - target) ** 2))(z)
            lower = jnp.tri(len(z)) * eta[None]
            z_q = x_q @ w - (lower * (x_q @ x_k.T)) @ grad + bias - lower @ grad
            np.testing.assert_allclose(found[b, s, h], x_q + norm(z_q, h), rtol=1e-9, atol=1e-10)
            w, bias = w - x_k.T @ (eta[:, None] * grad), bias - eta @ grad


def test_retentions_keep_what_they_promise(x64):
    w, u = jax.random.normal(jax.random.key(0), (2, 6, 5), jnp.float64)
    new = retain("row_norm", w, jnp.asarray(0.7), u)
    np.testing.assert_allclose(jnp.sum(new * new, axis=0), jnp.sum(w * w, axis=0), rtol=1e-9)
    simplex = effective("softmax", retain("softmax", w, jnp.asarray(0.7), 30 * u), 4.0)
    np.testing.assert_allclose(jnp.sum(simplex, axis=0), 1, rtol=1e-12)
    np.testing.assert_allclose(effective("q_norm", w, 4.0) * jnp.sum(w**4) ** 0.5, w, rtol=1e-9)


@pytest.mark.parametrize("shape", [(16, 16), (24, 6), (5, 20)])
def test_newton_schulz_drives_singular_values_to_one(shape, x64):
    g = jax.random.normal(jax.random.key(1), shape, jnp.float64)
    left, right = jnp.linalg.svd(g, full_matrices=False)[::2]
    found = newton_schulz((left * jnp.linspace(0.2, 1, min(shape))) @ right)
    sizes = jnp.linalg.svd(found, compute_uv=False)
    assert 0.6 < sizes.min() and sizes.max() < 1.25
    assert not newton_schulz(jnp.zeros(shape)).any()


def test_polynomial_features_are_the_polynomial_kernel(x64):
    x, y = jax.random.normal(jax.random.key(0), (2, 5), jnp.float64)
    c = jnp.asarray([1.0, 0.5, 0.25])
    a, b = polynomial_features(x, c), polynomial_features(y, c)
    assert a.shape == (feature_count(5, 3),)
    wanted = sum(c[d - 1] ** 2 * jnp.dot(x, y) ** d for d in (1, 2, 3))
    np.testing.assert_allclose(a @ b, wanted, rtol=1e-12)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(structure="matrix"), "unknown structure 'matrix'"),
        (dict(forgetting="channel"), "structure='linear'"),
        (dict(gradient_at="decayed", window=2), "window=1"),
        (dict(gradient_at="decayed", optimizer="muon"), "no muon"),
        (dict(gradient_at="decayed", forgetting="none"), "is the anchor itself"),
        (dict(structure="residual_mlp", feature_degree=2), "equal widths"),
        (dict(loss="lp", loss_power=1.5), "loss_power below 2"),
        (dict(norm_power=1.0), "norm_power below 2"),
        (dict(optimizer="momentum", momentum_order=0), "optimizer='sgd'"),
        (dict(optimizer="sgd", momentum_order=2), "has no momentum"),
        (dict(target="next", persistent_tokens=1), "writes nothing"),
        (dict(gradient_at="decayed", structure="linear", loss="dot"), "does not depend on the memory"),
        (dict(window=0), "window=0"),
        (dict(max_lr=-1.0), "max_lr=-1.0"),
    ],
)
def test_settings_without_meaning_are_refused_with_the_reason(changes, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(BASE, **changes)


@pytest.mark.deep
@pytest.mark.parametrize("loss", ["l2", "huber"])
def test_padding_may_hold_anything(loss, x64):
    module = same_parameters(MemoryConfig(**SMALL, loss=loss))[0]
    x = jnp.asarray(np.random.default_rng(2).standard_normal((1, 9, 8)))
    ids = jnp.asarray([[0, 0, 0, -1, 0, 0, 1, 1, -1]])
    y = outputs(module, jnp.where((ids < 0)[..., None], jnp.nan, x), None, ids)
    np.testing.assert_array_equal(y, outputs(module, x, None, ids))


def test_persistent_tokens_outlive_periodic_resets(x64):
    config = MemoryConfig(**SMALL | dict(persistent_tokens=6, reset_every=1))
    module, x = same_parameters(config)[0], jnp.ones((1, 5, 8))
    before = outputs(module, x)
    module.persistent[...] = module.persistent[...].at[0].add(1.0)
    assert np.all(np.any(outputs(module, x) != before, axis=-1))


def by_speed(*names):
    """Presets, of which `make test` takes the two that differ most, where they are among them."""
    return [pytest.param(n, marks=[pytest.mark.long] * (n not in ("ttt_linear", "lact"))) for n in names]


@pytest.mark.parametrize("name", by_speed("atlas", "lact", "moneta", "ttt_mlp"))
def test_what_is_normalised_does_not_begin_at_zero(name):
    """The derivative of a normalised 0 is 1e6 and more, and would drown every other gradient of the first steps."""
    module = build(MIXERS[name](heads=2, head_dim=8, hidden=16, chunk_size=4), 16)
    assert all(np.all(np.any(w[...][:, :-1], axis=(1, 2))) for w in module.initial.values())
    report = compiled(lambda module, x: module.report(x))(module, jax.random.normal(jax.random.key(0), (1, 8, 16)))
    assert report["memory_norm"] > 1


@pytest.mark.parametrize(
    "name", by_speed("ttt_linear", "ttt_mlp", "lact", "yaad", "moneta", "memora", "omeganet", "atlas")
)
def test_presets_learn_within_a_row(name):
    """A token that repeats is recalled better after its writes than before them, at the initial parameters."""
    config = dataclasses.replace(MIXERS[name](heads=2, head_dim=8, hidden=16, chunk_size=4), forget_init=0.001)
    module, x = build(config, 16), jnp.tile(jax.random.normal(jax.random.key(0), (1, 4, 16)), (1, 16, 1))
    report = compiled(lambda module, x: module.report(x))(module, x)
    by_token = [np.asarray(report.pop(f"error_{when}_write")) for when in ("before", "after")]
    assert all(np.isfinite(errors[:, 1:]).all() for errors in by_token)
    assert all(np.all(np.isfinite(value)) for value in report.values())

    @compiled
    def errors(module, x):  # of the last tokens read from the memory before the row, and from that after it
        _, later, _ = module._mix(x, None, None)
        _, _, (_, k, v, gates) = module._mix(x[:, -4:], None, None)
        still = jax.tree.map(jnp.zeros_like, gates)._replace(delta=gates.delta, weight=gates.weight)
        found = []
        for state in (module.init_state(1), later):
            memory = engine.close(config.rule(), state.memory)
            memory = memory._replace(momenta=jax.tree.map(jnp.zeros_like, memory.momenta))
            read, _ = module._memory(k, k, v, still, memory, None, None)
            found.append(-jnp.sum(read * v) if config.loss == "dot" else jnp.sum((read - v) ** 2))
        return found

    before, after = errors(module, x)
    assert after < before
