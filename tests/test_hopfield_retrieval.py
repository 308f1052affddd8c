"""The operations `hopfield_retrieval` and `hopfield_energy`: the definition, independence, gradients, meshes."""

import itertools
import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engrax.pallas_kernels import available, hopfield_energy, hopfield_retrieval
from engrax.pallas_kernels.hopfield_retrieval import cost
from engrax.tests.hopfield_problems import make_seen
from engrax.tests.neural_memory_problems import assert_close
from engrax.tests.op_problems import compiled, relative_rms

BETA = (0.7, 1.9)


def make_problem(batch=3, states=4, patterns=7, heads=2, width=5, value=3, seed=0):
    """Returns (state, stored, values), float64."""
    rng = np.random.default_rng(seed)
    shapes = (batch, states, heads, width), (batch, patterns, heads, width), (batch, patterns, heads, value)
    return tuple(jnp.asarray(rng.normal(size=shape)) for shape in shapes)


def make_mask(kind, batch=3, states=4, patterns=7, **_):
    """Returns a mask of the kind "none", "patterns" [B, M] or "pairs" [B, N, M]; one row or state sees nothing."""
    if kind == "none":
        return None
    shape = (batch, patterns) if kind == "patterns" else (batch, states, patterns)
    mask = np.random.default_rng(1).random(shape) < 0.6
    mask[..., 0] = True
    mask[(1,) if kind == "patterns" else (1, 2)] = False
    return jnp.asarray(mask)


def values_and_grads(state, stored, values, mask=None, beta=BETA, **options):
    """Returns (retrieved, gradients of a random weighting of it with respect to state, stored, values and beta)."""

    def run(state, stored, values, beta):
        return hopfield_retrieval(state, stored, values, beta=beta, mask=mask, **options)

    @compiled
    def both(*args):
        out, pull = jax.vjp(run, *args)
        return out, pull(jnp.asarray(np.random.default_rng(1).normal(size=out.shape), out.dtype))

    return both(state, stored, values, jnp.asarray(beta, jnp.promote_types(state.dtype, jnp.float32)))


TO_REST = dict(steps=None, max_steps=2000, tolerance=1e-11, gradient="implicit")
DYNAMICS = [dict(steps=1), dict(steps=3), dict(steps=None, max_steps=9, tolerance=1e-2), TO_REST]
EVERY = itertools.product(
    ("softmax", "sparsemax", "entmax"), ("dot", "cosine", "l2", "l1"), range(4), ("none", "patterns", "pairs")
)
FAST = [
    ("softmax", "dot", 0, "pairs"),
    ("softmax", "dot", 2, "pairs"),
    ("softmax", "dot", 3, "none"),
    ("sparsemax", "l2", 2, "patterns"),
    ("entmax", "cosine", 1, "pairs"),
]


def _marks(case):
    """Every separation with every similarity in `make test-deep`, with every dynamics and mask in `make test-long`."""
    return [] if case in FAST else [pytest.mark.deep if case[2:] == (1, "pairs") else pytest.mark.long]


@pytest.mark.parametrize(
    "separation, similarity, dynamics, mask",
    [pytest.param(*case, marks=_marks(case)) for case in EVERY],
)
def test_xla_equals_reference(separation, similarity, dynamics, mask, x64):
    options = dict(separation=separation, similarity=similarity, mask=make_mask(mask), **DYNAMICS[dynamics])
    if similarity in ("l2", "l1"):  # nearer patterns: rest is reached in fewer updates
        options["beta"] = (0.3, 4.0)
    xla = values_and_grads(*make_problem(), **options)
    assert_close(xla, values_and_grads(*make_problem(), implementation="reference", **options), 1e-7)


