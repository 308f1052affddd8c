"""The laws that every memory obeys: one body each, run over every registered mixer and model.

`LAWS` maps `law.part` to a function of a `Subject`; each raises AssertionError where the subject breaks the law.
Where a law says "no bit" the comparison is exact; elsewhere float64 rounding is allowed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from engrax.tests.subjects import ROWS, Subject, is_float

LAWS = {}
ROUNDING = 1e-9  # of the largest value compared, in float64
IMPLEMENTATIONS = ("reference", "xla", "pallas_gpu", "pallas_tpu")


def law(name: str):
    return lambda body: LAWS.setdefault(name, body)


def close(actual, wanted, what: str, tolerance: float = ROUNDING):
    """Asserts that two arrays are finite and differ by rounding alone."""
    actual, wanted = np.asarray(actual), np.asarray(wanted)
    assert actual.shape == wanted.shape, f"{what}: shape {actual.shape}, wanted {wanted.shape}"
    assert np.all(np.isfinite(actual)) and np.all(np.isfinite(wanted)), f"{what}: not finite"
    if actual.size:
        error, size = np.max(np.abs(actual - wanted)), np.max(np.abs(wanted))
        assert error <= tolerance * max(size, 1e-3), f"{what}: differs by {error:.2g} at values up to {size:.2g}"


def same(actual, wanted, what: str):
    """Asserts that two arrays agree in every bit (0 and -0 are the same) and are finite."""
    actual, wanted = np.asarray(actual), np.asarray(wanted)
    assert np.all(np.isfinite(wanted)), f"{what}: not finite"
    places = np.argwhere(actual != wanted)
    assert not len(places), f"{what}: {len(places)} of {actual.size} values changed, first at {tuple(places[0])}"


# ---------------------------------------------------------------------------------------------------------------------
# The contract of the state


@law("state.shapes")
def state_has_a_batch_axis_and_a_fixed_size(s: Subject, deep: bool = False):
    start = s.start(s.params, ROWS)
    axes = jax.tree.leaves(s.batch_axes)
    assert axes, "the state is empty: nothing can be carried from one call to the next"
    assert s.is_model or not any(axes), "every leaf of a mixer's state must be [B, ...]"
    shapes = lambda state: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)  # noqa: E731
    for ids in s.layouts(deep):
        for length, given in ((1, start), (s.length, None)):
            _, after = s.run(s.params, s.x[:, :length], given, None if ids is None else ids[:, :length])
            message = f"a call of {length} tokens turns the state\n{shapes(start)}\ninto\n{shapes(after)}"
            assert shapes(after) == shapes(start), f"{message}\nevery call would be compiled again"


@law("state.start")
def init_state_is_what_none_means(s: Subject, deep: bool = False):
    length = s.length if deep else 1
    for ids in (None, s.ids[:, :length]) if deep else (None,):
        wanted, _ = s.run(s.params, s.x[:, :length], None, ids)
        actual, _ = s.run(s.params, s.x[:, :length], s.start(s.params, ROWS), ids)
        close(actual, wanted, "outputs from init_state against outputs from None")


@law("state.one_segment")
def no_ids_mean_one_segment(s: Subject, deep: bool = False):
    actual, wanted = (s.run(s.params, s.x, None, ids) for ids in (None, s.one_segment))
    close(actual[0], wanted[0], "outputs without ids against outputs with one segment")


# ---------------------------------------------------------------------------------------------------------------------
# 1. Paths agree, 2. state carry


def _by_single_tokens(s: Subject, ids):
    """Outputs [B, T, D] of T calls of one token, and the states before the first tokens."""
    state, outputs, states = s.start(s.params, ROWS), [], []
    for t in range(s.length):
        if t < s.chunk + 2:  # those that the laws start from; a cache may be large
            states.append(state)
        y, state = s.run(s.params, s.x[:, t : t + 1], state, None if ids is None else ids[:, t : t + 1])
        outputs.append(y)
    return np.concatenate(outputs, axis=1), states


@law("paths.steps")
def full_pass_equals_single_tokens(s: Subject, deep: bool = False):
    for ids in s.layouts(deep):
        wanted, _ = s.run(s.params, s.x, None, ids)
        close(_by_single_tokens(s, ids)[0], wanted, f"token by token, {'one segment' if ids is None else 'packed'}")
        if ids is None:
            first, _ = s.run(s.params, s.x[:, :1])
            close(first, wanted[:, :1], "a call of one token from state=None")


@law("paths.implementations")
def implementations_agree(s: Subject, deep: bool = False):
    """Every implementation that can run here, where the config lets one choose; deep: gradients too."""
    if not hasattr(s.config, "implementation"):
        return
    wanted, _ = s.run(s.params, s.x, None, s.ids)
    ran = []
    for name in IMPLEMENTATIONS if s.thorough or deep else ("reference",):  # the xla form is what runs by default here
        other = s.variant(dataclasses.replace(s.config, implementation=name))
        try:
            y, _ = other.run(s.params, s.x, None, s.ids)
        except NotImplementedError:
            continue
        ran.append(name)
        close(y, wanted, f"implementation {name!r}")
        if deep:
            args = (s.params, s.x, s.ids, s.weights)
            compare_trees(other.pullback(*args), s.pullback(*args), f"gradients of implementation {name!r}")
    assert "reference" in ran, f"only {ran} could run: the reference must run everywhere"


def compare_trees(actual, wanted, what: str, tolerance: float = 1e-8):
    leaves = zip(jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(actual))
    for (path, want), got in leaves:
        close(got, want, f"{what}, {jax.tree_util.keystr(path)}", tolerance)


@law("paths.gradients")
def gradients_agree_through_the_state(s: Subject, deep: bool = False):
    """One call, or several with the state between them: the same gradients."""
    cuts = (s.chunk + 3, s.chunk + 4) if deep else (s.chunk + 4,)
    for ids in (None, s.ids) if deep else (s.ids,):
        args = (s.params, s.x, ids, s.weights)
        compare_trees(s.pullback(*args, cuts=cuts), s.pullback(*args), f"gradients through cuts at {cuts}")


@law("state_carry.blocks")
def every_cut_continues(s: Subject, deep: bool = False):
    """Two calls of chunk + 3 tokens, begun at every position of a chunk at once: each row is another cut."""
    block, starts = s.chunk + 3, range(s.chunk + 2)
    for ids, rows in ((s.ids, (0, 1)), (None, (0,)))[: 1 + deep]:
        wanted, _ = s.run(s.params, s.x, None, ids)
        _, states = _by_single_tokens(s, ids)
        state = s.join_rows([s.take_rows(states[a], rows) for a in starts])
        for offset in (0, block):

            def cut(array, offset=offset, rows=rows):
                return np.concatenate([array[np.asarray(rows), a + offset : a + offset + block] for a in starts])

            y, state = s.run(s.params, cut(s.x), state, None if ids is None else cut(ids))
            close(y, cut(wanted), f"call {1 + offset // block} of {block} tokens, begun at every position")


@law("state_carry.cuts")
def cuts_continue(s: Subject, deep: bool = False):
    """f(x) equals f(x[:, :a]) then f(x[:, a:], state), literally; deep: for every a."""
    for ids in (None, s.ids) if deep else (None,):
        wanted, _ = s.run(s.params, s.x, None, ids)
        for a in range(1, s.length) if deep else (s.chunk + 1,):
            head, tail = (None, None) if ids is None else (ids[:, :a], ids[:, a:])
            first, state = s.run(s.params, s.x[:, :a], None, head)
            second, _ = s.run(s.params, s.x[:, a:], state, tail)
            close(np.concatenate([first, second], axis=1), wanted, f"cut at {a} of {s.length}")


# ---------------------------------------------------------------------------------------------------------------------
# 3. Causality, 4. independence, 5. packing


@law("causality.finite_change")
def the_future_changes_no_bit_of_the_past(s: Subject, deep: bool = False):
    for ids in s.layouts(deep):
        before = np.asarray(s.run(s.params, s.x, None, ids)[0])
        for t in range(1, s.length):
            here = np.broadcast_to(np.arange(s.length) == t, (ROWS, s.length))
            after = np.asarray(s.run(s.params, s.changed(s.x, here), None, ids)[0])
            same(after[:, :t], before[:, :t], f"outputs before token {t} after a change of token {t}")
            real = np.ones(ROWS, bool) if ids is None else ids[:, t] >= 0
            seen = np.any(after[:, t] != before[:, t], axis=-1)[real]
            assert np.any(seen) or not np.any(real), f"token {t} does not see itself"


@functools.lru_cache(maxsize=2)
def _jacobian(s: Subject, packed: bool, tokens: tuple[int, ...]):
    """|d(output at t) / d(input at u)|, projected at random, for t in `tokens`: [t, B, u]."""
    rows = []
    for t in tokens:
        weights = np.where(np.arange(s.length)[None, :, None] == t, s.weights, 0)
        rows.append(np.max(np.abs(s.pullback(s.params, s.x, s.ids if packed else None, weights)[1]), axis=-1))
    return np.stack(rows)


def _some_tokens(s: Subject, deep: bool) -> tuple[int, ...]:
    every = 1 if deep or s.length <= 64 else s.length // 32
    return tuple(range(0, s.length, every))


def _gradient_of_other_tokens(s: Subject, ids, others):
    """For a model: the gradient of the outputs at the other positions with respect to tokens where `others [B, T]`.

    Those tokens use the upper half of the vocabulary, the rest the lower half; the logits of the upper half, through
    which tied embeddings would get a gradient of their own, are left out.
    """
    half = s.config.vocab_size // 2
    tokens = np.where(others, half + s.x % half, s.x % half).astype(np.int32)
    wanted = ~others[..., None] & (np.arange(s.config.vocab_size) < half)
    grads = s.pullback(s.params, tokens, ids, np.where(wanted, s.weights, 0))
    found = [(jax.tree_util.keystr(path), g) for path, g in jax.tree_util.tree_leaves_with_path(grads)]
    found = [np.asarray(g) for path, g in found if "embedding" in path and g.shape[0] == s.config.vocab_size]
    assert len(found) == 1, "no parameter named embedding with one row per token"
    assert np.any(found[0][:half] != 0), "the model does not depend on its embedding"
    return found[0][half:]


@law("causality.jacobian")
def no_gradient_from_the_future(s: Subject, deep: bool = False):
    for packed in (True, False)[: 1 + deep]:
        if s.is_model:
            later = np.broadcast_to(np.arange(s.length) > s.chunk + 1, (ROWS, s.length))
            same(_gradient_of_other_tokens(s, s.ids if packed else None, later), 0, "gradient of later tokens")
            continue
        tokens = _some_tokens(s, deep)
        size, t = _jacobian(s, packed, tokens), np.asarray(tokens)
        later = np.arange(s.length)[None, None, :] > t[:, None, None]
        same(np.where(later, size, 0), 0, "Jacobian above the diagonal")
        sees_itself = (size[np.arange(len(t)), :, t] > 0) == (np.asarray(s.ids)[:, t].T >= 0 if packed else True)
        assert np.all(sees_itself), "a token does not see itself, or padding does"


@law("independence.rows")
def other_rows_change_no_bit(s: Subject, deep: bool = False):
    others = np.broadcast_to((np.arange(ROWS) > 0)[:, None], (ROWS, s.length))
    swap = np.array([0, 2, 1])
    for ids in s.layouts(deep):
        before = s.run(s.params, s.x, None, ids)
        for what, x, ids_then in (
            ("changed", s.changed(s.x, others), ids),
            ("permuted", s.x[swap], None if ids is None else ids[swap]),
            ("zero", np.where(others.reshape(others.shape + (1,) * (s.x.ndim - 2)), 0, s.x), ids),
        ):
            after = s.run(s.params, x, None, ids_then)
            same(after[0][0], before[0][0], f"outputs of row 0 with the other rows {what}")
            states = [jax.tree.leaves(s.take_rows(state, [0])) for _, state in (after, before)]
            for leaf_after, leaf_before in zip(*states):
                same(leaf_after, leaf_before, f"state of row 0 with the other rows {what}")
            if what == "permuted":
                close(after[0][swap], before[0], "outputs of permuted rows")


@law("independence.batch_size")
def batch_size_changes_rounding_only(s: Subject, deep: bool = False):
    wanted, _ = s.run(s.params, s.x)
    alone, _ = s.run(s.params, s.x[2:])
    close(alone, wanted[2:], "a row alone against the same row in a batch")
    if deep:
        alone, _ = s.run(s.params, s.x[1:2], None, s.ids[1:2])
        close(alone, s.run(s.params, s.x, None, s.ids)[0][1:2], "a packed row alone against the same row in a batch")


@law("independence.padding")
def padding_is_ignored(s: Subject, deep: bool = False):
    """What stands in padding changes no bit, of what follows either; padding at the end changes rounding only."""
    padding = np.asarray(s.ids) < 0
    before = s.run(s.params, s.x, None, s.ids)
    after = s.run(s.params, s.changed(s.x, padding), None, s.ids)
    same(np.asarray(after[0])[~padding], np.asarray(before[0])[~padding], "outputs after a change of the padding")
    (_, before), (_, after), last = before, after, s.ids.max(axis=1, keepdims=True)
    for t in range(4):  # the row's last segment goes on
        y_before, before = s.run(s.params, s.x[:, t : t + 1], before, last)
        y_after, after = s.run(s.params, s.x[:, t : t + 1], after, last)
        same(y_after, y_before, "the tokens that follow after a change of the padding")
    keep = 2 * s.chunk - 1  # the rest of every row becomes padding
    ids = np.where(np.arange(s.length) < keep, s.one_segment, -1).astype(np.int32)
    padded, whole = s.run(s.params, s.x, None, ids)[0], s.run(s.params, s.x, None, s.one_segment)[0]
    close(padded[:, :keep], whole[:, :keep], "a row with padding at its end against the whole row")


@law("packing.apart")
def packed_segments_equal_segments_alone(s: Subject, deep: bool = False):
    """Each segment alone stands at its own place of the row, everything else being filler of other content."""
    ids = np.asarray(s.ids)
    packed, _ = s.run(s.params, s.x, None, s.ids)
    ranks = np.stack([np.searchsorted(np.unique(row[row >= 0]), row) for row in ids])
    for rank in range(ranks.max() + 1):
        own = (ranks == rank) & (ids >= 0)
        alone, _ = s.run(s.params, s.changed(s.x, ~own), None, np.where(own, s.ids, -2))
        close(np.asarray(alone)[own], np.asarray(packed)[own], f"segment {rank} of each row, packed against alone")
    start = 2 * s.chunk  # row 2's second segment begins on the chunk grid: it equals a run of its own
    ids = np.where(np.arange(s.length) < s.length - start, s.one_segment, -1).astype(np.int32)
    alone, _ = s.run(s.params, np.roll(s.x, -start, axis=1), None, ids)
    close(alone[2:, :-start], packed[2:, start:], "a segment on the chunk grid against the same tokens at the start")


@law("packing.gradients")
def gradients_do_not_cross_segments(s: Subject, deep: bool = False):
    ids = np.asarray(s.ids)
    if s.is_model:
        others = np.isin(ids, [0, 3, 6])  # some segments of each row against the rest
        same(_gradient_of_other_tokens(s, s.ids, others), 0, "gradient of another segment's tokens")
        return
    tokens = _some_tokens(s, deep)
    size = _jacobian(s, True, tokens)
    crosses = ids.T[np.asarray(tokens)][:, :, None] != ids[None]
    same(np.where(crosses, size, 0), 0, "Jacobian across segments")
    assert np.any(size > 0), "the outputs do not depend on the inputs"


# ---------------------------------------------------------------------------------------------------------------------
# 7. Trainability, 8. stability


@law("trainability.gradients")
def every_parameter_has_a_gradient(s: Subject, deep: bool = False):
    grads = s.pullback(s.params, s.x, s.ids, s.weights)
    for path, g in jax.tree_util.tree_leaves_with_path(grads if s.is_model else grads[0]):
        name, g = jax.tree_util.keystr(path), np.asarray(g)
        assert np.all(np.isfinite(g)), f"the gradient of {name} is not finite"
        dead = np.argwhere(g == 0)
        assert not len(dead), f"{len(dead)} of {g.size} entries of {name} have no gradient, first at {dead[0]}"


@law("trainability.finite_differences")
def finite_differences_agree(s: Subject, deep: bool = False):
    """Along a random direction, leaf by leaf, so that no small gradient hides behind a large one."""
    for ids in (s.ids, None)[: 1 + deep]:
        grads = s.pullback(s.params, s.x, ids, s.weights)
        point, grads = ((s.params,), (grads,)) if s.is_model else ((s.params, s.x), grads)
        point, grads = jax.tree.map(np.asarray, (point, grads))
        rng = np.random.default_rng(4)
        for i, (path, g) in enumerate(jax.tree_util.tree_leaves_with_path(grads)):
            direction = rng.standard_normal(g.shape) / g.size**0.5
            wanted = float(np.sum(g * direction))
            # Where the function curves much a long step errs, where little a short one; a wrong gradient fails at all.
            tried = [_directional_derivative(s, point, i, direction, ids, step) for step in (1e-5, 1e-6, 1e-7)]
            found = min(tried, key=lambda value, wanted=wanted: abs(value - wanted))
            size = float(np.linalg.norm(g.ravel()) * np.linalg.norm(direction))
            message = f"the gradient along a direction is {wanted:.9g}, finite differences say {found:.9g}"
            assert abs(found - wanted) <= 1e-6 * max(size, 1e-3), f"{jax.tree_util.keystr(path)}: {message}"


def _directional_derivative(s: Subject, point, leaf: int, direction, ids, step: float) -> float:
    """Fourth-order central difference of sum(weights * outputs) along a direction of one leaf of (params, x)."""
    leaves, tree = jax.tree.flatten(point)

    def value(epsilon):
        moved = [p + epsilon * direction if i == leaf else p for i, p in enumerate(leaves)]
        params, *x = jax.tree.unflatten(tree, moved)
        return float(np.sum(s.weights * np.asarray(s.run(params, x[0] if x else s.x, None, ids)[0])))

    return (8 * (value(step) - value(-step)) - value(2 * step) + value(-2 * step)) / (12 * step)


@law("stability.gradients")
def gradients_stay_finite_at_extreme_gates(s: Subject, deep: bool = False):
    for name, extreme in extreme_gates(jax.tree.map(lambda p: p.astype(jnp.float64), s.initial)):
        grads = s.pullback(extreme, s.x, s.ids, s.weights)
        for path, g in jax.tree_util.tree_leaves_with_path(grads):
            assert np.all(np.isfinite(g)), f"{name}: the gradient of {jax.tree_util.keystr(path)} is not finite"


@law("stability.long")
def long_rows_and_extreme_gates_stay_finite(s: Subject, deep: bool = False, tokens: int = 10_240, block: int = 512):
    """bfloat16 inputs and parameters as the trainer casts them, streamed through the state; gates driven to 0 and 1."""
    config = s.config
    if hasattr(config, "capacity"):  # a cache holds what was declared, no more
        config = dataclasses.replace(config, capacity=tokens)
    with jax.enable_x64(False):
        long = s.variant(config)
        half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), s.initial)
        for name, extreme in extreme_gates(half):
            state = long.start(extreme, ROWS)
            kinds = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
            for n in range(tokens // block if name == "fresh" else 4):
                y, state = long.run(extreme, _stream(s, block, n), state)
                assert np.all(np.isfinite(y)), (
                    f"{name}: an output is not finite among tokens {n * block} to {(n + 1) * block}"
                )
            assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == kinds, (
                f"{name}: the state changes its type"
            )
            for path, leaf in jax.tree_util.tree_leaves_with_path(state):
                what = f"{name}: state {jax.tree_util.keystr(path)}"
                assert not is_float(leaf) or np.all(np.isfinite(np.asarray(leaf, np.float32))), f"{what} is not finite"


def extreme_gates(params):
    """Named variants of the parameters: gate biases and decays moved by 50 (almost 0 or 1) and by 1000 (exactly)."""
    yield "fresh", params
    words = ("gate", "bias", "decay", "beta", "forget", "lambda")
    for name, amount in (
        ("gates +50", 50),
        ("gates -50", -50),
        ("gates +-50", None),
        ("gates -1000", -1000),
        ("gates +1000", 1000),
    ):

        def move(path, p, amount=amount):
            where = jax.tree_util.keystr(path).lower()
            if "kernel" in where or not any(word in where for word in words):
                return p
            by = np.random.default_rng(5).choice([-50.0, 50.0], p.shape) if amount is None else amount
            return (p + by).astype(p.dtype)

        yield name, jax.tree_util.tree_map_with_path(move, params)


def _stream(s: Subject, block: int, n: int):
    """Block n of three kinds of row: random, one token repeated for ever, and zeros."""
    rng = np.random.default_rng(100 + n)
    if s.is_model:
        kinds = [rng.integers(0, s.config.vocab_size, block), np.ones(block), np.zeros(block)]
        return jnp.asarray(np.stack(kinds), jnp.int32)
    kinds = [
        rng.standard_normal((block, s.dim)),
        np.ones((block, 1)) * np.sin(np.arange(s.dim)),
        np.zeros((block, s.dim)),
    ]
    return jnp.asarray(np.stack(kinds), jnp.bfloat16)
