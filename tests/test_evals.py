"""Evaluation of checkpoints: the numbers against slow or exact ones, and the files that a run's folder gets."""

import base64
import csv
import dataclasses
import html.parser
import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from engrax.data import MQAR, TextFolder
from engrax.errors import UserError
from engrax.evals import evaluate, evaluation, scoring, statistics, streaming
from engrax.layers import AttentionConfig, TitansConfig
from engrax.models import LanguageModelConfig, RMTConfig
from engrax.train import CheckpointConfig, EvalConfig, Experiment, LogConfig, ParallelConfig, cost, metrics, runs
from engrax.train.loop import train
from engrax.train.trainer import Trainer

STREAMED = 1024  # tokens
PASSES = []  # the muted mixers of every pass over the validation rows of `text_results`
ATTENTION = AttentionConfig(heads=2, head_dim=4, window=8)
TITANS = TitansConfig(heads=2, head_dim=4, depth=1, chunk_size=8, conv_width=1)  # depth 1 compiles fastest


def experiment(data, mixers=(ATTENTION, TITANS), **changes):
    model = LanguageModelConfig(vocab_size=data.vocab_size, dim=8, mixers=mixers, repeat=2, mlp_hidden=16)
    settings = {"steps": 4, "batch_size": 4, "seed": 3, "compute_dtype": "float32"} | changes
    often = {
        "eval": EvalConfig(every=2, batches=100),
        "log": LogConfig(every=1),
        "checkpoint": CheckpointConfig(every=2, keep_last=2),
    }
    return Experiment(data=data, **{"model": model} | settings, **often)


def letters(length, seed):
    """Random text over six letters."""
    return bytes(
        np.random.default_rng(seed).choice(
            np.frombuffer(b"abcdef", np.uint8), length, p=[0.4, 0.25, 0.15, 0.1, 0.06, 0.04]
        )
    )


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(6):
        (folder / f"{i}.txt").write_bytes(letters(1100 + 211 * i, i))
    return folder


@pytest.fixture(scope="module")
def text_run(text_folder, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "text_run"
    train(experiment(TextFolder(path=str(text_folder), seq_len=64, validation_fraction=0.4)), run, progress=False)
    return run


@pytest.fixture(scope="module")
def text_results(text_run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "SIDE_BY_SIDE", 1)  # each document is a group of its own
        score = scoring.Scorer.score

        def counted(self, rows, *, mute=(), **kwargs):
            PASSES.append(mute)
            return score(self, rows, mute=mute, **kwargs)

        patch.setattr(scoring.Scorer, "score", counted)
        return evaluate(text_run, stream=STREAMED, progress=False)


@pytest.fixture(scope="module")
def task_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "task_run"
    data = MQAR(seq_len=16, num_pairs=2, vocab_size=16, validation_examples=70)
    train(experiment(data, mixers=(ATTENTION,)), run, progress=False)
    return run


@pytest.fixture(scope="module")
def task_results(task_run):
    return evaluate(task_run, progress=False)


class Page(html.parser.HTMLParser):
    """What a browser would load for a page, and its text."""

    def __init__(self, text):
        super().__init__()
        self.loaded, self.tags, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]

    def handle_data(self, data):
        self.text.append(data)