def test_reference_is_the_definition(x64):
    """Two updates of softmax by hand, then values; and the length of the row's own longest visible pattern."""
    (state, stored, values), mask = make_problem(), np.asarray(make_mask("pairs"))
    got = hopfield_retrieval(
        state, stored, values, beta=jnp.asarray(BETA), steps=3, mask=jnp.asarray(mask), implementation="reference"
    )
    for b, n, h in np.ndindex(3, 4, 2):
        xi, x, v = state[b, n, h], stored[b, mask[b, n], h], values[b, mask[b, n], h]
        for _ in range(2 if len(x) else 0):
            xi = _softmax(BETA[h] * (x @ xi)) @ x
        wanted = _softmax(BETA[h] * (x @ xi)) @ v if len(x) else np.zeros(3)
        np.testing.assert_allclose(got[b, n, h], wanted, rtol=1e-12, atol=1e-14)


def _softmax(z):
    return np.exp(z - z.max()) / np.exp(z - z.max()).sum()


@pytest.mark.parametrize("alpha", [1.25, 1.5, 1.9, 2.0, 3.0])
def test_entmax_solves_its_problem(alpha, x64):
    """p maximises <p, z> - Omega(p): on the support the slope is the same everywhere, off it it is no larger."""
    from engrax.pallas_kernels.hopfield_retrieval.separation import separate

    z = jnp.asarray(np.random.default_rng(0).normal(size=(50, 9)))
    p = np.asarray(separate("entmax", alpha, z, None))
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-12)
    slope = z - p ** (alpha - 1) / (alpha - 1)
    tau = np.where(p > 0, slope, -np.inf).max(1, keepdims=True)
    assert np.ptp(np.where(p > 0, slope, tau), axis=1).max() < 1e-9 and np.all(slope <= tau + 1e-9)
    assert 0 < np.mean(p == 0) < 1
    if alpha == 2:
        np.testing.assert_allclose(p, separate("sparsemax", 2.0, z, None), atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# What the published package gets wrong


@pytest.mark.parametrize("separation", ["softmax", "sparsemax", "entmax"])
@pytest.mark.parametrize("steps", [1, 2, None])
def test_beta_zero_is_exactly_uniform(separation, steps):
    """One head at beta 0, the other not: the first one gives the mean of what is visible."""
    state, stored, _ = (x.astype(jnp.float32) for x in make_problem())
    identity = jnp.broadcast_to(jnp.eye(7, dtype=jnp.float32)[None, :, None], (3, 7, 2, 7))  # reads the weights
    mask = make_mask("pairs")
    options = dict(beta=jnp.asarray([0.0, 5.0]), steps=steps, separation=separation, mask=mask)
    weights = hopfield_retrieval(state, stored, identity, **options)
    count = np.maximum(np.asarray(mask).sum(2, keepdims=True), 1)
    wanted = np.where(mask, np.float32(1) / count.astype(np.float32), 0)
    np.testing.assert_allclose(weights[:, :, 0], wanted, rtol=2e-7, atol=0)
    assert not np.allclose(weights[:, :, 1], wanted, atol=0.1)


SETTINGS = [dict(steps=1), dict(steps=None, beta=0.3), dict(steps=None, separation="entmax", similarity="l2", beta=2.0)]


@pytest.mark.parametrize("options", SETTINGS, ids=["once", "softmax", "entmax"])
def test_batch_mates_change_no_bit(options):
    """Nor do the other states of a row: convergence is decided for each alone."""
    arrays = [x.astype(jnp.float32) for x in make_problem(states=6)]
    run = jax.jit(lambda s, x, v: hopfield_retrieval(s, x, v, **(dict(beta=1.0) | options)))
    before = np.asarray(run(*arrays))
    slow = [x.at[1:].set(0.999 * x[:1] + 0.001 * x[1:]) for x in arrays]  # others that take another number of updates
    assert np.array_equal(run(*slow)[0], before[0])
    others = arrays[0].at[:, 1:].multiply(-3.0)
    assert np.array_equal(run(others, *arrays[1:])[:, 0], before[:, 0])
    assert not np.array_equal(run(others, *arrays[1:])[:, 1:], before[:, 1:])
    swapped = [x[jnp.array([2, 0, 1])] for x in arrays]
    assert np.array_equal(run(*swapped), before[[2, 0, 1]])


def test_every_state_takes_its_own_number_of_updates(x64):
    """A state that rests is left alone: as if it were alone, iterated as long as it moves."""
    state, stored, values = make_problem(batch=1, heads=1, states=12, patterns=9)
    got = hopfield_retrieval(state, stored, values, beta=1.0, steps=None, tolerance=1e-2)
    x, counts = np.asarray(stored)[0, :, 0], set()
    for n in range(12):
        xi, count, moved = np.asarray(state)[0, n, 0], 0, np.inf
        while moved > 1e-2 * np.linalg.norm(x, axis=1).max():
            new = _softmax(x @ xi) @ x
            xi, moved, count = new, np.linalg.norm(new - xi), count + 1
        counts.add(count)
        np.testing.assert_allclose(got[0, n, 0], _softmax(x @ xi) @ np.asarray(values)[0, :, 0], rtol=1e-10)
    assert len(counts) > 2


@pytest.mark.parametrize("options", SETTINGS, ids=["once", "softmax", "entmax"])
def test_padding_is_ignored(options, x64):
    """Hidden patterns may hold anything; with them and without them the results are the same but for rounding."""
    state, stored, values = make_problem()
    options = dict(beta=1.0) | options
    wanted = hopfield_retrieval(state, stored, values, **options)
    mask = jnp.concatenate([jnp.ones((3, 7), bool), jnp.zeros((3, 4), bool)], axis=1)
    pad = [jnp.concatenate([x, jnp.full((3, 4, *x.shape[2:]), jnp.nan)], axis=1) for x in (stored, values)]
    np.testing.assert_allclose(hopfield_retrieval(state, *pad, mask=mask, **options), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["patterns", "pairs"])
@pytest.mark.parametrize("options", [*SETTINGS, dict(steps=None, gradient="implicit")])
def test_a_state_that_sees_nothing_retrieves_zero(kind, options):
    arrays, mask = [x.astype(jnp.float32) for x in make_problem()], make_mask(kind)
    blind = ~np.asarray(jnp.broadcast_to(mask if mask.ndim == 3 else mask[:, None], (3, 4, 7)).any(-1))
    assert blind.any() and not blind.all()
    out, grads = values_and_grads(*arrays, mask=mask, **({"beta": BETA} | options))
    assert np.all(np.asarray(out)[blind] == 0) and np.all(np.asarray(out)[~blind] != 0)
    assert all(np.all(np.isfinite(g)) for g in grads) and np.all(np.asarray(grads[0])[blind] == 0)
    assert np.any(grads[1] != 0)
    lost = jnp.where(blind[..., None, None], jnp.nan, arrays[0])
    same = values_and_grads(lost, *arrays[1:], mask=mask, **({"beta": BETA} | options))
    jax.tree.map(np.testing.assert_array_equal, same, (out, grads))


def test_the_energy_of_a_state_that_sees_nothing_poisons_no_pattern():
    (state, stored, _), mask = (make_problem(), make_mask("pairs"))
    lost = state.at[1, 2].set(jnp.nan)  # it sees nothing
    slope = jax.grad(lambda x: jnp.nansum(hopfield_energy(lost, x, beta=1.0, mask=mask)))(stored)
    assert np.all(np.isfinite(slope)) and np.any(slope != 0)


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


def test_implicit_equals_unrolled_at_rest(x64):
    to_rest = dict(steps=None, tolerance=1e-9, max_steps=300)
    out, unrolled = values_and_grads(*make_problem(), gradient="unrolled", **to_rest)
    same, implicit = values_and_grads(*make_problem(), gradient="implicit", **to_rest)
    np.testing.assert_array_equal(out, same)
    assert_close(implicit, unrolled, 1e-5)
    assert np.all(implicit[0] == 0) and np.abs(implicit[1]).max() > 0.1


def test_implicit_gradients_take_no_memory_for_the_updates():
    arrays = [x.astype(jnp.float32) for x in make_problem(states=64, patterns=32, width=16, value=16)]

    def temporary(gradient, max_steps):
        def total(*args):
            options = dict(beta=1.0, steps=None, max_steps=max_steps, gradient=gradient)
            return jnp.sum(jnp.sin(hopfield_retrieval(*args, **options)))

        program = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(*arrays).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary("implicit", 1000) == temporary("implicit", 10)
    assert temporary("unrolled", 1000) - temporary("unrolled", 10) > 900 * arrays[0].nbytes


@pytest.mark.parametrize("separation", ["softmax", "sparsemax", "entmax"])
def test_gradients_equal_finite_differences(separation, x64):
    arrays = (*make_problem(), jnp.asarray(BETA))
    rng = np.random.default_rng(2)
    direction = [rng.normal(size=x.shape) for x in arrays]

    @jax.jit
    def total(*args):
        *args, beta = args
        return jnp.sum(jnp.sin(hopfield_retrieval(*args, beta=beta, steps=3, separation=separation)))

    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))(*arrays)
    ends = [total(*(x + step * d for x, d in zip(arrays, direction))) for step in (1e-6, -1e-6)]
    slope = sum(jnp.vdot(g, d) for g, d in zip(gradient, direction))
    np.testing.assert_allclose((ends[0] - ends[1]) / 2e-6, slope, rtol=1e-6)


