"""The exceptions for a user's mistake."""


class UserError(ValueError):
    """A mistake that the user can mend: one sentence that says what is wrong and what to do.

    The command line prints the sentence alone and ends with exit code 2; from Python it is an ordinary ValueError.
    """


class UnknownName(UserError):
    """A name that no registry knows."""


class Diverged(UserError):
    """A training whose loss or gradient is not finite any more."""
