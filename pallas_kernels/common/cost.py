"""Shared parts of the operations' cost tables."""

from typing import NamedTuple


class Cost(NamedTuple):
    """Operations or bytes of one call, forward and backward."""

    forward: float
    backward: float


def gate_width(gate: str, key: int) -> int:
    """Returns the number of log-decay gates per token and head; `gate` is "none", "scalar" or "channel"."""
    return {"none": 0, "scalar": 1, "channel": key}[gate]