def test_the_gradient_of_the_energy_is_the_update(x64):
    """dE/dxi = xi - X^T p, for every separation: an update is a step of descent of length 1."""
    state, stored, _ = make_problem()
    mask = make_mask("patterns").at[1].set(True)
    for separation, similarity in (("softmax", "dot"), ("entmax", "l2"), ("sparsemax", "dot")):
        options = dict(beta=jnp.asarray(BETA), separation=separation, similarity=similarity, mask=mask)
        slope = jax.grad(lambda xi, o=options: jnp.sum(hopfield_energy(xi, stored, **o)))(state)
        np.testing.assert_allclose(slope, state - hopfield_retrieval(state, stored, **options), atol=1e-9)


@pytest.mark.parametrize("separation, similarity", [("softmax", "dot"), ("entmax", "l2")])
def test_energy_at_beta_zero_is_the_limit(separation, similarity, x64):
    state, stored, _ = make_problem()
    mask = make_mask("pairs")

    def energy(beta):
        options = dict(separation=separation, similarity=similarity, mask=mask)
        return np.asarray(hopfield_energy(state, stored, beta=beta, **options))

    np.testing.assert_allclose(energy(0.0), energy(1e-9), atol=1e-6)
    slope = jax.grad(lambda beta: jnp.sum(hopfield_energy(
        state, stored, beta=beta, separation=separation, similarity=similarity, mask=mask)))(0.0)  # fmt: skip
    np.testing.assert_allclose(slope, (energy(1e-5).sum() - energy(0.0).sum()) / 1e-5, rtol=1e-3)
    wanted = 0.5 * np.sum(np.asarray(state)[1, 2] ** 2, axis=-1) if similarity == "dot" else 0
    np.testing.assert_allclose(energy(1.0)[1, 2], wanted, atol=1e-14)  # it sees nothing


