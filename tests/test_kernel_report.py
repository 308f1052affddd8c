"""`engrax describe CONFIG --device`: which implementation serves each operation of a training.

Two tables of every shipped config are committed: every call in tests/kernels_reached.json, and a short one in
docs/operations.md. `python tests/test_kernel_report.py` writes them, so that a change shows as a diff.
"""

import dataclasses
import json
from functools import cache
from pathlib import Path

import jax
import pytest

from engrax import cli, configs
from engrax.errors import UserError
from engrax.layers import TitansConfig
from engrax.pallas_kernels import devices
from engrax.pallas_kernels.dispatch import KERNELS_NEED_JAX
from engrax.train import kernel_report

pytestmark = pytest.mark.skipif(jax.__version_info__[:3] < KERNELS_NEED_JAX, reason="there are no kernels on this jax")
TABLE = Path(__file__).parent / "kernels_reached.json"
DOCUMENT, BEGIN, END = TABLE.parents[1] / "docs/operations.md", "<!-- kernels reached -->", "<!-- end -->"
DEVICES = ("h200", "v5e", "v6e")
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
    assert sorted(wanted) == configs.names(), "python tests/test_kernel_report.py writes the table again"
    assert line_by_device(config) == wanted[config]


def test_the_command_prints_it_without_the_device(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("ENGRAX_CACHE", str(tmp_path))  # nothing is compiled there
    sizes = ["--batch-size", "2"]
    assert cli.main(["describe", "quickstart", "--device", "v5e", *sizes]) == 0
    costs, splits, formats, memory, told, compiled = capsys.readouterr().out.split("\n\n")
    assert costs.startswith("parameters") and "validation" in splits and "safetensors" in formats
    assert memory.startswith("arguments of the step on each of 1 device") and "\ntemporaries, estimated" in memory
    assert compiled == "not compiled yet: engrax compile quickstart --batch-size 2 --device v5e\n"
    head, *lines = told.splitlines()
    assert head == "operations of the training on TPU v5 lite, bfloat16:"
    assert lines[0].startswith("softmax_attention  batch=2 length=256 heads=4 groups=4 key=32 window=32 dtype=bfloat16")
    assert lines[1].split(None, 1) == ["splash_attention", "serves it"]
    lines = lines[[line.startswith("neural_memory  ") for line in lines].index(True) :]
    assert "batch=2 heads=4 blocks=8 aligned=yes segments=yes" in lines[0]
    assert [line.split(None, 1) for line in lines[1:5]] == [
        ["pallas_tpu", "serves it"],
        ["pallas_gpu", "it needs a GPU of compute capability 9.0, this is TPU v5 lite"],
        ["xla", "'pallas_tpu' comes first"],
        ["reference", "only by its name: the oracle"],
    ]
    assert cli.main(["describe", "quickstart", "--device", "cpu", *sizes]) == 0
    told = capsys.readouterr().out.split("\n\n")[4]
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


def short_table():
    """The lines of the table in the docs: for every config and operation that has kernels, what serves it."""
    lines = ["| config | operation | H200 | v5e | v6e |", "|---|---|---|---|---|"]
    for config in configs.names():
        cells = {}
        for device in DEVICES:
            for row in reports(configs.find(config).experiment, devices.NAMED[device]):
                if any(found.platform for found in kernel_report.dispatch.implementations(row.call.op)):
                    served = cells.setdefault(row.call.op, {}).setdefault(device, {})
                    served[_short(row.served, device)] = None
        lines += [
            f"| `{config}` | `{op}` | {' | '.join('; '.join(found[device]) for device in DEVICES)} |"
            for op, found in sorted(cells.items())
        ]
        lines += [] if cells else [f"| `{config}` | none with kernels | | | |"]
    return lines


def _short(served, device):
    """The kernel's name; or for another implementation also why the device's kernels do not serve the call."""
    if served.by not in ("xla", "reference"):
        return f"`{served.by}`"
    own = [r for name, r in served.others.items() if name not in ("xla", "reference") and not r.startswith(OTHER)]
    return f"{served.by}: {'; '.join(own)}"


def test_the_short_table_in_the_docs():
    told = DOCUMENT.read_text().split(BEGIN)[1].split(END)[0].strip().splitlines()
    assert told == short_table(), "python tests/test_kernel_report.py writes the table"


def test_a_titans_memory_in_packed_rows_gets_its_gpu_kernel():
    experiment, sizes = configs.find("quickstart").experiment, ((1, 64), (2, 64), (2, 128))
    mixers = tuple(TitansConfig(heads=2, head_dim=64, hidden=n, depth=depth, chunk_size=64) for depth, n in sizes)
    model = dataclasses.replace(experiment.model, mixers=mixers, repeat=1)
    rows = reports(dataclasses.replace(experiment, model=model), devices.NAMED["h200"])
    memories = [row for row in rows if row.call.op == "neural_memory"]
    assert [row.served.by for row in memories] == ["pallas_gpu"] * 3
    assert all(row.call.shapes.segments for row in memories)


if __name__ == "__main__":
    table = {config: line_by_device(config) for config in configs.names()}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN)
    table = "\n".join([BEGIN, *short_table(), END])
    DOCUMENT.write_text(before + table + rest.split(END)[1])
