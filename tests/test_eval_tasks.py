"""Evaluation on generated tasks: numbers of known models, the state against its arrays, resumption, refusals."""

import csv
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from engrax import cli, models
from engrax.data import MQAR, Continual, ForgettingMQAR, Parity, TaskMixture
from engrax.errors import UserError
from engrax.evals import Context, continual, evaluate, plots, scoring, task_cells, task_grid
from engrax.evals.evaluators.tasks import TasksConfig, config_of
from engrax.layers import AttentionConfig, LinearAttentionConfig
from engrax.layers.attention.attention import AttentionState
from engrax.models import LanguageModelConfig, RMTConfig
from engrax.models.contract import LinearHead, Model, Output, no_loss
from engrax.tests.experiments import tiny
from engrax.tests.run_folders import text_experiment, write_run
from engrax.tests.test_cli import mistake
from engrax.train import CheckpointConfig, runs
from engrax.train.checkpoint import Checkpoints
from engrax.train.trainer import Trainer

ATTENTION = AttentionConfig(heads=2, head_dim=4, capacity=64)
LINEAR = LinearAttentionConfig(heads=2, head_dim=4)
OWN = MQAR(seq_len=24, num_pairs=2, vocab_size=32, train_examples=512, validation_examples=64)


def experiment(mixers=(LINEAR,), own=OWN, **fields):
    model = LanguageModelConfig(vocab_size=own.vocab_size, dim=16, mixers=mixers, repeat=1, mlp_hidden=16)
    return tiny(model=model, data=own, **fields)


class Answering(Model):
    """A stand-in whose most likely token is the task's answer, or a random one of the tokens [low, high)."""

    def __init__(self, task, guesses=None):
        self.task, self.guesses = task, guesses
        self.scale = nnx.Param(jnp.ones(()), role="norm")

    def __call__(self, tokens, memory=None, *, segment_ids=None, collect=(), mute=()):
        shape = jax.ShapeDtypeStruct(tokens.shape, jnp.int32)
        answers = jax.pure_callback(self.answers, shape, tokens, vmap_method="sequential")
        hidden = jax.nn.one_hot(answers, self.task.vocab_size) * self.scale[...]
        return Output(hidden, None, no_loss(hidden), {})

    def answers(self, tokens):
        tokens = np.asarray(tokens)
        if self.guesses is None:
            return self.task.solve(tokens)
        return np.random.default_rng(tokens.sum()).integers(*self.guesses, tokens.shape, dtype=np.int32)

    def head(self, hidden):
        return LinearHead(hidden, jnp.eye(self.task.vocab_size))


def cell_of(task, guesses=None, examples=150):
    e = experiment(own=task)
    context = Context(runs.Run(epath.Path("run"), e, {}), Answering(task, guesses), 1)
    scorer = scoring.Scorer(e, context.model)
    return task_cells.measure(context, scorer, task, examples)


@pytest.mark.parametrize(
    "task, guesses, parts",
    [
        (MQAR(seq_len=16, num_pairs=2, vocab_size=16), (8, 16), ()),
        (ForgettingMQAR(seq_len=24, num_pairs=4, num_updates=2, vocab_size=16), (8, 16), ("updated", "untouched")),
        (Parity(seq_len=6, shortest=3), (3, 5), ("even", "odd")),
    ],
)
def test_an_oracle_scores_all_and_guesses_score_chance(task, guesses, parts):
    best, guessed = cell_of(task), cell_of(task, guesses)
    assert best.accuracy.value == best.label_accuracy.value == best.oracle == 1 and best.accuracy.low > 0.97
    assert guessed.accuracy.low < guessed.chance < guessed.accuracy.high
    assert guessed.label_accuracy.low < task.chance < guessed.label_accuracy.high
    assert best.examples == len(best.hits) == 150 and sum(best.hits) == sum(best.trials)
    assert {part.name for part in best.slices} == set(parts)
    assert sum(part.labels for part in best.slices) in (0, best.labels)
    for part in guessed.slices:
        assert part.accuracy.low < task.chance < part.accuracy.high


