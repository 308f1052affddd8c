"""The operation `softmax_attention`: the definition, blocks without all scores, kernels of libraries, its choice."""

import dataclasses
import re
import textwrap
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engrax.layers import AttentionConfig
from engrax.layers.attention.rope import rotate
from engrax.models import LanguageModelConfig
from engrax.pallas_kernels import available, devices, dispatch, softmax_attention
from engrax.pallas_kernels.dispatch import KERNELS_NEED_JAX, choose, explain, interpreted_kernels
from engrax.pallas_kernels.passes import run_by_platform
from engrax.pallas_kernels.softmax_attention import cost, cudnn, xla
from engrax.pallas_kernels.softmax_attention.api import OP, merge_attention, softmax_attention_terms
from engrax.pallas_kernels.softmax_attention.reference import attend, softmax_attention_reference
from engrax.pallas_kernels.softmax_attention.types import AttentionForm, AttentionInputs, AttentionShapes
from engrax.train import train_step

needs_kernels = pytest.mark.skipif(jax.__version_info__[:3] < KERNELS_NEED_JAX, reason="no kernels on this jax")


def make_problem(length, heads=4, groups=2, key=8, batch=2, segments=True, dtype=jnp.float64):
    """Queries, keys and values, and the segments of packed rows with filler inside and padding at their end."""
    keys = jax.random.split(jax.random.key(length), 3)
    sizes = (heads, groups, groups)
    arrays = [jax.random.normal(k, (batch, length, n, key), dtype) for k, n in zip(keys, sizes)]
    place = np.arange(length)
    ids = np.stack([3 * place // length + row for row in range(batch)])
    ids[0, place % 17 == 5] = -2
    ids[-1, length - length // 8 :] = -1
    return arrays, jnp.asarray(ids, jnp.int32) if segments else None


def by_definition(q, k, v, ids, window=None):
    """Values by loops over queries in NumPy, float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for row, t, head in np.ndindex(q.shape[:3]):
        own = None if ids is None else int(ids[row, t])
        first = 0 if window is None else max(0, t - window + 1)
        seen = [s for s in range(first, t + 1) if own is None or ids[row, s] == own]
        group = head // (q.shape[2] // k.shape[2])
        scores = k[row, seen, group] @ q[row, t, head] * q.shape[3] ** -0.5
        weights = np.exp(scores - scores.max())
        out[row, t, head] = 0 if own is not None and own < 0 else weights @ v[row, seen, group] / weights.sum()
    return out


def with_gradients(call, arrays):
    """Outputs, and the gradients of a sum that weights every output differently."""
    outputs, pull = jax.vjp(call, *arrays)

    def weights(x):
        return jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).astype(jnp.bfloat16).astype(x.dtype).reshape(x.shape)

    return outputs, pull(jax.tree.map(weights, outputs))


@pytest.mark.parametrize("window,segments", [(None, True), (5, True), (5, False)])
def test_the_definition(window, segments, x64):
    arrays, ids = make_problem(24, segments=segments)
    wanted = by_definition(*arrays, ids, window)
    for name in ("reference", "xla"):
        got = softmax_attention(*arrays, window=window, segment_ids=ids, implementation=name)
        np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)


def test_attentions_to_different_keys_merge(x64):
    (q, k, v), _ = make_problem(12)
    everything = jnp.ones((1, 1, 12), bool)
    wanted, log_sum = attend(q, k, v, everything, 0.3)
    parts = [attend(q, k[:, cut], v[:, cut], everything[..., cut], 0.3) for cut in (slice(5), slice(5, None))]
    np.testing.assert_allclose(merge_attention(*parts), wanted, rtol=1e-12)
    np.testing.assert_allclose(jnp.logaddexp(parts[0][1], parts[1][1]), log_sum, rtol=1e-12)


CASES = [  # length, window, queries of a tile, segments
    pytest.param(24, None, 32, True, id="one block"),
    pytest.param(53, None, 16, True, id="blocks", marks=pytest.mark.deep),
    pytest.param(75, None, 8, True, id="blocks of tiles"),
    pytest.param(75, 40, 8, False, id="blocks of tiles in a window", marks=pytest.mark.deep),
    pytest.param(75, 3, 8, False, id="near blocks, two at a time"),
    pytest.param(150, 33, 8, True, id="near blocks of blocks of tiles", marks=pytest.mark.deep),
    pytest.param(150, 33, 8, False, id="the same without segments", marks=pytest.mark.deep),
]


@pytest.mark.parametrize("length,window,tile,segments", CASES)
def test_blocks_give_the_values_and_gradients_of_all_scores(monkeypatch, length, window, tile, segments, x64):
    monkeypatch.setattr(xla, "TILE", tile)
    monkeypatch.setattr(xla, "SMALLEST_WINDOW", 4)
    arrays, ids = make_problem(length, segments=segments)

    @partial(jax.jit, static_argnums=0)
    def run(name, arrays):
        call = partial(softmax_attention_terms, window=window, segment_ids=ids, implementation=name)
        return with_gradients(call, arrays)

    got, wanted = (run(name, arrays) for name in ("xla", "reference"))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11), got, wanted)


@pytest.mark.parametrize("window", [3, pytest.param(None, marks=pytest.mark.deep)])
def test_the_library_in_tiles(monkeypatch, window, x64):
    """In bfloat16 and float32 a tile is the library's attention, if the log of the sum is not wanted."""
    monkeypatch.setattr(xla, "TILE", 8)
    arrays, ids = make_problem(75)
    exact = softmax_attention(*arrays, window=window, segment_ids=ids, implementation="reference")
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)):
        got = softmax_attention(*(x.astype(dtype) for x in arrays), window=window, segment_ids=ids)
        assert got.dtype == dtype
        np.testing.assert_allclose(got.astype(jnp.float64), exact, atol=tolerance)


def test_persistent_tokens_are_seen_by_every_token_of_a_segment():
    """One softmax over the persistent tokens, compared with unrotated queries, and over the tokens in the window."""
    config = AttentionConfig(heads=4, kv_heads=2, head_dim=4, window=5, persistent_tokens=3)
    mixer = config.build(12, rngs=nnx.Rngs(0))
    ids = jnp.asarray([[0, 0, 0, 0, -2, 1, 1, 1, -1]])

    def by_definition(x):
        q, k, v, own_k, own_v = (
            jnp.repeat(y.reshape(*y.shape[:-1], -1, 4), 16 // y.shape[-1], axis=-2)
            for y in (mixer.q(x), mixer.k(x), mixer.v(x), *(p(mixer.persistent[...])[None] for p in (mixer.k, mixer.v)))
        )
        turned = (rotate(y, jnp.arange(9)[None], config.rope_base) for y in (q, k))
        age = jnp.arange(9)[:, None] - jnp.arange(9)
        seen = (age >= 0) & (age < 5) & (ids[0][:, None] == ids[0])
        scores = [jnp.einsum("BTHK,BSHK->BHTS", *pair) / 2 for pair in ((q, own_k), turned)]
        weights = jax.nn.softmax(jnp.concatenate([scores[0], jnp.where(seen, scores[1], -jnp.inf)], axis=-1), axis=-1)
        out = jnp.einsum("BHTS,BSHK->BTHK", weights, jnp.concatenate([own_v, v], axis=1)).reshape(1, 9, 16)
        return mixer.out(jnp.where(ids[..., None] < 0, 0, out))

    @jax.jit
    def run(x):
        return by_definition(x), mixer(x, None, ids)[0], mixer(x, mixer.init_state(1), ids)[0]

    wanted, fresh, continued = run(jax.random.normal(jax.random.key(1), (1, 9, 12)))
    np.testing.assert_allclose(fresh, wanted, atol=1e-5)
    np.testing.assert_allclose(continued, wanted, atol=1e-5)


SCORES = re.compile(r"tensor<(\d+x)*2048x2048x[a-z]")


@pytest.mark.parametrize("window", [None, 1024])
def test_a_training_step_has_no_scores_of_all_tokens(window):
    mixer = AttentionConfig(heads=2, head_dim=8, window=window, persistent_tokens=2)
    config = LanguageModelConfig(vocab_size=32, dim=16, mixers=(mixer,), repeat=1)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))), nnx.Param)
    tokens = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    loss = train_step.make_loss(graphdef, jnp.dtype(jnp.float32))
    batch = dict(tokens=tokens, targets=tokens, segment_ids=tokens)
    text = jax.jit(jax.grad(loss, has_aux=True)).lower(params, batch, None).as_text()
    assert not SCORES.search(text)
    assert "x128x2048x" in text or "x128x1535x" in text  # the scores of a tile


