"""Law 1 for kernels: interpreted, in a dtype that they take, they err hardly more than the XLA form.

Kernels serve some sizes, and not float64. What counts is the error against float64 on the same numbers, and the XLA
form, which serves where the kernel cannot, sets the scale.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from engrax.errors import UserError
from engrax.laws.breach import demand
from engrax.laws.subject import Subject, is_float
from engrax.models.parameters import cast
from engrax.pallas_kernels import dispatch

DTYPES = {"pallas_gpu": jnp.bfloat16, "pallas_tpu": jnp.float32}  # of the tokens; states are float32
SLACK, FLOOR = 1.5, 5e-7  # times the XLA form's error; a few roundings of float32
SIZES = dict(heads=1, head_dim=64, hidden=64, chunk_size=64, persistent_tokens=0)  # that GPU kernels serve
MOVED = 0.1  # how far parameters are moved from their initial values towards the laws' own, where errors grow


def kernels_agree(s: Subject, deep: bool = False) -> list[str]:
    """Runs every kernel that serves the config; deep: else the config at `SIZES`, and gradients. Returns what ran.

    A kernel is left out only where it says itself why it does not serve a call (`unsupported`).
    Raises Breach if a kernel errs more than `SLACK` times as much as the XLA form.
    """
    ran, can_run = [], jax.__version_info__[:3] >= dispatch.KERNELS_NEED_JAX and s.wide  # float64 is the truth
    for name in DTYPES if can_run else ():
        for subject in _candidates(s, deep):
            served = [ids for ids in (subject.ids, None) if _serves(subject, name, ids)]
            if served:
                _compare(subject, name, served[0], deep)
                ran.append(name)
                break
    return ran


def _candidates(s: Subject, deep: bool) -> Iterator[Subject]:
    yield s
    names = {field.name for field in dataclasses.fields(s.config)}
    if deep and {"head_dim", "chunk_size"} <= names:
        try:
            config = dataclasses.replace(s.config, **{name: x for name, x in SIZES.items() if name in names})
        except UserError:  # its other fields do not go with these
            return
        yield Subject(config, dim=s.dim, thorough=False)


def _serves(s: Subject, name: str, ids) -> bool:
    """Whether the kernels of this name serve every call of an operation that the subject makes."""
    params, x, _ = _numbers(s, DTYPES[name])
    with jax.enable_x64(False), dispatch.recorded_calls() as calls:
        jax.eval_shape(lambda params, x, ids: s.apply(params, x, None, ids), params, x, ids)
    kernels = [{found.name: found for found in dispatch.implementations(call.op)}.get(name) for call in calls]
    return bool(calls) and all(found and not found.supports(call.shapes) for found, call in zip(kernels, calls))


def _numbers(s: Subject, dtype):
    """Parameters and inputs as training in `dtype` has them, and both as float64."""

    def moved(a, b):
        a, b = np.asarray(a), np.asarray(b)
        return jnp.asarray(a + MOVED * (b - a), jnp.float32) if is_float(a) else jnp.asarray(a)

    with jax.enable_x64(False):
        params = cast(jax.tree.map(moved, s.initial, s.params), dtype)
        x = jnp.asarray(s.x, dtype)
    return params, x, jax.tree.map(lambda p: np.asarray(p, s.dtype) if is_float(p) else p, (params, x))


def _compare(s: Subject, name: str, ids, deep: bool) -> None:
    params, x, wide = _numbers(s, DTYPES[name])

    def found(subject, params, x):
        y, _ = subject.run(params, x, None, ids)
        values = {"the output": s.shown(np.asarray(y, np.float64), ids)}
        return values | ({"the gradients": subject.pullback(params, x, ids, s.weights)} if deep else {})

    wanted = found(s, *wide)
    with jax.enable_x64(False), dispatch.interpreted_kernels():
        own, others = (
            found(s.variant(dataclasses.replace(s.config, implementation=one)), params, x) for one in (name, "xla")
        )
    for what, truth in wanted.items():
        error, other = _error(own[what], truth), _error(others[what], truth)
        message = f"{what} of {name!r} errs by {error:.1e} of its size, that of the XLA form by {other:.1e}"
        demand(error <= max(SLACK * other, FLOOR), message, size=error)


def _error(found, wanted) -> float:
    """Root mean square of the leaves' relative errors; infinite if a value is not finite."""
    squares = []
    for a, b in zip(
        *(map(lambda x: np.asarray(x, np.float64), jax.tree.leaves(t)) for t in (found, wanted)), strict=True
    ):
        if not np.all(np.isfinite(a)):
            return np.inf
        if b.size and np.any(b):
            squares.append(np.sum((a - b) ** 2) / np.sum(b**2))
    return float(np.sqrt(np.mean(squares)))