def test_an_answer_whose_loss_is_no_number_is_wrong(monkeypatch):
    """When a right answer's loss is NaN, then it does not count as a hit, and there is no mean loss."""
    score = scoring.Scorer.score

    def broken(*args, **options):
        found = score(*args, **options)
        nats = np.array(found.nats)
        nats[0] = np.nan
        return dataclasses.replace(found, nats=nats)

    monkeypatch.setattr(scoring.Scorer, "score", broken)
    cell = cell_of(MQAR(seq_len=16, num_pairs=2, vocab_size=16), examples=20)
    assert cell.nats is None and cell.hits[0] == 0 and cell.hits[1:] == cell.trials[1:]


def test_strings_count_as_a_whole():
    """Of strings of 3 to 6 bits, guesses get all positions of one in 8, 16, 32 or 64."""
    guessed = cell_of(Parity(seq_len=6, shortest=3), (3, 5))
    assert guessed.chance == pytest.approx((1 / 8 + 1 / 16 + 1 / 32 + 1 / 64) / 4, abs=0.015)
    assert guessed.trials == (1,) * 150 and guessed.accuracy.value < 0.2 < guessed.label_accuracy.value


def used_bytes(memory):
    """Bytes of a memory's arrays, without the empty slots of attention's caches."""

    def of(state):
        if not isinstance(state, AttentionState):
            return sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        used = np.asarray(state.segments) >= 0
        slots = (state.keys[used], state.values[used], state.segments[used])
        return sum(leaf.nbytes for leaf in (*slots, state.tail, state.position, state.last_segment))

    return sum(map(of, jax.tree.leaves(memory, is_leaf=lambda x: isinstance(x, AttentionState))))


@pytest.mark.parametrize(
    "mixer, grows",
    [(ATTENTION, True), (AttentionConfig(heads=2, head_dim=4, window=12, conv_width=4), True), (LINEAR, False)],
)
def test_state_bytes_are_those_of_the_arrays_after_the_row(mixer, grows):
    e = experiment((mixer,))
    memory = models.build(e.model, rngs=nnx.Rngs(0))(jnp.ones((1, 24), jnp.int32)).memory
    short, held, longer = (task_cells.state_at(e, length) for length in (8, 24, 48))
    assert held["total"] == used_bytes(memory) == sum(held["by_mixer"].values())
    assert (short["total"] < held["total"]) == grows
    assert (held["total"] < longer["total"]) == (mixer is ATTENTION)


def test_the_backbone_of_a_segment_recurrent_model_holds_a_segment_at_most():
    e = dataclasses.replace(experiment(), model=RMTConfig(backbone=experiment((ATTENTION,)).model, segment_length=8))
    assert task_cells.state_at(e, 32) == task_cells.state_at(e, 64)
    assert task_grid.grids(e, lengths=[4096])[0].cells, "no cache limits its rows"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "fresh", experiment((ATTENTION, LINEAR)))


ASKED = dict(tasks="mqar,forgetting_mqar", lengths=[24, 48], task={"num_updates": 1}, pairs=[2], examples=70)


@pytest.fixture(scope="module")
def drawn():
    return []


@pytest.fixture(scope="module")
def results(run, drawn):
    with pytest.MonkeyPatch.context() as patch:
        lines = plots.lines
        patch.setattr(plots, "lines", lambda *args, **kw: drawn.append((args, kw)) or lines(*args, **kw))
        return evaluate(run, **ASKED, progress=False)


