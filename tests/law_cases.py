"""Which law runs on which config, and which configs may be exempt from one."""

import pytest

from engrax.models import LanguageModelConfig
from engrax.tests.laws import LAWS
from engrax.tests.subjects import Subject

ALLOWED = {  # law -> the words by which a reason names one of the exemptions that exist
    "causality": ("paper", "prefix"),
    "paths": ("prefix",),
    "state_carry": ("prefix",),
    "trainability": ("stop-gradient", "correction", "truncated", "top-k", "top-1", "single-memory"),
}


def exempt(config, name: str) -> bool:
    """True where the config is exempt from `law.part`, or from the whole law."""
    return name in config.exempt_from or name.split(".")[0] in config.exempt_from


def check_exemptions_exist(config):
    """Every exemption names a law, and its reason is one that exists."""
    for name, reason in config.exempt_from.items():
        assert _parts(name), f"exempt from {name!r}, which is no law (known: {', '.join(LAWS)})"
        words = ALLOWED.get(name.split(".")[0], ())
        assert any(word in reason.lower() for word in words), (
            f"exempt from {name!r} because of {reason!r}: not an exemption that exists"
        )


def check_exemptions(s: Subject):
    """Every exemption is one that exists, and the law it names really fails."""
    check_exemptions_exist(s.config)
    for name in s.config.exempt_from:
        failing = any(_fails(s, part) for part in _parts(name))
        assert failing, f"exempt from {name!r}, which it obeys: remove the exemption"


def _parts(name: str) -> list[str]:
    return [part for part in LAWS if part == name or part.split(".")[0] == name]


def _fails(s: Subject, name: str) -> bool:
    try:
        LAWS[name](s)
    except AssertionError:
        return True
    return False


# Compiling is nearly all that a law costs. Except for what everything else is built on, `make test` leaves to
# `make test-all` the laws that need programs of their own, rows without segment ids, all but the first example of a
# config, gradients where a config resembles another that is tested in full, and most laws of mere settings of another
# config's module.
OWN_PROGRAMS = ("paths.gradients", "state_carry.cuts", "independence.batch_size", "stability.long", "state.start")
FOUNDATIONS = ("attention", "linear_attention", "titans")
FEW_PROGRAMS = ("causality.finite_change", "independence.rows", "independence.padding")
NO_GRADIENTS = (*FEW_PROGRAMS, "state_carry.blocks", "packing.apart")
RELATIVES = ("titans_mac", "titans_mag", "titans_mal", "retnet", "lightning", "hgrn2", "mamba2", "rebased")
RELATIVES += ("infini_attention", "hopfield_layer", "memorizing", "transformer_xl", "armt", "rmt")
GRADIENTS = ("causality.jacobian", "packing.gradients", "stability.gradients", "trainability.gradients")
SETTINGS_LEFT_OUT = ("ttt_mlp", "yaad", "moneta", "memora", "omeganet")  # of test_time_memory
MODELS_LEFT_OUT = ("titans_lmm", "titans_mac", "titans_mag", "titans_mal", "transformer_xl", "memorizing_transformer")


def is_thorough(name: str, index: int) -> bool:
    """Whether the config is one that `make test` tests in full."""
    return not index and name in FOUNDATIONS


def _is_slow(registry, name: str, index: int, part: str) -> bool:
    if index:
        return True
    if name in FOUNDATIONS:
        return name == "titans" and part in OWN_PROGRAMS  # they take a minute
    if _is_setting(registry[name], registry):
        return name in SETTINGS_LEFT_OUT + MODELS_LEFT_OUT or part not in FEW_PROGRAMS
    if name in RELATIVES:
        return part not in NO_GRADIENTS
    of_mixers = part in GRADIENTS and issubclass(registry[name], LanguageModelConfig)  # its mixers' gradients will do
    return of_mixers or part in OWN_PROGRAMS


def _is_setting(config: type, registry) -> bool:
    """Whether another registered config builds the same module."""
    others = (other for other in registry.values() if other is not config)
    return any(issubclass(config, other) and config.build is other.build for other in others)


def cases(registry):
    """pytest parameters (kind, name, index, law, deep), ordered by config, so that what one compiled can be dropped."""
    found, kind = [], registry.kind
    for name in registry:
        for index in range(len(registry[name].examples())):
            for part in LAWS:
                slow = [pytest.mark.slow] if _is_slow(registry, name, index, part) else []
                found.append(
                    pytest.param(kind, name, index, part, False, marks=slow, id=f"{kind}-{name}{index}-{part}")
                )
            found += [
                pytest.param(
                    kind, name, index, part, True, marks=[pytest.mark.slow], id=f"{kind}-{name}{index}-{part}-deep"
                )
                for part in LAWS
            ]
    return found
