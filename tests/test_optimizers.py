"""Optimizers against their papers' equations in numpy, and what they refuse."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from engrax.errors import UserError
from engrax.models.parameters import matrix_widths
from engrax.tests import experiments
from engrax.tests.optimizer_cases import GRADS, PARAMS, PLAIN, SHAPES, SMALL, STEPS
from engrax.train import (
    AdafactorConfig,
    AdamWConfig,
    ConstantConfig,
    FRUGALConfig,
    GaLoreConfig,
    MuonConfig,
    NaturalGaLoreConfig,
    ScheduleFreeConfig,
    SPAMConfig,
)
from engrax.train.optimizers import eight_bit
from engrax.train.optimizers.base import build
from engrax.train.optimizers.frugal import drawn_rows
from engrax.train.trainer import Trainer


def steps_of(config, params=PARAMS, grads=GRADS):
    """(state, [update after every step]); the parameters stay where they are."""
    tx = build(config, len(grads), params)
    update, state, found = jax.jit(tx.update), tx.init(params), []
    for g in grads:
        updates, state = update(g, state, params)
        found.append(updates)
    return state, found


def matrices(name, trees):
    """For every matrix under the name: its gradients or updates, step by step, in float64."""
    widths = SHAPES[name][3].get("widths", (SHAPES[name][1][-1],))
    arrays = np.stack([np.asarray(tree[name][...], np.float64) for tree in trees])
    arrays = arrays.reshape(len(trees), -1, *arrays.shape[-2:])
    return [part for i in range(arrays.shape[1]) for part in np.split(arrays[:, i], np.cumsum(widths)[:-1], axis=-1)]


def adam(grads, b1, b2, eps):
    m, v, found = 0.0, 0.0, []
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        found.append(m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps))
    return np.stack(found)


def close(found, wanted, rtol=2e-4):
    np.testing.assert_allclose(found, wanted, rtol=rtol, atol=rtol * np.abs(wanted).max())


def check_matrices(name, rule, rtol=2e-4, apart=("heads_apart", "table", "taps", "rates")):
    """The updates of every matrix are -rule(gradients), and those of the other parameters Adam's; returns them."""
    config = SMALL[name]
    _, found = steps_of(config)
    names = [n for n in SHAPES if n not in apart]
    for n in names:
        for g, u in zip(matrices(n, GRADS), matrices(n, found), strict=True):
            close(u, -rule(config, g), rtol)
    for n in apart:
        g, u = (np.stack([np.asarray(t[n][...], np.float64) for t in trees]) for trees in (GRADS, found))
        close(u, -adam(g, config.b1, config.b2, config.eps))
    return found


def muon(c, grads):
    m, found = 0.0, []
    for t, g in enumerate(grads, 1):
        m = c.momentum * m + (1 - c.momentum) * g
        ahead = c.momentum * m / (1 - c.momentum ** (t + 1)) + (1 - c.momentum) * g / (1 - c.momentum**t)
        x = ahead / np.linalg.norm(ahead)
        x = x.T if x.shape[0] > x.shape[1] else x
        for _ in range(c.newton_schulz_steps):
            s = x @ x.T
            x = 3.4445 * x + (-4.7750 * s + 2.0315 * s @ s) @ x
        x = x.T if x.shape != g.shape else x
        found.append(c.rms * math.sqrt(max(g.shape)) * x)
    return np.stack(found)


def test_muon_orthogonalises_every_matrix():
    found = check_matrices("muon", muon, rtol=5e-3)
    for n in ("wide", "tall", "qkv", "memories"):
        for u in matrices(n, found):
            sizes = np.linalg.svd(u[0], compute_uv=False) / (0.2 * math.sqrt(max(u[0].shape)))
            assert 0.3 < sizes.min() and sizes.max() < 1.3


def test_kernels_say_which_maps_lie_side_by_side():
    """Of a Titans model: queries, keys and values; and a mixture's stacked memories are matrices of their own."""
    model = nnx.eval_shape(lambda: experiments.tiny().model.build(rngs=nnx.Rngs(0)))
    block = model.blocks[1]
    assert matrix_widths(block.mixer.qkv.kernel) == (8, 8, 8) and matrix_widths(block.mlp.up.kernel) == (16,)
    assert matrix_widths(block.mixer.gate_bias) is None and matrix_widths(model.embedding) is None
    from engrax.layers import MIXERS

    mom = nnx.eval_shape(lambda: MIXERS["mom"].examples()[0].build(16, rngs=nnx.Rngs(0)))
    assert len(matrix_widths(mom.key_value.kernel)) == 2 and mom.key_value.kernel.ndim == 3