def test_results_json_holds_every_number(text_results, text_run):
    data = json.loads((text_results.directory / "results.json").read_text())
    assert data == text_results.data
    assert text_results.directory == runs.open_run(text_run).directory.resolve() / "evals" / "step_4"
    assert data["format_version"] == evaluation.FORMAT_VERSION and data["run"] == "text_run" and data["step"] == 4
    assert data["seeds"] == {"experiment": 3} and len(data["data_digest"]) == 64 and not data["warnings"]
    assert data["config"]["batch_size"] == 4 and data["device"].startswith("cpu")
    splits = runs.open_run(text_run).experiment.data.splits()
    assert data["splits"]["validation"]["bytes"] == splits.validation.bytes > 0
    assert str(splits.train) in text_results.report.read_text()
    found = data["evaluations"]
    names = ["validation", "baselines", "memory_ablation", "by_position", "stream", "diagnostics", "token_types"]
    assert list(found) == list(data["evaluators"]) == [*names, "training", "costs"]
    assert data["evaluators"]["stream"] == {"length": STREAMED}
    v = found["validation"]
    assert v["complete"] and v["tokens"] == v["bytes"] and 0 < v["accuracy"]["value"] < 1
    assert v["bits_per_byte"]["low"] < v["bits_per_byte"]["value"] < v["bits_per_byte"]["high"]
    assert v["bits_per_byte"]["value"] == pytest.approx(v["loss_nats_per_token"] / math.log(2))
    assert v["score"] == v["bits_per_byte"] and v["tokens_per_second"] > 0
    assert [order["order"] for order in found["baselines"]["orders"]] == [1, 2, 3]
    assert set(found["diagnostics"]["titans.lr_mean"]) == {"block 1", "block 3"}
    assert found["training"]["last_step"] == 4 and found["training"]["best_validation_loss"] > 0
    assert list(found["token_types"]["tokens"]) == ["all tokens", "lower case"]  # six letters
    plots = ("baselines", "memory_ablation", "by_position", "stream", "training", "memory_by_block")
    for name in (*plots, "memory_by_type", "memory_over_training"):
        assert (text_results.directory / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_validation_loss_is_that_of_the_training_loop(text_results, text_run):
    """The loop validated the same parameters on the whole split, through code of its own."""
    loss = [row["validation_loss"] for row in metrics.read(text_run) if "validation_loss" in row][-1]
    assert text_results.evaluations["validation"]["loss_nats_per_token"] == pytest.approx(loss, rel=1e-5)


def test_streaming_in_pieces_is_one_long_pass(text_results, text_run):
    """When long documents are read in pieces, then every position has the loss that one pass over all of it gives."""
    found, run = text_results.evaluations["stream"], runs.open_run(text_run)
    documents = [d for d in run.experiment.data.token_documents("validation") if len(d) > STREAMED]
    assert found["documents"] == len(documents) == 2 and found["trained_length"] == 64
    tokens = np.stack([d.tokens[: STREAMED + 1] for d in documents]).astype(np.int32)
    model, _ = run.load()
    logits = jax.nn.log_softmax(model.logits(model(jnp.asarray(tokens[:, :-1]))[0]))
    bits = -np.take_along_axis(np.asarray(logits), tokens[:, 1:, None], axis=-1)[..., 0] / math.log(2)
    pieces = jnp.asarray(tokens[:, :-1]).reshape(-1, streaming.PIECE)  # each read with an empty memory
    logits = jax.nn.log_softmax(model.logits(model(pieces)[0])).reshape(logits.shape)
    reset = -np.take_along_axis(np.asarray(logits), tokens[:, 1:, None], axis=-1)[..., 0] / math.log(2)
    for line, values in zip(found["curve"]["curves"], (bits, reset), strict=True):
        for b in line["bins"]:
            assert b["value"] == pytest.approx(float(values[:, b["from"] : b["to"]].mean()), rel=1e-4)
    for name, values in (("model", bits), ("reset", reset)):
        points = found["by_length"][name]
        assert [point["tokens"] for point in points] == [n for n in (64 << i for i in range(9)) if n < STREAMED] + [
            STREAMED
        ]
        for point in points:
            mean = float(values[:, : point["tokens"]].mean())
            assert point["value"] == pytest.approx(mean, rel=1e-4) and point["multiple"] == point["tokens"] / 64
            assert point["perplexity"] == pytest.approx(2**mean, rel=1e-3)
    quarters = bits.reshape(len(bits), 4, -1).mean(axis=(0, 2))
    assert [q["value"] for q in found["quarters"]] == pytest.approx(quarters.tolist(), rel=1e-4)
    assert found["drift"]["value"] == pytest.approx(quarters[3] - quarters[1], rel=1e-2, abs=1e-4)
    gain = (reset - bits).reshape(len(bits), 4, -1).mean(axis=2)
    assert np.abs(gain[:, 1:]).max() > 1e-3, "the memory makes no difference here"
    assert [q["value"] for q in found["gain_over_reset"]["quarters"]] == pytest.approx(
        gain.mean(axis=0).tolist(), abs=1e-4
    )
    assert found["gain_over_reset"]["drift"]["value"] == pytest.approx((gain[:, 3] - gain[:, 1]).mean(), abs=1e-4)
    assert found["state_bytes"]["first"] == found["state_bytes"]["last"] > 0
    assert found["time"]["piece"]["first"] > 0 and found["time"]["token"]["ratio"] > 0


def test_no_work_is_done_twice(text_results):
    """Validation, ablation and positions need the model's scores, and the last two those with the memory muted."""
    assert PASSES == [(), ("titans",)]


def test_an_evaluation_overwrites_nothing(task_run, task_results):
    """When a step is evaluated again, then the first folder stays as it is and the new one has its own name."""
    before = {file.name: file.read_bytes() for file in task_results.directory.iterdir()}
    again = evaluate(task_run, only=["costs"], progress=False)
    assert again.directory.parent == task_results.directory.parent and again.directory.name == "step_4-2"
    assert list(again.evaluations) == ["costs"] and again.accuracy is None
    assert {file.name: file.read_bytes() for file in task_results.directory.iterdir()} == before
    assert str(again.directory) in again.summary()


def test_the_drift_is_paired_by_document():
    """When documents differ much but each loses the same, then the drift is sure where the quarters are not."""
    bits = np.repeat([[1.0, 2.0, 3.0, 2.1]], 6, axis=0) * 1.0 + np.arange(6)[:, None]
    found = streaming.quarters(np.repeat(bits, 5, axis=1), np.ones((6, 20)))
    assert [q["value"] for q in found["quarters"]] == pytest.approx([3.5, 4.5, 5.5, 4.6])
    assert (found["drift"]["value"], found["drift"]["low"]) == pytest.approx((0.1, 0.1))


@pytest.mark.parametrize("stream, told", [(1000, "multiple of 1024"), (1 << 20, "longest")])
def test_what_cannot_be_streamed_is_refused(text_run, stream, told, monkeypatch):
    """Before anything is scored."""
    with monkeypatch.context() as m, pytest.raises(UserError, match=told):
        m.setattr(scoring, "Scorer", None)
        evaluate(text_run, stream=stream, progress=False)


def test_csv_holds_the_same_numbers(text_results):
    with (text_results.directory / "results.csv").open() as file:
        rows = {row["name"]: row["value"] for row in csv.DictReader(file)}
    assert float(rows["validation.bits_per_byte.value"]) == text_results.bits_per_byte
    assert float(rows["baselines.orders.2.value"]) == text_results.evaluations["baselines"]["orders"][2]["value"]


def test_position_bins_add_up_to_the_whole(text_results):
    found = text_results.evaluations
    for curve in found["by_position"]["position"]["curves"]:
        total = sum(b["tokens"] for b in curve["bins"])
        assert total == found["validation"]["tokens"]
        if curve["name"] == "model":
            assert sum(b["value"] * b["tokens"] for b in curve["bins"]) / total == pytest.approx(
                text_results.bits_per_byte
            )


@pytest.mark.parametrize("which", ["text_results", "task_results"])
def test_report_is_one_self_contained_page(which, request):
    results = request.getfixturevalue(which)
    page = Page(results.report.read_text())
    assert page.loaded and not {"script", "link", "iframe"} & set(page.tags)
    for source in page.loaded:
        assert source.startswith("data:image/png;base64,")
        assert base64.b64decode(source.split(",", 1)[1]).startswith(b"\x89PNG")
    assert "@import" not in results.report.read_text() and "url(" not in results.report.read_text()
    text = " ".join(page.text)
    score = f"{results.evaluations['validation']['score']['value']:.4f}"
    parameters = f"{results.evaluations['costs']['parameters']['total']:,}"
    for wanted in (score, results.data["data_digest"], results.data["run"], parameters):
        assert wanted in text
    assert page.tags.count("figcaption") == page.tags.count("img") == len(page.loaded)
    assert str(results.report) in results.summary() and score in results.summary()
    headings = re.findall("<h2>(.*?)</h2>", results.report.read_text())
    wanted = ["Result", "Score by position", "Training", "Cost", "Where these numbers come from"]
    assert [heading for heading in headings if heading in wanted] == wanted, "in the order of the evaluators"


def test_generated_task_is_scored_beside_chance_and_oracle(task_results):
    found = task_results.evaluations
    v = found["validation"]
    assert v["kind"] == "task" and "baselines" not in found and v["bits_per_byte"] is None
    assert v["task"] == {"chance": 1 / 8, "chance_in_context": 1 / 2, "oracle": 1.0}
    assert v["tokens"] == 2 * 70 and v["rows"] == 70 and v["complete"]
    bins = found["by_position"]["position"]["curves"][0]["bins"]
    right = sum(b["value"] * b["tokens"] for b in bins)
    assert right == pytest.approx(task_results.accuracy * 140) and task_results.bits_per_byte is None


def test_muting_a_memory_changes_the_score(text_results):
    model = text_results.bits_per_byte
    found = text_results.evaluations["memory_ablation"]
    assert set(found) == {"titans"}  # attention is no memory
    assert found["titans"]["muted"]["value"] - model == pytest.approx(found["titans"]["difference"]["value"])
    assert abs(found["titans"]["difference"]["value"]) > 1e-4


def test_muting_leaves_out_the_reads_and_nothing_else(text_run):
    """A model whose memory's output projection is 0 reads nothing: muting changes no bit of it, and much elsewhere."""
    run = runs.open_run(text_run)
    model, _ = run.load()
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: jnp.asarray(rng.normal(0, 0.5, p.shape), p.dtype), nnx.state(model, nnx.Param))
    nnx.update(model, params)
    rows = scoring.validation_rows(run.experiment, 1)
    scorer = scoring.Scorer(run.experiment, model)
    loud, muted = scorer.score(rows).nats, scorer.score(rows, mute=("titans",)).nats
    assert np.abs(loud - muted)[rows.labelled].mean() > 0.05
    out = scorer.params["blocks"][1]["mixer"]["out"]["kernel"]
    out[...] = jnp.zeros_like(out[...])
    np.testing.assert_array_equal(scorer.score(rows).nats, muted)


