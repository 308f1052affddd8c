"""A language model's memory in the form for many calls of one token.

A scan over stacked blocks copies every block's state and parameters at every call. For single tokens the blocks run one
after another in the program. Each has its own parameters and its own state, which is updated in place.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Opened(NamedTuple):
    """blocks[i][j]: the state of block j of stack i, [B, ...], from `Mixer.open_state`."""

    blocks: tuple[tuple[Any, ...], ...]
    place: tuple  # the state of the learned positions, if the model has any
    params: tuple[tuple[Any, ...], ...]  # the blocks' parameters, indexed in the same way


def open_blocks(mixers: list[Any], memory: tuple, params: tuple) -> Opened:
    """The memory of a model with these mixers, one for each stack, opened; memory and params are stacked."""
    repeats = [len(jax.tree.leaves(stack)[0]) for stack in params]
    states, place = memory[: len(mixers)], memory[len(mixers) :]
    blocks = tuple(
        tuple(mixer.open_state(state) for state in _unstacked(stack, repeat))
        for mixer, stack, repeat in zip(mixers, states, repeats)
    )
    return Opened(blocks, place, tuple(map(_unstacked, params, repeats)))


def close_blocks(mixers: list[Any], opened: Opened) -> tuple:
    """The memory with the blocks of a stack stacked again."""
    closed = [[mixer.close_state(state) for state in states] for mixer, states in zip(mixers, opened.blocks)]
    return (*(jax.tree.map(lambda *xs: jnp.stack(xs), *states) for states in closed), *opened.place)


def run_blocks(step: Callable, x: Any, inputs: tuple[tuple, tuple]) -> tuple[Any, Any]:
    """`lax.scan(step, x, (params, states))` as straight-line code for stacks in the form of `Opened`: (x, (new states,
    other outputs stacked))."""
    found = []
    for one in zip(*(zip(*stacks) for stacks in inputs)):
        x, out = step(x, one)
        found.append(out)
    states, *others = zip(*found)
    return x, (tuple(zip(*states)), *(jax.tree.map(lambda *xs: jnp.stack(xs), *other) for other in others))


def _unstacked(tree: Any, repeat: int) -> tuple[Any, ...]:
    """The trees of every block of a stack."""
    return tuple(jax.tree.map(lambda x, i=i: x[i], tree) for i in range(repeat))