def spam(c, grads):
    m, v, found = np.zeros_like(grads[0]), np.zeros_like(grads[0]), []
    for t, g in enumerate(grads, 1):
        since = t % c.gap
        if since == 0:
            m, v = 0 * m, 0 * v
        if since >= c.settle:
            g = np.where(g * g > c.threshold * v, np.sign(g) * np.sqrt(c.threshold * v), g)
        m, v = c.b1 * m + (1 - c.b1) * g, c.b2 * v + (1 - c.b2) * g * g
        scale = 1.0
        if t >= c.gap and since < c.warmup:
            scale = 1 - 0.99 * (1 + math.cos(math.pi * since / (c.warmup + 1))) / 2
        found.append(scale * m / (1 - c.b1**t) / (np.sqrt(v / (1 - c.b2**t)) + c.eps))
    return np.stack(found)


def test_spam_clips_spikes_and_forgets():
    config = dataclasses.replace(SMALL["spam"], threshold=3.0)  # some entries of every step, all of the spike's
    _, found = steps_of(config)
    for n in SHAPES:
        g, u = (np.stack([np.asarray(t[n][...], np.float64) for t in trees]) for trees in (GRADS, found))
        close(u, -spam(config, g))


def galore(c, grads, inner=adam):
    wide, found, lows, projectors = grads[0].shape[0] <= grads[0].shape[1], [], [], []
    for t, g in enumerate(grads):
        if t % c.gap == 0:
            left, _, right = np.linalg.svd(g)
            p = left[:, : c.rank] if wide else right[: c.rank].T
        projectors.append(p)
        lows.append(p.T @ g if wide else g @ p)
    for p, r in zip(projectors, inner(np.stack(lows), c.b1, c.b2, c.eps)):
        found.append(c.scale * (p @ r if wide else r @ p.T))
    return np.stack(found)


def natural(c):
    def rule(lows, *adam_settings):
        found = []
        for t, g in enumerate(lows):
            past = np.stack([x.ravel() for x in lows[max(t + 1 - c.history, 0) : t + 1]], axis=1)
            system = np.eye(past.shape[1]) + past.T @ past / c.damping
            z = np.linalg.solve(system, past.T @ g.ravel())
            found.append((g.ravel() / c.damping - past @ z / c.damping**2).reshape(g.shape))
        return adam(np.stack(found), *adam_settings)

    return rule


def whole(name):
    """Like `matrices`, without splitting maps side by side."""
    axes, shape, role, _ = SHAPES[name]
    return {**SHAPES, name: (axes, shape, role, {})}


@pytest.mark.parametrize("name", ["galore", "natural_galore"])
def test_galore_is_adam_in_a_subspace(name, monkeypatch):
    """In one subspace: a moment that is kept over a change would show the signs of singular vectors."""
    config = dataclasses.replace(SMALL[name], gap=STEPS)
    if name == "natural_galore":
        config = dataclasses.replace(config, damping=0.5)  # numpy computes what cancels
    monkeypatch.setitem(SMALL, name, config)
    monkeypatch.setitem(SHAPES, "qkv", whole("qkv")["qkv"])
    inner = natural(config) if name == "natural_galore" else adam
    check_matrices(name, lambda c, g: galore(c, g, inner), rtol=5e-3)


def test_galore_changes_its_subspace_and_keeps_its_moments():
    state, _ = steps_of(SMALL["galore"], grads=GRADS[:3])
    later, _ = steps_of(SMALL["galore"], grads=GRADS[:4])
    before, after = (s[0].inner_states["matrix"].inner_state for s in (state, later))
    g, p = (np.asarray(x["wide"][...], np.float64) for x in (GRADS[3], after.projector))
    for layer in range(2):
        left = np.linalg.svd(g[layer])[0][:, :2]
        close(np.abs(left.T @ p[layer]), np.eye(2), 1e-4)
    low = np.swapaxes(p, -1, -2) @ g
    mu = [np.asarray(s.inner.mu["wide"][...], np.float64) for s in (before, after)]
    close(mu[1], 0.9 * mu[0] + 0.1 * low)


def test_frugal_gives_moments_to_drawn_rows_and_signs_to_the_rest(monkeypatch):
    config = SMALL["frugal"]
    _, found = steps_of(config)
    order = [n for n in sorted(SHAPES) if n not in ("heads_apart", "table", "taps", "rates")]
    monkeypatch.setitem(SHAPES, "qkv", whole("qkv")["qkv"])
    drawn = {}
    for i, n in enumerate(order):
        for t in range(STEPS):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), t // config.gap), i)
            rows = drawn_rows(key, SHAPES[n][1], int(SHAPES[n][1][-2] * config.density))
            drawn[n, t] = np.asarray(rows).reshape(-1, rows.shape[-1])
        for j, (g, u) in enumerate(zip(matrices(n, GRADS), matrices(n, found), strict=True)):
            wanted = np.sign(g)
            for t in range(0, STEPS, config.gap):
                span = slice(t, t + config.gap)
                rows = drawn[n, t][j]
                assert len(set(rows)) == len(rows)
                wanted[span, rows] = adam(g[span][:, rows], config.b1, config.b2, config.eps)
            close(u, -wanted)
    assert (drawn["wide", 0][0] != drawn["wide", 0][1]).any() and (drawn["tall", 0] != drawn["tall", 3]).any()


