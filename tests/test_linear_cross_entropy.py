"""The operation `linear_cross_entropy`: against the definition, and without the logits in memory."""

import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engrax.pallas_kernels import available, linear_cross_entropy
from engrax.pallas_kernels.linear_cross_entropy import cost
from engrax.pallas_kernels.linear_cross_entropy.api import linear_cross_entropy_terms
from engrax.tests.neural_memory_problems import assert_close
from engrax.tests.op_problems import compiled, relative_rms


def make_problem(batch=2, length=7, features=5, vocabulary=23, unlabelled=0.2, scale=1.0):
    """Returns (hidden, embedding, labels), float64."""
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(scale * rng.normal(size=(batch, length, features)))
    embedding = jnp.asarray(scale * rng.normal(size=(vocabulary, features)))
    labels = rng.integers(0, vocabulary, size=(batch, length))
    labels = np.where(rng.random(size=labels.shape) < unlabelled, -1, labels)
    labels[0, 0], labels[-1, -1] = 0, vocabulary - 1
    return hidden, embedding, jnp.asarray(labels, jnp.int32)


def nats(*args, **options):
    """The losses alone."""
    return linear_cross_entropy(*args, **options)[0]


def values_and_grads(hidden, embedding, labels, **options):
    """Returns (losses, gradients of a random weighting of them with respect to hidden and embedding)."""

    def run(hidden, embedding):
        return nats(hidden, embedding, labels, **options)

    @compiled
    def both(hidden, embedding):
        losses, pull = jax.vjp(run, hidden, embedding)
        return losses, pull(jnp.asarray(np.random.default_rng(1).normal(size=losses.shape), losses.dtype))

    return both(hidden, embedding)


@pytest.mark.parametrize("chunk", [1, 5, 8, 23, 1024])
def test_xla_equals_reference(chunk, x64):
    problem = make_problem()
    assert_close(values_and_grads(*problem, chunk_size=chunk), values_and_grads(*problem, implementation="reference"))


def test_reference_is_the_definition(x64):
    hidden, embedding, labels = map(np.asarray, make_problem())
    losses = nats(hidden, embedding, labels, implementation="reference")
    for b, t in np.ndindex(labels.shape):
        logits = embedding @ hidden[b, t]
        wanted = np.log(np.sum(np.exp(logits))) - logits[labels[b, t]] if labels[b, t] >= 0 else 0
        np.testing.assert_allclose(losses[b, t], wanted, rtol=1e-12)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_correct_is_where_the_label_is_the_first_largest_logit(implementation, x64):
    hidden, embedding, labels = make_problem(batch=4, length=16, vocabulary=6)
    embedding = embedding.at[3].set(embedding[1])  # two entries that always tie: argmax takes the first
    labels = jnp.where(labels < 0, labels, jnp.argmax(hidden @ embedding.T, axis=-1).astype(jnp.int32))
    labels = labels.at[:, ::3].set(3)
    _, correct = linear_cross_entropy(hidden, embedding, labels, chunk_size=2, implementation=implementation)
    wanted = (labels >= 0) & (jnp.argmax(hidden @ embedding.T, axis=-1) == labels)
    assert correct.dtype == bool and np.array_equal(correct, wanted) and 0 < int(correct.sum()) < correct.size


def test_soft_cap_and_the_log_of_the_sum(x64):
    """Both implementations and the definition agree, values and gradients; no logit exceeds the cap."""
    hidden, embedding, labels = make_problem(scale=3.0)

    def terms(implementation):
        def run(hidden, embedding):
            options = dict(soft_cap=2.0, chunk_size=8, implementation=implementation)
            nats, _, log_total = linear_cross_entropy_terms(hidden, embedding, labels, **options)
            return jnp.sum(jnp.sin(nats)) + jnp.sum(log_total**2), (nats, log_total)

        return compiled(jax.value_and_grad(run, argnums=(0, 1), has_aux=True))(hidden, embedding)

    assert_close(terms("xla"), terms("reference"))
    logits = 2.0 * jnp.tanh(hidden @ embedding.T / 2.0)
    (_, (nats, log_total)), _ = terms("xla")
    real = labels >= 0
    wanted = jnp.where(real, jax.nn.logsumexp(logits, axis=-1), 0)
    np.testing.assert_allclose(log_total, wanted, rtol=1e-12)
    at_label = jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(nats, jnp.where(real, wanted - at_label, 0), rtol=1e-12, atol=1e-14)


