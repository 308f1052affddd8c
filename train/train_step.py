"""One optimizer step, in two strategies with the same mathematics.

`pjit`: one program over global arrays; the compiler derives the collectives from the shardings.
`pmap`: a per-device program with explicit collectives through `jax.shard_map`, the successor of `jax.pmap`: this file
sums or reduce-scatters gradients and gathers parameters.

The loss is the mean negative log-likelihood over all labelled tokens of the global batch, plus the auxiliary loss of
mixers and head. It is the same for any number of devices or microbatches. The two parts are logged separately.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from engrax.layers.common import sequence
from engrax.layers.common.sequence import SEQUENCE
from engrax.models import contract
from engrax.models.parameters import LAYERS, axes_of, cast, map_parameters
from engrax.train import guards, sharding
from engrax.train.experiment import Experiment
from engrax.train.objective import Batch, score
from engrax.train.optimizers import base as optimizers

# {"params": nnx.State, "opt_state": ..., "step": int32 []}, {"memory": ...} if carried, {"guard": ...} for spikes
State = dict[str, Any]
STATE = ("params", "opt_state", "step", "memory", "guard")


def resolve_dtype(name: str) -> Any:
    """The compute dtype: `auto` is bfloat16 if the default device multiplies it natively, else float32."""
    if name == "auto":
        device = jax.local_devices()[0]
        capable = device.platform == "gpu" and float(getattr(device, "compute_capability", "8.0")) >= 8  # a T4 has 7.5
        return jnp.bfloat16 if capable or device.platform == "tpu" else jnp.float32
    return jnp.dtype(name)


class Sums(NamedTuple):
    """Sums over a batch that are reported beside the differentiated loss: nats and auxiliary loss."""

    nats: Float[Array, ""]
    aux: Float[Array, ""]


Gather = Callable[[nnx.Variable], Array]  # returns the whole value of a sharded parameter
Loss = Callable[[Any, Batch, Any], tuple[Float[Array, ""], tuple[Sums, Any]]]


def make_loss(graphdef: nnx.GraphDef, dtype: Any, place: "Placement | None" = None) -> Loss:
    """Returns f(params, batch, memory) -> (sum of losses over labelled tokens, (Sums, memory after the batch)).

    memory: None = rows start from an empty memory; no gradient flows through the given or returned memory. place: how
    sharded parameters are gathered.
    """

    def loss(params, batch, memory):
        model, gather = assemble(graphdef, cast(optimizers.stop_frozen(params), dtype), place)
        if memory is not None:
            memory = model.at_call_length(jax.lax.stop_gradient(memory), batch["tokens"].shape[1])
        with contract.gathering(gather):
            scored = score(model, batch, memory)
        sums = Sums(jnp.sum(scored.nats), jnp.sum(scored.aux))
        return sums.nats + sums.aux, (sums, jax.lax.stop_gradient(scored.memory) if memory is not None else None)

    return loss


def over_pieces(f: Callable[[Any, Batch, Any], tuple[Any, Any]], mesh: Mesh) -> Callable:
    """f(params, batch, memory) -> (sums over tokens, memory) on rows whose tokens are split over the mesh axis
    `sequence`: a per-device program along this axis, whose sums are added. Parameters and memory are whole on each
    device of the axis, and the gradient is summed over it."""
    if mesh.shape[SEQUENCE] == 1:
        return f

    def piece(params, batch, memory):
        with sequence.pieces(SEQUENCE):
            sums, memory = f(params, batch, memory)
        return jax.lax.psum(sums, SEQUENCE), memory

    specs = PartitionSpec(), PartitionSpec(None, SEQUENCE), PartitionSpec()
    return jax.shard_map(piece, in_specs=specs, out_specs=PartitionSpec(), axis_names={SEQUENCE}, check_vma=False)


def _loss_over_pieces(loss: Loss, mesh: Mesh) -> Loss:
    def sums(params, batch, memory):
        total, (sums, memory) = loss(params, batch, memory)
        return (total, sums), memory

    split = over_pieces(sums, mesh)

    def whole(params, batch, memory):
        (total, sums), memory = split(params, batch, memory)
        return total, (sums, memory)

    return whole


class Placement(NamedTuple):
    """How parameters that ZeRO shards are gathered: the spec of every parameter, and gather(value, its spec)."""

    specs: Any
    gather: Callable[[Array, PartitionSpec], Array]

    @property
    def shares(self) -> bool:
        """Whether any parameter is sharded."""
        return any(sharding.zero_axis(spec) is not None for spec in _leaves(self.specs))


def assemble(graphdef: nnx.GraphDef, params: Any, place: Placement | None) -> tuple[Any, Gather | None]:
    """(the model, the argument of `contract.gathering`). Parameters outside the stacked layers are gathered here, once;
    those of a layer inside the model's scan."""
    if place is None or not place.shares:
        return nnx.merge(graphdef, params), None

    def tag(variable, spec):
        return variable.replace(variable.get_value(), shared=None if sharding.zero_axis(spec) is None else spec)

    def gather(variable):
        spec, value, axes = variable.get_metadata().get("shared"), variable.get_value(), axes_of(variable)
        if spec is None:
            return value
        return place.gather(value, PartitionSpec(*spec[len(axes) - value.ndim :]))

    params = _map(tag, params, place.specs, is_leaf=lambda x: isinstance(x, nnx.Variable))
    whole = map_parameters(lambda v: v.get_value() if _stacked(v) else gather(v), params)
    return nnx.merge(graphdef, whole), gather


