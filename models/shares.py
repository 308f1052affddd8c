"""Tensor parallelism in a model: each device of the mesh axis `tensor` runs a layer on its own heads or channels.

A mixer is cut by its heads, with its state (`MixerConfig.of_heads`), an MLP by its hidden channels, the embedding by
its vocabulary. A layer has one all-reduce of [B, T, D], at the end of its projection back to the model's width, and one
backward, of its input's cotangent. A mixer that cannot be cut is placed by the compiler.

Where projections lie side by side in one kernel, as queries, keys and values, a device's heads are columns here and
there. Such a kernel is held by rows (`parameters.held_axis`), and the devices exchange these for columns.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from engrax.layers.common.conv import ShortConv
from engrax.layers.common.lora import LoraLinear
from engrax.layers.mixer import Mixer, MixerConfig, MixerOutput
from engrax.models.contract import row_axes
from engrax.models.parameters import held_axis, parts_of, used_axis
from engrax.pallas_kernels.common import tensor

WHOLE = tensor.split(None)


def look_up(table_VD: Float[Array, "V D"], tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
    """The rows of tokens. Devices that share the vocabulary look up their own entries and add the results."""
    if tensor.shares() == 1 or table_VD.shape[0] % tensor.shares():
        return table_VD[tokens_BT]

    def own(index, rows, tokens):
        at = tokens - index[0] * len(rows)
        mine = (at >= 0) & (at < len(rows))
        return tensor.summed(jnp.where(mine[..., None], rows[jnp.where(mine, at, 0)], 0))

    axes = row_axes(len(tokens_BT))  # so each device adds up its own rows' gradient
    rows = PartitionSpec(axes)
    return tensor.on_shares(own, (tensor.split(0), rows), rows, also=axes)(table_VD, tokens_BT)


def run_mlp(mlp: nnx.Module, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """mlp(x), each device with its own hidden channels."""
    if tensor.shares() == 1 or _adapted(mlp):
        return mlp(x_BTD)
    cut = _cut(mlp)
    return tensor.on_shares(lambda _, values, x: cut.build(values)(x), (cut.specs, WHOLE), WHOLE)(cut.values, x_BTD)


def run_mixer(mixer: Mixer, x_BTD: Float[Array, "B T D"], state: Any, segment_ids: Any, **asked: Any) -> MixerOutput:
    """mixer.forward(...), each device with its own heads. What is collected, or muted, is asked of the whole mixer."""
    config = getattr(mixer, "config", None)
    cuttable = tensor.shares() > 1 and isinstance(config, MixerConfig) and config.of_heads(tensor.shares()) is not None
    if not cuttable or any(asked.values()) or _adapted(mixer):
        return mixer.forward(x_BTD, state, segment_ids, **asked)
    cut = _cut(mixer)
    whole = jax.eval_shape(lambda: mixer.init_state(len(x_BTD)))
    if state is not None and jax.tree.structure(state) != jax.tree.structure(whole):  # opened for single tokens
        return mixer.forward(x_BTD, state, segment_ids, **asked)
    own = jax.eval_shape(lambda values: cut.build(values).init_state(len(x_BTD)), cut.shapes)
    specs, parts = _state_places(mixer, whole, own)

    def run(_, values, x, state, segment_ids):
        out = cut.build(values).forward(x, state, segment_ids)
        return out.y, out.state, out.aux

    in_specs = cut.specs, WHOLE, WHOLE if state is None else specs, WHOLE
    given = None if state is None else _map_leaves(by_share, state, parts)
    y, after, aux = tensor.on_shares(run, in_specs, (WHOLE, specs, WHOLE))(cut.values, x_BTD, given, segment_ids)
    return MixerOutput(y, _map_leaves(side_by_side, after, parts), aux, {})


class Cut(NamedTuple):
    """A module whose parameters are cut into shares."""

    values: list[Array]  # its parameters, each share's heads or channels beside one another
    specs: list[PartitionSpec]  # which axis of each is cut
    shapes: list[jax.ShapeDtypeStruct]  # of one share
    build: Callable[[Sequence[Array]], nnx.Module]  # the module with the parameters of one share


def _cut(module: nnx.Module) -> Cut:
    shares = tensor.shares()
    graphdef, params = nnx.split(module)
    variables, structure = jax.tree.flatten(params, is_leaf=lambda x: isinstance(x, nnx.Variable))
    axes = [used_axis(variable) for variable in variables]
    values = [_columns(variable, shares) for variable in variables]
    shapes = [_share_of(value, axis, shares) for value, axis in zip(values, axes)]

    def build(values):
        own = jax.tree.unflatten(structure, [old.replace(new) for old, new in zip(variables, values)])
        built = nnx.merge(graphdef, own)
        for _, node in nnx.iter_graph(built):
            if isinstance(config := getattr(node, "config", None), MixerConfig):
                node.config = config.of_heads(shares)
        return built

    return Cut(values, [tensor.split(axis) for axis in axes], shapes, build)


def _columns(variable: nnx.Variable, shares: int) -> Array:
    """A parameter's value with the heads of every share beside one another."""
    value, parts = variable.get_value(), parts_of(variable)
    if len(parts) == 1:
        return value
    held = tensor.split(held_axis(variable, shares))
    return jax.lax.with_sharding_constraint(by_share(jax.lax.with_sharding_constraint(value, held), parts), held)


