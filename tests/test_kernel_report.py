"""`engrax describe CONFIG --device`: which implementation serves each operation of a training.

The table of every shipped config is committed: `python tests/test_kernel_report.py` writes it anew, so that a change
shows as a diff.
"""

import json
from functools import cache
from pathlib import Path

import jax
import pytest

from engrax import cli, configs
from engrax.errors import UserError
from engrax.pallas_kernels import devices
from engrax.pallas_kernels.dispatch import KERNELS_NEED_JAX
from engrax.train import kernel_report

pytestmark = pytest.mark.skipif(jax.__version_info__[:3] < KERNELS_NEED_JAX, reason="there are no kernels on this jax")
TABLE = Path(__file__).parent / "kernels_reached.json"
DEVICES = ("h200", "v5e")
OTHER = ("it needs a ", "only by its name", "there is no kernel")  # true of every call: left out of the table


@cache
def line_by_device(config):
    """{device: one line per operation: what serves it, and why kernels for the device do not}."""
    experiment, found = configs.find(config).experiment, {}
    for name in DEVICES:
        device, lines = devices.NAMED[name], []
        for row in reports(experiment, device):
            others = (f"{n}: {r}" for n, r in row.served.others.items() if not r.startswith(OTHER))
            lines.append(f"{row.call.op} {row.sizes} -> {'; '.join([row.served.by, *others])}")
        found[name] = lines
    return found


_calls = cache(kernel_report.calls)  # both devices compute in bfloat16: one trace


def reports(experiment, device):
    calls = _calls(experiment, kernel_report.compute_dtype(experiment, device))
    return [kernel_report.OperationRow(call, kernel_report.dispatch.explain(call, device)) for call in calls]


@pytest.mark.parametrize("config", configs.names())
def test_the_table_of_every_shipped_config(config):
    wanted = json.loads(TABLE.read_text())
    assert sorted(wanted) == configs.names(), "python tests/test_kernel_report.py writes the table anew"
    assert line_by_device(config) == wanted[config]


def test_the_command_prints_it_without_the_device(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("ENGRAX_CACHE", str(tmp_path))  # nothing is compiled there
    sizes = ["--batch-size", "2"]
    assert cli.main(["describe", "quickstart", "--device", "v5e", *sizes]) == 0
    costs, splits, memory, told, compiled = capsys.readouterr().out.split("\n\n")
    assert costs.startswith("parameters") and "validation" in splits
    assert memory.startswith("arguments of the step on each of 1 device") and "\ntemporaries, estimated" in memory
    assert compiled == "not compiled yet: engrax compile quickstart --batch-size 2 --device v5e\n"
    head, *lines = told.splitlines()
    assert head == "operations of the training on TPU v5 lite, bfloat16:"
    assert lines[0].startswith("neural_memory  ") and "batch=2 heads=4 blocks=8 aligned=yes segments=yes" in lines[0]
    assert [line.split(None, 1) for line in lines[1:5]] == [
        ["pallas_tpu", "serves it"],
        ["pallas_gpu", "it needs a GPU of compute capability 9.0, this is TPU v5 lite"],
        ["xla", "'pallas_tpu' comes first"],
        ["reference", "only by its name: the oracle"],
    ]
    assert cli.main(["describe", "quickstart", "--device", "cpu", *sizes]) == 0
    told = capsys.readouterr().out.split("\n\n")[3]
    assert "on cpu, float32:" in told and "tokens=float32" in told and "xla         serves it" in told


def test_a_device_that_is_not_known(capsys):
    assert cli.main(["describe", "quickstart", "--device", "h20"]) == 2
    assert capsys.readouterr().err.startswith("engrax: unknown device 'h20'; did you mean 'h200'")
    with pytest.raises(UserError, match="known: h100, h200, b200, v5e, v6e, cpu"):
        kernel_report.find_device("t4")


def test_the_report_is_what_a_program_traced_for_the_device_gets():
    """The choice made under the device itself: the names that the report gives."""
    experiment = configs.find("mqar_titans").experiment
    for name in DEVICES:
        device = devices.NAMED[name]
        with devices.use(device):
            served = [kernel_report.dispatch.choose(*row.call) for row in kernel_report.report(experiment, device)]
        names = [choice.branches[0][1].name for choice in served]
        assert names == [row.served.by for row in reports(experiment, device)] and names


if __name__ == "__main__":
    table = {config: line_by_device(config) for config in configs.names()}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
