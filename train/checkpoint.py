"""Checkpoints through Orbax: verified, sharded; with `saver` the only file that knows Orbax.

A checkpoint of step k holds the parameters, the optimizer state and the step after k updates, and the position in the
data after batch k. Arrays are stored under flat dotted names ("params.blocks.0.mixer.qkv.kernel"), so the file's
layout does not depend on Flax or optax classes, and arrays can be restored to any other sharding.
"""

import contextlib
import functools
import gc
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath
from flax import nnx

from engrax.errors import Damaged, UserError
from engrax.files import read_json, short
from engrax.train import integrity
from engrax.train.experiment import CheckpointConfig
from engrax.train.saver import Saver, first_line, steps_in, validation_loss

T = TypeVar("T")
ATTEMPTS = 100  # checkpoints that a training may remove under a reader before the reader gives up


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
    """The checkpoints of one run folder, written with a `config`, else only read.

    Every restore verifies the digests of the checkpoint's files first (`integrity`).
    """

    def __init__(self, run_dir: epath.PathLike, config: CheckpointConfig | None = None):
        self.directory = epath.Path(run_dir) / "checkpoints"
        if self.directory.exists() and not self.directory.is_dir():
            raise UserError(f"{self.directory} is a file, not a folder of checkpoints; restore the folder.")
        self.damaged: dict[int, str] = {}  # {step: what is wrong} of those that `read` skipped
        self._sound: set[int] = set()
        self._saver = None if config is None else Saver(self.directory, config)

    def save(self, step: int, state: Any, data_state: dict, metrics: dict[str, float] | None) -> None:
        """Starts a save. Blocks only while arrays are copied to the host; a rename completes the write.

        Raises UserError if the save before failed, Diverged if its state had a NaN.
        """
        self._saver.save(step, _not_empty(flatten(state)), data_state, metrics)

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, ascending."""
        return steps_in(self.directory)

    def resolve(self, step: int | str | None) -> int:
        """The step of the checkpoint None (newest), "best" or a number. Raises UserError if it does not exist."""
        return self._candidates(step)[0]

    def read(self, step: int | str | None, restore: Callable[[int], T], *, tell: bool = True) -> tuple[T, int]:
        """(restore(step), step) of the newest checkpoint that is sound, or for "best" of the best.

        `restore` may raise Damaged. Damaged checkpoints are skipped and noted in `damaged`; `tell`: also on
        stderr. A checkpoint that the training removed meanwhile is gone: the next newest is read. Raises UserError if
        none is sound, or if the one of a given step is not.
        """
        for _ in range(ATTEMPTS):
            wanted = [s for s in self._candidates(step) if s not in self.damaged]
            if not wanted:
                break
            try:
                self.verify(wanted[0])
                found = restore(wanted[0])
            except UserError as error:
                if not (self.directory / str(wanted[0])).exists():
                    _say(f"checkpoint {wanted[0]} is gone: the training has removed it; the newest one is read")
                elif isinstance(error, Damaged) and step in (None, "best"):
                    self.damaged[wanted[0]] = error.reason
                else:
                    raise
                continue
            if tell:
                for bad in self.damaged:
                    _say(f"{self._told(bad)}; step {wanted[0]} is read instead")
            return found, wanted[0]
        told = "; ".join(self._told(bad) for bad in self.damaged) or "the training removes them too fast"
        raise Damaged(f"no checkpoint can be read: {told}; restore one, or train into another --run-dir.")

    def _told(self, step: int) -> str:
        return f"checkpoint {self.directory / str(step)} is damaged ({self.damaged[step]})"

    def _candidates(self, step: int | str | None) -> list[int]:
        """The steps for None (newest first), "best" (lowest validation loss first) or a number. Raises UserError if
        there is none."""
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.directory} holds no checkpoint; train the run first.")
        if step is None:
            return steps[::-1]
        if step == "best":
            return self._best(steps)
        if str(step) not in map(str, steps):
            raise UserError(
                f"{self.directory} holds no checkpoint of step {short(step)} (there are: {_listing(steps)})."
            )
        return [int(step)]

    def _best(self, steps: list[int]) -> list[int]:
        losses = {}
        for step in steps:
            folder = self.directory / str(step)
            try:
                if reason := integrity.unsound(folder, "metrics/"):
                    self.damaged[step] = reason
                elif (loss := validation_loss(folder)) is not None:
                    losses[step] = loss
            except OSError:
                if folder.exists():
                    raise
        if not losses:
            raise UserError(
                f"{self.directory} holds no checkpoint with a validation loss; name a step ({_listing(steps)})."
            )
        return sorted(losses, key=lambda step: (losses[step], -step))

    def verify(self, step: int) -> None:
        """Raises Damaged if a file of the checkpoint is not what was written. All processes must call it."""
        if step in self._sound:
            return
        folder = self.directory / str(step)
        try:
            reason = integrity.unsound(folder)
            sealed = integrity.is_sealed(folder)
        except OSError as error:
            raise self.unsound(step, first_line(error)) from error
        if reason:
            raise self.unsound(step, reason)
        if not sealed and folder.exists():
            _say(f"checkpoint {folder} has no digests (an earlier engrax saved it), so it was not verified")
        self._sound.add(step)

    def unsound(self, step: int, reason: str) -> Damaged:
        """The error that says what is wrong with a checkpoint."""
        if not (self.directory / str(step)).exists():
            reason = "it is gone: the training has removed it"
        others = [s for s in self.steps() if s != step]
        remedy = f"choose another step ({_listing(others)})" if others else "there is no other one"
        error = Damaged(f"checkpoint {self.directory / str(step)} is damaged ({reason}); {remedy}.")
        error.reason = reason
        return error

    def put_aside(self) -> None:
        """Renames the damaged checkpoints: nothing reads them any more, and nothing is lost. For the writer alone."""
        for step, reason in self.damaged.items():
            target = self.directory / f"{step}.damaged"
            while target.exists():
                target = target.parent / f"{target.name}+"
            print(f"checkpoint {self.directory / str(step)} is damaged ({reason}); it is now {target}", file=sys.stderr)
            (self.directory / str(step)).rename(target)

    def restore(self, like: Any, step: int) -> tuple[Any, dict]:
        """(state, data position) of a step; `like` is a tree of ShapeDtypeStructs with shardings of any mesh.

        Raises UserError naming the first parameter whose name or shape differs, Damaged for a damaged file.
        """
        import orbax.checkpoint as ocp

        wanted = _not_empty(flatten(like))
        self._check(wanted, step)
        found = self._read(ocp.StandardCheckpointHandler(), ocp.args.StandardRestore(wanted), step)
        try:
            position = read_json(self.directory / str(step) / "data" / "metadata")
        except UserError as error:
            raise self.unsound(step, first_line(error)) from error
        return unflatten(found, like), position

    def restore_params(self, like: Any, step: int) -> Any:
        """The parameters alone."""
        return self.restore_parts({"params": like}, step)["params"]

    def restore_parts(self, like: dict[str, Any], step: int) -> dict[str, Any]:
        """Parts of the state alone: {"params": ..., "opt_state": ...} for example."""
        import orbax.checkpoint as ocp

        wanted = flatten(like)
        self._check(wanted, step)
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        args = ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=True)
        return unflatten(self._read(ocp.PyTreeCheckpointHandler(), args, step), like)

    def _read(self, handler: Any, args: Any, step: int) -> Any:
        with _quiet():
            try:
                return self._restored(handler, args, step)
            except Exception as error:  # of many types, by what is damaged
                reason = first_line(error)
            del handler, args
            gc.collect()  # collects interrupted reads while their messages are silenced
        raise self.unsound(step, reason)

    def _restored(self, handler: Any, args: Any, step: int) -> Any:
        import orbax.checkpoint as ocp

        with ocp.Checkpointer(handler) as checkpointer:
            return checkpointer.restore(self.directory / str(step) / "state", args=args)

    def _check(self, wanted: dict[str, Any], step: int) -> None:
        """Raises UserError if the checkpoint is damaged, or an array is missing, has another shape or type, or has
        chunks larger than itself."""
        self.verify(step)
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
                raise self.unsound(step, f"{name} has the shape {list(shape)} and chunks of {short(chunks)}")

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
            raise self.unsound(step, f"no readable metadata: {first_line(error)}") from error

    def delete_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps. What is read after this is verified again."""
        self._saver.wait()
        self._sound.clear()
        if jax.process_index() == 0:
            for later in [s for s in self.steps() if s > step]:
                self._saver.remove(later)

    def wait(self, *, last: bool = True) -> None:
        """Blocks until the save in progress is complete. Raises UserError if it failed.

        `last`: no save follows, so a full disk is an error too; else `when_full` decides.
        """
        self._saver.wait(last=last)

    def close(self) -> None:
        """Waits, then releases the threads."""
        if self._saver is not None:
            self._saver.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps tracebacks off stderr for reads that another read's failure interrupted. The failure itself is raised."""
    tasks = logging.getLogger("asyncio")
    old = sys.excepthook, sys.unraisablehook, tasks.disabled
    sys.excepthook, sys.unraisablehook, tasks.disabled = (lambda *_: None), (lambda _: None), True
    try:
        yield
    finally:
        sys.excepthook, sys.unraisablehook, tasks.disabled = old


@functools.cache
def _say(sentence: str) -> None:
    """Prints a sentence once, in one process."""
    if jax.process_index() == 0:
        print(sentence, file=sys.stderr)


def _listing(steps: list[int]) -> str:
    return ", ".join(map(str, steps))
