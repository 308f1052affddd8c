"""The table of parameters: a parameter's role determines its dtype, decay, learning rate and sharding.

A role is declared where the parameter is created, `nnx.Param(x, axes=("heads",), role="gate")`. For `nnx.Linear` and
Flax's norms and embeddings it follows from the type (`declare_roles`): a Linear kernel is a matrix. `axes` name the
parameter's axes; the axis of stacked layers is called "layers" and is never sharded.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from engrax.errors import UserError

LAYERS = "layers"  # the axis along which the blocks of a pattern position are stacked
SHARED = ("heads", "mlp", "vocab")  # axes that tensor parallelism splits
STACKS = (LAYERS, "memory")  # leading axes along which matrices are stacked: layers, and the memories of a mixture


class Role(NamedTuple):
    """The properties of all parameters of one role."""

    compute_dtype: bool  # cast to the compute dtype in the forward pass; else float32, and float64 stays
    decayed: bool  # whether weight decay pulls it to zero
    learning_rate: float  # factor of the optimizer's learning rate
    why_not_decayed: str = ""


ROLES = {
    "matrix": Role(True, True, 1.0),
    "embedding": Role(True, True, 1.0),
    "gate": Role(False, False, 1.0, "zero is not neutral for a decay rate, a gate's bias or a temperature"),
    "norm": Role(False, False, 1.0, "a norm's scale of zero removes its input"),
    "bias": Role(False, False, 1.0, "a bias has no scale that decay could keep in check"),
    "convolution": Role(True, False, 1.0, "the few taps of a channel start equal and hold the current token"),
    "initial memory": Role(True, False, 1.0, "the content that a memory starts from is no map that should be small"),
    "constant": Role(False, False, 0.0, "it is not trained"),
}


def role_of(variable: nnx.Variable) -> Role:
    """The role of a parameter. Raises UserError if none is declared."""
    name = variable.get_metadata().get("role")
    if name is None:
        raise UserError("a parameter has no role; build the model with engrax.models.build, which names the parameter.")
    return ROLES[name]


def axes_of(variable: nnx.Variable) -> tuple[str | None, ...]:
    """The names of a parameter's axes, None for an axis without a name."""
    axes = tuple(variable.get_metadata().get("axes") or ())
    return axes + (None,) * (len(variable.shape) - len(axes))


def matrix_widths(variable: nnx.Variable) -> tuple[int, ...] | None:
    """The output widths of the linear maps that lie side by side in a matrix [..., in, out]; None for other parameters.

    Leading axes stack matrices. A parameter of role matrix is none if its leading axes have other names, as those of an
    `nnx.Einsum` with heads apart from their width: the table does not say which of its axes are the input.
    """
    table, shape = variable.get_metadata(), variable.shape
    stacked = all(name in STACKS for name in axes_of(variable)[:-2])
    if table.get("role") != "matrix" or len(shape) < 2 or not stacked:
        return None
    return table.get("widths") or (shape[-1],)


def _by_type(module: Any, name: str) -> str | None:
    """The role of the parameter `name` of a Flax module, None for an unknown type."""
    if isinstance(module, nnx.Linear | nnx.LinearGeneral | nnx.Einsum):
        return {"kernel": "matrix", "bias": "bias"}.get(name)
    if isinstance(module, nnx.Conv | nnx.ConvTranspose):
        return {"kernel": "convolution", "bias": "bias"}.get(name)
    if isinstance(module, nnx.LayerNorm | nnx.RMSNorm | nnx.GroupNorm | nnx.BatchNorm):
        return "norm"
    return "embedding" if isinstance(module, nnx.Embed) else None


def declare_roles(model: nnx.Module, *, strict: bool = True) -> nnx.Module:
    """Sets every parameter's role from its declaration or from the type of its module; returns the model.

    Raises UserError for a parameter with neither, or with an unknown role; the message names the line to change. With
    strict=False such a parameter is a matrix if it has two axes or more, else a bias.
    """
    for owner, name, variable in _parameters(model):
        metadata = variable.get_metadata()
        role = metadata.get("role") or _by_type(owner, name)
        if role not in ROLES:
            if strict:
                raise UserError(_undeclared(owner, name, role))
            role = "matrix" if variable.ndim >= 2 else "bias"
        if metadata.get("role") != role:
            variable.set_metadata(role=role)
    return model


