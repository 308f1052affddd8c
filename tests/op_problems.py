"""Random problems for the log-decay operations, and the checks that every implementation of them must pass.

The operations take the same arguments (`gated_delta_rule` also `beta`), so one body of checks serves them all: a test
module names its operation and calls these with the implementations it has.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from engrax import pallas_kernels
from engrax.tests.neural_memory_problems import assert_close

GATES = {  # values of the log decay and how often
    "zero": ((0.0, 1.0),),
    "mixed": ((0.0, 0.1), (-1e-4, 0.5), (-0.3, 0.3), (-50.0, 0.1)),
    "reset": ((0.0, 0.1), (-1e-4, 0.5), (-0.3, 0.3), (-50.0, 0.05), (-np.inf, 0.05)),
}
TOKEN_ARGUMENTS = ("q", "k", "v", "g", "beta")
FLOAT32_ERROR = 1e-5  # relative RMS


def compiled(f, **options):
    """Returns f as `jax.jit` does, at half the time to compile: most programs here run once, on little."""
    return jax.jit(f, compiler_options={"xla_backend_optimization_level": 0}, **options)


def make_problem(
    op="linear_attention",
    seed=0,
    *,
    batch=2,
    length=75,
    heads=2,
    groups=1,
    key=8,
    value=6,
    chunk=16,
    gate="scalar",
    gates="reset",
    keys="random",
    segments="one",
    state=True,
):
    """Returns (arrays, static) in float64: what is differentiated and what is not.

    gate: "none", "scalar" or "channel"; gates: a key of `GATES`. keys: "random", "correlated" (cosine about 0.9) or
    "identical", all of unit norm. segments: "one", "packed", "states" (one state each, some without tokens), or "few"
    (the same, of more tokens).
    heads are those of q and k; there are `groups` value heads for each. beta mixes 0, 1 and 2 with values between.
    """
    rng = np.random.default_rng(seed)
    value_heads = heads * groups
    k = rng.normal(size=(batch, length, heads, key))
    common = rng.normal(size=(1, 1, heads, key))
    k = {"random": k, "correlated": 3 * common + k, "identical": np.broadcast_to(common, k.shape)}[keys]
    arrays = dict(
        q=rng.normal(size=(batch, length, heads, key)),
        k=k / np.linalg.norm(k, axis=-1, keepdims=True),
        v=rng.normal(size=(batch, length, value_heads, value)),
    )
    per_token = (batch, length, value_heads)
    if gate != "none":
        values, chances = zip(*GATES[gates])
        shape = per_token if gate == "scalar" else (*per_token, key)
        arrays["g"] = rng.choice(values, p=chances, size=shape)
    if op == "gated_delta_rule":
        exact = rng.choice([0.0, 1.0, 2.0], size=per_token)
        arrays["beta"] = np.where(rng.random(per_token) < 0.4, exact, 2 * rng.random(per_token))
    static = dict(chunk_size=chunk)
    if segments != "one":
        static["segment_ids"] = make_segments(batch, length, (3, 70, 90) if segments == "few" else (1, 2, 5, 11, 19))
    if segments in ("states", "few"):
        static["num_segments"] = int(static["segment_ids"].max()) + 2
    if state:
        lead = (batch, static["num_segments"]) if "num_segments" in static else (batch,)
        arrays["initial_state"] = rng.normal(size=(*lead, value_heads, key, value))
    return {name: jnp.asarray(x) for name, x in arrays.items()}, static


def make_segments(batch, length, runs):
    """Rows of segments of these numbers of tokens, ids left out, padding anywhere; the last of several is padding."""
    rng = np.random.default_rng(7)
    ids = np.full((batch, length), -1, np.int32)
    for row in range(max(1, batch - 1)):
        place, segment = row % 2, 0
        while place < length:
            run = int(rng.choice(runs))
            ids[row, place : place + run] = segment
            place, segment = place + run + int(rng.integers(0, 3)), segment + int(rng.integers(1, 3))
    ids[0, -2:] = -1
    return ids


def call(op, arrays, static, **options):
    """Returns (out, final state)."""
    arrays = dict(arrays)
    q, k, v = (arrays.pop(name) for name in "qkv")
    return getattr(pallas_kernels, op)(q, k, v, **arrays, **static, **options)


def values(op, arrays, static, **options):
    """Returns the same from a compiled program."""
    return compiled(lambda arrays: call(op, arrays, static, **options))(arrays)


def values_and_grads(op, arrays, static, **options):
    """Returns ((out, final state), gradients of a random weighting of both with respect to every array)."""
    return make_program(op, static, **options)(arrays)


def make_program(op, static, **options):
    """Returns the compiled function of the arrays behind `values_and_grads`."""

    @compiled
    def both(arrays):
        result, pull = jax.vjp(lambda arrays: call(op, arrays, static, **options), arrays)
        rng = np.random.default_rng(1)
        weights = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), result)
        return result, pull(weights)[0]

    return both


def relative_rms(actual, wanted):
    """Returns for every array the RMS of the error over the RMS of what is wanted; 0 where nothing is and is wanted."""

    def one(a, b):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error, size = np.sqrt(np.mean((a - b) ** 2)), np.sqrt(np.mean(b**2))
        return 0.0 if error == 0 else error / max(size, 1e-30)

    return jax.tree.map(one, actual, wanted)


def in_dtype(arrays, dtype, tokens=None):
    """Returns the arrays in `dtype`, q, k and v in `tokens` where given: what a call in lower precision gets."""
    lower = {name: jnp.asarray(x, dtype) for name, x in arrays.items()}
    return lower if tokens is None else lower | {name: jnp.asarray(arrays[name], tokens) for name in "qkv"}


def errors(op, arrays, static, *implementations):
    """Returns per implementation the relative RMS errors, gradients included, against the float64 reference."""
    wanted = values_and_grads(op, in_dtype(arrays, jnp.float64), static, implementation="reference")
    return [relative_rms(values_and_grads(op, arrays, static, implementation=n), wanted) for n in implementations]


# The checks. `implementation` is the one under test; `case` are keyword arguments of `make_problem`.


def check_against_reference(op, implementation, case):
    """In float64: values and gradients of every input, through the outputs and the final state, within 1e-10."""
    arrays, static = make_problem(op, **case)
    wanted = values_and_grads(op, arrays, static, implementation="reference")
    assert_close(values_and_grads(op, arrays, static, implementation=implementation), wanted)


def check_float32(op, implementation, case):
    """In float32: relative RMS 1e-5 or, where that is larger, 20 times the error of the recurrence in float32."""
    arrays, static = make_problem(op, **case)
    arrays = in_dtype(arrays, jnp.float32)
    got, recurrence = errors(op, arrays, static, implementation, "reference")
    for (path, error), own in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(recurrence), strict=True):
        assert error <= max(FLOAT32_ERROR, 20 * own), (jax.tree_util.keystr(path), error, own)


def check_causal(op, implementation, case, tokens):
    """A finite change of one token changes no bit of the outputs before it, and changes its own."""
    arrays, static = make_problem(op, **case)
    run = compiled(lambda arrays: call(op, arrays, static, implementation=implementation)[0])
    before = np.asarray(run(arrays))
    real = static["segment_ids"] >= 0 if "segment_ids" in static else np.ones(before.shape[:2], bool)
    for token in tokens:
        changed = dict(arrays)
        for name in TOKEN_ARGUMENTS:
            if name in arrays:
                changed[name] = arrays[name].at[:, token].add(-0.3 if name == "g" else 0.3)
        after, rows = np.asarray(run(changed)), real[:, token]
        assert np.array_equal(before[:, :token], after[:, :token]), token
        assert rows.any() and not np.any(before[rows, token] == after[rows, token]), token


def check_rows_apart(op, implementation, case):
    """Another row's change leaves a row's bits alone."""
    arrays, static = make_problem(op, **case)
    run = compiled(lambda arrays: call(op, arrays, static, implementation=implementation))
    changed = {name: x.at[1].multiply(1.7) for name, x in arrays.items()}
    for before, after in zip(run(arrays), run(changed)):
        before, after = np.asarray(before), np.asarray(after)
        assert np.array_equal(before[0], after[0]) and not np.array_equal(before[1], after[1])


def run_in_pieces(op, arrays, static, cuts, **options):
    """Returns (out, final state) of the call made piece by piece, each continuing the state of the one before."""
    length, outs = arrays["q"].shape[1], []
    static, ids = dict(static), static.get("segment_ids")
    state = arrays.get("initial_state")
    for begin, end in zip((0, *cuts), (*cuts, length)):
        piece = {name: arrays[name][:, begin:end] for name in TOKEN_ARGUMENTS if name in arrays}
        if ids is not None:
            static["segment_ids"] = ids[:, begin:end]
        out, state = call(op, piece | {"initial_state": state}, static, **options)
        outs.append(out)
    return jnp.concatenate(outs, axis=1), state


def check_cuts(op, implementation, case, cuts):
    """A call made in pieces equals the whole call, values and gradients."""
    arrays, static = make_problem(op, **case)

    def total(arrays, cuts):
        out, state = run_in_pieces(op, arrays, static, cuts, implementation=implementation)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(state)), (out, state)

    run = compiled(jax.value_and_grad(total, has_aux=True), static_argnums=1)
    assert_close(run(arrays, tuple(cuts)), run(arrays, ()))


def check_padding(op, implementation, case):
    """Padding may hold anything: it reads zero, changes nothing and gets no gradient."""
    arrays, static = make_problem(op, **case)
    padding = static["segment_ids"] < 0
    poisoned = dict(arrays)
    for name, poison in (("q", np.nan), ("k", np.nan), ("v", np.inf), ("g", -1.0), ("beta", np.nan)):
        if name in arrays:
            mask = padding.reshape(padding.shape + (1,) * (arrays[name].ndim - 2))
            poisoned[name] = jnp.where(mask, poison, arrays[name])
    clean = values_and_grads(op, arrays, static, implementation=implementation)
    dirty = values_and_grads(op, poisoned, static, implementation=implementation)
    assert_close(dirty, clean, 1e-14)
    (out, state), gradient = dirty
    assert np.all(np.asarray(out)[padding] == 0) and np.any(np.asarray(out)[~padding] != 0)
    for name in TOKEN_ARGUMENTS:
        assert name not in gradient or np.all(np.asarray(gradient[name])[padding] == 0), name
    if "initial_state" in arrays and padding[-1].all():
        assert np.array_equal(state[-1], arrays["initial_state"][-1])


def check_segments_apart(op, implementation, case):
    """Every packed segment equals a call of its own, and gets its own state where there is one for each."""
    arrays, static = make_problem(op, **case)
    out, final = values(op, arrays, static, implementation=implementation)
    run = compiled(partial(call, op, static={"chunk_size": static["chunk_size"]}, implementation=implementation))
    ids, by_segment = static["segment_ids"], "num_segments" in static
    for row in range(ids.shape[0]):
        present = [segment for segment in np.unique(ids[row]) if segment >= 0]
        for order, segment in enumerate(present):
            index = np.nonzero(ids[row] == segment)[0]
            alone = {name: arrays[name][row : row + 1, index] for name in TOKEN_ARGUMENTS if name in arrays}
            alone["initial_state"] = jnp.zeros_like(arrays["initial_state"][:1] if not by_segment else final[:1, 0])
            if by_segment:
                alone["initial_state"] = arrays["initial_state"][row : row + 1, segment]
            elif order == 0:
                alone["initial_state"] = arrays["initial_state"][row : row + 1]
            apart, last = run(alone)
            assert_close(out[row, index], apart[0])
            if by_segment or segment == present[-1]:
                assert_close(final[row, segment] if by_segment else final[row], last[0])
        if by_segment:
            for segment in set(range(static["num_segments"])) - set(present):
                assert np.array_equal(final[row, segment], arrays["initial_state"][row, segment])


def check_segment_gradients_apart(op, implementation, case):
    """The gradient of one segment's outputs is zero, exactly, at every other segment's tokens and states."""
    arrays, static = make_problem(op, **case)
    ids = static["segment_ids"]
    segment = int(np.unique(ids[0])[2])

    def total(arrays):
        out, _ = call(op, arrays, static, implementation=implementation)
        return jnp.sum(jnp.where((ids == segment)[:, :, None, None], out**2, 0))

    gradient = compiled(jax.grad(total))(arrays)
    for name in ("q", "k", "v"):
        x = np.asarray(gradient[name])
        assert np.all(x[ids != segment] == 0) and np.any(x[ids == segment] != 0), name
    states = np.asarray(gradient["initial_state"])
    if "num_segments" in static:
        assert np.all(np.delete(states, segment, axis=1) == 0) and np.any(states[:, segment] != 0)
    else:
        assert np.all(states[0] == 0)


MESH_PROGRAM = """
    import sys, jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from engrax import pallas_kernels
    op = getattr(pallas_kernels, sys.argv[1])
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    B, T, H, HV, K, V, N = 4, 37, 2, 4, 8, 8, 3
    rng = np.random.default_rng(0)
    rows = ("data", "fsdp")
    def array(spec, x):
        return jax.device_put(jnp.asarray(x, x.dtype), NamedSharding(mesh, spec))
    def normal(spec, *shape):
        return array(spec, rng.normal(size=shape).astype(np.float32))
    q, k = (normal(P(rows, None, "tensor"), B, T, H, K) / K for _ in range(2))
    v = normal(P(rows, None, "tensor"), B, T, HV, V)
    ids = array(P(rows), np.sort(rng.integers(0, N, size=(B, T)), axis=1).astype(np.int32))
    extra = {}
    if sys.argv[1] == "gated_delta_rule":
        extra["beta"] = jax.nn.sigmoid(normal(P(rows, None, "tensor"), B, T, HV))
    def check(form, gate, **static):
        arrays = dict(q=q, k=k, v=v, **extra)
        if gate is not None:
            arrays["g"] = -jnp.abs(normal(P(rows, None, "tensor"), *gate))
        lead = (B, N) if form == "states" else (B,)
        spec = P(rows, None, "tensor") if form == "states" else P(rows, "tensor")
        arrays["initial_state"] = normal(spec, *lead, HV, K, V)
        def run(arrays):
            arrays = dict(arrays)
            tokens = [arrays.pop(name) for name in "qkv"]
            return op(*tokens, **arrays, **static, chunk_size=8, implementation="xla")
        def pull(arrays):
            result, vjp = jax.vjp(run, arrays)
            return result, vjp(result)
        program = jax.jit(pull, compiler_options={"xla_backend_optimization_level": 0})
        text = program.lower(arrays).compile().as_text()
        for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"):
            assert name not in text, (form, gate, name)
        if form == "states":
            whole = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), arrays)
            for a, b in zip(jax.tree.leaves(program(arrays)), jax.tree.leaves(program(whole))):
                np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    check("one", None)
    check("packed", (B, T, HV), segment_ids=ids)
    check("states", (B, T, HV, K), segment_ids=ids, num_segments=N)
    print("no collectives")
"""
