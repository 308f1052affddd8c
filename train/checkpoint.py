"""Checkpoints through Orbax: asynchronous, atomic, sharded; the one file that knows Orbax.

A checkpoint of step k holds the parameters, the optimizer state and the step after k updates, and the position in the
data after batch k. Arrays are stored under flat dotted names ("params.blocks.0.mixer.qkv.kernel"), so the file's
layout does not depend on Flax or optax classes, and arrays can be restored to any other sharding.
"""

import contextlib
import gc
import json
import math
import sys
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx

from engrax.errors import UserError
from engrax.files import short
from engrax.train.experiment import CheckpointConfig


def flatten(tree: Any) -> dict[str, Any]:
    """Returns {dotted name: array} for a tree; a dot inside a key is written %2E.

    Raises ValueError if two arrays would share a name (the keys 0 and "0" of one dictionary).
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_variable)
    found = {}
    for path, leaf in leaves:
        name = _name(path)
        if name in found:
            raise ValueError(f"two arrays have the name {name}; rename one of the keys.")
        if _holds_array(leaf):
            found[name] = leaf.get_value() if _is_variable(leaf) else leaf
    return found


def unflatten(flat: dict[str, Any], like: Any) -> Any:
    """Returns a tree with the structure of `like` and the arrays of `flat`. Arrays of size 0 are not stored and are
    restored as empty arrays. Raises ValueError naming an array that is missing from `flat`."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(like, is_leaf=_is_variable)

    def one(path, leaf):
        if not _holds_array(leaf):
            return leaf
        name, wanted = _name(path), leaf.get_value() if _is_variable(leaf) else leaf
        if name not in flat and math.prod(wanted.shape):
            raise ValueError(f"there is no array {name}.")
        value = flat[name] if name in flat else jax.device_put(np.zeros(wanted.shape, wanted.dtype), wanted.sharding)
        return leaf.replace(value) if _is_variable(leaf) else value

    return jax.tree.unflatten(structure, [one(path, leaf) for path, leaf in leaves])


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)


def _holds_array(leaf: Any) -> bool:
    """False for an optimizer's placeholder for a frozen parameter."""
    return not _is_variable(leaf) or bool(jax.tree.leaves(leaf))


def _not_empty(flat: dict[str, Any]) -> dict[str, Any]:
    """Drops arrays of size 0: Orbax refuses them, and a memory may contain some."""
    return {name: leaf for name, leaf in flat.items() if math.prod(leaf.shape)}


def _name(path: Any) -> str:
    return ".".join(_key(k).replace("%", "%25").replace(".", "%2E") for k in path)


def _key(entry: Any) -> str:
    for name in ("key", "name", "idx"):
        if hasattr(entry, name):
            return str(getattr(entry, name))
    return str(entry)