def test_gradients_equal_finite_differences(x64):
    hidden, embedding, labels = make_problem()
    direction = (
        np.random.default_rng(2).normal(size=hidden.shape),
        np.random.default_rng(3).normal(size=embedding.shape),
    )
    total = jax.jit(lambda h, e: jnp.sum(jnp.sin(nats(h, e, labels, chunk_size=8))))
    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))(hidden, embedding)
    ends = [total(*(x + step * d for x, d in zip((hidden, embedding), direction))) for step in (1e-5, -1e-5)]
    slope = sum(jnp.vdot(g, d) for g, d in zip(gradient, direction))
    np.testing.assert_allclose((ends[0] - ends[1]) / 2e-5, slope, rtol=1e-7)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_float32(scale, x64):
    problem = make_problem(batch=2, length=30, features=48, vocabulary=500, scale=scale)
    lower = [x.astype(jnp.float32) for x in problem[:2]]
    wanted = values_and_grads(*(x.astype(jnp.float64) for x in lower), problem[2], implementation="reference")
    errors = relative_rms(values_and_grads(*lower, problem[2], chunk_size=64), wanted)
    assert max(jax.tree.leaves(errors)) < 1e-5, errors


def test_bfloat16():
    """bfloat16 operands, float32 sums: the losses are those of the rounded inputs, to float32."""
    hidden, embedding, labels = make_problem(length=30, features=48, vocabulary=500)
    lower = [x.astype(jnp.bfloat16) for x in (hidden, embedding)]
    losses, gradient = values_and_grads(*lower, labels, chunk_size=64)
    assert losses.dtype == jnp.float32 and {g.dtype for g in gradient} == {jnp.dtype(jnp.bfloat16)}
    exact = values_and_grads(*(x.astype(jnp.float32) for x in lower), labels, implementation="reference")
    assert relative_rms(losses, exact[0]) < 1e-6
    assert max(relative_rms(gradient, exact[1])) < 0.005


def test_unlabelled_tokens_may_hold_anything(x64):
    hidden, embedding, labels = make_problem(unlabelled=0.5)
    blank = np.asarray(labels) < 0
    clean = values_and_grads(hidden, embedding, labels, chunk_size=8)
    dirty = values_and_grads(jnp.where(blank[..., None], jnp.nan, hidden), embedding, labels, chunk_size=8)
    assert_close(dirty, clean, 1e-14)
    losses, (hidden_bar, _) = dirty
    assert np.all(losses[blank] == 0) and np.all(losses[~blank] > 0) and np.all(np.asarray(hidden_bar)[blank] == 0)


def test_large_logits_do_not_overflow():
    hidden, embedding, labels = make_problem(scale=100.0)
    losses, gradient = values_and_grads(hidden, embedding, labels, chunk_size=8)
    assert all(np.all(np.isfinite(x)) for x in (losses, *gradient)) and losses.max() > 1e3


def test_one_token_and_vmap(x64):
    hidden, embedding, labels = make_problem(batch=1, length=1, unlabelled=0)
    one = nats(hidden[:, :1], embedding, labels[:, :1])
    assert one.shape == (1, 1)
    hidden, embedding, labels = make_problem(batch=3)

    def loss(hidden, labels):
        return jnp.sum(nats(hidden[None], embedding, labels[None], chunk_size=8) ** 2)

    looped = jnp.stack([jax.grad(loss)(h, l) for h, l in zip(hidden, labels)])
    assert_close(jax.jit(jax.vmap(jax.grad(loss)))(hidden, labels), looped)


def gradient_program(length, vocabulary, chunk_size=128):
    shapes = [(1, length, 16), (vocabulary, 16)]
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    labels = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def run(hidden, embedding, labels):
        return jnp.sum(nats(hidden, embedding, labels, chunk_size=chunk_size))

    return compiled(jax.value_and_grad(run, argnums=(0, 1))).lower(*args, labels).compile()


