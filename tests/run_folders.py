"""Run folders for tests, written without training, and ways to damage their JSON files."""

import copy
import itertools
import json
from pathlib import Path

from engrax.data import MQAR, TextFolder
from engrax.layers import LinearAttentionConfig
from engrax.models import LanguageModelConfig, imported
from engrax.tests import pretrained_numpy
from engrax.tests.experiments import tiny
from engrax.train import experiment as experiments
from engrax.train import run_lock, runs
from engrax.train.checkpoint import Checkpoints
from engrax.train.trainer import Trainer

# Replacements for a value: every type, absurd numbers, names that lead out of the folder.
NONSENSE = (None, True, -1, 10**30, 0.5, float("nan"), "", "../outside/victim", [], [[1]], {}, {"a": {"b": 1}}, ...)
MISSING = ...  # the key is dropped


def write_tokenizer(path: Path, *, backwards: bool = False) -> Path:
    """A tokenizer.json of the 256 bytes, with ascending or descending ids."""
    import tokenizers

    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet(), reverse=backwards)
    found = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    found.save(str(path))
    return path


def text_experiment(folder: Path, **fields) -> experiments.Experiment:
    """A small model on the texts in `folder`/texts with `folder`/tokenizer.json; both are written."""
    (folder / "texts").mkdir()
    for i in range(12):
        (folder / "texts" / f"{i}.txt").write_text(f"document number {i} says hello world " * (5 + i))
    data = TextFolder(
        path=str(folder / "texts"), tokenizer_file=str(write_tokenizer(folder / "tokenizer.json")), seq_len=32
    )
    mixers = (LinearAttentionConfig(heads=2, head_dim=8),)
    model = LanguageModelConfig(vocab_size=256, dim=16, mixers=mixers, repeat=1, mlp_hidden=16)
    return tiny(model=model, data=data, **fields)


def write_run(directory: Path, experiment: experiments.Experiment, source: Path | None = None) -> Path:
    """A run folder with a checkpoint of step 4 and fresh parameters."""
    trainer = Trainer(experiment)
    with run_lock.held(runs.folder(directory)):
        run = runs.prepare(directory, experiment, source=source)
    checkpoints = Checkpoints(run.directory, experiment.checkpoint)
    loader = trainer.loader("train")
    checkpoints.save(4, trainer.init_state(), loader.get_state(), {"validation_loss": 1.0})
    loader.close()
    checkpoints.close()
    (run.directory / "metrics.jsonl").write_text('{"step": 3, "loss": 2.0}\n{"step": 4, "loss": 1.5}\n')
    return Path(directory)


def write_tuned(folder: Path) -> tuple[Path, Path]:
    """(a published checkpoint, a run folder without checkpoints that started from it)."""
    config = pretrained_numpy.CONFIGS["llama3"]
    pretrained_numpy.write_checkpoint(
        folder / "published", config, pretrained_numpy.random_tensors(config, "float32"), 2
    )
    data = MQAR(seq_len=24, num_pairs=2, vocab_size=32, train_examples=64, validation_examples=16)
    model = imported.read_config(folder / "published")
    experiment = tiny(model=model, data=data, init_from=str(folder / "published"))
    return folder / "published", Path(runs.prepare(folder / "tuned", experiment).directory)


def places(value, at=()):
    """The paths of all values inside a JSON value, including itself."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*at, key))


def damages(text: str, each: int | None = None):
    """(the change, the changed text) for every place of a JSON file and `each` kinds of bad values; None = all kinds.

    The kinds rotate, so neighbouring places get different damage.
    """
    whole = json.loads(text)
    kinds = itertools.cycle(NONSENSE)
    for at in places(whole):
        for nonsense in itertools.islice(kinds, each or len(NONSENSE)):
            changed = copy.deepcopy(whole)
            inner = changed
            for key in at[:-1]:
                inner = inner[key]
            if not at:
                changed = None if nonsense is MISSING else nonsense
            elif nonsense is MISSING:
                del inner[at[-1]]
            else:
                inner[at[-1]] = nonsense
            yield f"{'.'.join(map(str, at))} = {nonsense!r}", json.dumps(changed)
