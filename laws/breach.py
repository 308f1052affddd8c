"""The table of the laws, the exception of a broken law, and the comparisons that find it.

A law is a function of a `Subject`. It returns nothing if the subject obeys, else it raises a `Breach`. Nothing here
needs a test framework: `engrax check` and the tests run the same bodies.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

LAWS: dict[str, Callable] = {}  # "law.part" -> body(subject, deep=False)


class Breach(AssertionError):
    """A law that a subject breaks.

    law: "law.part"; position: place of the breach ("row 0, token 12", or a parameter's or a state leaf's name); size:
    in the units of the compared values (None if nothing is measured); message: the observation.
    """

    def __init__(self, message: str, *, position: str = "", size: float | None = None, law: str = ""):
        super().__init__(message)
        self.law, self.position, self.size, self.message = law, position, size, message
        self.subject = ""  # the name of the mixer or model, set by the caller

    def __str__(self) -> str:
        found = [f"at {self.position}"] if self.position else []
        found += [f"size {self.size:.2g}"] if self.size is not None else []
        where = f" {', '.join(found)}" if found else ""
        return " ".join(f"{self.law} broken{where}: {self.message}".split())


def law(name: str) -> Callable[[Callable], Callable]:
    """Enters a body into LAWS under `law.part`; a breach that the body raises carries that name."""

    def add(body: Callable) -> Callable:
        @functools.wraps(body)
        def named(subject, deep: bool = False):
            try:
                body(subject, deep)
            except Breach as breach:
                breach.law = breach.law or name
                raise

        LAWS[name] = named
        return named

    return add


def parts_of(name: str) -> list[str]:
    """The parts of a law ("causality"), or the one part ("causality.jacobian"); empty if no such law exists."""
    return [part for part in LAWS if part == name or part.split(".")[0] == name]


def demand(condition: Any, message: str, *, position: str = "", size: float | None = None) -> None:
    """Raises a Breach unless the condition holds."""
    if not condition:
        raise Breach(message, position=position, size=size)


def output_position(index: tuple[int, ...], first_token: int = 0) -> str:
    """The place of an entry of outputs [B, T, ...] whose first token is token `first_token` of the row."""
    token = f", token {index[1] + first_token}" if len(index) > 1 else ""
    return f"row {index[0]}{token}" if index else ""


def leaf_position(path: Any, index: tuple[int, ...] | None = None) -> str:
    """The name of a leaf of a tree, and its entry: `['gate']['bias'][2]`."""
    entry = f"[{', '.join(map(str, index))}]" if index else ""
    return jax.tree_util.keystr(path).removesuffix(".value") + entry


def _first(wrong: np.ndarray) -> tuple[int, ...]:
    """The first index of a mask [B, T, ...] in the order of tokens, then of rows."""
    found = np.argwhere(wrong)
    order = np.lexsort((found[:, 0], found[:, 1])) if found.shape[1] > 1 else [0]
    return tuple(int(i) for i in found[order[0]])


def _finite(array: np.ndarray, what: str, place: Callable) -> None:
    if not np.issubdtype(array.dtype, np.integer) and not np.all(np.isfinite(array)):
        raise Breach(f"{what}: not finite", position=place(_first(~np.isfinite(array))))


def close(actual, wanted, what: str, tolerance: float, place: Callable = output_position) -> None:
    """Raises a Breach unless two arrays are finite and differ by at most `tolerance` of the largest expected value.

    `place(index)` names the first entry that differs more; the breach's size is the largest difference.
    """
    actual, wanted = np.asarray(actual), np.asarray(wanted)
    demand(actual.shape == wanted.shape, f"{what}: shape {actual.shape}, wanted {wanted.shape}")
    _finite(wanted, what, place)
    _finite(actual, what, place)
    if not actual.size:
        return
    error = np.abs(actual.astype(np.float64) - wanted.astype(np.float64))
    largest, worst = float(np.max(np.abs(wanted))), float(np.max(error))
    wrong = error > tolerance * max(largest, 1e-3)
    if np.any(wrong):
        message = f"{what}: differs by {worst:.2g} at values up to {largest:.2g}"
        raise Breach(message, position=place(_first(wrong)), size=worst)


def same(actual, wanted, what: str, place: Callable = output_position) -> None:
    """Raises a Breach unless two arrays agree in every bit (0 and -0 are the same) and are finite."""
    actual = np.asarray(actual)
    wanted = np.broadcast_to(np.asarray(wanted), actual.shape)
    _finite(wanted, what, place)
    differ = actual != wanted
    if not np.any(differ):
        return
    _finite(actual, what, place)
    worst = float(np.max(np.abs(actual.astype(np.float64) - wanted.astype(np.float64))))
    message = f"{what}: {int(np.sum(differ))} of {actual.size} values differ, where none may"
    raise Breach(message, position=place(_first(differ)), size=worst)


def close_trees(actual, wanted, what: str, tolerance: float) -> None:
    """`close` leaf by leaf; integers must be equal."""
    demand(
        jax.tree.structure(actual) == jax.tree.structure(wanted),
        f"{what}: one tree is {jax.tree.structure(actual)}, the other {jax.tree.structure(wanted)}",
    )
    leaves = zip(jax.tree_util.tree_leaves_with_path(wanted), jax.tree.leaves(actual))
    for (path, want), got in leaves:
        place = functools.partial(leaf_position, path)
        whole = np.issubdtype(np.asarray(want).dtype, np.floating)
        close(got, want, f"{what}, {leaf_position(path)}", tolerance if whole else 0.0, place)