def test_an_older_step(task_run, task_results):
    found = evaluate(task_run, step=2, progress=False)
    assert found.step == 2 and found.directory.name == "step_2" and task_results.directory.name == "step_4"
    loss = [results.evaluations["validation"]["loss_nats_per_token"] for results in (found, task_results)]
    logged = {row["step"]: row["validation_loss"] for row in metrics.read(task_run) if "validation_loss" in row}
    assert loss == pytest.approx([logged[2], logged[4]], rel=1e-5) and loss[0] != loss[1]


def test_other_data_than_the_training_s_is_warned_about(task_run, tmp_path, capsys):
    run = tmp_path / "copy"
    shutil.copytree(task_run, run)
    environment = json.loads((run / "environment.json").read_text())
    (run / "environment.json").write_text(json.dumps(environment | {"data_digest": "0" * 64}))
    results = evaluate(run, step="best", batches=1, progress=False)
    assert "digest differs" in capsys.readouterr().err and "digest differs" in results.data["warnings"][0]
    assert "digest differs" in results.report.read_text()
    assert results.step == results.evaluations["training"]["best_validation_step"]


def test_fewer_batches_are_the_first_rows(text_folder, monkeypatch):
    e = experiment(TextFolder(path=str(text_folder), seq_len=64, validation_fraction=0.3))
    whole = scoring.validation_rows(e, None)
    monkeypatch.setattr(scoring, "LEAST_BATCH_TOKENS", 64)
    assert scoring.batch_rows(e) == 4 < scoring.batch_rows(dataclasses.replace(e, batch_size=100)) == 100
    some = scoring.validation_rows(e, 2)
    assert len(some) == 8 and whole.complete and not some.complete
    np.testing.assert_array_equal(some.targets, whole.targets[:8])


