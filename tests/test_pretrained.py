"""Imported checkpoints: logits of a plain NumPy forward pass, the same tensors back, errors that say what is wrong."""

import dataclasses
import functools
import hashlib
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from engrax.errors import UserError
from engrax.models import imported
from engrax.models.generate import sample
from engrax.tests import pretrained_numpy as oracle

TOKENS = np.random.default_rng(3).integers(0, 40, (2, 21))


@pytest.fixture
def checkpoint(tmp_path):
    """Returns `write(name, files=1, dtype="float32", **fields) -> (folder, config.json, tensors)`."""

    def write(name, files=1, dtype="float32", **fields):
        config = oracle.CONFIGS[name] | fields
        tensors = oracle.random_tensors(config, dtype)
        oracle.write_checkpoint(tmp_path / name, config, tensors, files)
        return tmp_path / name, config, tensors

    return write


@functools.partial(jax.jit, static_argnums=0)
def run(graphdef, params, tokens):
    model = nnx.merge(graphdef, params)
    hidden, _ = model(tokens)[:2]
    return model.logits(hidden)


def logits_of(model, tokens):
    """The logits [B, T, V] of rows of tokens; compiled once for each kind of model."""
    graphdef, params = nnx.split(model, nnx.Param)
    return np.asarray(run(graphdef, params, jnp.asarray(tokens, jnp.int32)))


