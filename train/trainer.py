"""The trainer builds what the loop needs from an experiment: mesh, shardings, state, compiled step, validation."""

import contextlib
import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from engrax import models
from engrax.data.config import check_rows
from engrax.errors import UserError
from engrax.layers.mixer import MixerConfig
from engrax.models import contract
from engrax.models.block_style import BlockStyleConfig
from engrax.models.model import ModelConfig
from engrax.models.parameters import cast
from engrax.models.segment_config import SegmentRecurrentConfig
from engrax.train import guards, sharding, train_step
from engrax.train.checkpoint import flatten, unflatten
from engrax.train.experiment import Experiment, nested_configs
from engrax.train.objective import score
from engrax.train.optimizers import base as optimizers
from engrax.train.train_step import Loss, Placement

NO_LABELS = "the validation split holds no labelled token; give more or longer documents, or another validation split."


@dataclasses.dataclass(frozen=True)
class Trainer:
    """An experiment on the available devices. Construction allocates nothing; `init_state` does.

    devices: others, for example of a described topology.
    """

    experiment: Experiment
    devices: tuple[jax.Device, ...] | None = None

    def __post_init__(self):
        check(self.experiment)

    @cached_property
    def mesh(self) -> jax.sharding.Mesh:
        """The device mesh."""
        e = self.experiment
        return sharding.make_mesh(e.parallel, e.batch_size, e.optimizer.accumulate, self.devices)

    @cached_property
    def _abstract(self) -> tuple[nnx.GraphDef, nnx.State]:
        return nnx.split(nnx.eval_shape(lambda: self._model(0)), nnx.Param)

    def _model(self, seed: int) -> contract.Model:
        """The model with fresh parameters, marked where they are frozen."""
        model = models.build(self.experiment.model, rngs=nnx.Rngs(seed))
        return optimizers.freeze(self.experiment.optimizer, model)

    @property
    def graphdef(self) -> nnx.GraphDef:
        """The model's static part."""
        return self._abstract[0]

    @cached_property
    def tx(self) -> optax.GradientTransformation:
        """The optimizer."""
        return optimizers.build(self.experiment.optimizer, self.experiment.steps, self._abstract[1])

    @cached_property
    def specs(self) -> dict[str, Any]:
        """Partition specs of the training state, leaf by leaf."""
        specs = sharding.state_specs(self.tx, self._abstract[1], self.experiment.parallel, self.mesh)
        if self.experiment.carry_memory:
            memory = jax.eval_shape(lambda p: self._fresh_memory(p, self.experiment.batch_size), self._abstract[1])
            specs["memory"] = sharding.memory_specs(memory, self._memory_axes())
        return specs | jax.tree.map(
            lambda _: PartitionSpec(), jax.eval_shape(lambda: guards.fresh(self.experiment.guard))
        )

    def _fresh_memory(self, params: Any, rows: int) -> Any:
        """The model's memory before the first batch, in the compute dtype."""
        memory = nnx.merge(self.graphdef, cast(params, self._dtype)).init_memory(rows)
        return jax.tree.map(jnp.asarray, memory)

    def _memory_axes(self) -> Any:
        """The batch axis of every leaf of the model's memory."""
        found = {}

        def axes(params):
            model = nnx.merge(self.graphdef, params)
            found["axes"] = model.memory_axes(model.init_memory(1))

        jax.eval_shape(axes, self._abstract[1])
        return found["axes"]

    @property
    def _dtype(self) -> Any:
        """The dtype of the forward pass."""
        return train_step.resolve_dtype(self.experiment.compute_dtype)

    @cached_property
    def state_shardings(self) -> dict[str, Any]:
        """NamedShardings of the training state."""
        return sharding.state_places(self.specs, self._shapes, self.mesh, self.experiment.parallel)

    def _fresh_state(self) -> dict[str, Any]:
        params = nnx.state(self._model(self.experiment.seed), nnx.Param)
        state = {"params": params, "opt_state": self.tx.init(params), "step": jnp.zeros((), jnp.int32)}
        if self.experiment.carry_memory:
            state["memory"] = self._fresh_memory(params, self.experiment.batch_size)
        return state | guards.fresh(self.experiment.guard)

    def init_state(self, params: dict[tuple, jax.Array] | None = None) -> dict[str, Any]:
        """The state before the first step, created sharded: no device ever holds a whole sharded leaf.

        `params` {path: array}, with this trainer's shardings, replace fresh ones (`train.starting`).
        """
        # On CPU it is compiled without optimisation: it runs once, and optimisation costs three times what it saves.
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        given = {".".join(map(str, ("params", *path))): value for path, value in (params or {}).items()}

        def fresh():  # given parameters are not returned, so they are not computed
            flat = {name: leaf for name, leaf in flatten(self._fresh_state()).items() if name not in given}
            # A weakly typed array would return from the first step with another type, and the step would compile twice.
            return {name: jax.lax.convert_element_type(leaf, leaf.dtype) for name, leaf in flat.items()}

        shardings = {name: s for name, s in flatten(self.state_shardings).items() if name not in given}
        found = jax.jit(fresh, out_shardings=shardings, compiler_options=options)()
        state = unflatten(found | given, self.abstract_state())
        if given and self.experiment.carry_memory:  # a memory may start from learned values among these parameters

            def memory(params):
                return self._fresh_memory(params, self.experiment.batch_size)

            shardings = self.state_shardings["memory"]
            state["memory"] = jax.jit(memory, out_shardings=shardings, compiler_options=options)(state["params"])
        return state

    def abstract_state(self) -> dict[str, Any]:
        """ShapeDtypeStructs with shardings, the target of restoring a checkpoint."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), self._shapes, self.state_shardings
        )

    def stored_state(self) -> dict[str, Any]:
        """The part of `abstract_state` that a checkpoint stores as arrays: guards keep theirs with the data position,
        so a run may resume with other guards."""
        return {name: part for name, part in self.abstract_state().items() if name != "guard"}

    def with_guard(self, state: dict[str, Any], statistics: dict[str, np.ndarray] | None) -> dict[str, Any]:
        """A restored state with the saved statistics of its guards, if they look for spikes; None = fresh ones."""
        if "guard" not in self.state_shardings:
            return state
        found = guards.fresh(self.experiment.guard)["guard"] if statistics is None else statistics
        return state | {"guard": jax.device_put(found, self.state_shardings["guard"])}

    @cached_property
    def advance(self) -> Callable:
        """advance(state["step"]): the step after one whose batch is dropped."""
        return jax.jit(lambda step: step + 1, out_shardings=self.state_shardings["step"])

    @cached_property
    def _shapes(self) -> dict[str, Any]:
        return jax.eval_shape(self._fresh_state)

    @cached_property
    def train_step(self) -> Callable:
        """step(state, batch) -> (state, {"loss", "aux_loss", "grad_norm", "learning_rate"}); the state is donated.

        Guards that decide in the step add "verdict" (`guards.settle`).
        """
        strategy = train_step.STRATEGIES[self.experiment.parallel.strategy]
        return strategy(self.experiment, self.make_loss, self.tx, self.mesh, self.specs, self.state_shardings)

    def make_loss(self, place: Placement | None = None) -> Loss:
        """The loss of the experiment's model (`train_step.make_loss`)."""
        return train_step.make_loss(self.graphdef, self._dtype, place)

    def forward(self, f: Callable) -> Callable:
        """f(model, batch), sums over tokens, as a compiled call(params, batch); the model gathers a sharded parameter
        where it is used."""
        place = train_step.compiler_placement(self.specs["params"], self.mesh)

        def sums(params, batch, _):
            model, gather = train_step.assemble(self.graphdef, cast(params, self._dtype), place)
            with contract.gathering(gather):
                return f(model, batch), None

        def call(params, batch):
            with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
                return train_step.over_pieces(sums, self.mesh)(params, batch, None)[0]

        return jax.jit(call, out_shardings=NamedSharding(self.mesh, PartitionSpec()))

    def evaluated(self, state: dict[str, Any]) -> Any:
        """The parameters to evaluate of a training state (`OptimizerConfig.evaluated`)."""
        return self._evaluated(state["params"], state["opt_state"])

    @cached_property
    def _evaluated(self) -> Callable:
        optimizer = self.experiment.optimizer
        if not optimizer.averages:
            return optimizer.evaluated
        return jax.jit(optimizer.evaluated, out_shardings=self.state_shardings["params"])

    @cached_property
    def eval_step(self) -> Callable:
        """eval(params, batch) -> (sum of losses in nats, labelled tokens, correctly predicted tokens), each [B]."""

        def evaluate(model, batch):
            scored = score(model, batch)
            values = scored.nats, batch["targets"] >= 0, scored.correct
            return tuple(jnp.sum(each, axis=1, dtype=jnp.float32) for each in values)

        return self.forward(evaluate)

    @cached_property
    def report_step(self) -> Callable:
        """report(params, batch) -> {"titans.lr_mean": [repeat], ...}: diagnostics, {} without any."""

        def report(model, batch):
            return model(batch["tokens"], segment_ids=batch["segment_ids"], collect=("*",)).collected

        return self.forward(report)

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This process's rows as part of a global batch on the mesh. Raises UserError if padding precedes a token."""
        check_rows(batch["segment_ids"])
        return sharding.put_batch(batch, self.mesh, self.experiment.batch_size)

    def loader(self, split: str, *, target_bytes: bool = False) -> Iterator[dict[str, np.ndarray]]:
        """This process's batches: endless and shuffled for "train", one fixed pass for "validation".

        `target_bytes`, only for text: the batches also have this field. It is for the host, not for `put`.
        """
        e = self.experiment
        return e.data.loader(
            split,
            batch_size=e.batch_size,
            seed=e.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            epochs=None if split == "train" else 1,
            align=e.align,
            **({"stream": True} if e.carry_memory and split == "train" else {}),
            **({"target_bytes": True} if target_bytes else {}),
        )

    def check_validation(self) -> None:
        """Raises UserError if the training's validation batches have no labelled token."""
        with contextlib.closing(self.loader("validation")) as loader:
            batches = itertools.islice(loader, self.experiment.eval.batches)
            if any((batch["targets"] >= 0).any() for batch in batches):
                return
        raise UserError(NO_LABELS)

    def validate(self, params: Any, batches: int) -> dict[str, float]:
        """Loss in nats per labelled token and, for text, in bits per byte, and accuracy, over the first validation
        batches. For a mixture also the accuracy of each source."""
        found, size = [], 0
        with contextlib.closing(self.loader("validation", target_bytes=self.experiment.data.counts_bytes)) as loader:
            for _, batch in zip(range(batches), loader):
                size += int(batch.pop("target_bytes", np.zeros(0, np.int32)).sum())
                found.append(np.stack(jax.device_get(self.eval_step(params, self.put(batch)))).astype(float))
        rows = np.concatenate(found, axis=1)
        loss, count, right = rows.sum(axis=1)
        if not count:
            raise UserError(NO_LABELS)
        size = int(np.sum(multihost_utils.process_allgather(np.asarray(size))))  # each process has read its rows
        in_bits = {"validation_bits_per_byte": loss / math.log(2) / size} if size else {}
        values = {"validation_loss": float(loss / count), "validation_accuracy": float(right / count)}
        return values | in_bits | self._accuracies(*rows[1:])

    def _accuracies(self, count: np.ndarray, right: np.ndarray) -> dict[str, float]:
        """The accuracy of each source of a mixture, from the sums of the first validation rows."""
        sources = self.experiment.data.sources(np.arange(len(count)))
        if sources is None:
            return {}
        names = [f"validation_accuracy/{name}" for name in sources.names]
        sums = [(count[sources.index == i].sum(), right[sources.index == i].sum()) for i in range(len(names))]
        return {name: float(right / count) for name, (count, right) in zip(names, sums) if count}

    def diagnose(self, params: Any) -> dict[str, float]:
        """The mixers' scalar diagnostics on the first validation batch: {"memory/titans.lr_mean/0": ...} by repeat; {}
        if tokens are split over devices, since they are of whole rows."""
        if self.experiment.parallel.sequence > 1:
            return {}
        with contextlib.closing(self.loader("validation")) as loader:
            report = jax.device_get(self.report_step(params, self.put(next(loader))))
        return {
            f"memory/{name}/{layer}": float(value)
            for name, values in report.items()
            for layer, value in enumerate(values)
            if np.ndim(value) == 0
        }


