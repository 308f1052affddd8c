"""The laws in the arithmetic of users: float32, bfloat16, and programs that XLA has optimised.

`test_laws.py` runs them in float64 and in programs that are not optimised, where rounding hides nothing and compiling
is quick. What no bit may change must hold in every arithmetic; what may differ by rounding gets that of the dtype.
"""

import jax
import jax.numpy as jnp
import pytest

from engrax.laws import LAWS, Breach, Subject
from engrax.laws.exemptions import exempt
from engrax.laws.subject import in_bfloat16
from engrax.layers import MIXERS
from engrax.layers.attention import attention
from engrax.models import MODELS
from engrax.tests.broken_mixers import GatedDecayConfig

EXACT = ("causality.finite_change", "independence.rows", "padding.content")
LAWS_OF = {
    "float32": (*EXACT, "state_carry.steps", "packing.apart"),
    "bfloat16": EXACT,
    "optimised": (*EXACT, "state_carry.steps", "packing.apart"),
}
# One of every kind of state and every operation; the others compute with the same code.
MIXERS_HERE = ("attention", "gated_convolution", "gated_deltanet", "gla", "hopfield", "mom", "retnet", "titans")
MIXERS_HERE += ("infini_attention", "test_time_memory")
CASES = [("mixer", name) for name in MIXERS_HERE] + [("model", "hmt")]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """The rows of the laws are short, and windows are to cut them into blocks."""
    monkeypatch.setattr(attention, "SMALLEST_BLOCK", 1)


def subject(config, arithmetic: str) -> Subject:
    wide = arithmetic == "optimised"
    s = Subject(config, thorough=False, wide=wide, optimised=wide)
    if arithmetic == "bfloat16":
        s.params, s.dtype, s.rounding = in_bfloat16(s.params), jnp.bfloat16, 0.05
        s.x = s.x if s.is_model else s.x.astype(jnp.bfloat16)
    return s


@pytest.mark.deep
@pytest.mark.parametrize("kind, name", CASES)
@pytest.mark.parametrize("arithmetic", LAWS_OF)
def test_the_laws_hold(kind, name, arithmetic):
    with jax.enable_x64(arithmetic == "optimised"):
        s = subject({"mixer": MIXERS, "model": MODELS}[kind][name].examples()[0], arithmetic)
        for law in LAWS_OF[arithmetic]:
            if not exempt(s.config, law):
                LAWS[law](s)


@pytest.mark.deep
@pytest.mark.parametrize("arithmetic", LAWS_OF)
@pytest.mark.parametrize("fault, law", [("next token", "causality.finite_change"), ("rows mixed", "independence.rows")])
def test_a_broken_mixer_is_caught(fault, law, arithmetic):
    with jax.enable_x64(arithmetic == "optimised"), pytest.raises(Breach) as caught:
        LAWS[law](subject(GatedDecayConfig(fault), arithmetic))
    assert caught.value.law == law
