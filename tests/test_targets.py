"""What README says the shipped configs reach, run as a user runs them: minutes each, so not in `make test`."""

import json

import pytest

CODE = """
import json, sys
import engrax
engrax.train(sys.argv[1], "run", progress=False)
print(json.dumps(engrax.evaluate("run", progress=False).data["evaluations"]))
"""


@pytest.fixture
def reached(run_python):
    """Returns `reached(config)`: the results of a run, in a process with optimised machine code as users have it."""

    def run(config):
        flags = "--xla_force_host_platform_device_count=1"
        out = run_python(CODE, devices=1, args=[config], env={"XLA_FLAGS": flags}, timeout=1200)
        return json.loads(out.splitlines()[-1])

    return run


@pytest.mark.parametrize(
    "config",
    [pytest.param("mqar_titans", marks=pytest.mark.deep), pytest.param("mqar_attention", marks=pytest.mark.long)],
)
def test_mqar_is_learned(config, reached):
    """64 tokens, 4 pairs, vocabulary 128: at least 95 % recalled."""
    assert reached(config)["validation"]["accuracy"]["value"] >= 0.95


@pytest.mark.long
def test_quickstart_learns_with_its_memory(reached):
    """Fewer bits per byte than the order-3 n-gram counted on the same bytes; at least 0.05 more without the memory."""
    data = reached("quickstart")
    order_3 = next(found["value"] for found in data["baselines"]["orders"] if found["order"] == 3)
    assert data["validation"]["bits_per_byte"]["value"] < order_3
    muted = data["memory_ablation"]
    assert muted and all(found["difference"]["value"] >= 0.05 for found in muted.values()), muted


DEEP = """
import json
import engrax
from engrax.configs import quickstart
from engrax.layers import TitansConfig
from engrax.train import metrics

experiment = quickstart.config()
fields = {
    "model__dim": 64, "model__mixers": (TitansConfig(depth=4),), "model__repeat": 4, "data__seq_len": 128,
    "steps": 2000, "batch_size": 4, "compute_dtype": "bfloat16", "log__every": 1, "eval__every": 0,
}
engrax.train(experiment, "run", progress=False, **fields)
from pathlib import Path
print(json.dumps([row["loss"] for row in metrics.read(Path("run"))]))
"""


@pytest.mark.long
def test_deep_memories_train_in_bfloat16(run_python):
    """4 layers, memories of depth 4 at their default settings, 2,000 steps: no loss that is not a number, and learning
    (users of other implementations report NaN here)."""
    losses = json.loads(run_python(DEEP, devices=1, env={"XLA_FLAGS": ""}, timeout=2400).splitlines()[-1])
    assert len(losses) == 2000 and all(0 < loss < 10 for loss in losses)
    assert sum(losses[-100:]) < 0.6 * sum(losses[:100])
