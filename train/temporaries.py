"""An estimate of the bytes that a training step holds beside its arguments, from the traced gradient alone.

Values live from the equation that makes them to the last that needs them, in the order in which they are traced; loops
and functions are followed inside. A compiler fuses: what is computed element by element and used once is not held, its
operands are, unless a loop or a matrix product takes it. Nothing is compiled, and the order in which a compiler runs
the equations is not known, so this is an estimate: docs/operations.md compares it with compilers.
"""

import contextlib
import math
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend import core

from engrax import models
from engrax.models.parameters import cast
from engrax.pallas_kernels import devices
from engrax.pallas_kernels.dispatch import KERNELS_NEED_JAX
from engrax.train import train_step
from engrax.train.experiment import Experiment

# Primitives whose results are fused into what uses them.
FUSED = frozenset(
    "abs add add_any and atan2 broadcast_in_dim cbrt ceil clamp convert_element_type copy cos cosh div eq erf exp exp2 "
    "expand_dims expm1 floor ge gt integer_pow iota is_finite le log log1p logistic lt max min mul ne neg not or pad "
    "pow reduce_precision rem reshape rev round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical "
    "sign sin sinh slice sqrt square squeeze stop_gradient sub tan tanh transpose xor name optimization_barrier "
    "bitcast_convert_type split".split()
)
MOVES = frozenset("broadcast_in_dim convert_element_type expand_dims reshape slice squeeze transpose name".split())
CALLS = ("jit", "pjit", "custom_jvp_call")  # functions


def estimate(experiment: Experiment, rows: int, dtype: Any, device: devices.Device) -> int:
    """Returns the bytes that the gradient of `rows` rows on one device holds at once, beside parameters and batch.

    dtype: of the computation. device: whose kernels are used.
    """
    graphdef, params = nnx.split(nnx.eval_shape(lambda: models.build(experiment.model, rngs=nnx.Rngs(0))), nnx.Param)
    tokens = jax.ShapeDtypeStruct((rows // experiment.optimizer.accumulate, experiment.data.seq_len), jnp.int32)
    batch = dict(tokens=tokens, targets=tokens, segment_ids=tokens)
    loss = train_step.make_loss(graphdef, dtype)
    memory = None
    if experiment.carry_memory:
        rows = tokens.shape[0]
        start = lambda p: nnx.merge(graphdef, cast(p, dtype)).init_memory(rows)  # noqa: E731
        memory = jax.eval_shape(lambda p: jax.tree.map(jnp.asarray, start(p)), params)
    kernels = jax.__version_info__[:3] >= KERNELS_NEED_JAX
    with devices.use(device) if kernels else contextlib.nullcontext():
        traced = jax.make_jaxpr(jax.grad(loss, has_aux=True))(params, batch, memory)
    return peak(traced.jaxpr, device.platform)


def peak(jaxpr: core.Jaxpr, platform: str) -> int:
    """Returns the most bytes that are held at once while a jaxpr runs, without its arguments; results are included."""
    sources: dict[Any, frozenset] = {}  # of a fused value: the held values that it is computed from
    size: dict[Any, int] = {v: 0 for v in (*jaxpr.invars, *jaxpr.constvars)}
    last: dict[Any, int] = {}
    needed = _taken_whole(jaxpr)

    def held(v) -> frozenset:
        return frozenset() if isinstance(v, core.Literal) else sources.get(v, frozenset((v,)))

    for at, eqn in enumerate(jaxpr.eqns):
        operands = frozenset().union(*map(held, eqn.invars))
        for v in eqn.outvars:
            if _fused(eqn) and v not in needed:
                sources[v] = operands
            else:
                size[v] = _bytes(v.aval)
        if any(v in size for v in eqn.outvars):
            last |= dict.fromkeys((*operands, *(v for v in eqn.outvars if v in size)), at)
    for v in jaxpr.outvars:
        last |= dict.fromkeys(held(v), len(jaxpr.eqns))
    ends: dict[int, list] = {}
    for v, at in last.items():
        ends.setdefault(at, []).append(v)
    now = most = 0
    for at, eqn in enumerate(jaxpr.eqns):
        now += sum(size[v] for v in eqn.outvars if v in size and v in last)
        most = max(most, now + _inside(eqn, platform))
        now -= sum(size[v] for v in ends.get(at, ()))
    return most


def _fused(eqn: core.JaxprEqn) -> bool:
    """Whether a compiler fuses an equation into what uses it; also a function of such, like `jax.nn.silu`."""
    if eqn.primitive.name in CALLS:
        return all(_fused(inner) for value in eqn.params.values() for jaxpr in _jaxprs(value) for inner in jaxpr.eqns)
    return eqn.primitive.name in FUSED


def _taken_whole(jaxpr: core.Jaxpr) -> set:
    """The values that are held even if they could be fused: that several equations use, or that a loop, a function or a
    product takes. A product reads through mere changes of shape or dtype."""
    uses = Counter(v for eqn in jaxpr.eqns for v in {x for x in eqn.invars if not isinstance(x, core.Literal)})
    made = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    found = {v for v, eqn in made.items() if uses[v] > 1 and eqn.primitive.name not in MOVES}
    for eqn in jaxpr.eqns:
        if _fused(eqn) or eqn.primitive.name.startswith(("reduce", "arg")):
            continue
        for v in eqn.invars:
            if isinstance(v, core.Literal):
                continue
            while eqn.primitive.name == "dot_general" and v in made and made[v].primitive.name in MOVES:
                v = made[v].invars[0]
                if isinstance(v, core.Literal):
                    break
            else:
                found.add(v)
    return found


def _inside(eqn: core.JaxprEqn, platform: str) -> int:
    """The bytes that an equation holds inside: of the branch for the platform, else of the largest."""
    if eqn.primitive.name in ("pallas_call", "core_map", "run_state", "mosaic_gpu_kernel"):
        return 0
    if eqn.primitive.name == "cond":
        return _branch(eqn, platform)
    inner = [p for value in eqn.params.values() for p in _jaxprs(value)]
    return max((peak(jaxpr, platform) for jaxpr in inner), default=0)


def _branch(eqn: core.JaxprEqn, platform: str) -> int:
    peaks = [peak(branch.jaxpr, platform) for branch in eqn.params["branches"]]
    return peaks[0] if eqn.params.get("branches_platforms") else max(peaks)


def _jaxprs(value: Any) -> list[core.Jaxpr]:
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    return [jaxpr for item in value for jaxpr in _jaxprs(item)] if isinstance(value, (tuple, list)) else []


def _bytes(aval: Any) -> int:
    shape, dtype = getattr(aval, "shape", None), getattr(aval, "dtype", None)
    return 0 if shape is None else math.prod(shape) * (np.dtype(dtype).itemsize if dtype != jax.dtypes.float0 else 0)
