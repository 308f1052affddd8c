"""Published formats: a plain forward pass from the files alone gives engrax's logits, and the tensors come back."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from engrax.data.published_tokenizer import describe
from engrax.data.tokenizers import load_tokenizer
from engrax.errors import UserError
from engrax.layers import AttentionConfig, TitansConfig
from engrax.models import imported
from engrax.models.imported import publish
from engrax.models.published import FORMATS, Fields, fit, read
from engrax.tests import published_numpy as oracle
from engrax.tests import run_folders
from engrax.tests.published_models import CONFIGS, GATED, GDN, NORMED, TOKENS, build, logits, model, parameters

QUICK = ("olmo", "gated_deltanet_hybrid", "mamba2")
DEEP = ("qwen3_5", "llama_longrope")


def publish_named(name, folder):
    """(format, config, module) of a model written to `folder`."""
    form, config = CONFIGS[name]
    module = build(config)
    publish.publish(module, folder, FORMATS[form])
    return FORMATS[form], config, module


def _every_model():
    """The names of all models, marked by when they are tried."""
    marks = {name: [] for name in QUICK} | {name: [pytest.mark.deep] for name in DEEP}
    return [pytest.param(name, marks=marks.get(name, [pytest.mark.long])) for name in CONFIGS]


@pytest.mark.parametrize("name", _every_model())
def test_a_plain_forward_pass_of_the_files_gives_the_logits(name, tmp_path):
    form, config, module = publish_named(name, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["model_type"], written["architectures"]) == (form.name, [form.architecture])
    wanted = oracle.logits(tmp_path / "out", TOKENS[0])
    np.testing.assert_allclose(logits(module, TOKENS[:1])[0], wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("name", _every_model())
def test_tensors_come_back_as_they_were(name, tmp_path):
    form, config, module = publish_named(name, tmp_path / "out")
    notes = fit(config, form).notes
    back = imported.load(tmp_path / "out", None if notes else dataclasses.replace(config, remat="full"))
    if notes:  # what has no parameter there has one here, a gate
        publish.publish(back, tmp_path / "again", form)
        ours, theirs = (load_file(tmp_path / folder / "model.safetensors") for folder in ("again", "out"))
    else:
        ours, theirs = parameters(back), parameters(module)
    assert {k: (v.shape, v.tobytes()) for k, v in ours.items()} == {
        k: (v.shape, v.tobytes()) for k, v in theirs.items()
    }


def test_every_format_is_tried():
    assert {form for form, _ in CONFIGS.values()} == set(FORMATS) - {"opt"}  # OPT's tests are in test_pretrained.py


@pytest.mark.parametrize(
    "name, config, message",
    [
        ("qwen3_5_text", model(dataclasses.replace(GDN, max_beta=2.0), GATED), "mixers.0.max_beta=2.0 .* be 1.0"),
        ("qwen3_5_text", model(GDN, dataclasses.replace(GATED, window=5)), "mixers.1.window=5 would have to be None"),
        ("qwen3_5_text", model(dataclasses.replace(GDN, output_gate=False), GATED), "output_gate=False .* be True"),
        ("gated_deltanet", model(GDN, NORMED), "mixers.1.head_dim=8 would have to be 4; mixers.1.qk_norm_eps"),
        ("olmo_hybrid", model(GDN), "at least one layer of each kind"),
        ("mamba2", CONFIGS["mamba2"][1], None),
        ("mamba2", dataclasses.replace(CONFIGS["mamba2"][1], mlp_hidden=24), "mlp_hidden=24 would have to be 0"),
        ("llama", model(TitansConfig()), "its mixers titans would have to be attention"),
        ("llama", CONFIGS["gpt2"][1], "rope_theta=None"),
        ("gpt2", CONFIGS["llama"][1], "n_positions=0"),
        (
            "olmo_hybrid",
            model(GDN, NORMED),
            "mixers.0.norm_eps=1e-06 .*; mixers.1.qk_norm='head' .*norm_places.1='before'",
        ),
        ("gla", model(AttentionConfig()), "one of its mixers would have to be gla"),
        (
            "linear_attn",
            model(CONFIGS["linear_attn"][1].mixers[0].__class__()),
            "normalise=True would have to be False",
        ),
    ],
)
def test_what_a_format_cannot_express_is_named(name, config, message, tmp_path):
    if message is None:
        assert not fit(config, FORMATS[name]).misfits
        return
    with pytest.raises(UserError, match=f"{name} cannot express this model: .*{message}"):
        publish.check_fit(config, FORMATS[name])


def test_a_setting_that_the_format_lacks_never_passes():
    """When any field of a mixer changes, then it is refused, said, or written."""
    free = {"capacity", "chunk_size", "implementation", "l2_eps", "z_loss", "norm_places"}
    for name in ("qwen3_5", "gated_deltanet_hybrid"):
        form, config = CONFIGS[name]
        for place, mixer in enumerate(config.mixers):
            for field in dataclasses.fields(mixer):
                old = getattr(mixer, field.name)
                changed = {int: lambda v: 2 * v or 1, float: lambda v: v / 2, bool: lambda v: not v}.get(type(old))
                if changed is None or field.name in free:
                    continue
                try:
                    other = dataclasses.replace(mixer, **{field.name: changed(old)})
                except UserError:
                    continue
                mixers = tuple(other if i == place else m for i, m in enumerate(config.mixers))
                found = fit(dataclasses.replace(config, mixers=mixers), FORMATS[form])
                same = found.fields == fit(config, FORMATS[form]).fields
                assert found.misfits or found.notes or not same, (name, place, field.name)


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "write_sums", lambda _: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        publish_named("llama", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_large_models_are_cut_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "SHARD", 8000)
    _, _, module = publish_named("gated_deltanet", tmp_path / "out")
    files = {file.name: file.stat().st_size for file in (tmp_path / "out").glob("model-*.safetensors")}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in parameters(module).values())
    back = parameters(imported.load(tmp_path / "out"))
    assert all(value.tobytes() == back[name].tobytes() for name, value in parameters(module).items())


def test_where_a_folder_has_two_layouts_the_single_file_counts(tmp_path, monkeypatch):
    """As in transformers: model.safetensors before its index."""
    monkeypatch.setattr(publish, "SHARD", 8000)
    publish_named("llama", tmp_path / "out")
    for file in (tmp_path / "out").glob("model-*"):
        file.unlink()  # what is left is an index without files
    monkeypatch.undo()
    publish_named("llama", tmp_path / "one")
    (tmp_path / "out" / "model.safetensors").write_bytes((tmp_path / "one" / "model.safetensors").read_bytes())
    assert parameters(imported.load(tmp_path / "out"))


@pytest.mark.parametrize("older", [True, False])
def test_olmo_as_transformers_saves_it_is_read(older, tmp_path):
    """The joint convolution in three equal parts, and norms under older names unless the model was loaded before."""
    _, config, module = publish_named("olmo", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    for i, kind in enumerate(json.loads((tmp_path / "out" / "config.json").read_text())["layer_types"]):
        layer = f"model.layers.{i}."
        if kind == "linear_attention":
            names = [f"{layer}linear_attn.{n}_conv1d.weight" for n in "qkv"]
            joined = np.concatenate([tensors[name] for name in names])
            third = -(-len(joined) // 3)
            tensors |= {n: joined[at * third : (at + 1) * third].copy() for at, n in enumerate(names)}
            if older:
                tensors[f"{layer}attention_layer_norm.weight"] = tensors.pop(f"{layer}input_layernorm.weight")
        if older:
            tensors[f"{layer}feedforward_layer_norm.weight"] = tensors.pop(f"{layer}post_attention_layernorm.weight")
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    back = parameters(imported.load(tmp_path / "out"))
    assert all(value.tobytes() == back[name].tobytes() for name, value in parameters(module).items())


def test_zeros_that_are_not_zero_are_refused(tmp_path):
    """When a bias that engrax has no parameter for is not zero, then the folder is refused, and the tensor named."""
    publish_named("kda", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["model.layers.1.attn.g_proj.1.bias"] += 1
    save_file(tensors, tmp_path / "out" / "model.safetensors")
    with pytest.raises(UserError, match="layers.1.attn.g_proj.1.bias is not zero"):
        imported.load(tmp_path / "out")


@pytest.mark.long
def test_a_pattern_may_be_repeated_inside_the_models_own(tmp_path):
    """When a model's pattern is twice the shortest one, then the same tensors belong to other parameters."""
    _, config, module = publish_named("qwen3_5", tmp_path / "out")
    twice = dataclasses.replace(config, mixers=config.mixers * 2, repeat=1)
    np.testing.assert_array_equal(logits(imported.load(tmp_path / "out", twice)), logits(module))


