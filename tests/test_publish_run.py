"""`engrax export --to`: a run as a folder that others load, with tokenizer and model card; refusals in one line."""

import dataclasses
import hashlib
import json
import os
import subprocess

import numpy as np
import pytest

import engrax
from engrax import cli
from engrax.data import TextFolder
from engrax.layers import AttentionConfig, TitansConfig
from engrax.layers.delta.gated_deltanet import GatedDeltaNetConfig
from engrax.models import HMTConfig, LanguageModelConfig
from engrax.tests.experiments import tiny
from engrax.tests.published_models import logits
from engrax.tests.test_cli import mistake
from engrax.train import runs
from engrax.train.experiment import CheckpointConfig
from engrax.train.loop import train

PYTHON = os.environ.get("ENGRAX_TRANSFORMERS_PYTHON")
LINEAR = GatedDeltaNetConfig(heads=2, head_dim=8, value_dim=16, chunk_size=8, l2_eps=1e-6)
FULL = AttentionConfig(heads=2, head_dim=8, capacity=512, qk_norm_eps=1e-6, output_gate=True, rope_fraction=0.5)
HYBRID = LanguageModelConfig(vocab_size=256, dim=16, mixers=(LINEAR, FULL), repeat=1, mlp_hidden=24)


def text(tmp_path):
    (tmp_path / "texts").mkdir(exist_ok=True)
    lines = (f"def f{i}(x):\n    return x + {i * i}  # number {i}\n" for i in range(300))
    (tmp_path / "texts" / "code.txt").write_text("\n".join(lines))
    return TextFolder(path=str(tmp_path / "texts"), seq_len=32, validation_fraction=0.2)


@pytest.fixture
def prepared(tmp_path):
    """A run folder of a Titans model, before its first checkpoint."""
    runs.prepare(tmp_path / "run", tiny())
    return str(tmp_path / "run")