def adafactor(c, grads, x, factored):
    r = k = v = 0.0
    found = []
    for t, g in enumerate(grads, 1):
        b, g2 = 1 - t**-c.decay, g * g + c.eps
        if factored:
            r, k = b * r + (1 - b) * g2.mean(axis=1), b * k + (1 - b) * g2.mean(axis=0)
            u = g / np.sqrt(np.outer(r, k) / r.mean())
        else:
            v = b * v + (1 - b) * g2
            u = g / np.sqrt(v)
        u /= max(1.0, np.sqrt((u * u).mean()) / c.threshold)
        found.append(u * max(c.least_scale, np.sqrt((x * x).mean())))
    return np.stack(found)


def test_adafactor_layer_by_layer():
    config = SMALL["adafactor"]
    state, found = steps_of(config)
    for n, factored in {"wide": True, "tall": True, "table": True, "taps": False, "rates": False}.items():
        layers = SHAPES[n][1][0] if SHAPES[n][0][0] == "layers" else 1
        for i in range(layers):
            g, u, x = (
                np.stack([np.asarray(t[n][...], np.float64).reshape(layers, *t[n].shape[layers > 1 :])[i] for t in ts])
                for ts in (GRADS, found, [PARAMS])
            )
            close(u, -adafactor(config, g, x[0], factored))


def test_schedule_free_steps_z_and_averages_x():
    config = dataclasses.replace(
        SMALL["schedule_free"], learning_rate=0.1, weight_decay=0.5, schedule=ConstantConfig(warmup_steps=3)
    )
    tx = build(config, STEPS, PARAMS)
    y, state, update = PARAMS, tx.init(PARAMS), jax.jit(tx.update)
    n, b1 = "wide", config.b1
    z = x = np.asarray(PARAMS[n][...], np.float64)
    ours, v, total = z, 0.0, 0.0
    rate = config.rate(STEPS)
    for t, g in enumerate(GRADS, 1):
        updates, state = update(g, state, y)
        y = jax.tree.map(jnp.add, y, updates)
        g, lr = np.asarray(g[n][...], np.float64), float(rate(t - 1))
        v = config.b2 * v + (1 - config.b2) * g * g
        z = z - lr * (g / (np.sqrt(v / (1 - config.b2**t)) + config.eps) + config.weight_decay * ours)
        total += lr**2
        x = (1 - lr**2 / total) * x + lr**2 / total * z
        ours = b1 * x + (1 - b1) * z
    close(np.asarray(y[n][...]), ours)
    close(np.asarray(config.evaluated(y, state)[n][...]), x)
    assert np.abs(x - ours).max() > 1e-3


@pytest.mark.parametrize("stacked", [False, True])
def test_eight_bits_by_the_equation(stacked):
    rng = np.random.default_rng(0)
    moment = (rng.normal(size=(2, 5, 77)) * 10.0 ** rng.uniform(-3, 3, (2, 5, 1))).astype(np.float32)
    moment[0, 0, :5] = 0
    stored = jax.jit(eight_bit.encode, static_argnums=1)(jnp.asarray(moment), stacked)
    back = np.asarray(eight_bit.decode(stored, stacked))
    rows = moment.reshape(2, -1) if stacked else moment.reshape(1, -1)
    codes, parts = (
        np.asarray(stored.codes).reshape(rows.shape),
        [np.asarray(p).reshape(len(rows), -1) for p in stored[1:]],
    )
    assert parts[0].shape[1] == -(-rows.shape[1] // 128) and stored.codes.shape == moment.shape
    for row, code, k, c, s in zip(rows.astype(np.float64), codes, *parts):
        for i in range(len(k)):
            x, found = row[128 * i : 128 * i + 128], code[128 * i : 128 * i + 128].astype(np.float64)
            size = np.abs(x[x != 0])
            span = max(np.log2(size.max() / size.min()), 1e-6)  # the last group has one entry
            close(k[i], min(np.floor(16 * np.log2(448**2 / 2) / span) / 16, 64))
            close(c[i], np.sqrt(size.max() * size.min()))
            wanted = np.sign(x) * (np.abs(x) / c[i]) ** k[i] / s[i]
            close(found, wanted.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64), 0.13)
    assert (back[moment == 0] == 0).all() and np.isfinite(back).all()
    assert np.median(np.abs(back / np.where(moment == 0, 1, moment) - 1)[moment != 0]) < 0.03


