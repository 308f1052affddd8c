"""Random problems for the operation `neural_memory`, and how its implementations are compared on them."""

import jax
import jax.numpy as jnp
import numpy as np

from engrax.pallas_kernels import NeuralMemoryState, neural_memory

TOLERANCE = 1e-10


def make_problem(
    seed=0, *, depth=2, batch=3, length=21, heads=2, key=4, value=5, hidden=6, chunk=4, rows="aligned", segments=False
):
    """Returns (arrays, static): random inputs whose gates hold exact 0 and 1; rows: "aligned" or "phased"."""
    rng = np.random.default_rng(seed)
    sizes = [key] + [hidden] * (depth - 1) + [value]

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape))

    def gate(*choices):  # exact values among generic ones
        shape = (batch, length, heads)
        return jnp.asarray(np.where(rng.random(shape) < 0.4, rng.choice(choices, size=shape), rng.random(shape)))

    def matrices(*lead):
        return tuple(0.6 * normal(*lead, i, o) for i, o in zip(sizes, sizes[1:]))

    arrays = dict(
        q=normal(batch, length, heads, key),
        k=normal(batch, length, heads, key),
        v=normal(batch, length, heads, value),
        lr=0.05 * gate(0.0, 2.0),
        momentum=gate(0.0, 1.0),
        forget=gate(0.0, 1.0, 0.1),
        state=tuple(matrices(batch, heads) for _ in range(3)),
    )
    static = dict(chunk_size=chunk, phase=np.zeros(batch, np.int32))
    if rows == "phased":
        static["phase"] = jnp.asarray((np.arange(batch) * 5 + 1) % chunk, jnp.int32)
    if segments:
        arrays["reset"] = (matrices(heads), matrices(heads))
        static["segment_ids"] = make_segments(batch, length)
    return arrays, static


def make_segments(batch, length):
    """Rows with short segments, padding before, between and after them; the last row is all padding."""
    rng = np.random.default_rng(7)
    ids = np.full((batch, length), -1, np.int32)
    for row in range(batch - 1):
        place, segment = row % 2, 0
        while place < length:
            run = int(rng.integers(1, 8))
            ids[row, place : place + run] = segment
            place, segment = place + run + int(rng.integers(0, 3)), segment + 1
    ids[0, -2:] = -1
    return ids


def call(arrays, static, **options):
    arrays, static = dict(arrays), dict(static)
    state = NeuralMemoryState(*arrays.pop("state"), static.pop("phase"))
    q, k, v = (arrays.pop(name) for name in "qkv")
    return neural_memory(q, k, v, state=state, **arrays, **static, **options)


def values_and_grads(arrays, static, **options):
    """Returns ((out, final matrices), phase, gradients of a random weighting of the former by every input)."""
    return make_program(static, **options)(arrays)


def make_program(static, **options):
    """Returns the compiled function of the arrays behind `values_and_grads`."""

    def run(arrays):
        out, state = call(arrays, static, **options)
        return (out, state[:3]), state.phase

    @jax.jit
    def both(arrays):
        result, pull, phase = jax.vjp(run, arrays, has_aux=True)
        rng = np.random.default_rng(1)
        weights = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), result)
        return result, phase, pull(weights)[0]

    return both


def assert_close(actual, wanted, tolerance=TOLERANCE):
    paths = jax.tree_util.tree_leaves_with_path(wanted)
    for (path, b), a in zip(paths, jax.tree.leaves(actual), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.all(np.isfinite(b)), f"{jax.tree_util.keystr(path)} of the wanted values is not finite"
        atol = tolerance * (1 + np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=atol, err_msg=jax.tree_util.keystr(path))


def check_against_reference(case, every=(1,), **options):
    arrays, static = make_problem(**case)
    wanted = values_and_grads(arrays, static, implementation="reference", **options)
    for save_every in every:
        assert_close(values_and_grads(arrays, static, implementation="xla", save_every=save_every, **options), wanted)
