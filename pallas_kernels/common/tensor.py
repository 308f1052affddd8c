"""Tensor parallelism: devices of the mesh axis `tensor` that work on their own heads, channels or vocabulary entries.

`on_shares` runs a function once per device of the axis, on shares of its arrays, while the compiler places all other
axes. Inside, `summed` adds what the devices have computed. Outputs that are not split must be equal on all devices.

`jax.shard_map` without its check divides the cotangent of such an output by the number of devices and adds up those of
every input that is not split. So one all-reduce in the backward pass serves all uses of an input, and a parameter used
by all heads gets its whole gradient.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Shaped

TENSOR = "tensor"


def _kind() -> AxisType | None:
    """Who places the axis, the compiler (auto) or the program (manual); None without several devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape.get(TENSOR, 1) == 1:
        return None
    return dict(zip(mesh.axis_names, mesh.axis_types))[TENSOR]


def shares() -> int:
    """Devices among which the current mesh can split heads; 1 without a mesh, and inside `on_shares`."""
    return jax.sharding.get_abstract_mesh().shape[TENSOR] if _kind() == AxisType.Auto else 1


def on_shares(f: Callable, in_specs: Any, out_specs: Any, *, also: tuple[str, ...] = ()) -> Callable:
    """f(index, *args), run by every device of the axis on its shares of args; `index` [1] is its place on the axis.

    The specs are prefixes of args and results: `PartitionSpec(None, "tensor")` splits the second axis, none is
    `PartitionSpec()`. `also`: further mesh axes that they split.
    """
    places = jnp.arange(shares())
    specs = (PartitionSpec(TENSOR), *in_specs)
    mapped = jax.shard_map(f, in_specs=specs, out_specs=out_specs, axis_names={TENSOR, *also}, check_vma=False)
    return lambda *args: mapped(places, *args)


def split(axis: int | None) -> PartitionSpec:
    """The spec of an array split along one axis, or along none."""
    return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, TENSOR)


@jax.custom_vjp
def _summed(x):
    return jax.lax.psum(x, TENSOR)


# All devices get the same cotangent, the whole one divided by their number.
_summed.defvjp(lambda x: (_summed(x), None), lambda _, x_bar: (x_bar * jax.lax.axis_size(TENSOR),))


def summed(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """The sum over the devices inside `on_shares`, else x. All that follows must be the same on all devices: else the
    gradient is wrong, and `jax.lax.psum` is right."""
    return _summed(x) if _kind() == AxisType.Manual else x


@jax.custom_vjp
def _to_shares(x):
    return x


_to_shares.defvjp(lambda x: (x, None), lambda _, x_bar: (jax.lax.pmean(x_bar, TENSOR),))


def to_shares(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """x, computed from a sum over the devices inside `on_shares`, as the input of what each does with its own heads."""
    return _to_shares(x) if _kind() == AxisType.Manual else x


def mean_of_shares(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """The mean over the devices inside `on_shares`, else x; whatever follows."""
    return jax.lax.pmean(x, TENSOR) if _kind() == AxisType.Manual else x
