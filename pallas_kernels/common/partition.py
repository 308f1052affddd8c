"""Kernels under a mesh: each device runs the kernel on its own rows and heads.

A hand-written kernel is opaque to the partitioner, so the call is wrapped in `jax.shard_map`: rows over the mesh axes
`data` and `fsdp`, heads over `tensor`, everything else replicated. No collective is needed.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

ROW_AXES = ("data", "fsdp")
HEAD_AXES = ("tensor",)


def shard_over_batch_and_heads(
    f: Callable, in_dims: tuple[Any, ...], out_dims: Any, *, uneven: str = "refuse"
) -> Callable:
    """Returns f for the active mesh (`jax.set_mesh`), or f unchanged without a mesh.

    in_dims: for each argument a pytree prefix of strings with one letter per axis, "BTHK"; B is a batch row, H a head
    (of q or of v); other axes are not split; None: replicated. out_dims: the same for f's results.
    Mesh axes that are already manual (inside `jax.shard_map`) are ignored. uneven: for sizes that do not divide evenly
    over the devices, "refuse" raises ValueError, and "whole" runs f unsplit (f must then not be a kernel).
    """
    mesh = jax.sharding.get_abstract_mesh()
    automatic = () if mesh.empty else [n for n, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Auto]
    axes = {"B": tuple(n for n in ROW_AXES if n in automatic), "H": tuple(n for n in HEAD_AXES if n in automatic)}
    if not automatic:
        return f

    def spec(dims):
        return PartitionSpec(*(axes.get(letter) or None for letter in dims or ()))

    def run(*args):
        misfits = [message for dims, arg in zip(in_dims, args) for message in _misfits(dims, arg, axes, mesh)]
        if misfits and uneven == "whole":
            return f(*args)
        if misfits:
            raise ValueError(misfits[0])
        in_specs, out_specs = (jax.tree.map(spec, dims, is_leaf=_is_dims) for dims in (in_dims, out_dims))
        # All axes become manual, even those that split nothing, because kernels are rejected under automatic axes.
        names = set(automatic)
        return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False)(*args)

    return run


def _is_dims(x) -> bool:
    return x is None or isinstance(x, str)


def _misfits(dims, arg, axes, mesh) -> list[str]:
    """The sizes that do not divide evenly over the mesh, one sentence each."""
    found = []

    def check(dims, subtree):
        for leaf in jax.tree.leaves(subtree):
            for letter, size in zip(dims or (), leaf.shape):
                parts = math.prod(mesh.shape[name] for name in axes.get(letter, ()))
                if size % parts:
                    what = "batch rows" if letter == "B" else "heads"
                    over = " x ".join(axes[letter])
                    found.append(f"{size} {what} do not divide over the {parts} devices of mesh axes {over}.")

    jax.tree.map(check, dims, arg, is_leaf=_is_dims)
    return found
