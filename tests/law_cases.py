"""Which law runs on which config, and which configs may be exempt from one."""

import pytest

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


def check_exemptions(s: Subject):
    """Every exemption is one that exists, and the law it names really fails."""
    for name, reason in s.config.exempt_from.items():
        parts = [part for part in LAWS if part == name or part.split(".")[0] == name]
        assert parts, f"exempt from {name!r}, which is no law (known: {', '.join(LAWS)})"
        words = ALLOWED.get(name.split(".")[0], ())
        assert any(word in reason.lower() for word in words), (
            f"exempt from {name!r} because of {reason!r}: not an exemption that exists"
        )
        assert any(_fails(s, part) for part in parts), f"exempt from {name!r}, which it obeys: remove the exemption"


def _fails(s: Subject, name: str) -> bool:
    try:
        LAWS[name](s)
    except AssertionError:
        return True
    return False


# Compiling is nearly all that a law costs. Except for what everything else is built on, `make test` leaves to
# `make test-all` the laws that need programs of their own, rows without segment ids, all but the first example of a
# config, and most laws of what is a setting of another config's module.
OWN_PROGRAMS = ("paths.gradients", "state_carry.cuts", "independence.batch_size", "stability.long", "state.start")
FOUNDATIONS = ("attention", "linear_attention", "titans")
FEW_PROGRAMS = ("causality.finite_change", "independence.rows", "independence.padding")


def is_thorough(name: str, index: int) -> bool:
    """Whether the config is one that `make test` tests in full."""
    return not index and name in (*FOUNDATIONS, "language_model")


def _is_slow(registry, name: str, index: int, part: str) -> bool:
    if name in FOUNDATIONS:
        many = name == "titans" and part in OWN_PROGRAMS  # they take a minute
        return part not in FEW_PROGRAMS if index else many
    few = _is_setting(registry[name], registry)
    return index > 0 or (part not in FEW_PROGRAMS if few else part in OWN_PROGRAMS)


def _is_setting(config: type, registry) -> bool:
    """Whether another registered config builds the same module."""
    others = (other for other in registry.values() if other is not config)
    return any(issubclass(config, other) and config.build is other.build for other in others)


def cases(registry):
    """pytest parameters (name, index, law, deep), ordered by config, so that what one compiled can be dropped."""
    found = []
    for name in registry:
        for index in range(len(registry[name].examples())):
            for part in LAWS:
                slow = [pytest.mark.slow] if _is_slow(registry, name, index, part) else []
                found.append(pytest.param(name, index, part, False, marks=slow, id=f"{name}{index}-{part}"))
            found += [
                pytest.param(name, index, part, True, marks=[pytest.mark.slow], id=f"{name}{index}-{part}-deep")
                for part in LAWS
            ]
    return found
