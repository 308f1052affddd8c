"""Every notebook runs from top to bottom: in its short setting, ENGRAX_FAST=1, and as users run it.

The short setting takes at most 60 s on two cores; the limit here is thrice that, for machines that others use too.
"""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import pytest

EXPECTED = {  # notebook: (what it prints, how many plots it draws, what it leaves beside itself)
    "01_quickstart": (["backend cpu", "one pass and two pieces differ"], 1, ["run/evals"]),
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
