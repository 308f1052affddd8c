"""A language model's memory in the form for many calls of one token.

A scan over stacked blocks copies every block's state at every call. For single tokens the blocks run one after another
in the program, each with a state of its own, which is updated in place.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Opened(NamedTuple):
    """blocks[i][j]: the state of pattern position j in repeat i, [B, ...], as `Mixer.open_state` makes it."""

    blocks: tuple[tuple[Any, ...], ...]
    place: tuple  # of the learned positions: their state, if the model has any


def open_blocks(mixers: list[Any], memory: tuple, repeat: int) -> Opened:
    """The memory of a model with these mixers, opened."""
    states, place = memory[: len(mixers)], memory[len(mixers) :]
    return Opened(
        tuple(
            tuple(mixer.open_state(jax.tree.map(lambda x, i=i: x[i], state)) for mixer, state in zip(mixers, states))
            for i in range(repeat)
        ),
        place,
    )


def close_blocks(mixers: list[Any], opened: Opened) -> tuple:
    """The memory with the repeats stacked again."""
    closed = [[mixer.close_state(state) for mixer, state in zip(mixers, states)] for states in opened.blocks]
    return (*(jax.tree.map(lambda *xs: jnp.stack(xs), *states) for states in zip(*closed)), *opened.place)


def run_blocks(step: Callable, x: Any, params: Any, blocks: tuple) -> tuple[Any, Any]:
    """`lax.scan(step, x, (params, blocks))` as straight-line code: (x, (new blocks, other outputs stacked))."""
    found = []
    for i, states in enumerate(blocks):
        x, out = step(x, (jax.tree.map(lambda p, i=i: p[i], params), states))
        found.append(out)
    states, *others = zip(*found)
    return x, (tuple(states), *(jax.tree.map(lambda *xs: jnp.stack(xs), *other) for other in others))