def _stacked(variable: nnx.Variable) -> bool:
    return axes_of(variable)[:1] == (LAYERS,)


def compiler_placement(specs: Any, mesh: Mesh) -> Placement:
    """Gathering by sharding constraints: whole in the forward pass, but for the axis of `tensor`; the gradient is
    sharded like the parameter."""

    def on_mesh(spec):
        if mesh.shape[SEQUENCE] == 1:
            return NamedSharding(mesh, spec)
        # The per-device program of `over_pieces` has its own mesh, where parameters are whole along this axis.
        others = (tuple(n for n in x if n != SEQUENCE) if isinstance(x, tuple) else x for x in spec)
        return PartitionSpec(*others)

    @partial(jax.custom_vjp, nondiff_argnums=(1,))
    def whole(value, spec):
        return jax.lax.with_sharding_constraint(value, on_mesh(sharding.without_zero(spec)))

    def bwd(spec, _, gradient):
        return (jax.lax.with_sharding_constraint(gradient, on_mesh(spec)),)

    whole.defvjp(lambda value, spec: (whole(value, spec), None), bwd)
    return Placement(specs, whole)


def explicit_placement(specs: Any) -> Placement:
    """Gathering inside a per-device program; its derivative is a reduce-scatter."""

    def whole(value, spec):
        return jax.lax.all_gather(value, sharding.ZERO, axis=sharding.zero_axis(spec), tiled=True)

    return Placement(specs, whole)


def accumulated_gradient(
    loss: Loss, params: Any, batch: Batch, memory: Any, count: Array, microbatches: int, shard: Callable[[Any], Any]
) -> tuple[Sums, Any, Any]:
    """(Sums / count, gradient of loss / count, memory), over microbatches in sequence; `shard` is applied to the
    gradient of each."""

    def mean(params, batch):
        total, (sums, after) = loss(params, batch, memory)
        return total / count, (jax.tree.map(lambda x: x / count, sums), after)

    def gradient(params, batch):
        grads, rest = jax.grad(mean, has_aux=True)(params, batch)
        return shard(grads), rest

    if microbatches == 1:
        grads, (sums, after) = gradient(params, batch)
        return sums, grads, after
    # Neighbouring rows belong to different microbatches, so each device keeps its rows.
    split = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total, micro):
        return jax.tree.map(jnp.add, total, gradient(params, micro)), None

    first = jax.tree.map(lambda x: x[0], split)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(gradient, params, first))
    grads, (sums, _) = jax.lax.scan(add, zero, split)[0]
    return sums, grads, None


def apply_gradient(tx, state: State, params: Any, grads: Any, norm: Array, clip_norm: float) -> tuple[Any, Any]:
    """(new parameters, new optimizer state); a gradient of larger norm is scaled to `clip_norm`."""
    if clip_norm:
        scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12))
        grads = jax.tree.map(lambda g: g * scale, grads)
    updates, opt_state = tx.update(grads, state["opt_state"], params)
    return optimizers.keep_frozen(params, optax.apply_updates(params, updates)), opt_state


def labelled(batch: Batch) -> Array:
    """Number of labelled tokens, float32."""
    return jnp.sum(batch["targets"] >= 0).astype(jnp.float32)


def pjit_step(
    experiment: Experiment, make: Callable[..., Loss], tx: Any, mesh: Mesh, specs: State, places: State
) -> Callable:
    """The jitted step(state, batch) -> (state, metrics) over global arrays; the state is donated."""
    rate = experiment.optimizer.rate(experiment.steps)
    loss = _loss_over_pieces(make(compiler_placement(specs["params"], mesh)), mesh)
    shards = sharding.named(specs["grads"], mesh)

    def shard(grads):
        return jax.lax.with_sharding_constraint(grads, shards) if experiment.parallel.zero >= 2 else grads

    def step(state, batch):
        count, settings = jnp.maximum(labelled(batch), 1.0), experiment.optimizer
        sums, grads, memory = accumulated_gradient(
            loss, state["params"], batch, state.get("memory"), count, settings.accumulate, shard
        )
        norm = optax.tree.norm(grads)
        params, opt_state = apply_gradient(tx, state, state["params"], grads, norm, settings.clip_norm)
        new = {"params": params, "opt_state": opt_state, "step": state["step"] + 1}
        new |= {"memory": memory} if "memory" in state else {}
        new, verdict = guards.settle(experiment.guard, state, new, sums.nats, norm)
        return new, _metrics(sums, norm, rate(updates_done(state))) | verdict

    return _jit(step, mesh, places)