@pytest.mark.parametrize(
    "options, told",
    [
        (["--to", "llama"], "llama cannot express this model: its mixers titans would have to be attention"),
        (["--to", "qwen35_text"], "unknown format 'qwen35_text'; did you mean 'qwen3_5_text'?"),
        (["--to", "safetensors", "--dtype", "float8"], "dtype='float8' is not one of float32, bfloat16, float16"),
        ([], "name a format with --to"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(capsys, prepared, tmp_path, options, told):
    assert told in mistake(capsys, "export", prepared, str(tmp_path / "out"), *options)
    assert not (tmp_path / "out").exists()


def test_describe_lists_the_formats(capsys, tmp_path):
    runs.prepare(tmp_path / "run", tiny(model=HYBRID, data=text(tmp_path)))
    assert cli.main(["describe", str(tmp_path / "run")]) == 0
    rows = dict(
        line.split(None, 3)[2:] for line in capsys.readouterr().out.splitlines() if line.startswith("export --to")
    )
    assert rows["qwen3_5_text"] == rows["safetensors"] == "fits" and "llama" not in rows
    assert rows["gated_deltanet"].startswith("mixers.1.qk_norm_eps=1e-06 would have to be None")


@pytest.mark.deep
def test_a_run_is_written_with_tokenizer_and_card(capsys, tmp_path):
    experiment = tiny(model=HYBRID, data=text(tmp_path), steps=2, checkpoint=CheckpointConfig(every=2))
    train(experiment, tmp_path / "run", progress=False)
    evals = tmp_path / "run" / "evals" / "step_2"
    evals.mkdir(parents=True)
    score = {"bits_per_byte": {"value": 2.345, "low": 2.3, "high": 2.4}, "tokens": 5}
    (evals / "results.json").write_text(json.dumps({"step": 2, "date": "2026", "evaluations": {"validation": score}}))
    out = tmp_path / "out"
    assert cli.main(["export", str(tmp_path / "run"), str(out), "--to", "qwen3_5_text"]) == 0
    assert "note" not in capsys.readouterr().err
    sums = dict(line.split("  ")[::-1] for line in (out / "SHA256SUMS").read_text().splitlines())
    assert sums == {
        name: hashlib.sha256((out / name).read_bytes()).hexdigest()
        for name in (
            *("README.md", "config.json", "generation_config.json", "model.safetensors"),
            *("tokenizer.json", "tokenizer_config.json"),
        )
    }
    page, fields = (out / "README.md").read_text(), json.loads((out / "config.json").read_text())
    assert "validation: bits per byte | 2.3450 (95 % interval 2.3000 to 2.4000)" in page and "from_pretrained" in page
    assert {name: fields[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")} == dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id")
    )
    tokens = np.arange(20)[None]
    wanted = logits(engrax.load(tmp_path / "run")[0], tokens)
    np.testing.assert_allclose(logits(engrax.load_published(out), tokens), wanted, atol=1e-5)  # other chunks
    engrax.export(tmp_path / "run", tmp_path / "own", to="safetensors")
    np.testing.assert_array_equal(logits(engrax.load_published(tmp_path / "own"), tokens), wanted)


@pytest.mark.long
def test_what_is_left_out_is_said(tmp_path):
    """When a model wraps a language model, then its backbone is written alone; as safetensors nothing is left out."""
    attention = AttentionConfig(heads=2, head_dim=8, capacity=64)
    backbone = LanguageModelConfig(vocab_size=32, dim=16, mixers=(attention,), repeat=1, mlp_hidden=16)
    train(
        tiny(model=HMTConfig(backbone=backbone, segment_length=8, summary_tokens=4, sensory_tokens=2), steps=1),
        tmp_path / "run",
        progress=False,
    )
    notes = engrax.export(tmp_path / "run", tmp_path / "out", to="llama")
    assert "hmt's own parts are left out: its backbone is written" in notes
    assert "the data is made of ids, so there is no tokenizer" in notes
    assert engrax.load_published(tmp_path / "out").config.mixers[0].heads == 2
    engrax.export(tmp_path / "run", tmp_path / "own", to="safetensors")
    assert type(engrax.load_published(tmp_path / "own").config) is HMTConfig


GENERATE = """
import json, sys
sys.modules["fla"] = None
import transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer(sys.argv[2], return_tensors="pt").input_ids
new = model.generate(ids, max_new_tokens=int(sys.argv[3]), do_sample=False)
print(json.dumps([ids[0].tolist(), tokenizer.decode(new[0, ids.shape[1] :])]))
"""


@pytest.mark.long
@pytest.mark.skipif(not PYTHON, reason="ENGRAX_TRANSFORMERS_PYTHON names no Python with transformers")
def test_transformers_generates_the_text_of_a_trained_run(tmp_path):
    """When a gated DeltaNet hybrid is trained on text and published, then transformers writes the same text."""
    model = dataclasses.replace(HYBRID, dim=32, mixers=(LINEAR, LINEAR, FULL))
    experiment = tiny(model=model, data=text(tmp_path), steps=60, checkpoint=CheckpointConfig(every=60))
    train(experiment, tmp_path / "run", progress=False)
    engrax.export(tmp_path / "run", tmp_path / "out", to="qwen3_5_text")
    prompt, tokens = "def f7(x):\n    ", 64
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [PYTHON, "-c", GENERATE, str(tmp_path / "out"), prompt, str(tokens)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    ids, theirs = json.loads(done.stdout.splitlines()[-1])
    assert ids == list(prompt.encode())
    ours = engrax.generate(tmp_path / "run", prompt, tokens=tokens, temperature=0.0)
    assert str(ours).removeprefix(prompt) == theirs and len(theirs) == tokens


@pytest.mark.deep
def test_a_titans_model_is_written_as_its_own(tmp_path):
    """When no published format has a mixer, then engrax's own lists every parameter under its name."""
    from engrax.models.imported import publish
    from engrax.tests.published_models import build, parameters
    from engrax.train import experiment as experiments

    config = LanguageModelConfig(vocab_size=32, dim=16, mixers=(TitansConfig.examples()[0],), repeat=1, mlp_hidden=16)
    module = build(config)
    publish.write_own(module, tmp_path / "out", experiments.to_dict(config))
    back = engrax.load_published(tmp_path / "out")
    assert back.config == config
    assert {k: v.tobytes() for k, v in parameters(back).items()} == {
        k: v.tobytes() for k, v in parameters(module).items()
    }
