"""Rules that say whether an answer in words is right, as the published benchmarks have them.

Each takes the text that a model wrote and the references, and returns (hits, trials).
"""

import re
from collections.abc import Collection, Sequence


def match_all(output: str, references: Sequence[str]) -> tuple[int, int]:
    """How many of the references the output contains, in any case of letters (RULER's string_match_all)."""
    output = output.lower()
    return sum(reference.lower() in output for reference in references), len(references)


def match_part(output: str, references: Sequence[str]) -> tuple[int, int]:
    """Whether the output contains any of the references, in any case of letters (RULER's string_match_part)."""
    output = output.lower()
    return int(any(reference.lower() in output for reference in references)), 1


def first_integer(output: str, references: Sequence[str]) -> tuple[int, int]:
    """Whether the first integer in the output is the reference (the passkey test of landmark attention)."""
    found = re.search(r"\d+", output)
    return int(found is not None and int(found.group()) == int(references[0])), 1


def only_label(output: str, target: str, question: str, labels: Collection[str]) -> tuple[int, int]:
    """Whether, of a task's labels, the first sentence names exactly the target; labels in the question do not count
    (BABILong).

    The published code also cuts at "Question" after it has made the output lower-case, so that this cut never happens.
    """
    output = output.lower()
    for end in (".", "<context>", "<example>"):
        output = output.split(end)[0]
    named = {label.lower() for label in labels if label.lower() in output}
    named -= {label.lower() for label in labels if label.lower() in question.lower()}
    return int(named == {target.lower()}), 1
