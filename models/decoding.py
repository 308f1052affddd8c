"""A language model's memory in the form for many calls of one token.

A scan over stacked blocks copies every block's state and parameters at every call. For single tokens the blocks run one
after another in the program. Each has its own parameters and its own state, which is updated in place.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Opened(NamedTuple):
    """blocks[i][j]: the state of pattern position j in repeat i, [B, ...], from `Mixer.open_state`."""

    blocks: tuple[tuple[Any, ...], ...]
    place: tuple  # the state of the learned positions, if the model has any
    params: tuple[tuple[Any, ...], ...]  # the blocks' parameters, indexed in the same way


def open_blocks(mixers: list[Any], memory: tuple, params: tuple, repeat: int) -> Opened:
    """The memory of a model with these mixers, opened; memory and params are stacked over the repeats."""
    states, place = memory[: len(mixers)], memory[len(mixers) :]
    blocks = tuple(
        tuple(mixer.open_state(state) for mixer, state in zip(mixers, one)) for one in _unstacked(states, repeat)
    )
    return Opened(blocks, place, tuple(_unstacked(params, repeat)))


def close_blocks(mixers: list[Any], opened: Opened) -> tuple:
    """The memory with the repeats stacked again."""
    closed = [[mixer.close_state(state) for mixer, state in zip(mixers, states)] for states in opened.blocks]
    return (*(jax.tree.map(lambda *xs: jnp.stack(xs), *states) for states in zip(*closed)), *opened.place)


def run_blocks(step: Callable, x: Any, opened: Opened) -> tuple[Any, Any]:
    """`lax.scan(step, x, (params, states))` as straight-line code: (x, (new states, other outputs stacked))."""
    found = []
    for inputs in zip(opened.params, opened.blocks):
        x, out = step(x, inputs)
        found.append(out)
    states, *others = zip(*found)
    return x, (tuple(states), *(jax.tree.map(lambda *xs: jnp.stack(xs), *other) for other in others))


def _unstacked(tree: Any, repeat: int) -> list[Any]:
    """The trees of every repeat."""
    return [jax.tree.map(lambda x, i=i: x[i], tree) for i in range(repeat)]
