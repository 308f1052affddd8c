"""What a training tells of its speed: profiler traces, the share of the peak, the memory of a device."""

import types

import jax
import pytest
from etils import epath

from engrax.errors import UserError
from engrax.models.model import ModelConfig
from engrax.tests.experiments import tiny
from engrax.train import LogConfig
from engrax.train.profile import Speed, Trace


@pytest.mark.parametrize(
    "profile, start, stop, traced",
    [
        ("3:2", 1, 9, [("begin", 3), ("end", 4)]),
        ("3:2", 4, 9, [("begin", 4), ("end", 4)]),  # a run that continues inside
        ("3:5", 1, 5, [("begin", 3), ("end", None)]),  # one that ends inside
        ("3:2", 5, 9, []),
        (None, 1, 9, []),
    ],
)
def test_the_steps_that_are_traced(profile, start, stop, traced, monkeypatch):
    told, now = [], [None]
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: told.append(("begin", now[0])))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: told.append(("end", now[0])))
    trace = Trace(tiny(log=LogConfig(profile=profile)), epath.Path("run"))
    assert str(trace.folder) == "run/profile"
    for step in range(start, stop + 1):
        now[0] = step
        trace.before(step)
        trace.after(step, {})
    now[0] = None
    trace.close()
    trace.close()
    assert told == traced


def test_a_profile_is_first_and_count():
    for profile in ("3", "0:2", "3:0", "a:b", "3:2:1"):
        with pytest.raises(UserError, match="must be FIRST:COUNT, such as 100:3"):
            LogConfig(profile=profile)


def test_speed_is_what_the_model_needs_over_what_the_devices_can(monkeypatch):
    device = types.SimpleNamespace(
        device_kind="NVIDIA H200", platform="gpu", memory_stats=lambda: {"peak_bytes_in_use": 5}
    )
    e = tiny()
    assert Speed(e, "float32")(1e6) == {}, "a CPU tells neither"
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    needed = 3 * e.model.flops_per_token(e.data.seq_len)
    for dtype, peak in (("bfloat16", 989e12), ("float32", 989e12 / 2)):
        assert Speed(e, dtype)(1e6) == {"mfu": pytest.approx(needed * 1e6 / peak / 2), "device_memory_bytes": 5}
    device.device_kind = "unknown"
    assert Speed(e, "bfloat16")(1e6) == {"device_memory_bytes": 5}
    device.device_kind = "NVIDIA H200"
    monkeypatch.setattr(type(e.model), "flops_per_token", ModelConfig.flops_per_token)
    assert Speed(e, "bfloat16")(1e6) == {"device_memory_bytes": 5}, "the model does not declare its FLOPs"
