"""The laws of `gated_delta_rule`: segments, causality, cuts, and the simpler operations that it reduces to.

The mixers on this operation obey the same laws in every run of the tests; here most of them are for `make test-deep`.
"""

import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engrax.pallas_kernels import NeuralMemoryState, gated_delta_rule, linear_attention, neural_memory
from engrax.tests import op_problems as problems
from engrax.tests.neural_memory_problems import assert_close
from engrax.tests.op_problems import call, make_problem, values

OP = "gated_delta_rule"
deep = pytest.mark.deep


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    "segments, implementation", [("states", "xla"), pytest.param("packed", "xla", marks=deep), ("states", "reference")]
)
def test_segments_equal_calls_apart(segments, implementation):
    case = dict(segments=segments, length=40, chunk=8, groups=2)
    problems.check_segments_apart(OP, implementation, case)


@pytest.mark.parametrize(
    "segments, gate, implementation",
    [
        pytest.param("packed", "none", "xla", marks=deep),
        pytest.param("states", "channel", "xla", marks=deep),
        ("packed", "scalar", "reference"),
    ],
)
def test_padding_writes_nothing_and_reads_zero(segments, gate, implementation):
    problems.check_padding(OP, implementation, dict(segments=segments, gate=gate, batch=3, length=50))


@pytest.mark.parametrize("segments", [pytest.param("packed", marks=deep), "states"])
def test_gradients_do_not_cross_segments(segments):
    problems.check_segment_gradients_apart(OP, "xla", dict(segments=segments, gates="mixed", batch=1))


@deep
@pytest.mark.parametrize("gate", ["none", "scalar", "channel"])
def test_causal(gate):
    case = dict(gate=gate, gates="mixed", keys="correlated", length=50)
    problems.check_causal(OP, "xla", case, (0, 15, 16, 40))


def test_causal_when_packed():
    problems.check_causal(OP, "xla", dict(segments="packed", gates="mixed"), (20,))


@deep
def test_rows_do_not_influence_each_other():
    problems.check_rows_apart(OP, "xla", dict(segments="states", gates="mixed", batch=3))


@deep
def test_a_cut_anywhere_changes_nothing():
    problems.check_cuts(OP, "xla", dict(gate="scalar", length=40), (17,))


@deep
def test_a_cut_changes_nothing_with_a_state_per_segment():
    problems.check_cuts(OP, "xla", dict(segments="states", batch=3, length=40), (13,))


@deep
def test_token_by_token_equals_one_call():
    problems.check_cuts(OP, "xla", dict(length=3, chunk=2, gate="channel"), (1, 2))


def test_vmap_equals_a_loop():
    made = [make_problem(OP, seed=seed, length=20) for seed in (0, 1)]
    static = made[0][1]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(arrays for arrays, _ in made))
    gradient = problems.compiled(jax.grad(lambda arrays: jnp.sum(call(OP, arrays, static)[0] ** 2)))
    looped = jax.tree.map(lambda *x: jnp.stack(x), *(gradient(arrays) for arrays, _ in made))
    assert_close(jax.vmap(gradient)(stacked), looped)


@deep
def test_no_collective_under_a_mesh(run_python):
    assert "no collectives" in run_python(textwrap.dedent(problems.MESH_PROGRAM), args=(OP,), devices=8)


# Reductions


def test_without_beta_the_state_only_decays():
    arrays, static = make_problem(OP, gate="channel", groups=2)
    q, k, v, g = (arrays[name] for name in "qkvg")
    still = values(OP, arrays | {"beta": jnp.zeros_like(arrays["beta"])}, static)
    assert_close(still, linear_attention(q, k, 0 * v, g=g, initial_state=arrays["initial_state"]))


def test_gates_reduce():
    """A gate per channel that is the same in all is a gate per head; a gate of zero is none (DeltaNet)."""
    arrays, static = make_problem(OP, gate="scalar")
    wide = arrays | {"g": jnp.repeat(arrays["g"][..., None], 8, axis=-1)}
    assert_close(values(OP, wide, static), values(OP, arrays, static))
    zero = arrays | {"g": jnp.zeros_like(arrays["g"])}
    assert_close(values(OP, zero, static), values(OP, arrays | {"g": None}, static))


def test_orthonormal_keys_are_recalled_exactly():
    """Given beta 1 and no gate, then every value written under one of K orthonormal keys is read back, twice written
    ones the last."""
    rng = np.random.default_rng(0)
    keys = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    k = jnp.asarray(np.concatenate([keys, keys[:8], keys])[None, :, None])
    v = jnp.asarray(rng.normal(size=(1, 40, 1, 5)))
    beta = jnp.asarray(np.repeat([1.0, 0.0], [24, 16])[None, :, None])
    out, state = gated_delta_rule(k, k, v, beta=beta, scale=1.0, chunk_size=16)
    last = jnp.concatenate([v[:, 16:24], v[:, 8:16]], axis=1)
    assert_close(out[:, 24:], last, 1e-14)
    assert_close(jnp.einsum("ik,kv->iv", keys, state[0, 0]), last[0, :, 0], 1e-14)


def test_a_linear_neural_memory_is_the_gated_delta_rule():
    """One layer, no momentum, chunks of one token, the gradient taken at the decayed memory."""
    arrays, _ = make_problem(OP, length=20, gates="mixed")
    q, k, v, beta, g = (arrays[name] for name in ("q", "k", "v", "beta", "g"))
    state = (arrays["initial_state"],)
    start = NeuralMemoryState(state, tuple(map(jnp.zeros_like, state)), state, np.zeros(2, np.int32))
    gates = dict(lr=beta, momentum=jnp.zeros_like(beta), forget=-jnp.expm1(g))
    out, memory = neural_memory(q, k, v, **gates, state=start, gradient_at="decayed", chunk_size=1)
    wanted = gated_delta_rule(q, k, v, beta=beta, g=g, initial_state=state[0], scale=1.0)
    assert_close((out, memory.weights[0]), wanted)
