"""TFDS text without TensorFlow and without network: a data set built here, and one mocked by tfds.testing."""

import itertools

import numpy as np
import pytest

from engrax.data import TfdsText
from engrax.errors import UserError

tfds = pytest.importorskip("tensorflow_datasets")


class TinyNotes(tfds.core.GeneratorBasedBuilder):
    """100 + 20 notes of 1 to 40 words; two text features and a number."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"text": tfds.features.Text(), "title": tfds.features.Text()}
        features["stars"] = tfds.features.Scalar(dtype=np.int32)
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 100), "test": self._generate_examples(100, 120)}

    def _generate_examples(self, start, stop):
        for i in range(start, stop):
            yield i, {"text": f"note{i:03} " * (1 + i % 40), "title": f"title {i}", "stars": i}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    TinyNotes(data_dir=path, file_format="array_record").download_and_prepare()
    return str(path)


def notes(data_dir, **fields):
    fields = {"name": "tiny_notes", "validation_split": "test", "seq_len": 64, "buffer_tokens": 2000, **fields}
    return TfdsText(data_dir=data_dir, **fields)


def test_every_example_is_seen_once_and_only_in_its_split(data_dir):
    for split, numbers in (("train", range(100)), ("validation", range(100, 120))):
        words = []
        for batch in notes(data_dir).loader(split, batch_size=4, epochs=1):
            for tokens, ids in zip(batch["tokens"], batch["segment_ids"]):
                words += "".join(
                    notes(data_dir).tokenizer.decode(tokens[ids == segment]) for segment in range(ids.max() + 1)
                ).split()
        counts = {f"note{i:03}": 1 + i % 40 for i in numbers}
        assert sorted(words) == sorted(itertools.chain(*([word] * count for word, count in counts.items())))


def test_a_restored_position_gives_the_same_batches(data_dir):
    loader = notes(data_dir).loader("train", batch_size=4, seed=1)
    for _ in range(70):  # into the second epoch, in its middle group
        next(loader)
    state = loader.get_state()
    assert state["document"] >= 100
    fresh = notes(data_dir).loader("train", batch_size=4, seed=1)
    fresh.set_state(state)
    for _ in range(20):
        np.testing.assert_equal(next(fresh), next(loader))


def test_slices_and_the_other_text_feature(data_dir):
    config = notes(data_dir, train_split="train[:90%]", validation_split="train[90%:]", text_key="title", seq_len=16)
    texts = {}
    for split in ("train", "validation"):
        batches = list(config.loader(split, batch_size=4, epochs=1))
        tokens = np.concatenate([batch["tokens"][batch["segment_ids"] >= 0] for batch in batches])
        texts[split] = config.tokenizer.decode(tokens)
    assert texts["train"].count("title") == 90 and texts["validation"].count("title") == 10


def test_prepared_files_are_enough_without_the_builders_code(data_dir, run_python):
    code = """
import sys, numpy as np
from engrax.data import TfdsText
config = TfdsText(name="tiny_notes", data_dir=sys.argv[1], validation_split="test", seq_len=64, buffer_tokens=2000)
print(next(config.loader("train", batch_size=2))["tokens"].sum(), config.digest(), "tensorflow" in sys.modules)
"""
    config = notes(data_dir)
    total, digest, tensorflow = run_python(code, args=[data_dir]).split()[-3:]
    assert int(total) == next(config.loader("train", batch_size=2))["tokens"].sum()
    assert (digest, tensorflow) == (config.digest(), "False")


def test_digest_follows_splits_and_text(data_dir):
    configs = [notes(data_dir), notes(data_dir, text_key="title"), notes(data_dir, train_split="train[:50%]")]
    assert len({config.digest() for config in configs}) == 3
    assert notes(data_dir, seq_len=32).digest() == configs[0].digest()


@pytest.mark.parametrize(
    "fields, sentence",
    [
        (dict(name=""), "needs the name"),
        (dict(name="tiny_note"), "'tiny_note' was not found"),
        (dict(name="not a name"), "cannot open the data set 'not a name'"),
        (dict(name="tiny_notes:9.9.9"), "9.9.9"),
        (dict(name="lm1b"), r"run tfds.builder\('lm1b', .*file_format='array_record'\)"),
        (dict(validation_split="validation"), "cannot read split 'validation' .*it has test, train"),
        (dict(train_split="train[:x]"), "cannot read split 'train\\[:x\\]'"),
        (dict(validation_split="train"), "both 'train'"),
        (dict(validation_split="train[:1%]"), "'train' and 'train\\[:1%\\]' overlap|overlap"),
        (dict(train_split="train[:50%]+test[:5]", validation_split="test[4:]"), "overlap"),
        (dict(text_key="stars"), "'stars' is not a text feature .*text, title"),
        (dict(buffer_tokens=0), "buffer_tokens"),
    ],
)
def test_mistakes_are_one_sentence(data_dir, fields, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        notes(data_dir, **fields).loader("train", batch_size=2)
    assert "\n" not in str(caught.value)


def test_splits_that_touch_do_not_overlap(data_dir):
    notes(data_dir, train_split="train[:50%]+test[:5]", validation_split="test[5:]").loader("train", batch_size=2)


def test_lm1b_by_name_with_mocked_data():
    with tfds.testing.mock_data(num_examples=30):
        config = TfdsText(name="lm1b", validation_split="test", seq_len=64)
        batch = next(config.loader("train", batch_size=4))
        assert batch["tokens"].shape == (4, 64) and (batch["segment_ids"] >= 0).mean() > 0.7
        assert len(config.digest()) == 64