@pytest.mark.parametrize("name", oracle.CONFIGS)
def test_logits_are_those_of_a_plain_forward_pass(checkpoint, name):
    folder, config, tensors = checkpoint(name, files=3 if name == "llama3" else 1)
    found = logits_of(imported.load(folder), TOKENS)
    wanted = np.stack([oracle.logits(config, tensors, row) for row in TOKENS])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("name", oracle.CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", ml_dtypes.bfloat16, "float16"], ids=["f32", "bf16", "f16"])
def test_export_writes_the_same_tensors(checkpoint, tmp_path, name, dtype):
    folder, _, tensors = checkpoint(name, files=3, dtype=dtype)
    (folder / "tokenizer.json").write_text("{}")
    imported.export(imported.load(folder), tmp_path / "out", like=folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    names = {file.name for file in folder.iterdir()}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names | {"SHA256SUMS"}
    sums = (line.split("  ") for line in (tmp_path / "out" / "SHA256SUMS").read_text().splitlines())
    assert {(hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest(), name) for name in names} == set(
        map(tuple, sums)
    )
    for file in {*index.values(), "model.safetensors.index.json"}:
        # The same program wrote both, so that equal names, dtypes, shapes and bytes are an equal file.
        assert (tmp_path / "out" / file).read_bytes() == (folder / file).read_bytes(), file
    found = {k: v for file in set(index.values()) for k, v in load_file(tmp_path / "out" / file).items()}
    assert {k: (v.dtype, v.tobytes()) for k, v in found.items()} == {
        k: (v.dtype, v.tobytes()) for k, v in tensors.items()
    }


def test_export_needs_no_more_than_what_describe_source_keeps(checkpoint, tmp_path):
    folder, _, tensors = checkpoint("qwen2", dtype=ml_dtypes.bfloat16)
    model = imported.load(folder)
    imported.describe_source(folder, tmp_path / "kept")
    (folder / "model.safetensors").unlink()
    imported.export(model, tmp_path / "out", like=tmp_path / "kept")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert {k: v.tobytes() for k, v in found.items()} == {k: v.tobytes() for k, v in tensors.items()}
    assert (tmp_path / "out" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_names_of_older_files_and_stored_heads_and_buffers(checkpoint, tmp_path):
    """GPT-2 as first published: no prefix, the masks beside the parameters; here the tied head is stored as well."""
    folder, config, tensors = checkpoint("gpt2")
    old = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    old |= {"h.0.attn.bias": np.ones((1, 1, 64, 64), np.float32), "lm_head.weight": tensors["transformer.wte.weight"]}
    save_file(old, folder / "model.safetensors")
    model = imported.load(folder)
    np.testing.assert_array_equal(model.embedding[...], tensors["transformer.wte.weight"])
    imported.export(model, tmp_path / "out", like=folder)
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(old) - {"h.0.attn.bias"}
    save_file(old | {"lm_head.weight": old["lm_head.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(UserError, match="ties the head to the embedding, but lm_head.weight"):
        imported.load(folder)


def test_the_index_names_the_tensors_that_are_written(checkpoint, tmp_path):
    """Buffers are left out of the files, a file of buffers alone is not written, and engrax reads what is left."""
    folder, config, tensors = checkpoint("llama3")
    (folder / "model.safetensors").unlink()
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32) for i in range(3)}
    oracle.write_checkpoint(folder, config, tensors | buffers, files=3)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(buffers, "buffers.safetensors")
    save_file(buffers, folder / "buffers.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    imported.describe_source(folder, tmp_path / "kept")
    for like, out in ((folder, tmp_path / "out"), (tmp_path / "kept", tmp_path / "again")):
        imported.export(imported.load(folder), out, like=like)
        np.testing.assert_array_equal(imported.load(out).embedding[...], tensors["model.embed_tokens.weight"])
        written = json.loads((out / "model.safetensors.index.json").read_text())
        assert set(written["weight_map"]) == set(tensors) and not (out / "buffers.safetensors").exists()
        assert written["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())


def test_a_description_is_complete_or_absent(checkpoint, tmp_path, monkeypatch):
    folder, _, _ = checkpoint("qwen2")

    def stops(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("engrax.models.imported.checkpoint._copy_descriptions", stops)
        with pytest.raises(OSError, match="no space left"):
            imported.describe_source(folder, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
    imported.describe_source(folder, tmp_path / "kept")  # what the first attempt left is no obstacle
    assert {file.name for file in (tmp_path / "kept").iterdir()} == {"config.json", "tensors.json"}
    assert not (tmp_path / "kept.tmp").exists()
    with pytest.raises(UserError, match="kept is not empty"):
        imported.describe_source(folder, tmp_path / "kept")


def test_generation_continues_a_prompt_and_learned_positions_end(checkpoint):
    folder, config, tensors = checkpoint("opt", max_position_embeddings=24)
    model = imported.load(folder)
    new = sample(model, TOKENS, tokens=3, temperature=0.0)
    for row, made in zip(TOKENS, new):
        for n, token in enumerate(made):
            assert token == oracle.logits(config, tensors, np.concatenate([row, made[:n]]))[-1].argmax()
    with pytest.raises(UserError, match="not numbers"):
        sample(model, TOKENS, tokens=5, temperature=0.0)
    with pytest.raises(UserError, match="25 tokens exceed the 24 learned positions"):
        model(jnp.zeros((1, 25), jnp.int32))


@pytest.mark.parametrize(
    "name, fields, message",
    [
        ("llama3", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling kind 'dynamic'"),
        ("llama3", {"rope_parameters": oracle.LLAMA3_ROPE | {"beta": 3}}, "has the field beta"),
        ("smollm", {"rope_scaling": {"type": "linear"}}, "lacks factor"),
        ("llama3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("llama3", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ("qwen2", {"layer_types": 3 * ["sliding_attention"]}, "layer_types.*one of full_attention for each of 3"),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types"),
        ("smollm", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("smollm", {"rope_interleaved": True}, "rope_interleaved=True"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gpt2", {"activation_function": "mish"}, "activation_function='mish'"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm=True"),
        ("opt", {"architectures": ["FalconForCausalLM"]}, "'FalconForCausalLM' is not supported"),
        ("opt", {"ffn_dim": None}, "lacks the field ffn_dim"),
    ],
)
def test_config_fields_that_are_not_supported_are_named(tmp_path, name, fields, message):
    (tmp_path / "config.json").write_text(json.dumps(oracle.CONFIGS[name] | fields))
    with pytest.raises(UserError, match=message):
        imported.read_config(tmp_path)


@pytest.mark.parametrize("place", ["rope_parameters", None])
def test_rotary_positions_of_whole_heads_may_be_spelled_out(tmp_path, place):
    written = oracle.CONFIGS["llama3"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    wanted, whole = imported.read_config(tmp_path), {"partial_rotary_factor": 1.0}
    written = written | ({place: written[place] | whole} if place else whole)
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert imported.read_config(tmp_path) == wanted


def _without(name):
    return lambda tensors: {k: v for k, v in tensors.items() if k != name}


@pytest.mark.parametrize(
    "change, message",
    [
        (_without("model.layers.1.mlp.up_proj.weight"), "lacks the tensor model.layers.1.mlp.up_proj.weight"),
        (lambda t: t | {"model.extra": t["model.norm.weight"]}, "holds the tensor model.extra unknown"),
        (
            lambda t: t | {"model.norm.weight": np.ones(17, np.float32)},
            r"model.norm.weight has shape \[17\], config.json asks for \[16\]",
        ),
        (
            lambda t: t | {"model.norm.weight": np.ones(16, np.float64)},
            "model.norm.weight is of dtype F64",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(checkpoint, change, message):
    folder, _, tensors = checkpoint("qwen2")
    save_file(change(tensors), folder / "model.safetensors")
    with pytest.raises(UserError, match=message):
        imported.load(folder)


def test_files_that_are_missing_or_damaged_are_named(checkpoint, tmp_path):
    folder, _, _ = checkpoint("qwen2", files=3)
    index = folder / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"]["model.ghost"] = "model-00001-of-00003.safetensors"
    kept = index.read_text()
    index.write_text(json.dumps(found))
    with pytest.raises(UserError, match="tensor model.ghost is missing"):
        imported.load(folder)
    index.write_text(kept)
    part = folder / "model-00002-of-00003.safetensors"
    part.write_bytes(part.read_bytes()[:-5])
    with pytest.raises(UserError, match="model-00002-of-00003.safetensors is damaged"):
        imported.load(folder)
    part.unlink()
    with pytest.raises(UserError, match="model-00002-of-00003.safetensors is missing"):
        imported.load(folder)
    index.unlink()
    with pytest.raises(UserError, match="holds neither model.safetensors nor"):
        imported.load(folder)
    with pytest.raises(UserError, match="config.json is missing"):
        imported.load(tmp_path / "nowhere")


def test_a_config_that_computes_something_else_is_refused(checkpoint):
    folder, _, _ = checkpoint("qwen3")
    config = imported.read_config(folder)
    free = dataclasses.replace(config, remat="full", mixers=(dataclasses.replace(config.mixers[0], window=8),))
    imported.check(folder, free)
    other = dataclasses.replace(config, mixers=(dataclasses.replace(config.mixers[0], rope_base=5.0),))
    with pytest.raises(UserError, match="rope_base is 1000000.0, not 5.0"):
        imported.load(folder, other)


SHARDED = """
import sys, jax, numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from engrax.models import imported
from engrax.models.imported import files
folder = sys.argv[1]
mesh = Mesh(np.array(jax.devices()), ("x",))
config = imported.read_config(folder)
state = nnx.state(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))), nnx.Param)
def place(p):  # the first axis that the devices divide, as ZeRO 3 does it
    axis = next((i for i, n in enumerate(p.shape) if n % 8 == 0), None)
    spec = P() if axis is None else P(*[None] * axis, "x")
    return jax.ShapeDtypeStruct(p.shape, np.float32, sharding=NamedSharding(mesh, spec))
like, sizes, read = jax.tree.map(place, state), {}, files.TensorFiles.read
def counted(self, name, index=()):
    value = read(self, name, index)
    sizes[name] = max(sizes.get(name, 0), value.nbytes)
    return value
files.TensorFiles.read = counted
found = imported.read_params(folder, like)
infos = files.TensorFiles(folder).infos
assert all(sizes[name] * 8 == 4 * np.prod(info.shape) for name, info in infos.items()), sizes
files.TensorFiles.read = read
one = dict(nnx.to_flat_state(nnx.state(imported.load(folder), nnx.Param)))
for path, value in found.items():
    np.testing.assert_array_equal(value, one[path].get_value())
    assert len(value.sharding.device_set) == 8
whole = sum(v.nbytes for v in found.values())
print(whole, sum(v.addressable_shards[0].data.nbytes for v in found.values()))
"""


def test_every_device_gets_its_part_alone(checkpoint, run_python):
    folder, _, _ = checkpoint("qwen2", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    whole, device = map(int, run_python(SHARDED, devices=8, args=(folder,)).split())
    assert device == whole / 8


def test_the_tokenizer_of_the_folder_encodes_for_the_model(checkpoint):
    from engrax.data.tokenizers import load_tokenizer

    folder, _, _ = checkpoint("qwen2")
    vocab = {word: i for i, word in enumerate(["[UNK]", "a", "b", "ab"])}
    spec = {"version": "1.0", "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}}
    spec |= {"pre_tokenizer": {"type": "Whitespace"}, "added_tokens": [], "normalizer": None}
    (folder / "tokenizer.json").write_text(json.dumps(spec | {"post_processor": None, "decoder": None}))
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    model = imported.load(folder)
    assert tokenizer.vocab_size <= model.config.vocab_size
    ids = tokenizer.encode("a b ab")[None]
    assert sample(model, ids, tokens=2, temperature=0.0).shape == (1, 2)
