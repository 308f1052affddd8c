"""The exceptions for a user's mistake, and the exit codes of the commands."""

import enum
from typing import Any


class Exit(enum.IntEnum):
    """The exit codes of every command. What starts a training again (launch/) decides by them: docs/machines.md."""

    FINISHED = 0
    FAILED = 1  # a bug, with a traceback; in `engrax check` a broken law
    REFUSED = 2  # a user's mistake, in one line
    DAMAGED = 3  # no sound checkpoint to continue from
    DIVERGED = 4  # the loss or the gradient is not finite
    PEER_LOST = 74  # another process of the training ended, or cannot be reached
    HUNG = 75  # a step took too long
    INTERRUPTED = 130  # Ctrl-C; a training saves first
    STOPPED = 143  # SIGTERM; a training saves first


class UserError(ValueError):
    """A mistake that the user can fix: one sentence that says what is wrong and what to do.

    The command line prints the sentence alone and ends with `exit_code`; from Python it is an ordinary ValueError.
    """

    exit_code = Exit.REFUSED


class CannotRun(UserError, NotImplementedError):
    """A named implementation cannot run a call."""


class UnknownName(UserError):
    """A name that is not registered."""


class Damaged(UserError):
    """A checkpoint does not hold what was saved, or no checkpoint of a run does.

    Attributes:
      reason: what is wrong with the one checkpoint, beginning with the file's name.
    """

    exit_code = Exit.DAMAGED
    reason = ""


class PeerLost(UserError):
    """Another process of a training cannot be reached."""

    exit_code = Exit.PEER_LOST


class Diverged(UserError):
    """The loss or gradient of a training became non-finite."""

    exit_code = Exit.DIVERGED


def require_at_least(group: str, config: Any, **bounds: float) -> None:
    """Raises UserError for the first field of `config` below its bound; `group` is the config's own field name."""
    for name, bound in bounds.items():
        if getattr(config, name) < bound:
            raise UserError(f"{group}.{name}={getattr(config, name)} must be at least {bound}.")


def require_positive(config: Any, *names: str) -> None:
    """Raises UserError for the first named field of `config` that is 0 or less; None is no number and passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise UserError(f"{name}={value} must be above 0.")
