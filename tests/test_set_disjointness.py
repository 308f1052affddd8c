"""Set intersection: the rows are what the module says, and the oracle answers them all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engrax import plugins
from engrax.configs.claims import set_order
from engrax.data import SetDisjointness
from engrax.data.set_disjointness import ASK, SEP
from engrax.errors import UserError
from engrax.models.parameters import declare_roles
from engrax.train import AdamWConfig, CosineConfig

TASK = SetDisjointness(small=3, large=9, seq_len=14, vocab_size=40)
MANY = np.arange(500)


@pytest.mark.parametrize(
    "task",
    [
        TASK,
        dataclasses.replace(TASK, order="small_first"),
        dataclasses.replace(TASK, order="large_first", num_passes=2, seq_len=28),
        SetDisjointness(small=1, large=1, seq_len=4, vocab_size=4),
        SetDisjointness(small=5, large=5, seq_len=12, vocab_size=11),
    ],
)
@pytest.mark.parametrize("split", ["train", "validation"])
def test_rows_hold_two_sets_with_one_common_element(task, split):
    tokens, targets = task.generate(split, MANY)
    assert tokens.shape == targets.shape == (500, task.seq_len)
    assert np.array_equal(targets >= 0, np.broadcast_to(np.arange(task.seq_len) == task.seq_len - 1, targets.shape))
    for row, answer in zip(tokens, targets[:, -1]):
        assert row[-1] == ASK
        passes = np.split(row, task.num_passes)
        for shown in passes:
            assert np.array_equal(shown[:-1], passes[0][:-1])
            end = int(np.flatnonzero(shown == SEP)[0])
            first, second = set(shown[:end]), set(shown[end + 1 : -1])
            assert (len(first), len(second)) in {(task.small, task.large), (task.large, task.small)}
            assert first & second == {answer} and min(first | second) >= 2
            if task.order != "random":
                assert len(first) == (task.small if task.order == "small_first" else task.large)
    assert np.array_equal(task.solve(tokens)[targets >= 0], targets[targets >= 0])


def test_orders_places_and_answers_vary():
    tokens, targets = TASK.generate("train", MANY)
    small_first = tokens[:, TASK.small] == SEP
    assert 0.4 < small_first.mean() < 0.6
    places = (tokens[:, :-1] == targets[:, -1:]).mean(axis=0)
    assert np.all(places[[0, 2, 11, 12]] > 0.05) and len(np.unique(targets[:, -1])) > 30
    again, _ = TASK.generate("train", MANY[::-1])
    assert np.array_equal(again[::-1], tokens)
    assert not np.array_equal(TASK.generate("validation", MANY)[0], tokens)


@pytest.mark.parametrize(
    "fields, told",
    [
        ({"small": 10}, "small=10"),
        ({"seq_len": 15}, "set it to 14"),
        ({"num_passes": 2}, "set it to 28"),
        ({"vocab_size": 12}, "needs 13"),
    ],
)
def test_what_does_not_fit_is_refused(fields, told):
    with pytest.raises(UserError, match=told):
        dataclasses.replace(TASK, **fields)


def test_the_card_orders_its_rows_by_the_first_set():
    """Every size of the first set has rows of its own, of one length; all ways to read carry as many numbers."""
    for passes in (1, 2):
        mixture = set_order.rows(passes)
        for first, task in zip(set_order.FIRST, mixture.tasks):
            shown, targets = task.generate("validation", np.arange(40))
            assert shown.shape == (40, passes * (set_order.TOTAL + 2)) and mixture.seq_len == shown.shape[1]
            assert np.all(np.argmax(shown == SEP, axis=1) == first)
            assert np.all((shown == targets[:, -1:]).sum(axis=1) == 2 * passes)
    matrices = [e.model.mixers[0].matrices for e in set_order.experiments().values()]
    assert {sum(m.heads * m.key * m.value for m in each) for each in matrices} == {192}


def test_a_factor_of_the_learning_rate_is_a_learning_rate(root):
    """The benchmarks' small trainings: one program with the rate as a factor does what a config with that rate does."""
    small_training = plugins.load(root / "benchmarks" / "small_training.py")
    model = declare_roles(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model, nnx.Param)
    inputs = jnp.asarray(np.random.default_rng(1).normal(size=(4, 5, 3)), jnp.float32)

    def trained(learning_rate, factor):
        schedule = CosineConfig(warmup_steps=1, final_fraction=0.0)
        optimizer = AdamWConfig(learning_rate=learning_rate, schedule=schedule, weight_decay=0.5, clip_norm=0.1)
        training = small_training.SmallTraining(
            optimizer, 4, lambda p, x: jnp.mean((nnx.merge(graph, p)(x) - jnp.sum(x)) ** 2)
        )
        state, losses = jax.jit(training.run)(training.start(params), inputs, factor)
        return state["params"]["kernel"][...], losses

    (kernel, losses), (wanted, _) = trained(1.0, 0.2), trained(0.2, 1.0)
    np.testing.assert_allclose(kernel, wanted, rtol=1e-5)
    assert losses.shape == (4,) and np.abs(kernel - params["kernel"][...]).max() > 0.1
