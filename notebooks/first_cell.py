"""Writes the badge and the first code cell of every notebook: python notebooks/first_cell.py

The first cell installs engrax where it is missing: from the checkout around the notebook, else from the repository, so
that a notebook opened alone in Colab runs. `ENGRAX_REPOSITORY` names another address or a folder.
"""

import json
from pathlib import Path

REPOSITORY = "https://github.com/engrax/engrax"  # the one place where the notebooks' address is written
FOLDER = Path(__file__).resolve().parent
BADGE = "[![Open In Colab](https://colab.research.google.com/assets/colab-badge.svg)]({})"

FIRST_CELL = """\
# Install engrax where it is missing: from the checkout around this notebook, else from the repository.
import importlib.util
import os
import pathlib
import shutil
import site
import subprocess
import sys

if importlib.util.find_spec("engrax") is None:
    here = pathlib.Path.cwd()
    around = [p for p in (here, *here.parents) if (p / "setup.py").exists() and (p / "layers").is_dir()]
    source = os.environ.get("ENGRAX_REPOSITORY") or next(map(str, around), "REPOSITORY")
    extra = "[cuda12]" if shutil.which("nvidia-smi") else ""
    wanted = [f"engrax{extra} @ git+{source}"] if "://" in source else ["-e", f"{source}{extra}"]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", *wanted], check=True)
    importlib.reload(site)  # an editable install is seen from the next import on

import jax

import engrax

print(f"engrax {engrax.__version__}, jax {jax.__version__}, backend {jax.default_backend()}: {jax.devices()}")
if jax.default_backend() == "cpu":
    print("No accelerator: the cells below take a few minutes. In Colab: Runtime, Change runtime type, T4 GPU.")
""".replace('"REPOSITORY"', f'"{REPOSITORY}"')


def with_first_cell(name: str, notebook: dict) -> dict:
    """The notebook with the badge in its first cell, a text, and with the first code cell as it is above."""
    text, code = notebook["cells"][:2]
    lines = "".join(text["source"]).splitlines()
    if lines[0].startswith("[!["):
        lines = lines[2:]
    owner = REPOSITORY.removeprefix("https://github.com/")
    badge = BADGE.format(f"https://colab.research.google.com/github/{owner}/blob/main/notebooks/{name}")
    text["source"] = "\n".join([badge, "", *lines]).splitlines(keepends=True)
    code["source"] = FIRST_CELL.rstrip().splitlines(keepends=True)
    return notebook


def main() -> None:
    """Writes all notebooks."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook = with_first_cell(path.name, json.loads(path.read_text()))
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
