"""One optimizer step, as two strategies of the same mathematics.

`pjit`: one program over global arrays; the compiler places the collectives that the shardings imply.
`pmap`: the same step as a per-device program with explicit collectives, through `jax.shard_map` (what `jax.pmap` has
become): gradients are summed or reduce-scattered, parameters gathered, by hand.

The loss is the mean negative log-likelihood over all labelled tokens of the global batch, and what the model's mixers
add to it (a router's balance), which is a number per row that each of its labelled tokens counts with: whatever the
number of devices or microbatches, every layout computes the same number.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from engrax.train import sharding
from engrax.train.experiment import Experiment
from engrax.train.optimizers import base as optimizers

Batch = dict[str, Array]
State = dict[str, Any]  # {"params": nnx.State, "opt_state": ..., "step": int32 []}, and {"memory": ...} if carried
STATE = ("params", "opt_state", "step", "memory")


def token_losses(logits_BTV: Float[Array, "B T V"], targets_BT: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """Negative log-likelihood in nats of each target; 0 where the target is -1."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, jnp.maximum(targets_BT, 0))
    return jnp.where(targets_BT >= 0, losses, 0.0)


def resolve_dtype(name: str) -> Any:
    """The compute dtype: `auto` is bfloat16 where the default device multiplies it natively, else float32."""
    if name == "auto":
        device = jax.local_devices()[0]
        capable = device.platform == "gpu" and float(getattr(device, "compute_capability", "8.0")) >= 8  # a T4 has 7.5
        return jnp.bfloat16 if capable or device.platform == "tpu" else jnp.float32
    return jnp.dtype(name)


def cast(params: Any, dtype: Any) -> Any:
    """Floating parameters in the compute dtype."""
    return jax.tree.map(lambda p: p.astype(dtype) if jnp.issubdtype(p.dtype, jnp.floating) else p, params)


def loss_sum(graphdef: nnx.GraphDef, dtype: Any) -> Callable[[Any, Batch], Float[Array, ""]]:
    """Returns f(params, batch) = sum over the batch's labelled tokens of the loss: nats, and what mixers add."""

    def compute(params, batch):
        model = nnx.merge(graphdef, cast(optimizers.stop_frozen(params), dtype))
        tokens, ids, added = batch["tokens"], batch["segment_ids"], 0.0
        if hasattr(model, "with_losses"):
            hidden, losses = model.with_losses(tokens, segment_ids=ids)
            added = jnp.sum(losses * jnp.sum(batch["targets"] >= 0, axis=1))
        else:
            hidden, _ = model(tokens, segment_ids=ids)
        return jnp.sum(token_losses(model.logits(hidden), batch["targets"])) + added

    return compute


def carried_loss_sum(graphdef: nnx.GraphDef, dtype: Any) -> Callable[[Any, Batch, Any], tuple[Float[Array, ""], Any]]:
    """Returns f(params, batch, memory) -> (sum of losses, the memory after the batch); no gradient through either."""

    def compute(params, batch, memory):
        model = nnx.merge(graphdef, cast(optimizers.stop_frozen(params), dtype))
        memory = jax.lax.stop_gradient(memory)
        if hasattr(model, "on_grid"):
            memory = model.on_grid(memory, batch["tokens"].shape[1])
        hidden, memory = model(batch["tokens"], memory, segment_ids=batch["segment_ids"])
        return jnp.sum(token_losses(model.logits(hidden), batch["targets"])), jax.lax.stop_gradient(memory)

    return compute


def accumulated_gradient(
    loss: Callable, params: Any, batch: Batch, count: Array, microbatches: int
) -> tuple[Array, Any]:
    """Loss and gradient of `loss(params, batch) / count`, summed over microbatches one after another."""
    value_and_grad = jax.value_and_grad(lambda p, b: loss(p, b) / count)
    if microbatches == 1:
        return value_and_grad(params, batch)
    # Neighbouring rows go to different microbatches, so that each device keeps its own rows.
    split = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total, micro):
        return jax.tree.map(jnp.add, total, value_and_grad(params, micro)), None

    first = jax.tree.map(lambda x: x[0], split)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(value_and_grad, params, first))
    return jax.lax.scan(add, zero, split)[0]


def apply_gradient(tx, state: State, params: Any, grads: Any, norm: Array, clip_norm: float) -> tuple[Any, Any]:
    """(new parameters, new optimizer state); the gradient is scaled to `clip_norm` where its norm is larger."""
    if clip_norm:
        scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12))
        grads = jax.tree.map(lambda g: g * scale, grads)
    updates, opt_state = tx.update(grads, state["opt_state"], params)
    return optimizers.keep_frozen(params, optax.apply_updates(params, updates)), opt_state