def test_the_logits_are_never_in_memory():
    """Temporary memory is that of one tile of logits, whatever the vocabulary; no buffer has tokens x vocabulary."""
    length, vocabulary = 512, 8192
    program = gradient_program(length, vocabulary)
    tile = cost.temporary_bytes(batch=1, seq=length, chunk_size=128)
    assert program.memory_analysis().temp_size_in_bytes < 4 * tile + 4 * 16 * vocabulary
    sizes = [np.prod([int(n) for n in m.split(",") if n]) for m in re.findall(r"f32\[([\d,]*)\]", program.as_text())]
    assert length * 128 in sizes and max(sizes) < length * vocabulary / 8


def test_cost_counts_the_matrix_products():
    sizes = dict(batch=1, seq=256, features=64, vocabulary=128)
    hidden, embedding, labels = make_problem(1, 256, 64, 128)
    counted = cost.flops(**sizes)

    def run(hidden, embedding):
        return nats(hidden, embedding, labels, implementation="xla")

    def backward(hidden, embedding):
        return jax.vjp(run, hidden, embedding)[1](jnp.ones(labels.shape))

    # One tile, so that XLA's count sees every product; it then makes the logits once for both directions.
    for program, wanted in ((run, counted.forward), (backward, counted.backward)):
        analysis = jax.jit(program).lower(hidden, embedding).compile().cost_analysis()
        assert 0.9 < wanted / analysis["flops"] < 1.01


MESH_PROGRAM = """
    import jax, jax.numpy as jnp, numpy as np, re
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from engrax.pallas_kernels import linear_cross_entropy
    nats = lambda *args, **options: linear_cross_entropy(*args, **options)[0]
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(8, 6, 16)).astype(np.float32)
    embedding = rng.normal(size=(64, 16)).astype(np.float32)
    labels = rng.integers(-1, 64, size=(8, 6)).astype(np.int32)
    def run(hidden, embedding, labels):
        total = lambda h, e: jnp.sum(nats(h, e, labels, chunk_size=16))
        return jax.value_and_grad(total, argnums=(0, 1))(hidden, embedding)
    program = jax.jit(run)
    whole = program(hidden, embedding, labels)
    rows, copies = NamedSharding(mesh, P(("data", "fsdp"))), NamedSharding(mesh, P())
    args = jax.device_put(hidden, rows), jax.device_put(embedding, copies), jax.device_put(labels, rows)
    for a, b in zip(jax.tree.leaves(program(*args)), jax.tree.leaves(whole)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    text = program.lower(*args).compile().as_text()
    assert "all-gather" not in text and "all-to-all" not in text  # rows stay where they are
    print("rows stay apart")
"""


def test_rows_stay_on_their_devices(run_python):
    assert "rows stay apart" in run_python(textwrap.dedent(MESH_PROGRAM), devices=8)


BAD = [
    (dict(hidden=np.zeros((7, 5))), r"hidden has shape \(7, 5\), wanted \[B, T, D\]"),
    (dict(hidden=np.zeros((2, 7, 5), np.int32)), "hidden has dtype int32"),
    (dict(embedding=np.zeros((23, 4))), r"embedding has shape \(23, 4\), wanted \[V, D\] = \(23, 5\)"),
    (dict(embedding=np.zeros((0, 5))), "every axis at least 1"),
    (dict(labels=np.zeros((2, 6), np.int32)), r"labels has shape \(2, 6\), wanted \[B, T\] = \(2, 7\)"),
    (dict(labels=np.zeros((2, 7))), "labels has dtype .*, wanted an integer dtype"),
    (dict(chunk_size=0), "chunk_size is 0"),
    (dict(soft_cap=0.0), "soft_cap is 0.0, wanted a number above 0 or None"),
    (dict(implementation="xlaa"), "did you mean 'xla'"),
]


@pytest.mark.parametrize("change, message", BAD, ids=[m for _, m in BAD])
def test_bad_arguments_are_named(change, message):
    hidden, embedding, labels = make_problem()
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**(dict(hidden=hidden, embedding=embedding, labels=labels) | change))


def test_there_is_no_kernel():
    names, missing = available("linear_cross_entropy")
    assert names == ("reference", "xla")
    for name in missing:
        with pytest.raises(NotImplementedError, match=f"'{name}' cannot run: .* use 'xla'"):
            linear_cross_entropy(*make_problem(), implementation=name)
