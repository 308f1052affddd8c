"""An estimate of the bytes that a training step holds beside its arguments, from the traced gradient alone.

Values live from the equation that makes them to the last that needs them, in the order in which they are traced; loops
and functions are followed inside. A compiler fuses: what is computed element by element is not held, its operands are,
unless a loop or a matrix product takes it. XLA repeats such work for every use on a GPU, and holds its result on a TPU.
Nothing is compiled, and the order in which a compiler runs the equations is not known, so this is an estimate:
docs/operations.md compares it with compilers.
"""

import contextlib
import itertools
import math
from collections import Counter
from typing import Any, NamedTuple

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
CALLS = frozenset(  # of functions; a compiler inlines them
    "jit pjit closed_call core_call custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr remat2 checkpoint eval_jaxpr "
    "shard_map".split()
)
KERNELS = frozenset("pallas_call mpmd_map core_map run_state".split())  # what they hold inside is on the chip


class Value(NamedTuple):
    """A value of one call of a function."""

    call: int
    var: core.Var

    @property
    def bytes(self) -> int:
        """Bytes of the array; 0 for what is none."""
        shape, dtype = getattr(self.var.aval, "shape", None), getattr(self.var.aval, "dtype", None)
        return 0 if shape is None or dtype == jax.dtypes.float0 else math.prod(shape) * np.dtype(dtype).itemsize


class Step(NamedTuple):
    """An equation of a jaxpr whose calls are inlined."""

    name: str
    eqn: core.JaxprEqn
    inputs: tuple[Value, ...]  # without literals
    outputs: tuple[Value, ...]


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


def inlined(jaxpr: core.Jaxpr, platform: str) -> tuple[list[Step], list[Value | None]]:
    """Returns the equations of a jaxpr in order, calls inlined, and its results (None for a literal)."""
    steps, calls = [], itertools.count()

    def walk(jaxpr, arguments):
        call = next(calls)
        known = dict(zip(jaxpr.invars, arguments)) | {v: Value(call, v) for v in jaxpr.constvars}

        def read(v):
            return None if isinstance(v, core.Literal) else known[v]

        for eqn in jaxpr.eqns:
            inputs, function = [read(v) for v in eqn.invars], _called(eqn, platform)
            if function is None:
                outputs = [Value(call, v) for v in eqn.outvars]
                given = tuple(value for value in inputs if value is not None)
                steps.append(Step(eqn.primitive.name, eqn, given, tuple(outputs)))
            else:
                outputs = walk(function, inputs[len(inputs) - len(function.invars) :])
            known.update(zip(eqn.outvars, outputs))
        return [read(v) for v in jaxpr.outvars]

    return steps, walk(jaxpr, [Value(-1, v) for v in jaxpr.invars])


def _called(eqn: core.JaxprEqn, platform: str) -> core.Jaxpr | None:
    """The function that an equation calls, if it is inlined: of several branches that for the platform."""
    platforms = eqn.params.get("branches_platforms")
    if eqn.primitive.name == "cond" and platforms is not None:
        own = [i for i, names in enumerate(platforms) if names and platform in names]
        return eqn.params["branches"][own[0] if own else -1].jaxpr
    return _jaxprs(tuple(eqn.params.values()))[0] if eqn.primitive.name in CALLS else None


def peak(jaxpr: core.Jaxpr, platform: str) -> int:
    """Returns the most bytes that are held at once while a jaxpr runs, without its arguments; results are included."""
    steps, results = inlined(jaxpr, platform)
    sources: dict[Value, frozenset] = {}  # of a fused value: the held values that it is computed from
    made: set[Value] = set()  # values that are held
    last: dict[Value, int] = {}  # the step that needs them last
    whole = _held_whole(steps, platform)
    for at, step in enumerate(steps):
        operands = frozenset().union(*(sources.get(v, frozenset((v,))) for v in step.inputs))
        held = [v for v in step.outputs if step.name not in FUSED or v in whole]
        sources |= {v: operands for v in step.outputs if v not in held}
        made |= set(held)
        if held:
            last |= dict.fromkeys((*operands, *held), at)
    for v in results:
        last |= dict.fromkeys(sources.get(v, (v,)), len(steps))
    ends: dict[int, list] = {}
    for v, at in last.items():
        if v in made:
            ends.setdefault(at, []).append(v)
    now = most = 0
    for at, step in enumerate(steps):
        now += sum(v.bytes for v in step.outputs if v in made)
        most = max(most, now + _inside(step, platform))
        now -= sum(v.bytes for v in ends.get(at, ()))
    return most


def _held_whole(steps: list[Step], platform: str) -> set[Value]:
    """The values that are held even if they could be fused: those that a loop or a product takes, before a mere change
    of shape or to a wider dtype, and on a TPU those that several equations use."""
    uses = Counter(v for step in steps for v in set(step.inputs)) if platform == "tpu" else Counter()
    maker = {v: step for step in steps for v in step.outputs}
    found = {v for v, step in maker.items() if uses[v] > 1 and step.name not in MOVES}
    for step in steps:
        if step.name in FUSED or step.name.startswith(("reduce", "arg")):
            continue
        for v in step.inputs:
            while step.name == "dot_general" and v in maker and maker[v].name in MOVES and maker[v].inputs:
                if maker[v].inputs[0].bytes > v.bytes:
                    break
                v = maker[v].inputs[0]
            found.add(v)
    return found


def _inside(step: Step, platform: str) -> int:
    """The bytes that an equation holds inside: of several functions the largest."""
    if step.name in KERNELS:
        return 0
    return max((peak(jaxpr, platform) for jaxpr in _jaxprs(tuple(step.eqn.params.values()))), default=0)


def _jaxprs(value: Any) -> list[core.Jaxpr]:
    if isinstance(value, core.ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, core.Jaxpr):
        return [value]
    return [jaxpr for item in value for jaxpr in _jaxprs(item)] if isinstance(value, tuple) else []