# The libraries' kernels


@needs_kernels
@pytest.mark.parametrize(
    "window,segments,key", [(50, True, 8), *(pytest.param(*c, marks=pytest.mark.deep) for c in [(None, False, 64)])]
)
def test_splash_attention_interpreted(window, segments, key):
    """Values and gradients, at most 1.5 times as far from float64 as those of the XLA form in bfloat16."""
    arrays, ids = make_problem(200, key=key, batch=1, segments=segments, dtype=jnp.bfloat16)

    @partial(jax.jit, static_argnums=0)
    def run(name, arrays):
        call = partial(softmax_attention, window=window, segment_ids=ids, implementation=name)
        return with_gradients(lambda *arrays: (call(*arrays),), arrays)

    with interpreted_kernels():
        got = run("splash_attention", arrays)
    allowed = run("xla", arrays)
    with jax.enable_x64(True):
        exact = jax.tree.map(np.asarray, run("reference", [x.astype(jnp.float64) for x in arrays]))
        with interpreted_kernels(), pytest.raises(NotImplementedError, match="does not trace with 64-bit types"):
            softmax_attention(*arrays, implementation="splash_attention")
    for x, y, wanted in zip(*map(jax.tree.leaves, (got, allowed, exact))):
        error, xla_error = (np.sqrt(np.mean((np.asarray(a, np.float64) - wanted) ** 2)) for a in (x, y))
        assert error <= 1.5 * xla_error


