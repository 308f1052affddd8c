"""Which configs may be exempt from a law: only for the reasons listed here, and only if the law really fails."""

from typing import Any

from engrax.laws.breach import LAWS, Breach, demand, parts_of
from engrax.laws.subject import Subject

ALLOWED = {  # law -> words that identify one of the accepted exemptions in a reason
    "causality": ("paper", "prefix"),
    "state_carry": ("prefix",),
    "trainability": ("stop-gradient", "correction", "truncated", "top-k", "top-1", "single-memory"),
}


def claims(config: Any) -> dict[str, str]:
    """{law or law.part: reason} that the config claims to be exempt from."""
    return dict(getattr(config, "exempt_from", {}))


def exempt(config: Any, name: str) -> bool:
    """True if the config is exempt from `law.part`, or from the whole law."""
    return name in claims(config) or name.split(".")[0] in claims(config)


def check_exemptions_exist(config: Any) -> None:
    """Raises a Breach unless every exemption names a law and has an accepted reason."""
    for name, reason in claims(config).items():
        demand(parts_of(name), f"exempt from {name!r}, which is no law (known: {', '.join(LAWS)})")
        words = ALLOWED.get(name.split(".")[0], ())
        known = any(word in reason.lower() for word in words)
        demand(known, f"exempt from {name!r} because of {reason!r}: not an exemption that exists")


def check_exemptions(s: Subject) -> None:
    """Raises a Breach unless every exemption is accepted and its law really fails."""
    check_exemptions_exist(s.config)
    for name in claims(s.config):
        failing = any(_fails(s, part) for part in parts_of(name))
        demand(failing, f"exempt from {name!r}, which it obeys: remove the exemption")


def _fails(s: Subject, name: str) -> bool:
    try:
        LAWS[name](s)
    except Breach:
        return True
    return False
