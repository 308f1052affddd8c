"""Every notebook runs from top to bottom: in its short setting, ENGRAX_FAST=1, and as users run it.

The short setting takes at most 60 s on two cores; the limit here is thrice that, for machines that others use too.
"""

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

import pytest

from engrax import plugins

EXPECTED = {  # notebook: (what it prints, how many plots it draws, what it leaves beside itself)
    "01_quickstart": (["backend cpu", "one pass and two pieces differ"], 1, ["run/evals"]),
    "02_your_own_memory": (
        ["backend cpu", "causality", "stability", "all laws hold", "linear_attention", "my_memory"],
        1,
        ["my_memory.py", "runs/notebook_frontier/frontier.html"],
    ),
    "05_hmt_long_documents": (
        [
            "backend cpu",
            "one pass and two pieces differ",
            "segment 0: 0.0 with bptt_segments 1",
            "mean weight at odd ages",
        ],
        3,
        [],
    ),
    "03_titans": (["backend cpu", "the anomaly surprises", "unseen keys at the end", "lact", "titans_mal"], 5, []),
    "04_mixture_of_memories": (
        ["backend cpu", "memories that were not chosen moved by 0.0", "balance weight 0.01", "mixture of 16, top-2"],
        4,
        [],
    ),
    "06_hopfield": (
        ["backend cpu", "largest rise of the energy", "patterns that hold 90 %", "digits"],
        3 + (importlib.util.find_spec("sklearn") is not None),
        [],
    ),
}
NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "fast, limit",
    [
        pytest.param(True, 180, marks=pytest.mark.deep, id="fast"),
        pytest.param(False, 3600, marks=pytest.mark.long, id="full"),
    ],
)
def test_notebook_runs(path, fast, limit, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.delenv("ENGRAX_NOTEBOOK_STEPS", raising=False)
    monkeypatch.setenv("ENGRAX_FAST", "1" if fast else "0")
    if not fast:  # in optimised programs
        monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("ENGRAX_NOTEBOOK_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    # The kernel that runs the tests, not one that happens to be registered on the machine.
    spec = tmp_path / "kernels" / "engrax-tests"
    spec.mkdir(parents=True)
    (spec / "kernel.json").write_text(
        json.dumps(
            {
                "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
                "display_name": "engrax-tests",
                "language": "python",
            }
        )
    )
    monkeypatch.setenv("JUPYTER_PATH", f"{tmp_path}{os.pathsep}{os.environ.get('JUPYTER_PATH', '')}")
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit notebooks without outputs"
    client = NotebookClient(
        notebook, timeout=limit, kernel_name="engrax-tests", resources={"metadata": {"path": str(tmp_path)}}
    )
    start = time.monotonic()
    client.execute()
    assert time.monotonic() - start < limit, f"{path.name} takes {time.monotonic() - start:.0f} s"
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    prints, plots, left = EXPECTED[path.stem]
    assert [text for text in prints if text not in printed] == []
    assert sum("image/png" in output.get("data", {}) for output in outputs) == plots
    assert all((tmp_path / name).exists() for name in left)


def test_the_first_cells_are_up_to_date():
    """`python notebooks/first_cell.py` changes nothing."""
    first_cell = plugins.load(NOTEBOOKS[0].parent / "first_cell.py")
    for path in NOTEBOOKS:
        notebook = json.loads(path.read_text())
        assert first_cell.with_first_cell(path.name, json.loads(path.read_text())) == notebook, path.name
        assert first_cell.REPOSITORY in "".join(notebook["cells"][1]["source"])


@pytest.mark.deep
def test_the_first_cell_installs_engrax_in_an_empty_folder(tmp_path):
    """Given the repository as a path; the packages that engrax needs are there, engrax itself is not."""
    venv.create(tmp_path / "env")
    (packages,) = (tmp_path / "env").glob("lib/*/site-packages")
    (packages / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")  # without engrax's own .pth file
    python, empty = tmp_path / "env" / "bin" / "python", tmp_path / "empty"
    empty.mkdir()
    pip = {"PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0"}  # "0": no isolation, as pip reads it
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= pip | {"ENGRAX_REPOSITORY": str(NOTEBOOKS[0].parents[1]), "JAX_PLATFORMS": "cpu"}
    missing = subprocess.run([python, "-c", "import engrax"], cwd=empty, env=environment, capture_output=True)
    assert b"No module named 'engrax'" in missing.stderr
    cell = "".join(json.loads(NOTEBOOKS[0].read_text())["cells"][1]["source"])
    ran = subprocess.run([python, "-c", cell], cwd=empty, env=environment, capture_output=True, text=True)
    assert "backend cpu" in ran.stdout, ran.stderr
