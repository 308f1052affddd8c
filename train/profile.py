"""What a training tells of its speed: the share of the devices' peak, their memory, and profiler traces."""

from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from engrax.pallas_kernels.bench.bench import FLOAT32_SHARE, PEAKS
from engrax.train.experiment import Experiment


class Trace:
    """A profiler trace of the steps that `--log.profile FIRST:COUNT` names, written to RUN/profile."""

    def __init__(self, experiment: Experiment, run_dir: epath.Path):
        self.folder = run_dir / "profile"
        self.first, count = map(int, (experiment.log.profile or "0:0").split(":"))
        self.last = self.first + count - 1
        self.runs = False

    def before(self, step: int) -> None:
        """Begins the trace before its first step, or before a later one if the training starts there."""
        if not self.runs and self.first <= step <= self.last:
            jax.profiler.start_trace(str(self.folder))
            self.runs = True

    def after(self, step: int, values: Any) -> None:
        """Ends it when its last step is done."""
        if self.runs and step >= self.last:
            jax.block_until_ready(values)
            self.close()

    def close(self) -> None:
        """Ends a trace whose training stops in it."""
        if self.runs:
            jax.profiler.stop_trace()
            self.runs = False


class Speed:
    """How well a training uses its devices."""

    def __init__(self, experiment: Experiment, dtype: Any):
        self.device, self.devices = jax.local_devices()[0], jax.device_count()
        self.needed, self.peak = _training_flops(experiment), _peak(self.device.device_kind, jnp.dtype(dtype).itemsize)

    def __call__(self, tokens_per_second: float) -> dict[str, float]:
        """{"mfu": needed FLOPs per second, without recomputation, over the peak of all devices, "device_memory_bytes":
        the most that this process's first device has held}, without what device or model do not tell."""
        found, held = {}, (self.device.memory_stats() or {}).get("peak_bytes_in_use")
        if self.needed is not None and self.peak is not None:
            found["mfu"] = self.needed * tokens_per_second / (self.peak * self.devices)
        return found if held is None else found | {"device_memory_bytes": held}


def _training_flops(experiment: Experiment) -> float | None:
    """FLOPs per token, forward and backward; None if the model does not declare them."""
    try:
        return 3 * float(experiment.model.flops_per_token(experiment.data.seq_len))
    except NotImplementedError:
        return None


def _peak(kind: str, itemsize: int) -> float | None:
    """Operations per second of a kind of device; None if they are not known."""
    if kind not in PEAKS:
        return None
    return PEAKS[kind][0] * (1.0 if itemsize <= 2 else FLOAT32_SHARE["tpu" if kind.startswith("TPU") else "gpu"])