# ---------------------------------------------------------------------------------------------------------------------
# Precision, transformations, costs, mistakes


def test_lower_precision(x64):
    """float32, and bfloat16 with float32 sums, against float64 on the rounded inputs; sizes of their own."""
    problem = make_problem(states=20, patterns=40, width=32, value=48)
    cases = ((jnp.float32, 3, 1e-5), (jnp.bfloat16, 1, 0.01), (jnp.bfloat16, 2, 0.02), (jnp.float16, 1, 0.002))
    for dtype, steps, most in cases:
        lower = [x.astype(dtype) for x in problem]
        wanted = values_and_grads(*(x.astype(jnp.float64) for x in lower), steps=steps, beta=(0.1, 0.3))
        got = values_and_grads(*lower, steps=steps, beta=(0.1, 0.3))
        assert {x.dtype for x in (got[0], *got[1][:3])} == {jnp.dtype(dtype)}
        *errors, of_beta = jax.tree.leaves(relative_rms(got, wanted))  # beta's gradient sums terms that cancel
        assert max(errors) < most and of_beta < 5 * most


@pytest.mark.parametrize(
    "dynamics, kind",
    [
        pytest.param(dict(steps=2), "pairs", marks=pytest.mark.deep),
        pytest.param(dict(steps=None, tolerance=1e-2), "pairs", marks=pytest.mark.deep),
        (dict(steps=2), "causal window cross"),
    ],
)
def test_blocks_of_states(dynamics, kind, monkeypatch, x64):
    """Ten states in blocks of three give what they give at once."""
    from engrax.pallas_kernels.hopfield_retrieval import xla

    problem = make_problem(states=10)
    seen = dict(mask=make_mask(kind, states=10)) if kind == "pairs" else make_seen(kind, 10, 7, batch=3)
    wanted = values_and_grads(*problem, **seen, **dynamics)
    monkeypatch.setattr(xla, "CACHED_SCORES", 3 * 3 * 2 * 7)
    jax.clear_caches()  # the constant is no key of the cache
    try:
        assert_close(values_and_grads(*problem, **seen, **dynamics), wanted, 1e-12)
    finally:
        jax.clear_caches()