def test_a_user_s_mistakes_are_one_sentence(text_run, tmp_path):
    for arguments, words in [
        ({"run_dir": tmp_path / "nowhere"}, "no run folder"),
        ({"run_dir": text_run, "step": 17}, "no checkpoint of step 17"),
        ({"run_dir": text_run, "step": "bets"}, "bets"),
        ({"run_dir": text_run, "batches": 0}, "batches=0"),
    ]:
        with pytest.raises(UserError, match=words) as caught:
            evaluate(progress=False, **arguments)
        assert "\n" not in str(caught.value)


# The n-gram baselines: which text they count (how they count is tested in test_ngrams.py).


def test_baselines_count_the_rows_that_the_model_saw(text_folder):
    e = experiment(TextFolder(path=str(text_folder), seq_len=64, validation_fraction=0.3))
    seen, _ = scoring.seen_rows(e, 3)
    loader = Trainer(e).loader("train")
    batches = [next(loader) for _ in range(3)]
    for name, array in seen.arrays().items():
        np.testing.assert_array_equal(array, np.concatenate([batch[name] for batch in batches]))
    assert seen.complete


def test_baselines_count_no_row_of_the_first_epoch_twice(text_folder):
    data = TextFolder(path=str(text_folder), seq_len=64, validation_fraction=0.3)
    seen, epochs = scoring.seen_rows(experiment(data), 100)
    documents = data.documents("train")
    assert seen.labelled.sum() == sum(len(document) - 1 for document in documents) and seen.complete
    assert epochs == pytest.approx(400 / len(seen)) and epochs > 2
    text = np.sort(np.concatenate([np.frombuffer(d[1:], np.uint8) for d in documents]))
    np.testing.assert_array_equal(np.sort(seen.targets[seen.labelled]), text)


