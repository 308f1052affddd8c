"""Every damage to every file of a checkpoint, and what a restore makes of it."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath

from engrax.train import resume

KINDS = ("deleted", "emptied", "cut in half", "cut by a byte", "zeroed", *["one bit"] * 8)


def files(checkpoint: Path) -> list[Path]:
    """All files of a checkpoint, in all its folders."""
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def damages(path: Path) -> Iterator[tuple[str, Callable[[], None], Callable[[], None]]]:
    """(what, do, undo) for every damage to a file; one that leaves it as it is (an empty file, emptied) is left out."""
    whole, chance = path.read_bytes(), random.Random(path.name)
    for what in KINDS:
        changed = {
            "deleted": None,
            "emptied": b"",
            "cut in half": whole[: len(whole) // 2],
            "cut by a byte": whole[:-1],
            "zeroed": bytes(len(whole)),
            "one bit": _flipped(whole, chance),
        }[what]
        if changed != whole:
            do = path.unlink if changed is None else lambda changed=changed: path.write_bytes(changed)
            yield f"{path.name}: {what}", do, lambda: path.write_bytes(whole)


def _flipped(whole: bytes, chance: random.Random) -> bytes:
    if not whole:
        return whole
    changed = bytearray(whole)
    changed[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def restored(run_dir: Path, like: Any, data: Any) -> tuple[Any, Any, int, dict[int, str]]:
    """(state, data position, step, damaged checkpoints) of the restore that a training begins with."""
    earlier = resume.find(epath.Path(run_dir))
    state, step = earlier.restore(like, data, None)
    return jax.device_get(state), data.get_state(), step, earlier.checkpoints.damaged


def verdict(run_dir: Path, like: Any, data: Any, wanted: dict[int, tuple[Any, Any]]) -> str:
    """ "noticed" or "harmless" after a damage to step 8, "silent" if neither; `wanted`: {step: (state, position)}."""
    state, position, step, damaged = restored(run_dir, like, data)
    equal = position == wanted[step][1] and all(
        map(np.array_equal, jax.tree.leaves(state), jax.tree.leaves(wanted[step][0]))
    )
    if equal and step == 4 and list(damaged) == [8]:
        return "noticed"
    return "harmless" if equal and step == 8 and not damaged else "silent"
