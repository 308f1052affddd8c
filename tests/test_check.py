"""`engrax check` names the law that each broken mixer breaks, and no other; good mixers pass."""

import dataclasses
import re

import pytest

from engrax import cli
from engrax.errors import UserError
from engrax.laws import check
from engrax.layers import MIXERS
from engrax.models import LanguageModelConfig
from engrax.tests.broken_mixers import BRIEF, FAULTS, GatedDecayConfig
from engrax.tests.good_mixers import KINDS, GoodConfig

REGISTERED = ("linear_attention", "retnet", "gla", "mamba2", "hgrn2", "gated_deltanet", "kda", "mom", "titans")
REGISTERED += ("attention", "hopfield", "gated_convolution")
# A state that forgets its document lets the next one read it, too.
ALSO = {"segment forgotten": {"packing.apart"}}


def _deep_but(names, fast, long=()):
    marks = {name: [pytest.mark.long if name in long else pytest.mark.deep] for name in names if name not in fast}
    return [pytest.param(name, marks=marks.get(name, ())) for name in names]


@pytest.mark.parametrize("fault", _deep_but(FAULTS, BRIEF))
def test_a_broken_mixer_is_reported_under_its_law(fault):
    wanted = FAULTS[fault]
    breaches = {breach.law: breach for breach in check(GatedDecayConfig(fault), progress=False)}
    print(*breaches.values(), sep="\n")
    assert set(breaches) == {wanted.law} | ALSO.get(fault, set())
    breach = breaches[wanted.law]
    assert re.fullmatch(wanted.position, breach.position), breach.position
    low, high = wanted.sizes
    assert low <= (breach.size or 0) <= high


@pytest.mark.parametrize("kind", _deep_but(KINDS, ("pointwise", "float32"), long=("attention",)))
def test_a_good_mixer_passes(kind):
    assert not check(GoodConfig(kind), progress=False)


@pytest.mark.deep
def test_the_mixer_without_a_fault_passes():
    assert not check(GatedDecayConfig(), progress=False)


@pytest.mark.long
@pytest.mark.parametrize("name", REGISTERED)
def test_a_registered_mixer_passes(name):
    assert not check(MIXERS[name].examples()[0], progress=False)


@pytest.mark.deep
@pytest.mark.parametrize("fault", ["next token", "rows mixed", "dead parameter"])
def test_a_model_is_checked_by_its_logits(fault):
    config = LanguageModelConfig(vocab_size=16, dim=8, mixers=(GatedDecayConfig(fault),), repeat=1, mlp_hidden=0)
    found = [breach.law.split(".")[0] for breach in check(config, progress=False)]
    assert found == [FAULTS[fault].law.split(".")[0]]


FILE = """
import dataclasses
import engrax
from engrax.tests.broken_mixers import GatedDecayConfig

@engrax.register("checked_here")
@dataclasses.dataclass(frozen=True)
class Config(GatedDecayConfig):
    @classmethod
    def examples(cls):
        return cls(), cls("next token")

    exempt_from = {"causality": "I say so"}
"""


def test_the_command_checks_all_that_a_file_registers(tmp_path, capsys):
    """Every example is checked; an exemption that engrax does not know excuses nothing."""
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    try:
        assert cli.main(["check", str(path), "--law", "causality.finite_change", "--law", "state.one_segment"]) == 1
        out, err = capsys.readouterr()
        lines = out.splitlines()
        exempt = [line for line in lines if "exemptions broken" in line]
        assert len(exempt) == 2 and "not an exemption that exists" in exempt[0]
        (leak,) = (line for line in lines if line not in exempt)
        assert leak.startswith("checked_here, example 2: causality.finite_change broken at row 0, token 0, size ")
        assert "after a change of token 1" in leak
        assert "checked_here, example 1: causality.finite_change" in err and "holds" in err
        assert cli.main(["check", "checked_here", "--law", "state.one_segment"]) == 1
    finally:
        del MIXERS._classes["checked_here"]


@pytest.mark.parametrize(
    "target, laws, told",
    [
        ("titanz", (), "did you mean 'titans'?"),
        ("no/such/file.py", (), "no file no/such/file.py"),
        ("titans", ("causalty",), "did you mean 'causality'?"),
        ("nothing.py", (), "registers no mixer or model"),
        ("fails.py", (), "fails.py, line 16 does not run: RuntimeError: not today"),
    ],
)
def test_a_mistake_is_one_line(target, laws, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nothing.py").write_text("x = 1\n")
    fails = (
        FILE.replace("checked_here", "fails_here").replace('"next token"', "None")
        + """
    def build(self, dim, **_):
        raise RuntimeError("not today")
"""
    )
    (tmp_path / "fails.py").write_text(fails)
    try:
        with pytest.raises(UserError, match=re.escape(told)):
            check(target, laws=laws, progress=False)
    finally:
        MIXERS._classes.pop("fails_here", None)


def test_a_law_that_hides_behind_another_is_not_judged(capsys):
    """A model that sees the future cannot carry its state either: that is the same fault."""
    (breach,) = check(GatedDecayConfig("next token"), laws=("causality.finite_change", "state_carry.cuts"))
    assert breach.law == "causality.finite_change"
    assert "not judged while causality is broken" in capsys.readouterr().err
    (breach,) = check(GatedDecayConfig("next token"), laws=("state_carry.cuts",), progress=False)
    assert breach.law == "state_carry.cuts"


def test_a_claimed_exemption_must_be_needed():
    paper = dataclasses.make_dataclass("PaperConfig", [], bases=(GatedDecayConfig,), frozen=True)
    paper.exempt_from = {"causality": "the paper mode sees its segment"}
    (breach,) = check(paper(), laws=("causality",), progress=False)
    assert breach.law == "exemptions" and "which it obeys" in str(breach)
    assert not check(paper("next token"), laws=("causality",), progress=False)


NO_PARAMETERS = """
import dataclasses
import engrax, jax.numpy as jnp
from flax import nnx

@engrax.register("without_parameters")
@dataclasses.dataclass(frozen=True)
class StillConfig(engrax.MixerConfig):
    def build(self, dim, *, rngs, layer=0, num_layers=1):
        return Still()

class Still(nnx.Module):
    def init_state(self, batch_size):
        return {"none": jnp.zeros((batch_size,))}

    def __call__(self, x, state=None, segment_ids=None):
        y = x if segment_ids is None else jnp.where((segment_ids >= 0)[..., None], x, 0)
        return y, self.init_state(len(x)) if state is None else state
"""


def test_a_mixer_without_parameters_passes(tmp_path):
    (tmp_path / "still.py").write_text(NO_PARAMETERS)
    assert check(tmp_path / "still.py", progress=False) == []
