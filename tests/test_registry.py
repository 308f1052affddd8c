"""Registries of every kind: what may register, what is found, and what no registry knows is refused before training."""

import dataclasses
import json
import sys
import types

import pytest

import engrax
from engrax import flags
from engrax.data import MQAR
from engrax.data.text import CorpusConfig
from engrax.errors import UnknownName, UserError
from engrax.layers import MIXERS, AttentionConfig, TitansConfig
from engrax.models import MODELS, LanguageModelConfig
from engrax.registry import KINDS, Registry, find_registry
from engrax.tests.experiments import tiny
from engrax.train import AdamWConfig, CosineConfig, EvalConfig, LionConfig, SGDConfig, WSDConfig, loop
from engrax.train import experiment as experiments


@pytest.fixture(autouse=True)
def _nothing_stays_registered():
    before = {kind: dict(find_registry(kind).items()) for kind in KINDS}
    yield
    for kind, classes in before.items():
        find_registry(kind)._classes = classes


@pytest.mark.parametrize("kind", KINDS)
def test_register_finds_the_registry_by_the_base(kind):
    base = getattr(engrax, KINDS[kind][1])
    cls = engrax.register("my_own")(dataclasses.dataclass(frozen=True)(type("Mine", (base,), {})))
    assert find_registry(kind)["my_own"] is cls and cls.registered_name == "my_own"
    assert find_registry(kind).kind == kind and base.registered_name == ""


def test_register_refuses_a_class_of_no_kind():
    with pytest.raises(UserError, match=r"Thing cannot be registered as 'thing': .*engrax.OptimizerConfig.*\.$"):
        engrax.register("thing")(type("Thing", (), {}))


def test_a_taken_name_is_refused_where_it_is_registered():
    with pytest.raises(UserError, match="mixer 'titans' is already registered by engrax.layers.test_time.titans"):
        engrax.register("titans")(type("Mine", (engrax.MixerConfig,), {}))
    mine = engrax.register("mine")(type("Mine", (engrax.MixerConfig,), {}))
    again = engrax.register("mine")(type("Mine", (engrax.MixerConfig,), {}))  # a notebook cell run twice
    assert MIXERS["mine"] is again is not mine


def test_an_unknown_name_names_the_nearest():
    with pytest.raises(UnknownName, match="unknown optimizer 'adam'; did you mean 'adamw'"):
        find_registry("optimizer")["adam"]
    with pytest.raises(UnknownName, match="unknown data set 'mqra'; did you mean 'mqar'"):
        find_registry("data")["mqra"]


WALK = """
import sys
from engrax.layers.mixer import MIXERS
assert "engrax.layers.linear.gla" not in sys.modules, "importing a registry walks nothing"
from engrax.layers import GLAConfig
assert "engrax.layers.delta.kda" not in sys.modules, "a name of the package loads its own module"
assert MIXERS["gla"] is GLAConfig and "kda" in MIXERS and len(MIXERS) > 30
"""


def test_a_registry_walks_its_package_when_first_asked(run_python):
    run_python(WALK, devices=1)


def test_a_walk_imports_what_registers_and_reports_what_does_not_import(tmp_path, monkeypatch):
    package = tmp_path / "some_mixers" / "deep"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "helper.py").write_text("raise RuntimeError('helpers load when they are used')")
    own = package / "own.py"
    own.write_text("from some_registry import THINGS\n@THINGS.register('own')\nclass Own: x = 1 / 0\n")
    things = Registry("thing", "some_mixers")
    monkeypatch.setitem(sys.modules, "some_registry", types.SimpleNamespace(THINGS=things))
    monkeypatch.syspath_prepend(tmp_path)
    (package / "__init__.py").write_text("import no_such_module\n")
    with pytest.raises(ModuleNotFoundError):
        len(things)
    (package / "__init__.py").write_text("")
    for _ in range(2):  # a failure is not forgotten
        with pytest.raises(ZeroDivisionError):
            len(things)
    own.write_text("from some_registry import THINGS\n@THINGS.register('own')\nclass Own: x = 1.0  # changed\n")
    assert list(things) == ["own"] and things["own"].x == 1


@dataclasses.dataclass(frozen=True)
class OwnMixer(AttentionConfig):
    """Not registered, as all below."""


class OwnModel(LanguageModelConfig):
    pass


class OwnData(CorpusConfig):
    def _corpus(self):
        raise AssertionError("data was read")


class OwnOptimizer(AdamWConfig):
    pass


class OwnSchedule(WSDConfig):
    pass


class OwnEvaluator(engrax.EvaluatorConfig):
    def run(self, context):
        raise NotImplementedError


class OwnEval(EvalConfig):
    pass


