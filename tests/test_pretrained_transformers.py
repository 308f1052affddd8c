"""Imported checkpoints against the `transformers` library itself, run by a Python of its own.

Skipped unless ENGRAX_TRANSFORMERS_PYTHON names an interpreter that has torch and transformers:

    ENGRAX_TRANSFORMERS_PYTHON=/path/to/bin/python python -m pytest tests/test_pretrained_transformers.py
"""

import json
import os
import subprocess

import numpy as np
import pytest
from safetensors.numpy import load_file

from engrax.models import imported
from engrax.tests.pretrained_numpy import CONFIGS
from engrax.tests.test_pretrained import TOKENS, logits_of

PYTHON = os.environ.get("ENGRAX_TRANSFORMERS_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="ENGRAX_TRANSFORMERS_PYTHON names no Python with transformers")

PEER = """
import json, sys
from pathlib import Path
import numpy as np, torch, transformers
root, task = Path(sys.argv[1]), json.loads(sys.argv[2])
torch.manual_seed(0)
tokens, found = torch.tensor(task["tokens"]), {}
for name, fields in task["configs"].items():
    if fields is None:  # a folder that engrax wrote
        model = transformers.AutoModelForCausalLM.from_pretrained(root / name, dtype=torch.float32)
    else:
        config = transformers.AutoConfig.for_model(**fields)
        model = getattr(transformers, fields["architectures"][0])(config)
        with torch.no_grad():  # as initialised, every norm is 1 and every bias 0: nothing would be seen of them
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(root / name, max_shard_size="4KB" if name == "llama3" else "1GB")
    with torch.no_grad():
        found[name] = model.eval()(tokens).logits.numpy()
np.savez(root / task["output"], **found)
"""


def run_peer(root, configs, output):
    """{name: logits [B, T, V]} of the library's models; those with a config are made and saved in root/name."""
    task = {"tokens": TOKENS.tolist(), "configs": configs, "output": output}
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    command = [PYTHON, "-c", PEER, str(root), json.dumps(task)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(np.load(root / output))


@pytest.fixture(scope="module")
def peer(tmp_path_factory):
    """(folder of the saved models, their logits)."""
    root = tmp_path_factory.mktemp("transformers")
    return root, run_peer(root, CONFIGS, "made.npz")


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(peer, name):
    root, wanted = peer
    assert name != "llama3" or (root / name / "model.safetensors.index.json").exists()
    np.testing.assert_allclose(logits_of(imported.load(root / name), TOKENS), wanted[name], rtol=0, atol=1e-4)


def test_transformers_loads_what_engrax_exports(peer, tmp_path):
    root, wanted = peer
    for name in CONFIGS:
        imported.export(imported.load(root / name), tmp_path / name, like=root / name)
        for file in (root / name).glob("*.safetensors"):
            ours, theirs = load_file(tmp_path / name / file.name), load_file(file)
            assert {k: (v.dtype, v.tobytes()) for k, v in ours.items()} == {
                k: (v.dtype, v.tobytes()) for k, v in theirs.items()
            }
    again = run_peer(tmp_path, dict.fromkeys(CONFIGS), "again.npz")
    for name, logits in again.items():
        np.testing.assert_array_equal(logits, wanted[name])