def stand_in(monkeypatch):
    """Makes the library's XLA form serve calls of cuDNN, and notes the windows that these ask for."""
    library, windows = jax.nn.dot_product_attention, []

    def attention(*args, implementation, **options):
        if implementation == "cudnn":
            windows.append(options["local_window_size"])
        return library(*args, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    return windows


@pytest.mark.parametrize("window", [None, 5])
def test_what_cudnn_is_asked_for(monkeypatch, window):
    (q, k, v), _ = make_problem(24, dtype=jnp.float32)
    windows = stand_in(monkeypatch)
    (out,) = cudnn.passes(AttentionForm(window, 8**-0.5), AttentionInputs(q, k, v, None))
    np.testing.assert_allclose(out, by_definition(q, k, v, None, window), atol=1e-5)
    assert windows == [window and (window - 1, 0)]


def test_rows_of_one_segment_go_to_cudnn(monkeypatch):
    """The choice is made by the batch: NaN from the stand-in shows which of the two computed it."""
    monkeypatch.setattr(cudnn, "_cudnn", lambda form, inputs: (jnp.full_like(inputs.q, jnp.nan),))
    (q, k, v), packed = make_problem(16, dtype=jnp.float32)
    run = jax.jit(lambda ids: cudnn.passes_by_rows(AttentionForm(None, 1.0), AttentionInputs(q, k, v, ids))[0])
    whole = jnp.asarray([[4] * 16, [0] * 9 + [-2, -2] + [-1] * 5], jnp.int32)
    assert jnp.all(jnp.isnan(run(whole)))
    hidden = [packed, whole.at[1, 3].set(1), whole.at[1, 3].set(-2), whole.at[0, 0].set(-1), whole.at[1, 11].set(2)]
    assert not any(jnp.any(jnp.isnan(run(ids))) for ids in hidden)


@pytest.mark.deep
def test_gradients_of_both_ways(monkeypatch):
    """What the forward pass saves is enough for the backward pass, whichever of the two served the batch."""
    arrays, packed = make_problem(40, dtype=jnp.float32)
    windows = stand_in(monkeypatch)

    @partial(jax.jit, static_argnums=0)
    def run(by_rows, ids):
        def call(*arrays):
            inputs, form = AttentionInputs(*arrays, ids), AttentionForm(7, 8**-0.5)
            if by_rows:
                return run_by_platform(((None, cudnn.passes_by_rows),), form, inputs)
            return softmax_attention_reference(form, inputs)

        return with_gradients(call, arrays)

    for ids in (packed, jnp.zeros_like(packed)):
        compare = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
        jax.tree.map(compare, run(True, ids), run(False, ids))
    assert set(windows) == {(6, 0)}


SHAPES = AttentionShapes(8, 4096, 16, 8, 64, 1024, jnp.dtype(jnp.bfloat16), True, False)


@needs_kernels
def test_what_serves_a_call_on_which_device():
    def by(device, **change):
        served = explain(dispatch.Call(OP, SHAPES._replace(**change), None), devices.NAMED[device])
        return served.by, served.others

    assert by("h200")[0] == "cudnn_or_xla" and by("h200", segments=False)[0] == "cudnn_attention"
    assert "does not take the segments" in by("h200")[1]["cudnn_attention"]
    assert by("v5e")[0] == "splash_attention" and by("cpu")[0] == "xla"
    for device, name in (("h200", "cudnn_or_xla"), ("v5e", "splash_attention")):
        wrong = {"float32": dict(dtype=jnp.dtype(jnp.float32)), "not 36": dict(key=36), "log": dict(log_sum=True)}
        for reason, change in wrong.items():
            served, others = by(device, **change)
            assert served == "xla" and reason in others[name]
    assert "not 256" in by("h200", key=256)[1]["cudnn_or_xla"]


@needs_kernels
def test_what_cannot_be_traced_here_is_left_out(monkeypatch):
    """Under a device the choice is the report's, except that cuDNN is not traced where JAX does not find it."""
    monkeypatch.setattr(devices, "in_sight", lambda: (devices.NAMED["h200"],))
    served = lambda: [found.name for _, found in choose(OP, SHAPES).branches]  # noqa: E731
    if cudnn.not_installed():
        assert served() == ["xla"]
        assert "cuDNN" in available(OP).missing["cudnn_or_xla"]
        with pytest.raises(NotImplementedError, match="'cudnn_or_xla' cannot run: JAX finds no cuDNN"):
            choose(OP, SHAPES, "cudnn_or_xla")
    listed = [dataclasses.replace(found, not_installed=dispatch.installed) for found in dispatch.implementations(OP)]
    monkeypatch.setattr(dispatch, "implementations", lambda op: tuple(listed))
    assert served() == ["cudnn_or_xla", "xla"]


MESH_PROGRAM = """
    import jax, jax.numpy as jnp, numpy as np, re
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from engrax.pallas_kernels import softmax_attention
    from engrax.pallas_kernels.softmax_attention import xla
    xla.TILE = 8
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=(4, 75, n, 8)), jnp.float32) for n in (4, 2, 2)]
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (4, 75)), axis=1), jnp.int32)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    rows, split = (NamedSharding(mesh, P(("data", "fsdp"), None, *more)) for more in ((), ("tensor",)))
    placed, placed_ids = [jax.device_put(x, split) for x in arrays], jax.device_put(ids, rows)
    for window in (None, 40, 3):
        def gradients(ids, *a):
            total = lambda *a: jnp.sum(jnp.sin(softmax_attention(*a, window=window, segment_ids=ids)))
            return jax.grad(total, argnums=(0, 1, 2))(*a)
        with jax.set_mesh(mesh):
            program = jax.jit(gradients, out_shardings=(split,) * 3).lower(placed_ids, *placed).compile()
            got = program(placed_ids, *placed)
        wanted = jax.jit(gradients)(ids, *arrays)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, wanted)
        moved = re.findall("all-gather|all-reduce|all-to-all|collective-permute", program.as_text())
        assert not moved, (window, moved)
    print("no array travels")
"""


@pytest.mark.deep
def test_rows_and_heads_are_split_without_moving_an_array(run_python):
    assert "no array travels" in run_python(textwrap.dedent(MESH_PROGRAM), devices=8)


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(q=jnp.ones((2, 6, 8))), "q has shape .2, 6, 8., wanted .B, T, H, K."),
        (dict(k=jnp.ones((2, 5, 2, 8))), "k has shape .2, 5, 2, 8., wanted .B, T, G, K. = .2, 6, 2, 8."),
        (dict(v=jnp.ones((2, 6, 2, 4))), "v has shape .2, 6, 2, 4., wanted .B, T, G, K. = .2, 6, 2, 8."),
        (dict(q=jnp.ones((2, 6, 3, 8))), "q has 3 heads, wanted a multiple of the 2 heads of k and v"),
        (dict(window=0), "window is 0, wanted an integer of at least 1"),
        (dict(segment_ids=jnp.ones((2, 6))), "segment_ids has dtype float"),
        (dict(scale="1"), "scale is '1'"),
    ],
)
def test_wrong_arguments(change, message):
    arrays = dict(q=jnp.ones((2, 6, 4, 8)), k=jnp.ones((2, 6, 2, 8)), v=jnp.ones((2, 6, 2, 8)))
    with pytest.raises(ValueError, match=message):
        softmax_attention(**(arrays | change))


def test_costs():
    """A window of 2 in 4 tokens has 1 + 2 + 2 + 2 pairs of query and key; all tokens have 10."""
    sizes = dict(batch=1, seq=4, heads=1, key=1)
    assert [cost.flops(**sizes, window=window).forward for window in (2, None)] == [4 * 7, 4 * 10]
    assert cost.traffic_bytes(**sizes).forward == 4 * 4 * 2
