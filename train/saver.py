"""Saving checkpoints through Orbax: in the background, complete or not at all.

A save fills a temporary folder, seals it (`integrity`), renames it to its step and removes the checkpoints that are not
kept any more. The loop waits only while arrays are copied to the host. A state with a NaN is never renamed.
"""

import asyncio
import concurrent.futures
import contextlib
import math
import sys

import jax
import jax.numpy as jnp
from etils import epath

from engrax.errors import Diverged, UserError
from engrax.files import is_full, read_json, short
from engrax.train import integrity
from engrax.train.experiment import CheckpointConfig

TEMPORARY = ".orbax-checkpoint-tmp"  # in the names of folders that are incomplete or about to be removed


def steps_in(directory: epath.Path) -> list[int]:
    """The steps of the complete checkpoints in a folder, ascending."""
    if not directory.exists():
        return []
    names = (entry.name for entry in directory.iterdir())
    found = [int(name) for name in names if name.isascii() and name.isdigit() and str(int(name)) == name]
    if "://" in str(directory):  # a bucket cannot rename: a file completes the save
        found = [step for step in found if (directory / str(step) / "commit_success.txt").exists()]
    return sorted(step for step in found if (directory / str(step)).is_dir())


def validation_loss(folder: epath.Path) -> float | None:
    """The validation loss of a checkpoint, infinite if it was not finite; None without one. Raises UserError."""
    if not (folder / "metrics").exists():
        return None
    loss = read_json(folder / "metrics" / "metrics").get("validation_loss")
    if not isinstance(loss, float):
        raise UserError(f"the validation loss of {folder} is {short(loss)}, not a number; restore its metrics.")
    return loss if math.isfinite(loss) else math.inf


