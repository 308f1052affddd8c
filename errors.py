"""The exceptions for a user's mistake."""

from typing import Any


class UserError(ValueError):
    """A mistake that the user can fix: one sentence that says what is wrong and what to do.

    The command line prints the sentence alone and ends with exit code 2; from Python it is an ordinary ValueError.
    """


class CannotRun(UserError, NotImplementedError):
    """A named implementation cannot run a call."""


class UnknownName(UserError):
    """A name that is not registered."""


class Diverged(UserError):
    """The loss or gradient of a training became non-finite."""


class DamagedCheckpoint(UserError):
    """A checkpoint does not hold what was saved.

    Attributes:
      reason: what is wrong, beginning with the file's name.
    """

    reason = ""


def require_at_least(group: str, config: Any, **bounds: float) -> None:
    """Raises UserError for the first field of `config` below its bound; `group` is the config's own field name."""
    for name, bound in bounds.items():
        if getattr(config, name) < bound:
            raise UserError(f"{group}.{name}={getattr(config, name)} must be at least {bound}.")