class Checkpoints:
    """The checkpoints of one run folder; `config` sets how many of the newest and best are kept.

    Without a config they are only read, and a save in progress in another process is left alone.
    """

    def __init__(self, run_dir: epath.PathLike, config: CheckpointConfig | None = None):
        import orbax.checkpoint as ocp
        from absl import logging
        from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

        logging.set_verbosity(logging.ERROR)  # Orbax warns at every save without a validation loss
        self._ocp = ocp
        self.directory = epath.Path(run_dir) / "checkpoints"
        best = {"best_fn": _loss, "best_mode": "min"}
        if config is None:
            options = ocp.CheckpointManagerOptions(read_only=True, **best)
        else:
            policies = [keep.LatestN(max(config.keep_last, 1))]
            if config.keep_best:
                policies.append(
                    keep.BestN(
                        get_metric_fn=_loss, reverse=True, n=config.keep_best, keep_checkpoints_without_metrics=False
                    )
                )
            options = ocp.CheckpointManagerOptions(
                preservation_policy=keep.AnyPreservationPolicy(policies), cleanup_tmp_directories=True, **best
            )
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(f"{self.directory} is a file, not a folder of checkpoints; restore the folder.")
        with self._reading():
            self._manager = ocp.CheckpointManager(self.directory, options=options)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Turns Orbax's errors for damaged files, of any type, into a UserError."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"{self.directory} is damaged ({first_line(error)}); restore it.") from error

    def save(self, step: int, state: Any, data_state: dict, metrics: dict[str, float] | None) -> None:
        """Starts a save. Blocks only while arrays are copied to the host; a rename completes the write."""
        args = self._ocp.args.Composite(
            state=self._ocp.args.StandardSave(_not_empty(flatten(state))), data=self._ocp.args.JsonSave(data_state)
        )
        self._manager.save(step, args=args, metrics=metrics)

    def steps(self) -> list[int]:
        """The steps that can be restored, ascending."""
        return sorted(self._manager.all_steps())

    def resolve(self, step: int | str | None) -> int:
        """The step of the checkpoint None (newest), "best" or a number. Raises UserError if it does not exist."""
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.directory} holds no checkpoint; train the run first.")
        if step is None:
            return steps[-1]
        if step == "best":
            with self._reading():
                best = self._manager.best_step()
            if best is None:
                raise UserError(
                    f"{self.directory} holds no checkpoint with a validation loss; name a step ({_listing(steps)})."
                )
            return best
        if str(step) not in map(str, steps):
            raise UserError(
                f"{self.directory} holds no checkpoint of step {short(step)} (there are: {_listing(steps)})."
            )
        return int(step)

    def restore(self, like: Any, step: int) -> tuple[Any, dict]:
        """(state, data position) of a step; `like` is a tree of ShapeDtypeStructs with shardings of any mesh.

        Raises UserError naming the first parameter whose name or shape differs.
        """
        wanted = _not_empty(flatten(like))
        self._check(wanted, step)
        args = self._ocp.args.Composite(state=self._ocp.args.StandardRestore(wanted), data=self._ocp.args.JsonRestore())
        found = self._read(self._manager, step, args)
        if not isinstance(found["data"], dict):
            raise self._damaged(step, f"its position in the data is {short(found['data'])}")
        return unflatten(found["state"], like), found["data"]

    def restore_params(self, like: Any, step: int) -> Any:
        """The parameters alone."""
        return self.restore_parts({"params": like}, step)["params"]

    def restore_parts(self, like: dict[str, Any], step: int) -> dict[str, Any]:
        """Parts of the state alone: {"params": ..., "opt_state": ...} for example."""
        wanted = flatten(like)
        self._check(wanted, step)
        ocp = self._ocp
        args = ocp.args.PyTreeRestore(
            item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )
        handlers, options = {"state": ocp.PyTreeCheckpointHandler()}, ocp.CheckpointManagerOptions(read_only=True)
        with ocp.CheckpointManager(self.directory, item_handlers=handlers, options=options) as manager:
            found = self._read(manager, step, ocp.args.Composite(state=args))
        return unflatten(found["state"], like)

    def _read(self, manager: Any, step: int, args: Any) -> Any:
        with _quiet():
            try:
                return manager.restore(step, args=args)
            except Exception as error:  # of many types, by what is damaged
                reason = first_line(error)
            gc.collect()  # collects interrupted reads while their messages are silenced
        raise self._damaged(step, reason)

    def _damaged(self, step: int, reason: str) -> UserError:
        earlier = [s for s in self.steps() if s < step]
        remedy = f"delete it to go on from step {earlier[-1]}" if earlier else "there is no earlier one"
        return UserError(f"checkpoint {self.directory / str(step)} is damaged ({reason}); {remedy}.")

    def _check(self, wanted: dict[str, Any], step: int) -> None:
        """Raises UserError if an array is missing, has another shape or type, or has chunks larger than itself."""
        stored = self._stored(list(wanted), step)
        for name in sorted(wanted, key=lambda name: not name.startswith("params.")):
            leaf = wanted[name]
            if stored[name] is None:
                raise UserError(
                    f"checkpoint {step} in {self.directory} has no array {name}; it belongs to another config."
                )
            shape, dtype, chunks = stored[name]
            if tuple(shape) != tuple(leaf.shape) or dtype != np.dtype(leaf.dtype):
                raise UserError(
                    f"checkpoint {step} in {self.directory} holds {name} as {dtype}{list(shape)}, "
                    f"the config wants {np.dtype(leaf.dtype)}{list(leaf.shape)}; it belongs to another config."
                )
            if len(chunks) != len(shape) or any(part > max(size, 1) for part, size in zip(chunks, shape)):
                raise self._damaged(step, f"{name} has the shape {list(shape)} and chunks of {short(chunks)}")

    def _stored(self, names: list[str], step: int) -> dict[str, tuple[list[int], np.dtype, list[int]] | None]:
        """{name: (shape, dtype, chunk shape)} from each array's own file, None without one. No values are read. Orbax
        is not used, because it prints complaints on stderr."""
        import tensorstore

        path = str(self.directory / str(step) / "state") + "/"
        try:
            base = path if "://" in path else {"driver": "file", "path": path}
            store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
            reads = {name: store.read(f"{name}/.zarray") for name in names}
            texts = {name: read.result().value.decode() for name, read in reads.items()}
            found = {name: json.loads(text) if text else None for name, text in texts.items()}
            return {
                name: entry and (list(entry["shape"]), np.dtype(entry["dtype"]), [int(n) for n in entry["chunks"]])
                for name, entry in found.items()
            }
        except Exception as error:  # of many types, by what is damaged
            raise self._damaged(step, f"no readable metadata: {first_line(error)}") from error

    def delete_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps."""
        for later in [s for s in self.steps() if s > step]:
            self._manager.delete(later)

    def wait(self) -> None:
        """Blocks until the save in progress is committed."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases the manager's threads."""
        self._manager.close()


def first_line(error: Exception) -> str:
    """An error's message, cut to part of a line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps tracebacks off stderr for reads that another read's failure interrupted. The failure itself is raised."""
    old = sys.excepthook, sys.unraisablehook
    sys.excepthook, sys.unraisablehook = (lambda *_: None), (lambda _: None)
    try:
        yield
    finally:
        sys.excepthook, sys.unraisablehook = old


def _loss(metrics: dict[str, float]) -> float:
    loss = metrics.get("validation_loss") if isinstance(metrics, dict) else metrics
    if not isinstance(loss, float):
        raise UserError(f"the validation loss of a checkpoint is {short(loss)}, not a number; restore its metrics.")
    return loss if math.isfinite(loss) else math.inf


def _listing(steps: list[int]) -> str:
    return ", ".join(map(str, steps))