def test_large_scores_do_not_overflow():
    state, stored, values = (100 * x.astype(jnp.float32) for x in make_problem())
    for separation in ("softmax", "sparsemax", "entmax"):
        out, grads = values_and_grads(state, stored, values, steps=2, separation=separation)
        assert all(np.all(np.isfinite(x)) for x in (out, *grads))


def test_vmap_and_one_of_everything(x64):
    one = [x[:1, :1] for x in make_problem()]
    np.testing.assert_allclose(hopfield_retrieval(*one, beta=1.0, steps=None), one[2], rtol=1e-14)
    state, stored, values = make_problem()
    run = lambda s, x, v: hopfield_retrieval(s[None], x[None], v[None], beta=1.0, steps=None)[0]  # noqa: E731
    np.testing.assert_allclose(
        jax.vmap(run)(state, stored, values), hopfield_retrieval(state, stored, values, beta=1.0, steps=None)
    )


MESH_PROGRAM = """
    import jax, jax.numpy as jnp, numpy as np, re
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from engrax.pallas_kernels import hopfield_retrieval
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(4, n, 2, 6)), jnp.float32) for n in (5, 7, 7)]
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    for steps in (1, 3, None):
        def total(*a):
            return jnp.sum(jnp.sin(hopfield_retrieval(*a, beta=jnp.asarray([0.5, 1.0]), steps=steps)))
        wanted = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*arrays)
        split = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor"))
        placed = [jax.device_put(x, split) for x in arrays]
        program = jax.jit(jax.grad(total, argnums=(0, 1, 2)), out_shardings=(split,) * 3).lower(*placed).compile()
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), program(*placed), wanted)
        moved = re.findall(r"\\S*\\[([\\d,]*)\\]\\S* (?:all-gather|all-reduce|all-to-all|collective-permute)",
                           program.as_text())
        assert all(len(shape) < 2 for shape in moved), (steps, moved)  # whether any state moves: one bit
    print("no array travels")
"""


@pytest.mark.deep
def test_rows_and_heads_are_split_without_moving_an_array(run_python):
    assert "no array travels" in run_python(textwrap.dedent(MESH_PROGRAM), devices=8)


def test_flops_are_those_of_the_products():
    sizes = dict(batch=2, seq=24, patterns=40, heads=2, key=16, value=8)
    state, stored, values = make_problem(2, 24, 40, 2, 16, 8)
    for steps in (2, 3):
        run = jax.jit(lambda *a, steps=steps: hopfield_retrieval(*a, beta=1.0, steps=steps))
        text = run.lower(*(x.astype(jnp.float32) for x in (state, stored, values))).as_text()
        assert len(re.findall("dot_general", text)) >= 2
        found = cost.flops(**sizes, steps=steps)
        assert found.forward == 2 * 2 * 24 * 40 * (2 * 2 * 16 * (steps - 1) + 2 * (16 + 8)) and found.backward > 0
    assert cost.saved_bytes(batch=2, seq=24, heads=2, key=16, steps=4) == 3 * 4 * 2 * 24 * 2 * 16
    assert cost.traffic_bytes(**sizes).backward == 2 * cost.traffic_bytes(**sizes).forward


