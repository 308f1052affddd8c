"""Law 7: every parameter has a gradient, and the gradient is correct."""

import jax
import jax.numpy as jnp
import numpy as np

from engrax.laws.breach import demand, law, leaf_position
from engrax.laws.subject import Subject, is_float

LONG = 1031  # tokens of a row that reaches more than short rows do, such as late positions of a table
NOTHING = 1e-14  # of the largest gradient: a leaf whose gradient is nowhere larger has only rounding


@law("trainability.gradients")
def every_parameter_has_a_gradient(s: Subject, deep: bool = False):
    """Every entry of every parameter has a gradient in some situation: packed rows, one segment, several calls with the
    state between them, other inputs, fresh parameters, a long row."""
    dead = None
    for grads in _situations(s, s.thorough or deep):
        leaves = jax.tree_util.tree_leaves_with_path(grads)
        for path, g in leaves:
            demand(np.all(np.isfinite(g)), "its gradient is not finite", position=leaf_position(path))
        largest = max((float(np.max(np.abs(g))) for _, g in leaves if np.size(g)), default=0.0)
        here = [_dead(np.abs(np.asarray(g)), NOTHING * largest) for _, g in leaves]
        dead = here if dead is None else [a & b for a, b in zip(dead, here)]
        if not any(np.any(entries) for entries in dead):
            return
    for (path, g), entries in zip(leaves, dead):
        if np.any(entries):
            index = tuple(int(i) for i in np.argwhere(entries)[0])
            message = f"{int(np.sum(entries))} of {np.size(g)} entries have no gradient in any call that was tried"
            demand(False, message, position=leaf_position(path, index), size=0.0)


def _dead(size: np.ndarray, nothing: float) -> np.ndarray:
    """Which entries of a leaf have no gradient: those at exact 0, or all if none exceeds `nothing`."""
    return size == 0 if np.any(size > nothing) else np.ones(size.shape, bool)


def _situations(s: Subject, programs: bool):
    """Gradients of the parameters, most informative first. Entries without a gradient in the first ones are looked for
    in the others, also in those that need their own `programs`."""

    def of(*args, **kwargs):
        grads = s.pullback(*args, **kwargs)
        return grads if s.is_model else grads[0]

    yield of(s.params, s.x, s.ids, s.weights)
    yield of(s.params, s.changed(s.x, np.ones(s.x.shape[:2], bool)), s.ids, s.weights)
    fresh = jax.tree.map(lambda p: p.astype(s.dtype) if is_float(p) else p, s.initial)
    yield of(fresh, s.x, s.ids, s.weights)
    for _ in range(4):  # paths of few tokens
        yield of(s.params, s.inputs(*s.x.shape[:2]), s.ids, s.weights)
    if not programs:
        return
    yield of(s.params, s.x, None, s.weights)
    yield of(s.params, s.x, s.ids, s.weights, cuts=(s.chunk + 4,))
    long = s.with_capacity(LONG)
    x = s.inputs(1, LONG)
    weights = np.random.default_rng(7).standard_normal((1, LONG, s.weights.shape[-1]))
    grads = long.pullback(s.params, x, None, weights)
    yield grads if s.is_model else grads[0]


@law("trainability.finite_differences")
def finite_differences_agree(s: Subject, deep: bool = False):
    """Along a random direction, leaf by leaf, so that no small gradient hides behind a large one."""
    steps, tolerance = ((1e-5, 1e-6, 1e-7), 1e-6) if s.wide else ((3e-2, 1e-2, 3e-3), 5e-2)
    for ids in (s.ids, None)[: 1 + deep]:
        grads = s.pullback(s.params, s.x, ids, s.weights)
        point, grads = ((s.params,), (grads,)) if s.is_model else ((s.params, s.x), grads)
        point, grads = jax.tree.map(np.asarray, (point, grads))
        rng = np.random.default_rng(4)
        total = float(np.sum(np.abs(s.weights * np.asarray(s.run(s.params, s.x, None, ids)[0]))))
        rounding = 10 * float(np.finfo(s.dtype).eps) * total / steps[0]  # of the difference that is divided by the step
        for i, (path, g) in enumerate(jax.tree_util.tree_leaves_with_path(grads)):
            direction = rng.standard_normal(g.shape) / g.size**0.5
            wanted = float(np.sum(g * direction))
            # A long step errs at large curvature, a short one at small curvature; a wrong gradient fails at all.
            tried = [_directional_derivative(s, point, i, direction, ids, step) for step in steps]
            found = min(tried, key=lambda value, wanted=wanted: abs(value - wanted))
            size = float(np.linalg.norm(g.ravel()) * np.linalg.norm(direction))
            demand(
                abs(found - wanted) <= tolerance * max(size, 1e-3) + rounding,
                f"the gradient along a direction is {wanted:.9g}, finite differences say {found:.9g}",
                position=_name(s, path),
                size=abs(found - wanted),
            )


def _name(s: Subject, path) -> str:
    """A parameter's name, or the inputs, in (parameters, inputs)."""
    return "the inputs" if not s.is_model and len(path) == 1 and path[0].idx == 1 else leaf_position(path[1:])


def _directional_derivative(s: Subject, point, leaf: int, direction, ids, step: float) -> float:
    """Fourth-order central difference of sum(weights * outputs) along a direction of one leaf of (params, x)."""
    leaves, tree = jax.tree.flatten(point)

    def value(epsilon):
        moved = [jnp.asarray(p + epsilon * direction, p.dtype) if i == leaf else p for i, p in enumerate(leaves)]
        params, *x = jax.tree.unflatten(tree, moved)
        y = np.asarray(s.run(params, x[0] if x else s.x, None, ids)[0], np.float64)
        return float(np.sum(s.weights * y))

    return (8 * (value(step) - value(-step)) - value(2 * step) + value(-2 * step)) / (12 * step)