def test_bits_per_byte_of_a_json_tokenizer(text_folder, tmp_path):
    """A uniform guess costs log2(V) bits a token, so bits per byte follow from the text's bytes and tokens alone."""
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train([str(text_folder / "0.txt")], vocab_size=300, show_progress=False)
    trained.save(str(tmp_path / "tokenizer.json"))
    data = TextFolder(
        path=str(text_folder), seq_len=64, validation_fraction=0.3, tokenizer_file=str(tmp_path / "tokenizer.json")
    )
    e = experiment(data)
    rows = scoring.validation_rows(e, None)
    bits = np.where(rows.labelled, math.log2(data.vocab_size), 0.0)
    found = statistics.mean(bits, scoring.divisors(rows, scoring.kind_of(e)))
    texts = [data.tokenizer.encode(document) for document in data.documents("validation")]
    tokens = sum(len(text) - 1 for text in texts)
    size = sum(len(data.tokenizer.decode(text[1:]).encode()) for text in texts)
    assert rows.labelled.sum() == tokens < size
    assert found.value == pytest.approx(math.log2(data.vocab_size) * tokens / size)


def test_baselines_of_streamed_runs_count_the_streams(text_folder):
    """When rows are streams, then the training's own batches are counted, and no token of a later pass again."""
    data = TextFolder(path=str(text_folder), seq_len=64, validation_fraction=0.4)
    e = experiment(data, carry_memory=True, batch_size=3)
    loader = Trainer(e).loader("train")
    batches = [next(loader) for _ in range(100)]
    trained = {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    seen, epochs = scoring.seen_rows(e, 5)
    for name, array in seen.arrays().items():
        np.testing.assert_array_equal(array, trained[name][: 5 * 3])
    assert seen.complete and math.isnan(epochs), "less than a pass"
    seen, epochs = scoring.seen_rows(e, 100)
    documents = data.documents("train")
    assert seen.labelled.sum() == sum(len(document) - 1 for document in documents)
    text = np.sort(np.concatenate([np.frombuffer(d[1:], np.uint8) for d in documents]))
    np.testing.assert_array_equal(np.sort(seen.targets[seen.labelled]), text)
    assert epochs == pytest.approx((trained["targets"] >= 0).sum() / len(text)) and epochs > 2


# Costs.


def test_costs_are_those_of_the_arrays(text_run):
    run = runs.open_run(text_run)
    e, (model, _) = run.experiment, run.load()
    found = cost.costs(e)
    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert found["parameters"]["total"] == sum(p.size for p in params) == sum(found["parameters"]["by_part"].values())
    assert found["state_bytes_per_sequence"]["total"] == sum(x.nbytes for x in jax.tree.leaves(model.init_memory(1)))
    assert set(found["state_bytes_per_sequence"]["by_mixer"]) == {"attention", "titans"}
    assert found["flops_per_token"]["forward"] == e.model.flops_per_token(64)
    assert found["training_flops"] == 3 * e.model.flops_per_token(64) * 4 * 4 * 64
    table = cost.format_costs(found)
    assert f"{found['parameters']['total']:,}" in table and len({len(line) for line in table.splitlines()}) == 1


def test_costs_of_a_wrapped_backbone_name_its_mixers(text_folder):
    attention = AttentionConfig(heads=2, head_dim=8)
    backbone = LanguageModelConfig(vocab_size=256, dim=16, mixers=(attention, TitansConfig(heads=2, head_dim=8)))
    wrapped = RMTConfig(backbone=backbone, segment_length=16, memory_tokens=3)
    found = cost.costs(experiment(TextFolder(path=str(text_folder), seq_len=64), model=wrapped))
    parts, state = found["parameters"]["by_part"], found["state_bytes_per_sequence"]
    assert {"backbone.blocks.0 (attention) mixer", "backbone.blocks.1 (titans) mlp", "backbone.embedding"} <= set(parts)
    assert sum(parts.values()) == found["parameters"]["total"]
    assert set(state["by_mixer"]) == {"memory", "attention", "titans"} and state["by_mixer"]["memory"] == 3 * 16 * 4
    assert 0 < state["total"] - sum(state["by_mixer"].values()) < 100  # where in the segment the row is


def test_optimizer_bytes_per_device_follow_the_zero_stage(text_folder):
    e = experiment(TextFolder(path=str(text_folder), seq_len=64), batch_size=8)
    params = jax.tree.leaves(nnx.state(nnx.eval_shape(lambda: e.model.build(rngs=nnx.Rngs(0))), nnx.Param))
    size = lambda p: 4 * p.size  # noqa: E731
    split = lambda p: size(p) // 8 if any(n % 8 == 0 for n in p.shape) else size(p)  # noqa: E731
    counters = 8  # optax counts its steps in two int32, which no device count divides
    whole, parts = sum(map(size, params)), sum(map(split, params))
    for zero, parameters, moments in ((0, whole, whole), (1, whole, parts), (3, parts, parts)):
        found = cost.costs(dataclasses.replace(e, parallel=ParallelConfig(zero=zero)), devices=8)["memory_per_device"]
        assert found["devices"] == 8 and found["parameter_bytes"] == parameters
        assert found["optimizer_bytes"] == 2 * moments + counters
        assert found["optimizer_bytes_unsharded"] == 2 * whole + counters
    assert parts < whole / 4
    assert (
        cost.costs(dataclasses.replace(e, parallel=ParallelConfig(data=2, fsdp=2)))["memory_per_device"]["devices"] == 4
    )