def test_the_folder_has_every_number(results, drawn):
    assert results.data == json.loads((results.directory / "results.json").read_text())
    assert list(results.evaluations) == ["tasks"], "the tasks instead of the other evaluators"
    found = results.evaluations["tasks"]
    assert (found["trained_on"], found["trained_length"], found["reused_cells"]) == ("mqar", 24, 0)
    cells = found["tasks"]["forgetting_mqar"]["cells"]
    assert [c["values"] for c in cells] == [{"seq_len": n, "num_pairs": 2, "num_updates": 1} for n in (24, 48)]
    for c in cells:
        assert c["accuracy"]["low"] <= c["chance"] == 1 / 16 and c["oracle"] == 1 and c["examples"] == 70
        assert c["tokens_per_second"] > 0 and c["peak_bytes"] > 4 * 16 * 32
        assert set(c["slices"]) == {"updated", "untouched"}
        assert any(name.startswith("linear_attention.") for name in c["diagnostics"])
    grown = cells[1]["state_bytes_by_mixer"]["attention"] - cells[0]["state_bytes_by_mixer"]["attention"]
    assert grown == 24 * (2 * 8 * 4 + 4) and cells[0]["state_bytes"] > 0
    for (title, _, entries), options in drawn:
        assert options["marks"] == [("trained on 24", 24)] and "step 4" in title
        assert {"model", "chance", "oracle"} <= {entry["name"] for entry in entries}
        assert next(e for e in entries if e["name"] == "model")["x"] == [24, 48]
    table = list(csv.DictReader((results.directory / "tasks.csv").open()))
    assert [(row["task"], row["seq_len"]) for row in table] == [
        (name, n) for name in ("mqar", "forgetting_mqar") for n in ("24", "48")
    ]
    assert float(table[3]["accuracy"]) == cells[1]["accuracy"]["value"]
    for name in ("mqar_by_length", "forgetting_mqar_by_length", "mqar_memory"):
        assert (results.directory / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = results.report.read_text()
    assert "forgetting mqar: accuracy by length" in page and "24 (trained)" in page
    assert "mqar, 24 tokens (trained), num pairs 2" in results.summary()


def test_finished_settings_are_not_measured_again(run, results, monkeypatch):
    """When new lengths are asked for and the evaluation is interrupted, then only what is missing is measured."""
    measured, asked = [], ASKED | {"tasks": "mqar", "lengths": [16, 24, 32]}
    del asked["task"]
    opened = runs.open_run(run)
    model, step = opened.load()
    kept = task_cells.Cells(Context(opened, model, step), model, step, 70).find(dataclasses.replace(OWN, seq_len=48))

    def measure(context, scorer, task, *rest, until=9):
        if len(measured) == until:
            raise KeyboardInterrupt
        measured.append(task.seq_len)
        return kept

    monkeypatch.setattr(task_cells, "measure", functools.partial(measure, until=1))
    with pytest.raises(KeyboardInterrupt):
        evaluate(run, **asked, progress=False)
    monkeypatch.setattr(task_cells, "measure", measure)
    again = evaluate(run, **asked, progress=False)
    assert measured == [16, 32] and again.evaluations["tasks"]["reused_cells"] == 2
    before, after = (r.evaluations["tasks"]["tasks"]["mqar"]["cells"] for r in (results, again))
    assert after[1] == before[0]


def test_a_cell_of_other_weights_or_settings_is_not_used(run, results):
    opened = runs.open_run(run)
    model, step = opened.load()
    task = dataclasses.replace(OWN, seq_len=48)
    context = Context(opened, model, step)
    assert task_cells.Cells(context, model, step, 70).find(task) is not None
    assert task_cells.Cells(context, model, step, 71).find(task) is None, "other rows"
    assert task_cells.Cells(context, model, step + 1, 70).find(task) is None, "another step"
    assert task_cells.Cells(context, model, step, 70).find(dataclasses.replace(task, seed=1)) is None
    model.embedding[...] = model.embedding[...].at[0, 0].add(1e-3)
    assert task_cells.Cells(context, model, step, 70).find(task) is None, "other weights"


@pytest.mark.parametrize("text", ['{"cells": 3}', "nonsense", None])
def test_a_damaged_file_of_settings_is_refused(tmp_path, text):
    folder = write_run(tmp_path / "run", experiment())
    path = folder / "evals" / "task_cells.json"
    path.parent.mkdir()
    if text is None:  # the right key, and less than a cell
        opened = runs.open_run(folder)
        key = task_cells.Cells(Context(opened, opened.load()[0], 4), opened.load()[0], 4, 500).key(OWN)
        text = json.dumps({"cells": {key: {"result": {"examples": "many"}}}})
    path.write_text(text)
    with pytest.raises(UserError, match="task_cells.json") as caught:
        evaluate(folder, lengths=24, progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "args, told",
    [
        (["--tasks", "mqarr"], "unknown task 'mqarr'; did you mean 'mqar'?"),
        (["--tasks", "mqar,"], "unknown task ''"),
        (["--tasks", "stdlib_text"], "unknown task 'stdlib_text'"),
        (["--tasks", "mqar,mqar"], "named twice"),
        (["--lengths", "24,,48"], "'24,,48' is no list such as 64,128,256"),
        (["--lengths", "24,0"], "--lengths"),
        (["--pairs", "two"], "'two' is no list"),
        (["--examples", "0"], "--examples"),
        (["--lengths", "24,128"], "rows of 128 tokens exceed capacity=64 of the run's attention cache"),
        (["--lengths", "4,24"], "the task mqar does not fit: seq_len 4 is too short for 2 pairs"),
        (["--tasks", "mqar", "--pairs", "2,16"], "too few for num_pairs 16"),
        (["--tasks", "memorization", "--task.vocab-size", "64"], "memorization has 64 tokens, and the vocabulary"),
        (["--tasks", "continual", "--lengths", "64"], "choose other tasks for it"),
        (["--tasks", "mqar", "--task.num-pair", "2"], "has a field 'num_pair'; did you mean 'num_pairs'?"),
        (["--tasks", "mqar", "--task.power-a", "early"], "mqar.power_a='early' is not of the type wanted: float"),
        (["--task.power-a"], "--task.power-a needs a value"),
        (["--task.seq-len", "64"], "give it as lengths"),
    ],
)
def test_a_mistake_is_one_line_before_anything_long(run, capsys, monkeypatch, args, told):
    monkeypatch.setattr(runs.Run, "load", None)
    assert told in mistake(capsys, "evaluate", str(run), *args)


def test_a_run_on_text_is_refused(tmp_path, capsys):
    write_run(tmp_path / "run", text_experiment(tmp_path))
    assert "reads text through its tokenizer" in mistake(capsys, "evaluate", str(tmp_path / "run"), "--tasks", "mqar")
    assert "is no generated task; name tasks" in mistake(capsys, "evaluate", str(tmp_path / "run"), "--lengths", "64")


def test_a_run_on_a_mixture_is_tried_on_its_tasks():
    mixture = TaskMixture(tasks=(OWN, dataclasses.replace(OWN, num_pairs=1)), weights=(1, 1), seq_len=32)
    e = dataclasses.replace(experiment((ATTENTION,)), data=mixture)
    (grid,) = task_grid.grids(e, lengths=[24])
    assert grid.cells == {(24,): mixture.tasks[1]}, "of two with one name, the last"
    (other,) = task_grid.grids(e, ["induction"], lengths=[24])
    assert other.cells[(24,)].vocab_size == OWN.vocab_size
    apart = dataclasses.replace(e, data=dataclasses.replace(mixture, tokens="separate"))
    with pytest.raises(UserError, match="separate tokens"):
        task_grid.grids(apart, ["mqar"])


def test_the_settings_of_a_task_are_the_run_s_or_take_its_vocabulary():
    e = experiment((ATTENTION,))
    (own, other), fields = task_grid.grids(e, ["mqar", "forgetting_mqar"]), {"num_updates": (0, 3)}
    assert own.varied == {"seq_len": (24, 48)}, "four times the training's length is beyond the cache"
    assert own.cells == {(24,): OWN, (48,): dataclasses.replace(OWN, seq_len=48)}
    assert list(other.cells) == [(48,)] and other.cells[(48,)].vocab_size == 32
    grid = task_grid.grids(e, ["forgetting_mqar", "parity"], [48], fields | {"num_pairs": (2, 3)})[0]
    assert list(grid.cells) == [(48, 0, 2), (48, 0, 3), (48, 3, 3)]
    assert "num_updates 3 must lie in [0, num_pairs]" in grid.refused[48, 3, 2]
    given = ForgettingMQAR(seq_len=64, num_pairs=3, num_updates=1, vocab_size=32)
    assert task_grid.grids(e, [given], [64])[0].cells == {(64,): given}


def test_arguments_may_be_one_or_several():
    assert config_of() is None and config_of(fields={}) is None
    wanted = TasksConfig(("mqar", "stack"), (64,), {"num_pairs": (4,), "power_a": (0.1, 1.0)}, 9)
    assert config_of("mqar, stack", 64, 4, 9, {"power_a": [0.1, 1.0]}) == wanted
    assert config_of(["mqar", "stack"], (64,), [4], 9, {"power_a": (0.1, 1.0)}) == wanted
    with pytest.raises(UserError, match="whole numbers from 1"):
        config_of(lengths=[0])


def test_the_list_and_the_readme_show_how(capsys, root):
    assert cli.main(["list"]) == 0
    for text in (capsys.readouterr().out, *((root / name).read_text() for name in ("README.md", "docs/tasks.md"))):
        assert "engrax evaluate" in text and "--tasks mqar" in text and "--lengths 64" in text


# A continual stream.

STREAM = Continual(seq_len=16, tasks=(MQAR(seq_len=16, num_pairs=2, vocab_size=16),) * 2, train_examples=64)


def test_the_checkpoints_of_a_stream_are_those_of_its_first_epoch():
    three = dataclasses.replace(STREAM, tasks=STREAM.tasks[:1] * 3, train_examples=96)  # ends after 4, 8 and 12 steps
    assert continual.checkpoints_of(three, 8, [2, 4, 6, 9, 12, 16]) == ([2, 4, 6, 9, 12], [1, 3, 4])
    for steps in ([2, 4, 6], [9, 12], [4, 8], []):
        with pytest.raises(UserError, match="--checkpoint.every"):
            continual.checkpoints_of(three, 8, steps)


def test_the_stability_gap_has_intervals_over_rows():
    """Two tasks of 100 rows: the first falls from 80 % to 20 % and recovers to 60 %, the second ends at 90 %."""
    rng, shares = np.random.default_rng(0), np.array([[0.8, 0.1], [0.2, 0.5], [0.6, 0.9]])
    hits = np.empty((3, 200), int)
    for evaluation, task in np.ndindex(3, 2):
        hits[evaluation, task::2] = rng.permutation(100) < 100 * shares[evaluation, task]
    found = continual.stability_gap_of_rows(hits, np.ones_like(hits), np.array([0, 2]))
    wanted = {"min_accuracy": 0.2, "worst_case_accuracy": 0.55, "average_accuracy": 0.75, "forgetting": 0.2}
    assert {name: metric["value"] for name, metric in found.items()} == pytest.approx(wanted)
    half = 1.96 * np.sqrt(0.2 * 0.8 / 100)
    assert found["min_accuracy"]["low"] == pytest.approx(0.2 - half, abs=0.02)
    assert found["min_accuracy"]["high"] == pytest.approx(0.2 + half, abs=0.02)


@pytest.mark.deep
def test_a_run_on_a_stream_reports_its_stability_gap(tmp_path, monkeypatch):
    e = experiment(own=STREAM, checkpoint=CheckpointConfig(every=4, keep_last=3))
    folder = write_run(tmp_path / "run", e)
    measured, measure = [], task_cells.measure
    monkeypatch.setattr(task_cells, "measure", lambda *args: measured.append(measure(*args)) or measured[0])
    found = evaluate(folder, lengths=[16], examples=20, progress=False).evaluations["tasks"]["tasks"]["continual"]
    assert found["stability_gap"] is None and "has those of steps 4" in found["no_stability_gap"]
    trainer, checkpoints = Trainer(e), Checkpoints(runs.folder(folder), e.checkpoint)
    checkpoints.save(8, trainer.init_state(), {}, {"validation_loss": 1.0})
    checkpoints.close()
    monkeypatch.setattr(task_cells, "measure", lambda *args: measured.append(None) or measured[0])
    results = evaluate(folder, lengths=[16], examples=20, progress=False)
    gap = results.evaluations["tasks"]["tasks"]["continual"]["stability_gap"]
    assert gap["steps"] == [4, 8] and gap["forgetting"]["value"] == 0, "the same parameters"
    assert len(measured) == 2, "the cell of step 4 was there"
    assert "worst case accuracy" in results.summary() and "checkpoints of steps 4, 8" in results.report.read_text()
