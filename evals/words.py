"""Numbers as text, for the terminal and the report."""

from typing import Any


def estimate(found: dict[str, Any], digits: int = 4) -> str:
    """An estimate (`statistics.Estimate.to_dict`) as value ± half of its 95 % interval."""
    if found["value"] is None:
        return "none"
    interval = "" if found["low"] is None else f" ± {(found['high'] - found['low']) / 2:.{digits}f}"
    return f"{found['value']:.{digits}f}{interval}"


def signed(found: dict[str, Any]) -> str:
    """A difference with its sign."""
    return ("+" if found["value"] >= 0 else "-") + estimate(found | {"value": abs(found["value"])})


def interval(found: dict[str, Any]) -> str:
    """A difference with its sign and the ends of its 95 % interval."""
    ends = "" if found["low"] is None else f" [{found['low']:+.3f}, {found['high']:+.3f}]"
    return f"{found['value']:+.3f}{ends}"


def number(value: Any) -> str:
    """Four significant digits, whole numbers above a thousand, powers of ten above a million."""
    if value is None:
        return "not finite"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"
