"""Token ids from callers: lists, one row or several rows. They are checked on the host, never inside jit."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from engrax.errors import UserError


def taking_lists(call: Callable[..., Any]) -> Callable[..., Any]:
    """A model's call that also takes lists and [T], and checks ids outside jit."""

    @functools.wraps(call)
    def checked(self, tokens_BT, *args, **kwargs):
        if not isinstance(tokens_BT, jax.core.Tracer):
            tokens_BT = as_tokens(tokens_BT, self.vocabulary)
        return call(self, tokens_BT, *args, **kwargs)

    return checked


def as_tokens(tokens: Any, vocabulary: int | None) -> Any:
    """Token ids as an array [B, T]. Inputs that are not integers (vectors of a set, or shapes) are returned unchanged.

    Raises UserError for rows of unequal lengths, for more than two axes, and for an id outside the vocabulary.
    """
    if isinstance(tokens, list | tuple):
        try:
            tokens = np.asarray(tokens)
        except ValueError:
            raise UserError(
                "the rows of tokens have unequal lengths; pad them with segment_ids of -1, or use engrax.session, "
                "which takes them as they are."
            ) from None
    if not hasattr(tokens, "dtype") or not jnp.issubdtype(tokens.dtype, jnp.integer) or vocabulary is None:
        return tokens
    if np.ndim(tokens) not in (1, 2):
        raise UserError(f"tokens of shape {np.shape(tokens)} must be one row [T] or rows [B, T].")
    check_ids(tokens, vocabulary)
    return jnp.asarray(tokens if np.ndim(tokens) == 2 else tokens[None], jnp.int32)


def is_one(given: Any) -> bool:
    """Whether the input is one text or one row of ids, and not several."""
    return isinstance(given, str | bytes) or not len(given) or not (isinstance(given[0], str) or np.ndim(given[0]))


def check_ids(tokens: Any, vocabulary: int) -> None:
    """Raises UserError for the first id outside the vocabulary."""
    values = np.asarray(tokens)
    wrong = values[(values < 0) | (values >= vocabulary)]
    if wrong.size:
        raise UserError(
            f"token id {wrong.flat[0]} is outside the vocabulary of {vocabulary} (ids are 0 to {vocabulary - 1}); "
            "is this the tokenizer that the model was trained with?"
        )
