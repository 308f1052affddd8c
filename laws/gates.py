"""Parameters moved so that gates saturate, for the laws that must hold there.

A gate is a bias, a decay rate or a projection of the input. A bias or rate is moved by a constant. A projection's
kernel is moved along one direction u that is added to all inputs, so its logits move by that constant too.
"""

from collections.abc import Iterator

import jax
import numpy as np

from engrax.laws.breach import leaf_position
from engrax.laws.subject import Subject, is_float

KEEPING = "gates that write all and forget nothing"
FORGETTING = ("decay", "forget", "a_log", "log_rate", "dt_")  # names of gates that are pushed down to keep the memory
WORDS = ("gate", "bias", "decay", "beta", "forget", "lambda", "alpha", "momentum", "a_log", "dt_")


def direction(dim: int) -> np.ndarray:
    """The vector u [D] of +-1 that is added to pushed inputs."""
    return np.where(np.random.default_rng(6).random(dim) < 0.5, -1.0, 1.0)


def pushed_inputs(s: Subject, x):
    """A mixer's inputs with u added; a model's tokens do not change."""
    return x if s.is_model else (x + direction(s.dim)).astype(x.dtype)


def _along_u(p, amount: float):
    """A kernel [D, out] moved so that its product with u grows by `amount`."""
    u = direction(p.shape[-2])
    return (p + amount * u[:, None] / len(u)).astype(p.dtype)


def each_leaf_pushed(s: Subject) -> Iterator[tuple[str, object]]:
    """(name of the pushed leaf, parameters): one leaf at a time, up and down, a little and far.

    Every leaf of a mixer is tried, so gates need no special names. Of a model, only leaves with a gate's name are
    tried; its mixers are tried on their own.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(s.params)
    for i, (path, leaf) in enumerate(leaves):
        name = leaf_position(path)
        if not is_float(leaf) or (s.is_model and not _is_gate(name)):
            continue
        moves = [("", lambda p, amount: (p + amount).astype(p.dtype))]
        if not s.is_model and leaf.ndim >= 2 and leaf.shape[-2] == s.dim:
            moves.append((" along the inputs", _along_u))
        for how, move in moves:
            for amount in (12.0, -12.0, 60.0, -60.0):
                moved = [move(p, amount) if j == i else p for j, (_, p) in enumerate(leaves)]
                yield f"{name} moved by {amount:+.0f}{how}", jax.tree.unflatten(tree, moved)


def _is_gate(name: str) -> bool:
    return any(word in name.lower() for word in WORDS)


def extreme_gates(params, dim: int | None) -> Iterator[tuple[str, object]]:
    """Named variants of the parameters: all gates moved by 50 (almost 0 or 1) and by 1000 (exactly), projections of
    gates made 100 times larger, so that tokens saturate them up or down, and forgetting pushed down while the others
    are pushed up. dim: the width of a mixer, whose projections are moved along its inputs; None for a model."""
    yield "fresh", params
    for name, amount in (
        ("gates +50", 50.0),
        ("gates -50", -50.0),
        ("gates +-50", None),
        ("gates -1000", -1000.0),
        ("gates +1000", 1000.0),
        ("projections of gates x100", 0.0),
        (KEEPING, 50.0),
    ):

        def move(path, p, name=name, amount=amount):
            where = jax.tree_util.keystr(path).lower()
            if not is_float(p) or not _is_gate(where):
                return p
            if name == KEEPING and any(word in where for word in FORGETTING):
                amount = -amount
            if "kernel" in where:
                if amount == 0.0:
                    return (100 * p).astype(p.dtype)
                return _along_u(p, amount) if amount is not None and p.shape[-2] == dim else p
            by = np.random.default_rng(5).choice([-50.0, 50.0], p.shape) if amount is None else amount
            return (p + by).astype(p.dtype)

        yield name, jax.tree_util.tree_map_with_path(move, params)
