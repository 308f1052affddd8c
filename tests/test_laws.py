"""The laws on every registered mixer and model, models judged by their logits, and every config of its `examples()`."""

import functools

import pytest

from engrax.laws import LAWS, Subject
from engrax.laws.exemptions import check_exemptions, check_exemptions_exist, exempt
from engrax.layers import MIXERS
from engrax.layers.attention import attention
from engrax.models import MODELS
from engrax.pallas_kernels.softmax_attention import xla
from engrax.tests.law_cases import cases, is_thorough

REGISTRIES = {registry.kind: registry for registry in (MIXERS, MODELS)}
NAMES = [(kind, name) for kind, registry in REGISTRIES.items() for name in registry]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """The rows of the laws are short, and windows are to cut them into blocks."""
    monkeypatch.setattr(attention, "SMALLEST_BLOCK", 1)
    monkeypatch.setattr(xla, "SMALLEST_WINDOW", 1)


def examples(kind: str, name: str) -> tuple:
    """The configs of `examples()`."""
    return REGISTRIES[kind][name].examples()


@functools.lru_cache(maxsize=1)
def subject(kind: str, name: str, index: int) -> Subject:
    """One subject per config, so that its compiled functions are shared by the laws; the last one alone is kept."""
    return Subject(examples(kind, name)[index], thorough=is_thorough(name, index))


@pytest.mark.parametrize("kind, name, index, law, deep", [c for r in REGISTRIES.values() for c in cases(r)])
def test_law(kind, name, index, law, deep, x64):
    s = subject(kind, name, index)
    if exempt(s.config, law):
        pytest.skip(f"exempt: {s.config.exempt_from}")
    LAWS[law](s, deep)


@pytest.mark.parametrize("kind, name", NAMES)
def test_exemptions_exist(kind, name):
    for config in examples(kind, name):
        check_exemptions_exist(config)


@pytest.mark.long  # every law that a config is exempt from runs
@pytest.mark.parametrize(
    "kind, name, index", [(*n, i) for n in NAMES for i, c in enumerate(examples(*n)) if c.exempt_from]
)
def test_exempt_laws_really_fail(kind, name, index, x64):
    check_exemptions(subject(kind, name, index))
