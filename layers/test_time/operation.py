"""Runs the memories whose rule is exactly that of the operation `neural_memory` (`Rule.operation`).

Its functions are those of `engine`, which runs all others. The operation has kernels, and a form for decoding.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from engrax.layers.test_time.coefficients import Gates
from engrax.layers.test_time.rule import Matrices, Rule
from engrax.pallas_kernels import NeuralMemoryState, neural_memory
from engrax.pallas_kernels.neural_memory.decode import DecodingMemory, close_memory, decode, open_memory
from engrax.pallas_kernels.neural_memory.types import Layers


def start_state(rule: Rule, matrices: Matrices, batch_size: int) -> NeuralMemoryState:
    """Returns the state at phase 0 whose rows all hold `matrices`, `[H, I, O]` each, without momentum."""
    return NeuralMemoryState.start(tuple(matrices[name] for name in rule.structure.widths()), batch_size)


def run(
    rule: Rule,
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    gates: Gates,
    state: NeuralMemoryState | DecodingMemory,
    reset: NeuralMemoryState | None,
    segment_ids: Int[Array, "B T"] | None,
    extra: dict[str, Float[Array, "H V"]],
) -> tuple[Float[Array, "B T H V"], NeuralMemoryState | DecodingMemory]:
    """Writes and reads every token.

    reset: the initial state of new segments, for one row. A state for decoding takes one token, of the row's segment.
    """
    momentum = gates.momentum[..., 0] if rule.momentum_order else jnp.zeros_like(gates.lr)
    options = dict(lr=gates.lr, momentum=momentum, forget=gates.forget[..., 0], segment_ids=segment_ids)
    options |= dict(activation=rule.structure.activation, chunk_size=rule.chunk_size)
    if isinstance(state, DecodingMemory):
        return decode(q, k, v, memory=state, **options)
    return neural_memory(
        q,
        k,
        v,
        state=state,
        reset=None if segment_ids is None else _of_first_row(reset),
        gradient_at="decayed" if rule.decayed else "anchor",
        save_every=rule.save_every,
        implementation=rule.implementation,
        **options,
    )


def close(rule: Rule, state: NeuralMemoryState) -> NeuralMemoryState:
    """Returns the state of one row with its chunk ended at the current position, at phase 0."""
    return state._replace(anchor=state.weights, phase=np.zeros(1, np.int32))


def spread(rule: Rule, state: NeuralMemoryState, batch_size: int) -> NeuralMemoryState:
    """Returns the matrices of the first row in every row, at phase 0."""
    weights, momentum = _of_first_row(state)
    return NeuralMemoryState.start(weights, batch_size, momentum)


def at_place_of(state: NeuralMemoryState, other: NeuralMemoryState) -> NeuralMemoryState:
    """Returns the state at the other's position in the row's chunk grid."""
    return state._replace(phase=other.phase)


def matrices(state: NeuralMemoryState) -> tuple[Layers, Layers]:
    """Returns the memory and its momentum."""
    return state.weights, state.momentum


def opened(rule: Rule, state: NeuralMemoryState) -> NeuralMemoryState | DecodingMemory:
    """Returns the state in its form for many calls of one token, if the rule and the implementation have one."""
    if rule.decayed or rule.implementation not in (None, "xla"):
        return state
    return open_memory(state, rule.chunk_size)


def closed(state: NeuralMemoryState | DecodingMemory) -> NeuralMemoryState:
    """Returns an opened state in its usual form."""
    return close_memory(state) if isinstance(state, DecodingMemory) else state


def _of_first_row(state: NeuralMemoryState) -> tuple[Layers, Layers]:
    return jax.tree.map(lambda leaf: leaf[0], (state.weights, state.momentum))
