"""Shared validation of the operations: every message names the argument, its actual and its expected form.

Values are not checked, since that would wait for the device. With `debug_checks(True)`, or `ENGRAX_DEBUG=1` in the
environment, programs traced afterwards report positive log-decay gates as warnings of the logger "engrax".
"""

import logging
import os
from typing import no_type_check

import jax
import jax.numpy as jnp
import numpy as np

from engrax.registry import did_you_mean

_log = logging.getLogger("engrax")
_debug = os.environ.get("ENGRAX_DEBUG", "") not in ("", "0")


@no_type_check
def check_array(name, x, wanted_letters, shape, kind=jnp.floating):
    """Raises ValueError unless array x has this shape; `wanted_letters` is the shape in letters, for the message."""
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise ValueError(f"{name} must be an array of shape {wanted_letters}, got {type(x).__name__}.")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, wanted {wanted_letters} = {tuple(shape)}.")
    if not jnp.issubdtype(x.dtype, kind):
        family = "a floating-point" if kind is jnp.floating else "an integer"
        raise ValueError(f"{name} has dtype {x.dtype}, wanted {family} dtype.")


@no_type_check
def check_rank(name, x, wanted_letters):
    """Raises ValueError unless x is an array with one axis per letter, none of them empty."""
    if getattr(x, "ndim", None) != wanted_letters.count(",") + 1 or 0 in x.shape:
        shape = getattr(x, "shape", None)
        raise ValueError(f"{name} has shape {shape}, wanted {wanted_letters}, every axis at least 1.")


@no_type_check
def check_option(name, value, known):
    """Raises ValueError unless `value` is one of the known names."""
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}{did_you_mean(str(value), known)} (known: {', '.join(known)}).")


@no_type_check
def check_positive_int(name, value):
    """Raises ValueError unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise ValueError(f"{name} is {value!r}, wanted an integer of at least 1.")


@no_type_check
def check_scale(scale, key_size):
    """Returns the scale as a number, `key_size ** -0.5` for None; raises ValueError if it is not a number."""
    if scale is None:
        return key_size**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float, np.integer, np.floating)):
        raise ValueError(f"scale is {scale!r}, wanted a number or None for K ** -0.5.")
    return float(scale)


@no_type_check
def check_tokens(q, k, v):
    """Raises ValueError unless q and k are [B, T, H, K] and v is [B, T, HV, V] with HV a multiple of H."""
    check_rank("q", q, "[B, T, H, K]")
    check_rank("v", v, "[B, T, HV, V]")
    check_array("q", q, "[B, T, H, K]", q.shape)
    check_array("k", k, "[B, T, H, K]", q.shape)
    check_array("v", v, "[B, T, HV, V]", (*q.shape[:2], *v.shape[2:]))
    if v.shape[2] % q.shape[2]:
        raise ValueError(f"v has {v.shape[2]} heads, wanted a multiple of the {q.shape[2]} heads of q and k.")


@no_type_check
def check_decay(g, q, v):
    """Raises ValueError unless the log-decay gate g is None, [B, T, HV] or [B, T, HV, K]."""
    if g is None:
        return
    if getattr(g, "ndim", None) == 4:
        check_array("g", g, "[B, T, HV, K]", (*v.shape[:3], q.shape[3]))
    elif hasattr(g, "ndim") and g.ndim != 3:
        raise ValueError(f"g has shape {tuple(g.shape)}, wanted [B, T, HV] or [B, T, HV, K].")
    else:
        check_array("g", g, "[B, T, HV]", v.shape[:3])
    report_positive("g", g)


@no_type_check
def check_segments(q, v, initial_state, segment_ids, num_segments):
    """Raises ValueError unless segments and initial state match each other and the tokens."""
    if segment_ids is not None:
        check_array("segment_ids", segment_ids, "[B, T]", q.shape[:2], jnp.integer)
    letters, shape = "[B, HV, K, V]", (q.shape[0], v.shape[2], q.shape[3], v.shape[3])
    if num_segments is not None:
        check_positive_int("num_segments", num_segments)
        if segment_ids is None:
            raise ValueError("num_segments needs segment_ids, the segment of every token.")
        letters, shape = "[B, N, HV, K, V]", (shape[0], num_segments, *shape[1:])
    if initial_state is not None:
        check_array("initial_state", initial_state, letters, shape)


def debug_checks(on: bool) -> None:
    """Turns reports of positive gates on or off, for calls and programs traced afterwards."""
    global _debug
    _debug = bool(on)


@no_type_check
def report_positive(name, gate):
    """In debug mode, makes the program warn about positive log-decay gates; otherwise does nothing."""
    if _debug:
        jax.debug.callback(_warn_positive, jnp.sum(gate > 0), jnp.max(gate), name=name)


def _warn_positive(count, largest, name) -> None:
    if count > 0:
        _log.warning("%d values of %s are positive (largest %g): a log-decay gate must be <= 0.", count, name, largest)
