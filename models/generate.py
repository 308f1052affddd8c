"""Sampling continuations with a memory of fixed size, compiled once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from engrax.errors import UserError

PREFILL = 64  # tokens of the prompt read at a time


def sample(
    model: nnx.Module,
    prompt_BT: Int[np.ndarray, "B T"],
    *,
    tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> Int[np.ndarray, "B new"]:
    """Samples `tokens` tokens after each prompt; temperature 0 takes the most likely token.

    The prompt is read in pieces of PREFILL tokens, then token by token: two shapes are compiled for any length.
    Raises UserError for an empty prompt, a negative temperature, or if a cache of declared capacity overflows.
    """
    if prompt_BT.shape[1] == 0:
        raise UserError("the prompt is empty; give at least one token.")
    if temperature < 0 or tokens < 1:
        raise UserError(f"temperature={temperature} must not be negative and tokens={tokens} at least 1.")
    graphdef, params = nnx.split(model, nnx.Param)

    @jax.jit
    def read(params, tokens_BT, memory):
        model = nnx.merge(graphdef, params)
        out = model(tokens_BT, memory)
        return model.logits(out.hidden[:, -1:])[:, 0], out.memory

    def choose(logits_BV: Float[Array, "B V"], key: Array) -> Int[Array, " B"]:
        likeliest = jnp.argmax(logits_BV, axis=-1)
        drawn = jax.random.categorical(key, logits_BV / (temperature or 1.0))
        return jnp.where(temperature == 0, likeliest, drawn).astype(jnp.int32)

    @jax.jit
    def write(params, logits, memory, key):
        def step(carry, key):
            logits, memory = carry
            token = choose(logits, key)
            return read(params, token[:, None], memory), token

        carry, new = jax.lax.scan(step, (logits, memory), jax.random.split(key, tokens))
        return carry[0], new.T

    logits, memory = _prefill(
        read, params, prompt_BT, jax.jit(lambda p: nnx.merge(graphdef, p).init_memory(len(prompt_BT)))(params)
    )
    logits, new = write(params, logits, memory, jax.random.key(seed))
    if bool(jnp.isnan(logits).any()):
        raise UserError(
            "the model's outputs are not numbers: prompt and sample exceed an attention cache's capacity; "
            "sample fewer tokens, or train with a window."
        )
    return np.asarray(new)


def _prefill(read: Any, params: Any, prompt_BT: Int[np.ndarray, "B T"], memory: Any) -> tuple[Array, Any]:
    """Logits after the prompt's last token, and the memory."""
    logits, at = None, 0
    while at < prompt_BT.shape[1]:
        size = PREFILL if prompt_BT.shape[1] - at >= PREFILL else 1
        logits, memory = read(params, jnp.asarray(prompt_BT[:, at : at + size]), memory)
        at += size
    return logits, memory
