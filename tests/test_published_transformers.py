"""Published models in the libraries themselves, run by a Python of its own: transformers, and flash-linear-attention.

Skipped unless ENGRAX_TRANSFORMERS_PYTHON names an interpreter that has torch and transformers (and fla for its tests):

    ENGRAX_TRANSFORMERS_PYTHON=/path/to/bin/python python -m pytest tests/test_published_transformers.py
"""

import json
import os
import subprocess

import numpy as np
import pytest

from engrax.models import imported
from engrax.models.generate import sample
from engrax.models.imported import publish
from engrax.models.published import FORMATS
from engrax.tests.published_models import CONFIGS, TOKENS, build, logits

PYTHON = os.environ.get("ENGRAX_TRANSFORMERS_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="ENGRAX_TRANSFORMERS_PYTHON names no Python with transformers")
OF_FLA = [name for name, (form, _) in CONFIGS.items() if FORMATS[form].library == "fla"]
OTHERS = [name for name in CONFIGS if name not in OF_FLA]
STEPS = {"transformers": 64, "fla": 6}  # FLA runs in Triton's interpreter

TRANSFORMERS = """
sys.modules["fla"] = None  # else transformers takes its kernels, which need a GPU
def greedy(model, tokens, steps):
    options = dict(do_sample=False, eos_token_id=None, pad_token_id=0, attention_mask=torch.ones_like(tokens))
    return model.generate(tokens, max_new_tokens=steps, **options)[:, tokens.shape[1] :]
"""
# FLA on a CPU: Triton's interpreter, and a driver for what asks for a device; torch in the place of flash-attn and of a
# sort that may swap equal keys.
FLA = """
os.environ["TRITON_INTERPRET"] = "1"
import fla, torch, triton
class Driver:
    def get_current_target(self): return triton.backends.compiler.GPUTarget("cuda", 80, 32)
    def get_active_torch_device(self): return torch.device("cpu")
    def get_device_interface(self): return torch.cpu
    def get_current_device(self): return 0
    def get_current_stream(self, device=None): return 0
    def get_benchmarker(self): return lambda call, *args, **kwargs: (call(), [0.0, 0.0, 0.0])[1]
triton.runtime.driver.set_active(Driver())
import fla.layers.attn as attn
def flash(q, k, v, causal=True, window_size=(-1, -1), **_):
    T, S = q.shape[1], k.shape[1]
    k, v = (y.repeat_interleave(q.shape[2] // y.shape[2], dim=2) for y in (k, v))
    age = torch.arange(S - T, S)[:, None] - torch.arange(S)[None]
    seen = (age >= 0) & ((age <= window_size[0]) if window_size[0] >= 0 else True)
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2)
attn.flash_attn_func = flash
argsort = torch.Tensor.argsort
torch.Tensor.argsort = lambda self, dim=-1, descending=False, stable=False: argsort(
    self, dim=dim, descending=descending, stable=True)
def greedy(model, tokens, steps):  # `generate` gives a mask, for which FLA's attention asks for more of flash-attn
    new, cache = [], None
    for _ in range(steps):
        out = model(new[-1] if new else tokens, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        new.append(out.logits[:, -1:].argmax(-1))
    return torch.cat(new, dim=1)
"""
PEER = """
import json, os, sys
from pathlib import Path
ENVIRONMENT
import numpy as np, torch, transformers
task = json.loads(sys.argv[1])
tokens, found = torch.tensor(task["tokens"]), {}
for name in task["names"]:
    folder = Path(task["root"]) / name
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    wrong = {key: str(value) for key, value in info.items() if value}
    assert not wrong and type(model).__name__ == task["names"][name], (name, type(model).__name__, wrong)
    with torch.no_grad():
        found[f"{name} logits"] = model.eval()(tokens).logits.numpy()
        found[f"{name} greedy"] = greedy(model, tokens, task["steps"]).numpy()
    model.save_pretrained(Path(task["root"]) / "saved" / name)
np.savez(task["output"], **found)
"""


def run_peer(library, root, names, steps):
    """{"NAME logits": [B, T, V], "NAME greedy": [B, steps]} of the library's models in root/NAME, which it also saves
    in root/saved/NAME."""
    classes = {name: FORMATS[form].architecture for name, form in names.items()}
    task = {"root": str(root), "names": classes, "tokens": TOKENS.tolist(), "steps": steps}
    task["output"] = str(root / f"{library}.npz")
    code = PEER.replace("ENVIRONMENT", {"transformers": TRANSFORMERS, "fla": FLA}[library])
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([PYTHON, "-c", code, json.dumps(task)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(task["output"]))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(folder of all models, the modules)."""
    root, modules = tmp_path_factory.mktemp("published"), {}
    for name, (form, config) in CONFIGS.items():
        modules[name] = build(config)
        publish.publish(modules[name], root / name, FORMATS[form])
    return root, modules


def agrees(written, library, names):
    root, modules = written
    steps = STEPS[library]
    found = run_peer(library, root, {name: CONFIGS[name][0] for name in names}, steps)
    for name in names:
        ours = logits(modules[name])
        scale = 1e-4 * np.abs(ours).max()
        np.testing.assert_allclose(found[f"{name} logits"], ours, rtol=0, atol=scale, err_msg=name)
        new = np.asarray(sample(modules[name], TOKENS, tokens=steps, temperature=0.0))
        np.testing.assert_array_equal(found[f"{name} greedy"], new, err_msg=name)
        if name != "qwen3_5_plain":  # its gate has parameters there
            back = imported.load(root / "saved" / name, CONFIGS[name][1])
            np.testing.assert_array_equal(logits(back), ours, err_msg=name)


@pytest.mark.long
def test_transformers_computes_the_same(written):
    """Nothing missing or unexpected in its report, equal logits, equal greedy tokens with its cache; and what it saves
    comes back."""
    agrees(written, "transformers", OTHERS)


@pytest.mark.long
@pytest.mark.parametrize("name", OF_FLA)
def test_flash_linear_attention_computes_the_same(written, name):
    probe = subprocess.run([PYTHON, "-c", "import fla"], capture_output=True)
    if probe.returncode:
        pytest.skip("ENGRAX_TRANSFORMERS_PYTHON has no fla")
    agrees(written, "fla", [name])
