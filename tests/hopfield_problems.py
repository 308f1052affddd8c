"""Problems of Hopfield retrieval that the tests of its kernels share."""

import jax
import jax.numpy as jnp
import numpy as np

from engrax.pallas_kernels import hopfield_retrieval
from engrax.tests.op_problems import relative_rms


def make_problem(states, patterns, width, value, masked):
    """Returns (state, stored, values), float32, and a mask; the second row sees nothing."""
    rng = np.random.default_rng(0)
    shapes = (2, states, 2, width), (2, patterns, 2, width), (2, patterns, 2, value)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    mask = rng.random((2, patterns)) < 0.7
    mask[0, 0], mask[1] = True, False
    return arrays, jnp.asarray(mask) if masked else None


def make_seen(kind, states, patterns, batch=2, **masked):
    """Returns arguments of the operation for what states see: "all", "mask" (of `masked`), or a part of these words:
    "causal", "window", "segments" (N = M), "cross" (ids of both; some are padding, some stand on one side only)."""
    if kind in ("all", "mask"):
        return masked if kind == "mask" else {}
    rng = np.random.default_rng(3)

    def ids(count):
        found = np.sort(rng.integers(0, 4, size=(batch, count)), axis=1).astype(np.int32)
        found[0, -1:], found[-1, count // 2] = -1, -2
        return jnp.asarray(found)

    seen = dict(causal="causal" in kind, window=max(patterns // 3, 2) if "window" in kind else None)
    if "cross" in kind:
        seen |= dict(segment_ids=ids(states), stored_segment_ids=ids(patterns))
    return seen | (dict(segment_ids=ids(states)) if "segments" in kind else {})


def pairs_seen(
    states, patterns, batch=2, mask=None, causal=False, window=None, segment_ids=None, stored_segment_ids=None
):
    """Returns what states see as bool [B, N, M], pair by pair."""
    shown = np.zeros((batch, states, patterns), bool)
    stored = segment_ids if stored_segment_ids is None else stored_segment_ids
    for b, n, m in np.ndindex(shown.shape):
        age = n + patterns - states - m
        near = (not causal or age >= 0) and (window is None or age < window)
        same = segment_ids is None or segment_ids[b][n] == stored[b][m] >= 0
        shown[b, n, m] = near and same and (mask is None or mask[b][m])
    return shown


def with_gradients(arrays, seen, implementation, steps=3):
    @jax.jit
    def run(*arrays):
        def call(*arrays, beta):
            return hopfield_retrieval(*arrays, beta=beta, steps=steps, implementation=implementation, **seen)

        beta = jnp.asarray([0.2, 0.6], jnp.promote_types(arrays[0].dtype, jnp.float32))
        out, pull = jax.vjp(lambda beta, *arrays: call(*arrays, beta=beta), beta, *arrays)
        return out, pull(jnp.asarray(np.random.default_rng(1).normal(size=out.shape), out.dtype))

    return run(*arrays)


def assert_as_accurate_as_xla(kernel, arrays, seen, *, slack, floor, steps=3):
    """Asserts that values and gradients of the kernel err by slack times the XLA form's error at most, or by floor."""
    with jax.enable_x64(True):
        truth = with_gradients([x.astype(jnp.float64) for x in arrays], seen, "reference", steps)
        truth = jax.tree.map(np.asarray, truth)
    found, xla = (with_gradients(arrays, seen, name, steps) for name in (kernel, "xla"))
    for own, other in zip(*(jax.tree.leaves(relative_rms(x, truth)) for x in (found, xla))):
        assert own <= max(slack * other, floor), (own, other)
    assert [x.dtype for x in jax.tree.leaves(found)] == [x.dtype for x in jax.tree.leaves(xla)]
    if seen:
        lists = {name: x.tolist() if hasattr(x, "tolist") else x for name, x in seen.items()}
        blind = ~pairs_seen(arrays[0].shape[1], arrays[1].shape[1], **lists).any(axis=2)
        assert blind.any() and np.all(np.asarray(found[0])[blind] == 0) and np.all(np.asarray(found[0])[~blind] != 0)