def check(experiment: Experiment) -> None:
    """Raises UserError if model and data, or model and loss, do not fit."""
    leak = experiment.model.exempt_from.get("causality")
    if leak and not experiment.allow_future:
        raise UserError(
            f"the model is not causal ({leak}), so its next-token loss means nothing; choose a causal mode, or "
            "set --allow-future to train it anyway."
        )
    parallel, optimizer = experiment.parallel, experiment.optimizer
    elementwise = optimizer.elementwise and optimizer.moments == "float32"
    if parallel.strategy == "pmap" and parallel.zero and not elementwise:
        raise UserError(
            f"parallel.strategy='pmap' with parallel.zero={parallel.zero} updates slices of parameters, and the "
            f"optimizer {optimizer.registered_name} with {optimizer.moments} moments needs whole ones; choose "
            "parallel.strategy='pjit' or parallel.zero=0."
        )
    if parallel.tensor > 1:
        _check_shares(experiment)
    if parallel.sequence > 1:
        sharding.check_split(experiment)
    if experiment.carry_memory:
        _check_carried(experiment)
    vocab = getattr(experiment.model, "vocab_size", None)
    if vocab is not None and vocab < experiment.data.vocab_size:
        raise UserError(
            f"model.vocab_size={vocab} is smaller than the data's {experiment.data.vocab_size} tokens; "
            f"set --model.vocab-size {experiment.data.vocab_size}."
        )


