"""engrax as a model of lm-evaluation-harness: skipped where lm_eval is not installed (pip install 'engrax[harness]').

Tasks and their data are written by the tests; nothing is downloaded.
"""

import json
import math
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from engrax.data.tokenizers import ByteTokenizer
from engrax.errors import UserError
from engrax.layers import AttentionConfig
from engrax.models.session import Session
from engrax.tests import pretrained_numpy, run_folders
from engrax.tests.test_likelihood import TITANS, build, plain

TEXTS = ["A memory needs no window.", "Two bytes: \N{LATIN SMALL LETTER E WITH ACUTE}. " * 20, "\nx"]
TASKS = {
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
        "rows": [{"text": text} for text in TEXTS],
    },
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{label}}",
        "doc_to_choice": ["yes", "no", "perhaps not"],
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "rows": [{"text": "Is it so? " * n, "label": n % 3} for n in range(1, 8)],
    },
    "writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["q", "\n\n"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
        "rows": [{"text": "Once " * n, "answer": "upon"} for n in range(1, 6)],
    },
}


@pytest.fixture(scope="module")
def harness():
    pytest.importorskip("lm_eval")
    from engrax.evals import harness

    return harness


@pytest.fixture(scope="module")
def model():
    return build(TITANS, vocab_size=256)


def session(model):
    return Session(model, tokenizer=ByteTokenizer())


def requests(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """The folder of the three local tasks; the network is off."""
    import yaml

    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    for name, fields in TASKS.items():
        fields = dict(fields)
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in fields.pop("rows")))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | source | fields))
    return tmp_path


def evaluate(lm, tasks):
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(model=lm, tasks=list(TASKS), task_manager=manager, bootstrap_iters=0)


def test_local_tasks_run_offline_and_the_batch_changes_nothing(harness, model, tasks):
    one, four = (evaluate(harness.EngraxLM(session(model), batch_size=rows), tasks) for rows in (1, 4))
    for name in TASKS:
        for a, b in zip(one["samples"][name], four["samples"][name], strict=True):
            flat = [np.ravel(np.array(x["resps"], dtype=object)).tolist() for x in (a, b)]
            for left, right in zip(*flat, strict=True):
                assert left == (pytest.approx(right, abs=1e-5) if isinstance(right, float) else right)
    assert one["results"]["choice"]["acc,none"] == four["results"]["choice"]["acc,none"]
    written = [sample["resps"][0][0] for sample in one["samples"]["writing"]]
    assert any(written) and not any("q" in text for text in written)


def test_a_uniform_byte_model_has_eight_bits_per_byte(harness, model, tasks):
    graphdef, params = nnx.split(model, nnx.Param)
    silent = nnx.merge(graphdef, jax.tree.map(lambda x: 0 * x, params))
    found = evaluate(harness.EngraxLM(session(silent), batch_size=2), tasks)
    assert found["results"]["rolling"]["bits_per_byte,none"] == pytest.approx(8.0, abs=1e-6)
    logp = found["samples"]["choice"][0]["resps"][0][0][0]
    bytes_scored = len("  yes")  # the harness puts a space before a choice, and moves the context's last one there
    assert float(logp) == pytest.approx(-bytes_scored * math.log(256), abs=1e-5)


def test_log_likelihoods_are_those_of_the_model(harness, model):
    lm = harness.EngraxLM(session(model), batch_size=2)
    pairs = [("ask", " answer"), ("ask ", "answer"), ("", "alone"), ("  ", "x"), ("long " * 60, "x")]
    whole = [("ask", " answer"), ("ask", " answer"), ("\n", "alone"), ("\n", "  x"), ("long " * 59 + "long", " x")]
    for (logp, greedy), (context, scored) in zip(lm.loglikelihood(requests("loglikelihood", *pairs)), whole):
        nats, right = plain(model, list(context.encode()), list(scored.encode()))
        assert logp == pytest.approx(-nats.sum(), abs=1e-5) and greedy == right.all()
    for logp, text in zip(lm.loglikelihood_rolling(requests("loglikelihood_rolling", *((t,) for t in TEXTS))), TEXTS):
        assert logp == pytest.approx(-plain(model, [10], list(text.encode()))[0].sum(), abs=1e-3)


def test_answers_end_before_their_first_stop(harness, model):
    lm = harness.EngraxLM(session(model), batch_size=2)
    settings = {"do_sample": True, "temperature": 2.0, "max_gen_toks": 60}
    (whole,) = lm.generate_until(requests("generate_until", ("Once", settings)))
    stop = next(letter for letter in whole[1:] if letter.isascii() and letter not in whole[0])
    later = next(letter for letter in reversed(whole) if letter.isascii())
    (cut,) = lm.generate_until(requests("generate_until", ("Once", settings | {"until": [later, stop, "never"]})))
    assert cut == whole[: min(whole.index(stop), whole.index(later))] and len(cut) < len(whole)


