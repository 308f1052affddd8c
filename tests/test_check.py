"""`engrax check` names the law that each broken mixer breaks, and no other; good mixers pass."""

import re

import pytest

from engrax.laws import check
from engrax.tests.broken_mixers import BRIEF, FAULTS, GatedDecayConfig

CASES = [pytest.param(fault, marks=[] if fault in BRIEF else [pytest.mark.long]) for fault in FAULTS]


@pytest.mark.parametrize("fault", CASES)
def test_a_broken_mixer_is_reported_under_its_law(fault):
    wanted = FAULTS[fault]
    (breach,) = check(GatedDecayConfig(fault), progress=False)
    print(breach)
    assert breach.law == wanted.law
    assert re.fullmatch(wanted.position, breach.position)
    low, high = wanted.sizes
    assert low <= (breach.size or 0) <= high
