"""The laws on every registered mixer and every config of its `examples()`."""

import functools

import pytest

from engrax.layers import MIXERS
from engrax.tests.law_cases import cases, check_exemptions, check_exemptions_exist, exempt, is_thorough
from engrax.tests.laws import LAWS
from engrax.tests.subjects import Subject


@functools.lru_cache(maxsize=1)
def subject(name: str, index: int) -> Subject:
    """One subject per config, so that its compiled functions are shared by the laws; the last one alone is kept."""
    return Subject(MIXERS[name].examples()[index], thorough=is_thorough(name, index))


@pytest.mark.parametrize("name, index, law, deep", cases(MIXERS))
def test_law(name, index, law, deep, x64):
    s = subject(name, index)
    if exempt(s.config, law):
        pytest.skip(f"exempt: {s.config.exempt_from}")
    LAWS[law](s, deep)


@pytest.mark.parametrize("name", MIXERS)
def test_exemptions_exist(name):
    for config in MIXERS[name].examples():
        check_exemptions_exist(config)


@pytest.mark.slow
@pytest.mark.parametrize("name, index", [(name, i) for name in MIXERS for i in range(len(MIXERS[name].examples()))])
def test_exempt_laws_really_fail(name, index, x64):
    if MIXERS[name].examples()[index].exempt_from:
        check_exemptions(subject(name, index))