def test_a_session_stands_before_every_request(harness, model):
    book = "It was read once, and is asked often. "
    fed, plain_lm = harness.EngraxLM(session(model).feed(book)), harness.EngraxLM(session(model))
    found = fed.loglikelihood(requests("loglikelihood", ("Who?", " He"), ("", "He")))
    wanted = plain_lm.loglikelihood(requests("loglikelihood", (book + "Who?", " He"), (book[:-1], " He")))
    wanted[1] = (wanted[1][0] - plain_lm.loglikelihood(requests("loglikelihood", (book[:-1], " ")))[0][0], wanted[1][1])
    np.testing.assert_allclose([x[0] for x in found], [x[0] for x in wanted], atol=1e-5)
    settings = {"until": [], "max_gen_toks": 5}
    answers = fed.generate_until(requests("generate_until", ("Who?", settings), ("", settings)))
    assert answers == plain_lm.generate_until(requests("generate_until", (book + "Who?", settings), (book, settings)))


def test_a_cache_of_declared_capacity_is_read_in_windows(harness):
    """Every token is scored once; a context that is too long keeps its newest tokens."""
    model = build(AttentionConfig(heads=2, head_dim=4, capacity=16), vocab_size=256)
    lm = harness.EngraxLM(session(model), batch_size=2)
    assert lm.max_length == 16
    text = "0123456789abcdefghijklmnopqrstuvw"
    windows = [("\n", text[:16]), (text[15], text[16:32]), (text[16:32], text[32])]
    nats = [plain(model, list(c.encode()), list(s.encode()))[0].sum() for c, s in windows]
    (found,) = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    assert found == pytest.approx(-sum(nats), abs=1e-4)
    ((cut, _),) = lm.loglikelihood(requests("loglikelihood", (text, "xy")))
    assert cut == pytest.approx(-plain(model, list(text[-15:].encode()), list(b"xy"))[0].sum(), abs=1e-5)
    assert len(lm.generate_until(requests("generate_until", (text, {"max_gen_toks": 9})))[0].encode()) >= 1
    with pytest.raises(UserError, match="exceed the 16"):
        lm.loglikelihood(requests("loglikelihood", ("a", text)))
    with pytest.raises(UserError, match="exceed the 16"):
        lm.generate_until(requests("generate_until", (text, {"max_gen_toks": 16})))


def test_runs_and_published_checkpoints_are_opened_by_name(harness, tmp_path, capsys):
    run = run_folders.write_run(tmp_path / "run", run_folders.text_experiment(tmp_path))
    from lm_eval.api.registry import get_model

    lm = get_model("engrax").create_from_arg_string(f"run={run},step=4", {"batch_size": 2, "device": "cuda:0"})
    assert lm.rows == 2 and lm.max_length is None and lm.session.name == "step 4"
    config = pretrained_numpy.CONFIGS["llama3"] | {"vocab_size": 256}
    tensors = pretrained_numpy.random_tensors(config, "float32")
    pretrained_numpy.write_checkpoint(tmp_path / "published", config, tensors, 1)
    run_folders.write_tokenizer(tmp_path / "published" / "tokenizer.json")
    lm = harness.EngraxLM(tmp_path / "published", dtype="float32")
    ids = [lm.tokenizer.encode(text).tolist() for text in ("\nWord", " by word")]
    wanted = pretrained_numpy.logits(config, tensors, np.array(ids[0] + ids[1]))[len(ids[0]) - 1 : -1]
    nats = -np.asarray(jax.nn.log_softmax(wanted))[np.arange(len(ids[1])), ids[1]]
    ((found, _),) = lm.loglikelihood(requests("loglikelihood", ("\nWord", " by word")))
    assert found == pytest.approx(-nats.sum(), abs=1e-3)


def test_the_command_hands_its_flags_on(harness, tasks, monkeypatch, capsys):
    from engrax import cli

    monkeypatch.setattr(sys, "argv", ["engrax"])
    run = run_folders.write_run(tasks / "run", run_folders.text_experiment(tasks))
    flags = ["--tasks", "rolling", "--include_path", str(tasks), "--limit", "1", "--batch_size", "2"]
    assert cli.main(["harness", str(run), *flags]) == 0
    assert "bits_per_byte" in capsys.readouterr().out


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"batch_size": "auto"}, "batch_size=auto"),
        ({"prefix": "two"}, "has 3 tokens"),
        ({"max_length": 0}, "can read no more"),
    ],
)
def test_settings_that_do_not_fit_are_refused(harness, model, settings, match):
    with pytest.raises(UserError, match=match):
        harness.EngraxLM(session(model), **settings)


def test_settings_of_tasks_that_have_no_effect_are_refused(harness, model):
    lm = harness.EngraxLM(session(model))
    with pytest.raises(UserError, match="num_beams"):
        lm.generate_until(requests("generate_until", ("a", {"num_beams": 2})))
    with pytest.raises(UserError, match="tokenizer"):
        harness.EngraxLM(Session(model))
