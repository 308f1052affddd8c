"""What README says the shipped configs reach, run as a user runs them: minutes each, so `make test-all` only."""

import json

import pytest

CODE = """
import json, sys
import engrax
engrax.train(sys.argv[1], "run", progress=False)
print(json.dumps(engrax.evaluate("run", progress=False).data))
"""


@pytest.fixture
def reached(run_python):
    """Returns `reached(config)`: the results of a run, in a process with optimised machine code as users have it."""

    def run(config):
        flags = "--xla_force_host_platform_device_count=1"
        out = run_python(CODE, devices=1, args=[config], env={"XLA_FLAGS": flags}, timeout=1200)
        return json.loads(out.splitlines()[-1])

    return run


@pytest.mark.slow
@pytest.mark.parametrize("config", ["mqar_titans", "mqar_attention"])
def test_mqar_is_learned(config, reached):
    """64 tokens, 4 pairs, vocabulary 128: at least 95 % recalled."""
    assert reached(config)["validation"]["accuracy"]["value"] >= 0.95


@pytest.mark.slow
def test_quickstart_learns_with_its_memory(reached):
    """Fewer bits per byte than the order-3 n-gram counted on the same bytes; at least 0.05 more without the memory."""
    data = reached("quickstart")
    order_3 = next(found["value"] for found in data["baselines"]["orders"] if found["order"] == 3)
    assert data["validation"]["bits_per_byte"]["value"] < order_3
    assert data["ablation"]
    assert all(found["difference"]["value"] >= 0.05 for found in data["ablation"].values()), data["ablation"]