def labelled(batch: Batch) -> Array:
    """Number of labelled tokens, float32."""
    return jnp.sum(batch["targets"] >= 0).astype(jnp.float32)


def pjit_step(experiment: Experiment, loss: Callable, tx: Any, mesh: Mesh, specs: State) -> Callable:
    """The jitted step(state, batch) -> (state, metrics) over global arrays; the state is donated."""
    rate = experiment.optimizer.rate(experiment.steps)

    def gradient(state, batch, count):
        """(loss, gradient, what the new state holds besides)."""
        if "memory" not in state:
            value, grads = accumulated_gradient(loss, state["params"], batch, count, experiment.optimizer.accumulate)
            return value, grads, {}

        def mean(params):
            total, memory = loss(params, batch, state["memory"])
            return total / count, memory

        (value, memory), grads = jax.value_and_grad(mean, has_aux=True)(state["params"])
        return value, grads, {"memory": memory}

    def step(state, batch):
        count = jnp.maximum(labelled(batch), 1.0)
        value, grads, rest = gradient(state, batch, count)
        norm = optax.tree.norm(grads)
        params, opt_state = apply_gradient(tx, state, state["params"], grads, norm, experiment.optimizer.clip_norm)
        new = {"params": params, "opt_state": opt_state, "step": state["step"] + 1} | rest
        return new, {"loss": value, "grad_norm": norm, "learning_rate": rate(state["step"])}

    return _jit(step, mesh, specs)


def pmap_step(experiment: Experiment, loss: Callable, tx: Any, mesh: Mesh, specs: State) -> Callable:
    """The same step as a per-device program: every collective is written here.

    A leaf whose moments are sharded has its gradient reduce-scattered, and its new value gathered where replicated.
    """
    rate = experiment.optimizer.rate(experiment.steps)
    axes = sharding.BATCH
    owned = specs["moments"]  # how each parameter's optimizer state is split

    def gather(x, spec):
        return x if spec == PartitionSpec() else jax.lax.all_gather(x, axes, axis=len(spec) - 1, tiled=True)

    def reduce(grad, spec):
        if spec == PartitionSpec():
            return jax.lax.psum(grad, axes)
        return jax.lax.psum_scatter(grad, axes, scatter_dimension=len(spec) - 1, tiled=True)

    def own(x, spec):
        if spec == PartitionSpec():
            return x
        size = x.shape[len(spec) - 1] // mesh.size
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axes) * size, size, axis=len(spec) - 1)

    def norm(grads):
        squares = jax.tree.map(lambda g: jnp.sum(g * g), grads)
        whole, parts = 0.0, 0.0
        for square, spec in zip(jax.tree.leaves(squares), _leaves(owned)):
            whole, parts = (whole + square, parts) if spec == PartitionSpec() else (whole, parts + square)
        return jnp.sqrt(whole + jax.lax.psum(parts, axes))

    def step(state, batch):
        params = _map(gather, state["params"], specs["params"])
        count = jnp.maximum(jax.lax.psum(labelled(batch), axes), 1.0)
        value, grads = accumulated_gradient(loss, params, batch, count, experiment.optimizer.accumulate)
        grads = _map(reduce, grads, owned)
        grad_norm = norm(grads)
        new, opt_state = apply_gradient(
            tx, state, _map(own, params, owned), grads, grad_norm, experiment.optimizer.clip_norm
        )
        if experiment.parallel.zero == 1:
            new = _map(gather, new, owned)
        new = {"params": new, "opt_state": opt_state, "step": state["step"] + 1}
        metrics = {"loss": jax.lax.psum(value, axes), "grad_norm": grad_norm, "learning_rate": rate(state["step"])}
        return new, metrics

    spec = {name: specs[name] for name in ("params", "opt_state", "step")}
    scalars = PartitionSpec()
    per_device = jax.shard_map(
        step, mesh=mesh, in_specs=(spec, PartitionSpec(axes)), out_specs=(spec, scalars), check_vma=False
    )
    return _jit(per_device, mesh, specs)


STRATEGIES = {"pjit": pjit_step, "pmap": pmap_step}


def _leaves(specs: Any) -> list[PartitionSpec]:
    return jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))


def _map(f: Callable, tree: Any, specs: Any) -> Any:
    """f(leaf, spec) over a tree and the tree of its specs."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, [f(x, s) for x, s in zip(leaves, _leaves(specs))])


def _jit(step: Callable, mesh: Mesh, specs: State) -> Callable:
    state = sharding.named({name: specs[name] for name in STATE if name in specs}, mesh)
    batch = jax.sharding.NamedSharding(mesh, PartitionSpec(sharding.BATCH))
    scalar = jax.sharding.NamedSharding(mesh, PartitionSpec())
    return jax.jit(step, in_shardings=(state, batch), out_shardings=(state, scalar), donate_argnums=0)
