"""Resuming from the newest sound checkpoint of a run folder."""

import dataclasses
from typing import Any

from etils import epath

from engrax.errors import UserError
from engrax.files import short
from engrax.train.checkpoint import Checkpoints, first_line

_SAVED = {
    "position",
    "data_digest",
}  # the keys of what is saved; before there were digests, the position alone was saved


@dataclasses.dataclass(frozen=True)
class Earlier:
    """The checkpoints that a run folder has before training; `step` is the newest sound one's, 0 without any."""

    checkpoints: Checkpoints
    step: int
    steps: list[int]  # of all checkpoints, damaged ones included

    def restore(self, like: Any, data: Any, digest: str | None) -> tuple[Any, int]:
        """(state, step) of the newest sound checkpoint. Moves the data to its position.

        `like` is the state as ShapeDtypeStructs, `digest` the data's. Raises UserError if no checkpoint is sound, or if
        it belongs to other data.
        """
        return self.checkpoints.read(None, lambda step: restore(self.checkpoints, like, data, digest, step), tell=False)


def restore(checkpoints: Checkpoints, like: Any, data: Any, digest: str | None, step: int) -> Any:
    """The state of a checkpoint. Moves the data to its position.

    Raises Damaged if it is not sound, UserError if it belongs to other data.
    """
    state, saved = checkpoints.restore(like, step)
    saved = saved if saved.keys() == _SAVED else {"position": saved, "data_digest": None}
    if None not in (digest, saved["data_digest"]) and saved["data_digest"] != digest:
        raise UserError(
            f"checkpoint {step} in {checkpoints.directory} was saved with other data; restore them, or train into "
            "another --run-dir."
        )
    try:
        _refuse_senseless(saved["position"])
        data.set_state(saved["position"])
    except Exception as error:  # of many types, by the data set
        told = f"its position in the data makes no sense: {first_line(error)}"
        raise checkpoints.unsound(step, told) from error
    return state


def find(run_dir: epath.Path) -> Earlier:
    """Verifies the checkpoints of a run folder, the newest first, until one is sound. Changes nothing.

    Raises UserError if there are checkpoints and none is sound.
    """
    checkpoints = Checkpoints(run_dir)
    steps = checkpoints.steps()
    step = checkpoints.read(None, lambda step: None, tell=False)[1] if steps else 0
    return Earlier(checkpoints, step, steps)


def position(data: Any, digest: str | None) -> dict[str, Any]:
    """What is saved of the data: the position, and the digest of the data that it is a position in."""
    return {"position": data.get_state(), "data_digest": digest}


def _refuse_senseless(position: Any) -> None:
    """Raises ValueError if a number in a data position is not a valid count."""
    if isinstance(position, (dict, list)):
        for part in position.values() if isinstance(position, dict) else position:
            _refuse_senseless(part)
    elif isinstance(position, (int, float)) and not 0 <= position < 1 << 53:
        raise ValueError(f"{short(position)} is no position")