def by_share(x: Float[Array, "... C"], parts: tuple[int, ...]) -> Float[Array, "... C"]:
    """Parts side by side -> the first share of each part, the second share of each part, ..."""
    pieces = jnp.split(x, np.cumsum(parts)[:-1], axis=-1)
    shared = [piece.reshape(*x.shape[:-1], tensor.shares(), -1) for piece in pieces]
    return jnp.concatenate(shared, axis=-1).reshape(x.shape)


def side_by_side(x: Float[Array, "... C"], parts: tuple[int, ...]) -> Float[Array, "... C"]:
    """The inverse of `by_share`."""
    shares = tensor.shares()
    shared = x.reshape(*x.shape[:-1], shares, -1)
    pieces = jnp.split(shared, np.cumsum([part // shares for part in parts])[:-1], axis=-1)
    return jnp.concatenate([piece.reshape(*x.shape[:-1], -1) for piece in pieces], axis=-1)


def _state_places(mixer: Mixer, whole: Any, own: Any) -> tuple[Any, list[tuple[int, ...] | None]]:
    """The spec of every leaf of a state, from its shapes for all heads and for a share of them, and for a convolution's
    tail the widths of the parts that lie side by side in it."""
    convs = [node.kernel for _, node in nnx.iter_graph(mixer) if isinstance(node, ShortConv)]
    widths = {kernel.shape[-1]: parts_of(kernel) for kernel in convs}
    paths, structure = jax.tree_util.tree_flatten_with_path(whole)
    specs, parts = [], []
    for (path, leaf), share in zip(paths, jax.tree.leaves(own)):
        cut = [i for i, (a, b) in enumerate(zip(leaf.shape, share.shape)) if a != b]
        specs.append(tensor.split(cut[0] if cut else None))
        parts.append(widths[leaf.shape[-1]] if getattr(path[-1], "name", None) == "tail" and cut else None)
    return jax.tree.unflatten(structure, specs), parts


def _map_leaves(f: Callable, tree: Any, parts: Sequence[tuple[int, ...] | None]) -> Any:
    """f(leaf, its parts) over the leaves that have parts."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [x if p is None else f(x, p) for x, p in zip(leaves, parts)])


def _share_of(value: Array, axis: int | None, shares: int) -> jax.ShapeDtypeStruct:
    shape = tuple(n // shares if i == axis else n for i, n in enumerate(value.shape))
    return jax.ShapeDtypeStruct(shape, value.dtype)


def _adapted(module: nnx.Module) -> bool:
    """Whether it has adapters, whose parts do not lie as their projections'; the compiler places it."""
    return any(isinstance(node, LoraLinear) for _, node in nnx.iter_graph(module))
