"""The trained run that comes with engrax: the golden file of the format of runs."""

import numpy as np
import pytest

import engrax
from engrax import cli
from engrax.configs import small_hybrid
from engrax.errors import UserError
from engrax.evals.likelihood import continuations
from engrax.train import runs

TEXT = '''def area(shape):
    """Return the area of a shape."""
    if not isinstance(shape, Shape):
        raise TypeError("shape must be a Shape, not %r" % type(shape))
    return shape.width * shape.height
'''
BITS = 2.10928  # per byte of the text, its first byte apart


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    return engrax.sample(tmp_path_factory.mktemp("sample") / "run")


def test_the_shipped_run_restores_with_the_same_loss(copied):
    session = engrax.session(copied)
    ids = session.tokenizer.encode(TEXT).tolist()
    (found,) = continuations(session, [(ids[:1], ids[1:])])
    assert np.mean(found.nats) / np.log(2) == pytest.approx(BITS, abs=1e-4)


def test_the_shipped_run_is_its_config_and_small(copied):
    run = runs.open_run(copied)
    assert run.experiment == small_hybrid.config()
    files = [file for file in copied.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 5_000_000
    assert not any(file.name.startswith((".", "lock")) for file in files)
    assert "/" not in run.environment["platform"]


def test_the_command_copies_it_once(tmp_path, capsys):
    assert cli.main(["sample", str(tmp_path / "run")]) == 0
    assert str(tmp_path / "run") in capsys.readouterr().out and (tmp_path / "run" / "config.json").exists()
    with pytest.raises(UserError, match="not empty"):
        engrax.sample(tmp_path / "run")


@pytest.mark.long
def test_the_shipped_run_continues_and_is_evaluated(copied):
    """On the text that it was trained on; another Python has another."""
    found = engrax.evaluate(copied, batches=2, progress=False)
    assert found.report.exists() and found.bits_per_byte < 3