class Saver:
    """Writes the checkpoints of one run; `config` says how many are kept and what a full disk does."""

    def __init__(self, directory: epath.Path, config: CheckpointConfig):
        self.directory, self.config = directory, config
        self._step = 0
        self._refused: Exception | None = None  # what stopped the last save before its thread began
        self._nan: concurrent.futures.Future = concurrent.futures.Future()  # {array of the state to save: has a NaN}
        if jax.process_index() == 0:
            directory.mkdir(parents=True, exist_ok=True)
            self._remove_incomplete()
        self._open()

    def _open(self) -> None:
        import orbax.checkpoint as ocp
        from absl import logging

        logging.set_verbosity(logging.FATAL)  # Orbax prints tracebacks of errors that it also raises
        self._ocp = ocp
        items = ocp.CompositeCheckpointHandler(
            state=ocp.StandardCheckpointHandler(),
            data=ocp.JsonCheckpointHandler(),
            metrics=ocp.JsonCheckpointHandler(filename="metrics"),
        )
        self._checkpointer = ocp.AsyncCheckpointer(items, temporary_path_class=self._temporary_folder())

    def _temporary_folder(self) -> type:
        """Orbax's temporary folder, sealed before it takes its final name."""
        saver, bucket = self, "://" in str(self.directory)
        kinds = self._ocp.path.atomicity

        class Sealed(kinds.CommitFileTemporaryPath if bucket else kinds.AtomicRenameTemporaryPath):
            async def finalize(self):  # in process 0, in a thread, after all processes have written
                await asyncio.to_thread(saver._refuse_nan)
                if bucket:
                    await asyncio.to_thread(integrity.seal, self.get(), without=integrity.WRITTEN_LAST)
                    await super().finalize()
                else:
                    final, self._final_path = self._final_path, self.get().parent / f"{self.get().name}-complete"
                    await super().finalize()  # adds its last files and renames to `_final_path`
                    await asyncio.to_thread(integrity.seal, self._final_path)
                    self._final_path.rename(final)
                    self._final_path = final
                await asyncio.to_thread(saver._remove_old)

        return Sealed

    def save(self, step: int, arrays: dict[str, jax.Array], data_state: dict, metrics: dict | None) -> None:
        """Starts a save, after the one before has ended. Raises what stopped that one, except a full disk."""
        self._finish(last=False)
        self._step, self._nan = step, concurrent.futures.Future()
        floats = {name: array for name, array in arrays.items() if jnp.issubdtype(array.dtype, jnp.inexact)}
        if jax.process_count() > 1:  # all refuse together; a single process looks while it writes
            self._nan.set_result(_find_nan(floats))
            self._refuse_nan()
        args = self._ocp.args
        items = {"state": args.StandardSave(arrays), "data": args.JsonSave(data_state)}
        items |= {"metrics": args.JsonSave(metrics)} if metrics else {}
        try:
            self._checkpointer.save(
                self.directory / str(step), args=args.Composite(**items), custom_metadata=integrity.DUE, force=True
            )
            if not self._nan.done():
                self._nan.set_result(_find_nan(floats))
        except Exception as error:  # of many types; reported like an error of the thread, by the next save or wait
            self._refused = error
        finally:
            self._nan.cancel()  # no effect on a result; after Ctrl-C the thread does not wait for one

    def wait(self, *, last: bool = True) -> None:
        """Blocks until the save in progress is complete. Raises UserError if it failed, for a full disk if `last`."""
        self._finish(last=last)

    def close(self) -> None:
        """Waits and releases the threads. A failure is printed, because another error may be on its way."""
        try:
            self._finish(last=True)
        except UserError as error:
            print(f"engrax: {error}", file=sys.stderr)
        self._checkpointer.close()

    def _finish(self, *, last: bool) -> None:
        refused, self._refused = self._refused, None
        try:
            self._checkpointer.wait_until_finished()
            if refused is not None:
                raise refused
        except Exception as error:  # of many types
            self._failed(error, last=last)

    def _failed(self, error: Exception, *, last: bool) -> None:
        """After a failed save: removes what it wrote. Goes on if the disk is full and there will be more saves."""
        if jax.process_count() == 1:
            with contextlib.suppress(OSError):
                self._remove_incomplete()
            self._open()
        if isinstance(error, UserError):
            raise error
        kept = steps_in(self.directory)
        there = f"the newest checkpoint is of step {kept[-1]}" if kept else "nothing was saved yet"
        if not is_full(error):
            raise UserError(f"step {self._step} was not saved ({first_line(error)}); {there}.") from error
        sentence = f"the disk is full: step {self._step} was not saved in {self.directory}; {there}"
        if last or self.config.when_full == "stop" or jax.process_count() > 1:
            raise UserError(f"{sentence}; make room, then train again to continue from there.") from error
        print(f"{sentence}; the run continues and saves when there is room", file=sys.stderr)

    def _refuse_nan(self) -> None:
        """Raises Diverged if an array of the state to save has a NaN."""
        bad = sorted(name for name, found in jax.device_get(self._nan.result()).items() if found)
        if bad:
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            raise Diverged(
                f"the state after step {self._step} has a NaN in {bad[0]}{more}, so it was not saved; train again to "
                "continue from the last checkpoint, or in another --run-dir with a lower --optimizer.learning-rate."
            )

    def _remove_old(self) -> None:
        """Removes the checkpoints that are neither among the newest nor among the best."""
        steps, losses, kept = steps_in(self.directory), {}, set()
        for step in steps:
            folder = self.directory / str(step)
            try:
                if integrity.unsound(folder, "metrics/", alone=True):
                    kept.add(step)
                elif (loss := validation_loss(folder)) is not None:
                    losses[step] = loss
            except (UserError, OSError):
                kept.add(step)  # what cannot be judged is kept
        kept |= set(steps[-self.config.keep_last :])
        kept |= set(sorted(losses, key=lambda step: (losses[step], -step))[: self.config.keep_best])
        for step in set(steps) - kept:
            self.remove(step)

    def remove(self, step: int) -> None:
        """Removes a checkpoint. A reader sees all of it or nothing."""
        folder = self.directory / str(step)
        if "://" not in str(folder):
            folder = folder.rename(folder.parent / f"{step}{TEMPORARY}-removed")
        folder.rmtree()

    def _remove_incomplete(self) -> None:
        for folder in self.directory.iterdir():
            if TEMPORARY in folder.name and folder.is_dir():
                folder.rmtree()


@jax.jit
def _find_nan(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    # A sum of magnitudes is NaN only if an element is (infinities stay infinite), and is faster than a search. A
    # maximum over several devices may lose a NaN. Types of 8 bits have no infinity: their sum would overflow to NaN.
    return {name: jnp.isnan(jnp.sum(jnp.abs(array), dtype=_wide(array.dtype))) for name, array in arrays.items()}


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    return dtype if dtype.itemsize >= 4 else jnp.dtype(jnp.float32)


def first_line(error: BaseException) -> str:
    """An error's message, cut to part of a line."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