def test_range_expansion_halves_the_error_of_eight_bits():
    """Gaussians in groups of 128: median relative error 1 % against plain E4M3's 2 %."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 128)), jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 448
    plain = (x / scale).astype(jnp.float8_e4m3fn).astype(jnp.float32) * scale
    errors = [float(jnp.median(jnp.abs(y / x - 1))) for y in (eight_bit.decode(eight_bit.encode(x)), plain)]
    assert errors[0] < 0.012 < 0.02 < errors[1]


def test_zero_moments_stay_zero_in_eight_bits():
    stored = eight_bit.encode(jnp.zeros((3, 200)))
    assert (np.asarray(eight_bit.decode(stored)) == 0).all()
    assert all(np.isfinite(np.asarray(part)).all() for part in stored[1:])


def test_eight_bit_moments_change_a_step_by_little():
    big = {"w": (("layers", "embed", "mlp"), (2, 16, 24), "matrix", {})}
    rng = np.random.default_rng(1)
    trees = [
        nnx.State(
            {
                n: nnx.Param(jnp.asarray(rng.normal(size=s), jnp.float32), axes=a, role=r)
                for n, (a, s, r, _) in big.items()
            }
        )
        for _ in range(6)
    ]
    config = AdamWConfig(**PLAIN)
    (_, exact), (state, rough) = (
        steps_of(c, trees[0], trees) for c in (config, dataclasses.replace(config, moments="float8"))
    )
    exact, rough = (np.asarray(f[-1]["w"][...]) for f in (exact, rough))
    error = np.abs(rough - exact).mean() / np.abs(exact).mean()
    assert 1e-4 < error < 0.1
    assert state[0].mu["w"].codes.dtype == jnp.float8_e4m3fn


def test_rates_of_groups():
    config = dataclasses.replace(SMALL["sgd"], rates=(("t[ab]*", 0.5), ("*", 2.0)))
    found, plain = (steps_of(c, grads=GRADS[:1])[1][0] for c in (config, SMALL["sgd"]))
    for n in SHAPES:
        factor = 0.5 if n in ("table", "taps") else 0.5 if n == "tall" else 2.0
        np.testing.assert_array_equal(found[n][...], factor * plain[n][...])
    with pytest.raises(
        UserError, match=r"optimizer.rates has the pattern 'block\*', which fits no parameter; names are"
    ):
        build(dataclasses.replace(config, rates=(("block*", 0.5),)), 1, PARAMS)
    from engrax.train import experiment

    saved = experiment.from_json(experiment.to_json(experiments.tiny(optimizer=config)))
    assert saved.optimizer == config


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MuonConfig(momentum=1.0), "optimizer.momentum=1.0 must be at least 0 and below 1"),
        (lambda: MuonConfig(newton_schulz_steps=0), "newton_schulz_steps"),
        (
            lambda: SPAMConfig(warmup=500),
            "optimizer.warmup=500 and optimizer.settle=20 must be below optimizer.gap=500",
        ),
        (lambda: GaLoreConfig(rank=0), "optimizer.rank=0"),
        (lambda: NaturalGaLoreConfig(damping=0.0), "optimizer.damping=0.0 must be above 0"),
        (lambda: FRUGALConfig(density=0.0), "optimizer.density=0.0 must be above 0 and at most 1"),
        (lambda: AdafactorConfig(decay=0.0), "optimizer.decay=0.0 must be above 0"),
        (lambda: ScheduleFreeConfig(b1=0.0), "optimizer.b1=0 makes no average"),
        (lambda: AdamWConfig(rates=(("*", -1.0),)), "the factor -1.0"),
        (
            lambda: build(AdafactorConfig(moments="float8"), 1, PARAMS).init(PARAMS),
            "optimizer.moments='float8': this optimizer has no moments",
        ),
        (
            lambda: Trainer(experiments.tiny(optimizer=MuonConfig(), parallel=parallel())),
            "the optimizer muon with float32 moments needs whole ones",
        ),
        (
            lambda: Trainer(experiments.tiny(optimizer=AdamWConfig(moments="float8"), parallel=parallel())),
            "the optimizer adamw with float8 moments needs whole ones",
        ),
    ],
)
def test_errors_in_one_sentence(make, message):
    with pytest.raises(UserError) as error:
        make()
    assert message in str(error.value) and str(error.value).count(". ") == 0


def parallel():
    from engrax.train import ParallelConfig

    return ParallelConfig(strategy="pmap", zero=1)
