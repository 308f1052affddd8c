"""What a state of `hopfield_retrieval` sees by its place, a window and segments: the same as by the mask in words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engrax.pallas_kernels import hopfield_energy
from engrax.tests.hopfield_problems import make_seen, pairs_seen
from engrax.tests.neural_memory_problems import assert_close
from engrax.tests.test_hopfield_retrieval import DYNAMICS, make_problem, values_and_grads


def _as_mask(seen, *sizes):
    lists = {name: x.tolist() if hasattr(x, "tolist") else x for name, x in seen.items()}
    return jnp.asarray(pairs_seen(*sizes, batch=3, **lists))


SEEN = [  # (what decides, N, M): states before all patterns where N > M
    ("causal", 4, 7), ("causal", 9, 7), ("window", 4, 7), ("causal window", 7, 7), ("segments", 7, 7),
    ("causal segments", 7, 7), ("causal window segments", 7, 7), ("cross", 4, 7), ("causal window cross", 9, 7),
]  # fmt: skip
QUICK = [("causal window cross", 9, 7, 1), ("causal segments", 7, 7, 3)]


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(
    "kind, states, patterns, dynamics",
    [
        pytest.param(*seen, i, marks=[] if (*seen, i) in QUICK else pytest.mark.deep if i == 1 else pytest.mark.long)
        for seen in SEEN
        for i in range(4)
    ],
)
def test_places_and_segments_equal_their_mask(kind, states, patterns, dynamics, implementation, x64):
    problem, seen = make_problem(states=states, patterns=patterns), make_seen(kind, states, patterns, batch=3)
    options = dict(implementation=implementation, **DYNAMICS[dynamics])
    mask = _as_mask(seen, states, patterns)
    assert 0 < jnp.mean(mask) < 1
    wanted = values_and_grads(*problem, mask=mask, **options)
    assert_close(values_and_grads(*problem, **seen, **options), wanted, 1e-10)


@pytest.mark.parametrize(
    "kind, states, patterns",
    [pytest.param(*seen, marks=[] if seen[0] == "causal window" else pytest.mark.deep) for seen in SEEN],
)
def test_attention_sees_by_places_and_segments(kind, states, patterns):
    """One update in float32 runs as the library's attention, whose own causal mask begins at the first pattern."""
    problem = [x.astype(jnp.float32) for x in make_problem(states=states, patterns=patterns)]
    seen = make_seen(kind, states, patterns, batch=3)
    mask = _as_mask(seen, states, patterns)
    wanted = values_and_grads(*problem, mask=mask, implementation="reference")
    got = values_and_grads(*problem, **seen)
    assert_close(got, wanted, 1e-5)
    assert np.all(np.asarray(got[0])[~np.asarray(mask).any(axis=2)] == 0)


@pytest.mark.parametrize("steps", [1, 2])
def test_padding_by_segments_may_hold_anything(steps):
    """States and patterns with negative ids: no value of theirs reaches a result or a gradient, and none is 0 x NaN."""
    problem = [x.astype(jnp.float32) for x in make_problem(states=7)]
    seen = make_seen("causal segments", 7, 7, batch=3)
    padding = np.asarray(seen["segment_ids"]) < 0
    lost = [jnp.where(padding[..., None, None], jnp.nan, x) for x in problem]
    wanted, got = (values_and_grads(*x, steps=steps, **seen) for x in (problem, lost))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    assert np.all(np.asarray(got[0])[padding] == 0) and all(np.all(np.asarray(g)[padding] == 0) for g in got[1][:3])


@pytest.mark.parametrize("kind", ["causal window cross", pytest.param("causal segments", marks=pytest.mark.deep)])
def test_the_energy_by_places_and_segments(kind, x64):
    (state, stored, _), seen = make_problem(states=7), make_seen(kind, 7, 7, batch=3)
    got, wanted = (hopfield_energy(state, stored, beta=1.5, **x) for x in (seen, dict(mask=_as_mask(seen, 7, 7))))
    np.testing.assert_allclose(got, wanted, rtol=1e-12)
    assert not np.allclose(got, hopfield_energy(state, stored, beta=1.5), rtol=1e-3)