def updates_done(state: State) -> Array:
    """The number of updates, which the learning rate follows: steps that changed nothing are not counted.

    An optimizer without optax's schedule state tells no number; then it is the step.
    """
    counts = optax.tree.get_all_with_path(state["opt_state"], "count")
    found = [x for path, x in counts if getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"]
    return found[-1] if found else state["step"]


def _metrics(sums: Sums, norm: Array, learning_rate: Array) -> dict[str, Array]:
    """Metrics of a step: `loss` of the data, in nats per labelled token; `aux_loss` of mixers and head."""
    return {"loss": sums.nats, "aux_loss": sums.aux, "grad_norm": norm, "learning_rate": learning_rate}


def pmap_step(
    experiment: Experiment, make: Callable[..., Loss], tx: Any, mesh: Mesh, specs: State, places: State
) -> Callable:
    """The same step as a per-device program with explicit collectives.

    A sharded parameter is gathered where the model uses it, and its gradient is reduce-scattered there. If a parameter
    is replicated and its moments are sharded, its gradient is reduce-scattered (ZeRO 2: that of every microbatch) and
    its new value gathered.
    """
    rate, axes, zero = experiment.optimizer.rate(experiment.steps), sharding.ZERO, experiment.parallel.zero
    held, owned = specs["params"], specs["moments"]  # specs of each parameter and of its optimizer state
    loss = make(explicit_placement(held))

    def reduce(grad, held, owned):
        if held != PartitionSpec():
            return grad
        if owned == PartitionSpec():
            return jax.lax.psum(grad, axes)
        return jax.lax.psum_scatter(grad, axes, scatter_dimension=sharding.zero_axis(owned), tiled=True)

    def summed(grads):
        return _map(reduce, grads, held, owned)

    def own(x, held, owned):
        if held != PartitionSpec() or owned == PartitionSpec():
            return x
        axis = sharding.zero_axis(owned)
        size = x.shape[axis] // mesh.size
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * size, size, axis=axis)

    def gather(x, held, owned):
        if held != PartitionSpec() or owned == PartitionSpec():
            return x
        return jax.lax.all_gather(x, axes, axis=sharding.zero_axis(owned), tiled=True)

    def norm(grads):
        whole, parts = 0.0, 0.0
        for grad, spec in zip(jax.tree.leaves(grads), _leaves(owned)):
            square = jnp.sum(grad * grad)
            whole, parts = (whole + square, parts) if spec == PartitionSpec() else (whole, parts + square)
        return jnp.sqrt(whole + jax.lax.psum(parts, axes))

    def step(state, batch):
        params, settings = state["params"], experiment.optimizer
        count = jnp.maximum(jax.lax.psum(labelled(batch), axes), 1.0)
        each = summed if zero == 2 else lambda grads: grads
        sums, grads, _ = accumulated_gradient(loss, params, batch, None, count, settings.accumulate, each)
        grads = grads if zero == 2 else summed(grads)
        grad_norm = norm(grads)
        mine = _map(own, params, held, owned)
        new, opt_state = apply_gradient(tx, state, mine, grads, grad_norm, settings.clip_norm)
        new = {"params": _map(gather, new, held, owned), "opt_state": opt_state, "step": state["step"] + 1}
        sums = jax.tree.map(lambda x: jax.lax.psum(x, axes), sums)
        new, verdict = guards.settle(experiment.guard, state, new, sums.nats, grad_norm)
        return new, _metrics(sums, grad_norm, rate(updates_done(state))) | verdict

    spec = {name: specs[name] for name in STATE if name in specs}
    scalars = PartitionSpec()
    per_device = jax.shard_map(
        step, mesh=mesh, in_specs=(spec, PartitionSpec(axes)), out_specs=(spec, scalars), check_vma=False
    )
    return _jit(per_device, mesh, places)


STRATEGIES = {"pjit": pjit_step, "pmap": pmap_step}


def _leaves(specs: Any) -> list[PartitionSpec]:
    return jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))


def _map(f: Callable, tree: Any, *specs: Any, is_leaf: Callable | None = None) -> Any:
    """f(leaf, spec, ...) over a tree and trees of its specs."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_leaf)
    return jax.tree.unflatten(structure, [f(x, *s) for x, *s in zip(leaves, *map(_leaves, specs))])


def _jit(step: Callable, mesh: Mesh, places: State) -> Callable:
    """The step compiled for the mesh; the mesh is set while the step is traced, in every call."""
    batch = NamedSharding(mesh, sharding.batch_spec(mesh))
    scalar = NamedSharding(mesh, PartitionSpec())

    def on_mesh(state, batch):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            new, metrics = step(sharding.fetched(state, places), batch)
            return sharding.returned(new, places), metrics

    return jax.jit(on_mesh, in_shardings=(places, batch), out_shardings=(places, scalar), donate_argnums=0)
