"""The laws on every registered model and every config of its `examples()`, judged by the logits."""

import functools

import pytest

from engrax.models import MODELS
from engrax.tests.law_cases import cases, check_exemptions, check_exemptions_exist, exempt, is_thorough
from engrax.tests.laws import LAWS
from engrax.tests.subjects import Subject


@functools.lru_cache(maxsize=1)
def subject(name: str, index: int) -> Subject:
    """One subject per config, so that its compiled functions are shared by the laws; the last one alone is kept."""
    return Subject(MODELS[name].examples()[index], thorough=is_thorough(name, index))


@pytest.mark.parametrize("name, index, law, deep", cases(MODELS))
def test_law(name, index, law, deep, x64):
    s = subject(name, index)
    if exempt(s.config, law):
        pytest.skip(f"exempt: {s.config.exempt_from}")
    LAWS[law](s, deep)


@pytest.mark.parametrize("name", MODELS)
def test_exemptions_exist(name):
    for config in MODELS[name].examples():
        check_exemptions_exist(config)


@pytest.mark.slow
@pytest.mark.parametrize("name, index", [(name, i) for name in MODELS for i in range(len(MODELS[name].examples()))])
def test_exempt_laws_really_fail(name, index, x64):
    if MODELS[name].examples()[index].exempt_from:
        check_exemptions(subject(name, index))
