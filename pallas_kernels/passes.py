"""An implementation's forward and backward pass, and their choice by the platform a program is lowered for."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Passes:
    """The core of an operation: `passes(plan, inputs) -> outputs`, differentiable.

    forward(plan, inputs) -> (outputs, residuals); residuals: values for the backward pass, besides the inputs.
    backward(plan, inputs, residuals, cotangents) -> cotangents of the inputs, None for inputs that are not floats.
    alone(plan, inputs) -> outputs: the same, differentiable by itself; None: built from the two. It is used if the
    program has no other implementation: it may save residuals that the others cannot hold, and run forwards without
    them. plan: static, hashable; inputs, outputs, residuals: trees of arrays.
    """

    forward: Callable
    backward: Callable
    alone: Callable | None = None

    def __call__(self, plan: Any, inputs: Any) -> Any:
        if self.alone is not None:
            return self.alone(plan, inputs)
        return run_by_platform(((None, self),), plan, inputs)

    @classmethod
    def of(cls, function: Callable) -> "Passes":
        """Returns the passes of a differentiable `function(plan, inputs)`; without `alone`, nothing is saved."""

        def forward(plan, inputs):
            return function(plan, inputs), ()

        def backward(plan, inputs, residuals, cotangents):
            return pull_back(partial(function, plan), inputs, cotangents)

        return cls(forward, backward, function)

    @classmethod
    def saving(cls, function: Callable) -> "Passes":
        """Returns the passes of a differentiable `function(plan, inputs)`; what its derivative needs is saved."""

        def linearized(plan, inputs):
            return _pulled_back(partial(function, plan), inputs)

        def forward(plan, inputs):
            outputs, pull = linearized(plan, inputs)
            return outputs, jax.tree.leaves(pull)

        def backward(plan, inputs, residuals, cotangents):
            pull = jax.tree.structure(jax.eval_shape(partial(linearized, plan), inputs)[1]).unflatten(residuals)
            return _with_floats(inputs, pull(cotangents))

        return cls(forward, backward, function)


Branches = tuple[tuple[str | None, Passes], ...]  # by platform; the last is for all others


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def run_by_platform(branches: Branches, plan: Any, inputs: Any) -> Any:
    """Returns the outputs of the branch for the platform that the program is lowered for.

    `jax.lax.platform_dependent` traces every branch, so the caller must omit those that cannot serve the call.
    """
    if len(branches) == 1:
        return branches[0][1].forward(plan, inputs)[0]
    return _choose([platform for platform, _ in branches], [partial(passes, plan) for _, passes in branches], inputs)


def _forward(branches: Branches, plan, inputs):
    """Each kernel has a slot for its residuals. The last branch, beside kernels, saves none and recomputes."""
    if len(branches) == 1:
        outputs, residuals = branches[0][1].forward(plan, inputs)
        return outputs, (inputs, residuals)
    *kernels, (_, last) = branches
    runs = [jax.jit(partial(passes.forward, plan)) for _, passes in kernels]  # jit: traces each once
    slots = [jax.eval_shape(run, inputs)[1] for run in runs]

    def with_slots(i, inputs):
        outputs, residuals = runs[i](inputs)
        return outputs, [residuals if i == j else _zeros(slot) for j, slot in enumerate(slots)]

    def without(inputs):
        return last.forward(plan, inputs)[0], [_zeros(slot) for slot in slots]

    calls = [*(partial(with_slots, i) for i in range(len(kernels))), without]
    outputs, residuals = _choose([platform for platform, _ in branches], calls, inputs)
    return outputs, (inputs, residuals)


def _backward(branches: Branches, plan, saved, cotangents):
    inputs, residuals = saved
    if len(branches) == 1:
        return (branches[0][1].backward(plan, inputs, residuals, cotangents),)
    *kernels, (_, last) = branches

    def with_slots(i, inputs, residuals, cotangents):
        return kernels[i][1].backward(plan, inputs, residuals[i], cotangents)

    def without(inputs, residuals, cotangents):
        return last.backward(plan, inputs, last.forward(plan, inputs)[1], cotangents)

    calls = [*(partial(with_slots, i) for i in range(len(kernels))), without]
    return (_choose([platform for platform, _ in branches], calls, inputs, residuals, cotangents),)


run_by_platform.defvjp(_forward, _backward)


def _choose(platforms: list[str | None], calls: list[Callable], *args) -> Any:
    return jax.lax.platform_dependent(*args, default=calls[-1], **dict(zip(platforms[:-1], calls)))


def _zeros(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)


def pull_back(function: Callable, inputs: Any, cotangents: Any) -> Any:
    """Returns the cotangents of the inputs of `function(inputs)`, None for inputs that are not floats."""
    return _with_floats(inputs, _pulled_back(function, inputs)[1](cotangents))


def _pulled_back(function: Callable, inputs: Any) -> tuple[Any, Callable]:
    """Returns `function(inputs)`, and the function from its cotangents to those of the float inputs, in order."""
    leaves = jax.tree.leaves(inputs)
    return jax.vjp(lambda *floats: function(_with_floats(inputs, floats, leaves)), *filter(_is_float, leaves))


def _with_floats(inputs: Any, floats: Any, leaves: list | None = None) -> Any:
    """Returns the tree of the inputs with these floats, and its other leaves from `leaves`, None by default."""
    mine, structure = jax.tree.flatten(inputs)
    rest = iter(floats)
    others = leaves or [None] * len(mine)
    return structure.unflatten([next(rest) if _is_float(x) else other for x, other in zip(mine, others)])


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)