def _parameters(model: nnx.Module) -> Iterator[tuple[Any, str, nnx.Param]]:
    """(owning module, attribute, parameter) of every parameter."""
    owners = {path: node for path, node in nnx.iter_graph(model)}
    for path, node in owners.items():
        if isinstance(node, nnx.Param):
            parent = path[:-1]
            while parent and not isinstance(owners.get(parent), nnx.Module):
                parent = parent[:-1]
            names = [part for part in path[len(parent) :] if isinstance(part, str)]
            yield owners.get(parent, model), names[-1] if names else str(path[-1]), node


def _undeclared(owner: Any, name: str, role: str | None) -> str:
    """The error message for a parameter without a role: its name, its place, and what to write."""
    cls = type(owner)
    where = cls.__qualname__
    try:
        lines, first = inspect.getsourcelines(cls)
        found = [i for i, line in enumerate(lines) if f"self.{name}" in line and "Param(" in line]
        found = found or [i for i, line in enumerate(lines) if f"self.{name}" in line]
        where = f"{inspect.getsourcefile(cls)}, line {first + found[0]}" if found else where
    except (OSError, TypeError):
        pass
    wrong = f"has the unknown role {role!r}" if role else "has no role"
    known = ", ".join(ROLES)
    return (
        f"{where}: the parameter {name!r} of {cls.__name__} {wrong}; write "
        f'nnx.Param(..., role="matrix") with one of {known}.'
    )


def map_parameters(f: Callable[..., Any], params: Any, *others: Any) -> Any:
    """f(variable, ...) over the variables of a state; the result replaces the variable's value."""

    def one(variable, *rest):
        return variable.replace(f(variable, *rest))

    return jax.tree.map(one, params, *others, is_leaf=lambda x: isinstance(x, nnx.Variable))


def cast(params: Any, dtype: Any) -> Any:
    """Parameters for a forward pass in `dtype`: matrices and embeddings are cast, gates, norms and biases are float32.

    float64 casts all parameters: the oracle uses no lower precision. Integers are unchanged.
    """
    dtype = jnp.dtype(dtype)

    def one(variable):
        value = variable.get_value()
        if not jnp.issubdtype(value.dtype, jnp.floating):
            return value
        wide = jnp.promote_types(dtype, jnp.float32)
        return value.astype(dtype if role_of(variable).compute_dtype else wide)

    return map_parameters(one, params)


def decay_mask(params: Any) -> Any:
    """True for the parameters with weight decay."""
    return map_parameters(lambda variable: role_of(variable).decayed, params)


def sharded_axis(variable: nnx.Variable, devices: int, taken: int | None = None) -> int | None:
    """The axis along which ZeRO shards a parameter: the first that `devices` divides, except the stacked layers' and
    the one that tensor parallelism has `taken`."""
    for i, (length, name) in enumerate(zip(variable.shape, axes_of(variable))):
        if devices > 1 and name != LAYERS and i != taken and length and length % devices == 0:
            return i
    return None


def parts_of(variable: nnx.Variable) -> tuple[int, ...]:
    """The widths of the parts that lie side by side along a parameter's last axis, each cut by heads on its own."""
    table = variable.get_metadata()
    return table.get("parts") or table.get("widths") or variable.shape[-1:]


def used_axis(variable: nnx.Variable) -> int | None:
    """The axis of which every device uses its own heads, channels or vocabulary entries; None: all use all."""
    axes = axes_of(variable)
    names = axes[len(axes) - variable.ndim :]  # in a model's scan without the axis of layers
    return next((i for i, name in enumerate(names) if name in (*SHARED, "channels")), None)


def held_axis(variable: nnx.Variable, shares: int) -> int | None:
    """The axis along which `shares` devices hold a parameter, or optimizer state of its shape: the axis they use. With
    parts side by side it is the rows, of which each device exchanges its own for the columns of its heads. None: each
    holds all, as of a convolution's taps, or if the length does not divide."""
    axis = used_axis(variable)
    if axis is None or "channels" in axes_of(variable):
        return None
    axis -= len(parts_of(variable)) > 1
    return axis if axis >= 0 and variable.shape[axis] % shares == 0 else None


def stack_axes(block: nnx.Module) -> None:
    """Names the leading axis of every parameter of a stacked block."""
    for _, value in nnx.iter_graph(block):
        if isinstance(value, nnx.Param):
            axes = tuple(value.get_metadata().get("axes") or ())
            rest = value.ndim - 1
            value.set_metadata(axes=(LAYERS, *axes[:rest], *(None,) * (rest - len(axes))))
