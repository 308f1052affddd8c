"""What optimizers of matrices share: which parameters are matrices, and maps over several results."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from engrax.models.parameters import matrix_widths
from engrax.train.optimizers.base import map_variables


def for_matrices(
    tx: optax.GradientTransformation,
    others: optax.GradientTransformation,
    wanted: Callable[[tuple[int, ...]], bool] = lambda shape: True,
) -> optax.GradientTransformation:
    """`tx` for the matrices [..., in, out] of the table of parameters (`matrix_widths`) whose shape is `wanted`, and
    `others` for all other parameters: embeddings, gates, norms, biases, convolutions, initial memories."""

    def labels(params):
        def one(v):
            if not jax.tree.leaves(v):  # a frozen parameter
                return v
            return v.replace("matrix" if matrix_widths(v) is not None and wanted(v.shape) else "other")

        return map_variables(one, params)

    return optax.partition({"matrix": tx, "other": others}, labels)


def side_by_side(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` with the maps that lie side by side in one matrix apart: queries, keys and values are three matrices."""

    def cut(variable):
        if not jax.tree.leaves(variable) or len(widths := matrix_widths(variable)) == 1:
            return variable
        value, parts, start = variable.get_value(), [], 0
        for width in widths:
            parts.append(variable.replace(value[..., start : start + width], widths=(width,)))
            start += width
        return tuple(parts)

    def join(variable, parts):
        if not isinstance(parts, tuple):
            return parts
        return variable.replace(jnp.concatenate([part.get_value() for part in parts], axis=-1))

    def update(updates, state, params=None):
        found, state = tx.update(map_variables(cut, updates), state, params)
        return map_variables(join, updates, found), state

    return optax.GradientTransformation(lambda params: tx.init(map_variables(cut, params)), update)


def map_arrays(f: Callable[..., tuple], outputs: int, *trees: Any) -> list[Any]:
    """The `outputs` trees of what f(array, ...) returns, over trees of one structure."""
    leaves, structure = jax.tree.flatten(trees[0])
    found = [f(*arrays) for arrays in zip(leaves, *map(jax.tree.leaves, trees[1:]), strict=True)]
    return [structure.unflatten([results[i] for results in found]) for i in range(outputs)]