def _model(cls=LanguageModelConfig, mixer=TitansConfig):
    return cls(vocab_size=32, dim=16, mixers=(mixer(),), repeat=1)


UNKNOWN = {
    "mixer": (dict(model=_model(mixer=OwnMixer)), "OwnMixer is not registered"),
    "model": (dict(model=_model(OwnModel)), "OwnModel is not registered"),
    "data": (dict(data=OwnData()), "OwnData is not registered"),
    "optimizer": (dict(optimizer=OwnOptimizer()), "OwnOptimizer is not registered"),
    "schedule": (dict(optimizer=SGDConfig(schedule=OwnSchedule())), "OwnSchedule is not registered"),
    "evaluator": (dict(eval=OwnEvaluator()), "OwnEvaluator is not registered"),
    "no registered kind": (dict(eval=OwnEval()), "eval is a OwnEval, which a saved run could not restore"),
    "no JSON": (dict(seed={1}), "which JSON cannot carry"),
    "another type": (dict(steps=3.5), "steps=3.5 is not of the type wanted: int"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_no_registry_knows_is_refused_before_anything_is_done(case, tmp_path, monkeypatch):
    fields, told = UNKNOWN[case]

    def touched(*_, **__):
        raise AssertionError("data or devices were touched")

    monkeypatch.setattr(loop, "Trainer", touched)
    monkeypatch.setattr(MQAR, "digest", touched)
    experiment = tiny()
    for name, value in fields.items():  # past the types that tests check
        object.__setattr__(experiment, name, value)
    with pytest.raises(UserError, match=told):
        loop.train(experiment, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("optimizer", [LionConfig(b1=0.8), SGDConfig(schedule=WSDConfig(decay_fraction=0.5))])
def test_optimizers_and_schedules_travel_as_json(optimizer):
    text = experiments.to_json(tiny(optimizer=optimizer))
    assert experiments.from_json(text).optimizer == optimizer
    saved = json.loads(text)["experiment"]["optimizer"]
    assert saved["type"] == f"optimizer:{optimizer.registered_name}"
    assert saved["schedule"]["type"] == f"schedule:{optimizer.schedule.registered_name}"


@pytest.mark.parametrize("name", find_registry("optimizer"))
def test_flags_and_the_grid_of_a_comparison_change_every_optimizer(name):
    experiment = tiny(optimizer=find_registry("optimizer")[name]())
    given = ["--optimizer.learning-rate", "0.25", "--optimizer.schedule.warmup-steps", "3"]
    changed = flags.override(experiment, given, "engrax train tiny").optimizer
    assert type(changed) is type(experiment.optimizer)
    schedule = dataclasses.replace(experiment.optimizer.schedule, warmup_steps=3)
    assert (changed.learning_rate, changed.schedule) == (0.25, schedule)
    assert dataclasses.replace(changed, learning_rate=0.5).rate(10)(3) == 0.5


def test_another_optimizer_is_another_experiment():
    old, new = (experiments.to_dict(tiny(optimizer=o)) for o in (AdamWConfig(), LionConfig()))
    assert experiments.differences(old, new) == ["optimizer"]
    old, new = (experiments.to_dict(tiny(optimizer=AdamWConfig(schedule=s))) for s in (CosineConfig(), WSDConfig()))
    assert experiments.differences(old, new) == ["optimizer.schedule"]


def test_a_renamed_class_is_found_and_warns():
    import engrax.layers as layers

    with pytest.warns(DeprecationWarning, match="engrax.layers.HopfieldSettings is now AssociationConfig"):
        assert layers.HopfieldSettings is layers.AssociationConfig
    with pytest.raises(AttributeError, match="no attribute 'HopfieldSetings'"):
        _ = layers.HopfieldSetings


@pytest.mark.parametrize("package", ["", ".data", ".evals", ".layers", ".models", ".train"])
def test_every_public_name_exists(package):
    import importlib

    module = importlib.import_module(f"engrax{package}")
    missing = [name for name in module.__all__ if not hasattr(module, name)]
    assert not missing and sorted(module.__all__) == sorted(set(module.__all__))
    if not package:
        assert {base for _, base in KINDS.values()} <= set(module.__all__)


NUMBERS = [
    pytest.param(registry, name, field.name, id=f"{registry.kind}-{name}-{field.name}")
    for registry in (MIXERS, MODELS)
    for name, cls in registry.items()
    for field in dataclasses.fields(cls)
    if isinstance(field.default, (int, float)) and not isinstance(field.default, bool)
]


@pytest.mark.parametrize("registry, name, field", NUMBERS)
def test_a_negative_number_is_refused_by_its_name(registry, name, field):
    with pytest.raises(UserError, match=field):
        dataclasses.replace(registry[name].examples()[0], **{field: -4})