def _check_shares(experiment: Experiment) -> None:
    """Raises UserError if the strategy cannot share heads, or if heads, hidden channels or vocabulary do not divide."""
    shares = experiment.parallel.tensor
    if experiment.parallel.strategy == "pmap":
        raise UserError(
            f"parallel.strategy='pmap' splits rows alone and cannot share heads (parallel.tensor={shares}); choose "
            "parallel.strategy='pjit' or parallel.tensor=1."
        )
    for part in nested_configs(experiment.model):
        if isinstance(part, MixerConfig):
            part.of_heads(shares)
        for name, width in (("mlp_hidden", "mlp_width"), ("vocab_size", "vocab_size")):
            size = getattr(part, width, 0)
            if isinstance(part, ModelConfig) and size % shares:
                raise UserError(
                    f"{name}={size} of {part.registered_name} does not divide over parallel.tensor={shares} devices; "
                    f"choose {name}={size + -size % shares}, or a smaller parallel.tensor."
                )


def _check_carried(experiment: Experiment) -> None:
    """Raises UserError if the data cannot be streamed, or if a part of the model has a limit on tokens per row."""
    if "stream" not in inspect.signature(experiment.data.loader).parameters:
        raise UserError(
            f"carry_memory needs rows that continue in the next batch, and {experiment.data.registered_name} has none; "
            "choose a text data set, or train without it."
        )
    for part in nested_configs(experiment.model, skip=SegmentRecurrentConfig):  # these read segment by segment
        if isinstance(part, BlockStyleConfig) and part.positions:
            raise UserError(
                f"carry_memory: carried rows are unbounded, and the model has layout.positions={part.positions} "
                "learned positions; choose layout.positions=0 and mixers with a window."
            )
        if hasattr(part, "capacity") and getattr(part, "window", None) is None:
            raise UserError(
                f"carry_memory: carried rows are unbounded, and {part.registered_name} without a window holds "
                f"capacity={part.capacity} tokens; set its window."
            )
