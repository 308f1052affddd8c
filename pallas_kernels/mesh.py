"""Kernels under a mesh: each device runs the kernel on its own rows and heads.

A hand-written kernel is opaque to the partitioner, so the call is wrapped in `jax.shard_map`: rows over the mesh axes
`data` and `fsdp`, heads over `tensor`, everything else replicated. No collective is needed.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

ROW_AXES = ("data", "fsdp")
HEAD_AXES = ("tensor",)


def over_mesh(f: Callable, in_dims: tuple[Any, ...], out_dims: Any) -> Callable:
    """Returns f as it runs under the mesh in force (`jax.set_mesh`), f itself where there is none.

    in_dims: for each argument a pytree prefix of strings with one letter per axis, "BTHK"; B is a batch row, H a head
    (of q or of v), any other letter stays whole; None: replicated. out_dims: the same for what f returns.
    Axes that are already manual (inside `jax.shard_map`) are left alone.
    """
    mesh = jax.sharding.get_abstract_mesh()
    automatic = () if mesh.empty else [n for n, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Auto]
    axes = {"B": tuple(n for n in ROW_AXES if n in automatic), "H": tuple(n for n in HEAD_AXES if n in automatic)}
    if not automatic:
        return f

    def spec(dims):
        return PartitionSpec(*(axes.get(letter) or None for letter in dims or ()))

    def run(*args):
        for dims, arg in zip(in_dims, args):
            _check_sizes(dims, arg, axes, mesh)
        in_specs, out_specs = (jax.tree.map(spec, dims, is_leaf=_is_dims) for dims in (in_dims, out_dims))
        # All axes become manual, those that split nothing too: kernels are refused where an automatic one is left.
        names = set(automatic)
        return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False)(*args)

    return run


def _is_dims(x) -> bool:
    return x is None or isinstance(x, str)


def _check_sizes(dims, arg, axes, mesh) -> None:
    def check(dims, subtree):
        for leaf in jax.tree.leaves(subtree):
            for letter, size in zip(dims or (), leaf.shape):
                parts = 1
                for name in axes.get(letter, ()):
                    parts *= mesh.shape[name]
                if size % parts:
                    what = "batch rows" if letter == "B" else "heads"
                    over = " x ".join(axes[letter])
                    raise ValueError(f"{size} {what} do not divide over the {parts} devices of mesh axes {over}.")

    jax.tree.map(check, dims, arg, is_leaf=_is_dims)