IDS = dict(segment_ids=jnp.zeros((3, 4), int), stored_segment_ids=jnp.zeros((3, 7), int))
ALL = dict(mask=jnp.ones((3, 7), bool))
BAD = [
    (dict(state=jnp.zeros((3, 4, 2))), r"state has shape .*, wanted \[B, N, H, D\]"),
    (dict(stored=jnp.zeros((3, 7, 2, 4))), r"stored has shape \(3, 7, 2, 4\), wanted .* = \(3, 7, 2, 5\)"),
    (dict(values=jnp.zeros((3, 6, 2, 3))), "values has shape"),
    (dict(state=jnp.zeros((3, 4, 2, 5), int)), "state has dtype int.*, wanted a floating-point dtype"),
    (dict(beta=jnp.zeros(3)), r"beta has shape \(3,\), wanted \[H\] = \(2,\)"),
    (dict(beta="warm"), r"beta is 'warm', wanted a number or an array \[H\]"),
    (dict(steps=0), "steps is 0, wanted an integer of at least 1"),
    (dict(steps=None, max_steps=0), "max_steps is 0"),
    (dict(tolerance=-1.0), "tolerance is -1.0, wanted a number of at least 0"),
    (dict(separation="softmx"), "unknown separation 'softmx'; did you mean 'softmax'"),
    (dict(separation="entmax", alpha=1.0), "alpha is 1.0, wanted a number above 1"),
    (dict(similarity="cosin"), "did you mean 'cosine'"),
    (dict(gradient="exact"), "unknown gradient 'exact'"),
    (dict(gradient="implicit", steps=2), "it needs steps=None, not steps=2"),
    (dict(mask=jnp.ones((3, 6), bool)), r"mask has shape \(3, 6\) and dtype bool, wanted bool \[B, M\] = \(3, 7\) or"),
    (dict(mask=jnp.ones((3, 4, 6), bool)), r"mask has shape .* or \[B, N, M\] = \(3, 4, 7\)"),
    (dict(mask=jnp.ones((3, 7))), "and dtype float"),
    (dict(causal=1), "causal is 1, wanted True or False"),
    (dict(window=0), "window is 0, wanted an integer of at least 1"),
    (IDS | dict(segment_ids=jnp.zeros((3, 5), int)), r"segment_ids has shape \(3, 5\), wanted \[B, N\] = \(3, 4\)"),
    (IDS | dict(segment_ids=jnp.zeros((3, 4))), "segment_ids has dtype float.*, wanted an integer dtype"),
    (IDS | dict(stored_segment_ids=jnp.zeros((3, 6), int)), r"stored_segment_ids has .*, wanted \[B, M\] = \(3, 7\)"),
    (
        IDS | dict(stored_segment_ids=None),
        r"of 4 states for 7 patterns: give .*, stored_segment_ids \[B, M\] = \(3, 7\)",
    ),
    (IDS | dict(segment_ids=None), "stored_segment_ids needs segment_ids"),
    (ALL | dict(causal=True), "mask says all of what the states see: leave out causal, window, segment_ids and stored"),
    (ALL | dict(window=3), "or leave out mask"),
    (ALL | IDS, "or leave out mask"),
    (dict(implementation="xlaa"), "did you mean 'xla'"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[m for _, m in BAD])
def test_bad_arguments_are_named(change, message):
    state, stored, values = make_problem()
    with pytest.raises(ValueError, match=message):
        hopfield_retrieval(**(dict(state=state, stored=stored, values=values, beta=1.0) | change))


def test_energy_refuses_what_has_none():
    state, stored, _ = make_problem()
    with pytest.raises(ValueError, match="similarity 'cosine' has no energy"):
        hopfield_energy(state, stored, beta=1.0, similarity="cosine")
    with pytest.raises(ValueError, match="window is 0"):
        hopfield_energy(state, stored, beta=1.0, window=0)


def test_what_is_there():
    names, missing = available("hopfield_retrieval")
    assert names[:2] == ("reference", "xla")
    for name in missing:
        with pytest.raises(NotImplementedError, match=f"'{name}' cannot run: .* use 'xla'"):
            hopfield_retrieval(*make_problem(), beta=1.0, implementation=name)