def test_rounded_weights_are_written_on_request(tmp_path):
    form, config = CONFIGS["llama"]
    publish.publish(build(config), tmp_path / "out", FORMATS[form], dtype="bfloat16")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(value.dtype) for value in tensors.values()} == {"bfloat16"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_bytes_are_a_tokenizer_of_256_tokens(tmp_path):
    files, ids = describe(load_tokenizer(None), None)
    (tmp_path / "tokenizer.json").write_text(files["tokenizer.json"])
    read = load_tokenizer(str(tmp_path / "tokenizer.json"))
    text = "def f(x):\n\treturn 'ä€😀' + x  \x00\x7f"
    assert read.vocab_size == 256 and read.decode(read.encode(text)) == text
    np.testing.assert_array_equal(read.encode(text), np.frombuffer(text.encode(), np.uint8))
    assert set(ids) == {"bos_token_id", "eos_token_id", "pad_token_id"} and not any(ids.values())
    assert json.loads(files["tokenizer_config.json"])["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("name", ("qwen3_5", "olmo", "mamba2", "gated_deltanet_hybrid", "mom", "llama_yarn", "gsa"))
def test_damaged_configs_are_named_in_one_sentence(name):
    """When any field of a config.json is nonsense, then it is read, or refused in one line."""
    form, config = CONFIGS[name]
    whole = json.dumps(fit(config, FORMATS[form]).fields)
    for what, changed in run_folders.damages(whole, 5):
        fields = json.loads(changed)
        try:
            read(Fields(fields, "config.json") if isinstance(fields, dict) else Fields({}, "config.json"))
        except UserError as error:
            assert "\n" not in str(error), (what, str(error))
