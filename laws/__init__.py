"""The laws that every memory obeys, one body each, for the tests and for `engrax check` alike.

`LAWS` maps "law.part" to a function of a `Subject`, in the order in which they are tried; each raises a `Breach` if the
subject breaks the law. If a law says "no bit", the comparison is exact; otherwise rounding is allowed.
"""

from engrax.laws import (  # noqa: F401, I001  (the order of the laws)
    state,
    independence,
    causality,
    carry,
    packing,
    padding,
    trainability,
    stability,
)
from engrax.laws.breach import LAWS, Breach
from engrax.laws.check import check
from engrax.laws.subject import Subject

__all__ = ["LAWS", "Breach", "Subject", "check"]
